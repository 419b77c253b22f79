"""Which kernel serves which call of dense attention: the first of its device whose reason in `LACKS` is None.

On a GPU CUDA C++ comes first, for the plain cases in 16 bits, and Triton has everything up to heads of 256 elements. On
a CPU C++ has everything: torch's own kernel, where it covers a call, is the slower one.
"""

from typing import Any

import torch

from pykern.ops._spec import native, triton
from pykern.ops.attention_core import DenseCall

LARGEST_HEAD = 256  # of the GPU kernels: of larger ones no tile fits beside its output
MOST_QUERIES = 65535 * 128  # of the CUDA kernels: tiles are counted in a grid's second dimension


def cuda_lacks(*args: Any) -> str | None:
    call = DenseCall(*args)
    if call.query.dtype not in (torch.float16, torch.bfloat16):
        return f"computes fp16 and bf16, not {call.query.dtype}"
    if call.attn_mask is not None:
        return "the CUDA kernel has no attn_mask"
    if call.dropout_p > 0:
        return "the CUDA kernel has no dropout"
    size, value_size = call.query.shape[-1], call.value.shape[-1]
    if size % 8 or value_size % 8 or max(size, value_size) > LARGEST_HEAD:
        return f"takes heads of a multiple of 8 elements up to {LARGEST_HEAD}, not {size} and {value_size}"
    if call.query.shape[-3] > MOST_QUERIES:
        return f"takes up to {MOST_QUERIES} queries, not {call.query.shape[-3]}"
    return None


def cuda_backward_lacks(*args: Any) -> str | None:
    call = DenseCall(*args)
    for name, given in (("ALiBi", call.alibi_slopes), ("sinks", call.sinks)):
        if given is not None:
            return f"the CUDA kernel of the backward has no {name}"
    return cuda_lacks(*args)


def triton_lacks(*args: Any) -> str | None:
    call = DenseCall(*args)
    size, value_size = call.query.shape[-1], call.value.shape[-1]
    if max(size, value_size) > LARGEST_HEAD:
        return f"takes heads of any number of elements up to {LARGEST_HEAD}, not {size} and {value_size}"
    return cpu_lacks(*args)


def cpu_lacks(*args: Any) -> str | None:
    dtype = args[0].dtype
    if dtype is torch.float32 or dtype is torch.bfloat16 or dtype is torch.float16:
        return None
    return f"computes fp32, fp16 and bf16, not {dtype}"


BACKENDS = {
    "cuda": native("cuda", "attention"),
    "triton": triton("attention", "attention"),
    "cpu": native("cpu", "attention"),
}
LACKS = {"cuda": cuda_lacks, "triton": triton_lacks, "cpu": cpu_lacks}
BACKWARD = {
    "cuda": native("cuda", "attention_backward"),
    "triton": triton("attention_backward", "attention_backward"),
    "cpu": native("cpu", "attention_backward"),
}
BACKWARD_LACKS = {
    name: lambda dout, dlse, *args, lacks=lacks: lacks(*args[:-3])
    for name, lacks in {**LACKS, "cuda": cuda_backward_lacks}.items()
}

"""Which kernel serves which call of dense attention: the first of `BACKENDS` whose entry in `LACKS` returns None."""

from typing import Any

import torch

from pykern.ops._spec import native, triton  # noqa: F401
from pykern.ops.attention_core import DenseCall
from pykern.ops.attention_torch import flash, flash_backward, flash_lacks

LARGEST_HEAD = 256  # of the GPU kernels: a larger one leaves no room for a tile beside it


def cuda_lacks(*args: Any) -> str | None:
    """Why the CUDA C++ kernels, which are for the plain cases in 16 bits, cannot serve the forward."""
    call = DenseCall(*args)
    if call.query.dtype not in (torch.float16, torch.bfloat16):
        return f"computes fp16 and bf16, not {call.query.dtype}"
    for name, given in (("mask", call.attn_mask), ("ALiBi", call.alibi_slopes), ("sinks", call.sinks)):
        if given is not None:
            return f"the CUDA kernel has no {name}"
    if call.dropout_p > 0:
        return "the CUDA kernel has no dropout"
    for name, size in (("query", call.query.shape[-1]), ("value", call.value.shape[-1])):
        if size > LARGEST_HEAD or size % 8 != 0:
            return f"{name}: the CUDA kernel takes heads of a multiple of 8 elements up to {LARGEST_HEAD}, not {size}"
    return None


def triton_lacks(*args: Any) -> str | None:
    call = DenseCall(*args)
    if call.query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"computes fp32, fp16 and bf16, not {call.query.dtype}"
    largest = max(call.query.shape[-1], call.value.shape[-1])
    return (
        f"the Triton kernel takes heads of up to {LARGEST_HEAD} elements, not {largest}"
        if largest > LARGEST_HEAD
        else None
    )


def cpu_lacks(*args: Any) -> str | None:
    dtype = args[0].dtype
    if dtype is torch.float32 or dtype is torch.bfloat16 or dtype is torch.float16:
        return None
    return f"computes fp32, fp16 and bf16, not {dtype}"


LACKS = {"aten": flash_lacks}
BACKENDS = {
    "aten": flash,
}
BACKWARD_LACKS = {name: lambda dout, dlse, *args, lacks=lacks: lacks(*args[:-3]) for name, lacks in LACKS.items()}
BACKWARD = {
    "aten": flash_backward,
}

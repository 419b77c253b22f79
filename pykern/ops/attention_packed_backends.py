"""Which kernel serves which call of packed and cached attention: the first of its device whose reason is None.

As for dense attention: CUDA C++ for what it has in 16 bits, Triton for the rest on a GPU, C++ for all on a CPU.
"""

from typing import Any

import torch

from pykern.ops._backends import Kernel
from pykern.ops.attention_backends import LARGEST_HEAD, cpu_lacks
from pykern.ops.attention_core import DecodeCall, VarlenCall


def _too_large(size: int, value_size: int) -> str | None:
    if max(size, value_size) > LARGEST_HEAD:
        return f"takes heads of any number of elements up to {LARGEST_HEAD}, not {size} and {value_size}"
    return None


def _lacks_tensor_cores(dtype: torch.dtype, size: int, value_size: int) -> str | None:
    if dtype not in (torch.float16, torch.bfloat16):
        return f"computes fp16 and bf16, not {dtype}"
    if size % 8 or value_size % 8 or max(size, value_size) > LARGEST_HEAD:
        return f"takes heads of a multiple of 8 elements up to {LARGEST_HEAD}, not {size} and {value_size}"
    return None


def _varlen_cuda_lacks(*args: Any) -> str | None:
    call = VarlenCall(*args)
    if call.dropout_p > 0:
        return "the CUDA kernel has no dropout"
    return _lacks_tensor_cores(call.query.dtype, call.query.shape[-1], call.value.shape[-1])


def _varlen_cuda_backward_lacks(*args: Any) -> str | None:
    call = VarlenCall(*args)
    for name, given in (("ALiBi", call.alibi_slopes), ("sinks", call.sinks)):
        if given is not None:
            return f"the CUDA kernel of the backward has no {name}"
    return _varlen_cuda_lacks(*args)


def _varlen_triton_lacks(*args: Any) -> str | None:
    call = VarlenCall(*args)
    return _too_large(call.query.shape[-1], call.value.shape[-1]) or cpu_lacks(*args)


def _backward_lacks(lacks: Any) -> Any:
    def reason(dout: Any, dlse: Any, *args: Any) -> str | None:
        call = VarlenCall(*args[:-3])
        return "pages have no backward kernel" if call.block_table is not None else lacks(*call)

    return reason


def _decode_cuda_lacks(*args: Any) -> str | None:
    call = DecodeCall(*args)
    return _lacks_tensor_cores(call.query.dtype, call.query.shape[-1], call.value_cache.shape[-1])


def _decode_triton_lacks(*args: Any) -> str | None:
    call = DecodeCall(*args)
    return _too_large(call.query.shape[-1], call.value_cache.shape[-1]) or cpu_lacks(*args)


VARLEN: dict[str, Kernel] = {}
VARLEN_LACKS = {"cuda": _varlen_cuda_lacks, "triton": _varlen_triton_lacks, "cpu": cpu_lacks}
VARLEN_BACKWARD: dict[str, Kernel] = {}
VARLEN_BACKWARD_LACKS = {
    name: _backward_lacks(lacks) for name, lacks in {**VARLEN_LACKS, "cuda": _varlen_cuda_backward_lacks}.items()
}
DECODE: dict[str, Kernel] = {}
DECODE_LACKS = {"cuda": _decode_cuda_lacks, "triton": _decode_triton_lacks, "cpu": cpu_lacks}

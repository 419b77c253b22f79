"""Which kernel serves which call of packed and cached attention: the first of its device whose reason is None.

As for dense attention: CUDA C++ for what it has in 16 bits, Triton for the rest on a GPU, C++ for all on a CPU.
"""

from typing import Any

import torch
from torch import Tensor

from pykern.kernels.attention_calls import VarlenCall
from pykern.ops._backends import Kernel, native, triton
from pykern.ops.attention_backends import LARGEST_HEAD, MOST_QUERIES, cpu_lacks
from pykern.ops.attention_core import DecodeCall


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
    longest = min(call.max_seqlen_q, call.query.shape[0])
    if longest > MOST_QUERIES:
        return f"takes up to {MOST_QUERIES} queries a sequence, not {longest}"
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


def _unaligned(name: str, cache: Tensor) -> str | None:
    """A cache is read where it is, 16 bytes at a time; only one with gaps between a head's elements is copied."""
    strides = [stride for length, stride in zip(cache.shape[:-1], cache.stride()[:-1], strict=True) if length > 1]
    starts = [cache.element_size() * x for x in (*strides, cache.storage_offset())]
    if cache.numel() == 0 or cache.stride(-1) != 1 or not any(start % 16 for start in starts):
        return None
    place = f"strides {cache.stride()} and offset {cache.storage_offset()}"
    return f"takes a {name} whose heads begin at multiples of 16 bytes, not one of {place}"


def _decode_cuda_lacks(*args: Any) -> str | None:
    call = DecodeCall(*args)
    return (
        _lacks_tensor_cores(call.query.dtype, call.query.shape[-1], call.value_cache.shape[-1])
        or _unaligned("key_cache", call.key_cache)
        or _unaligned("value_cache", call.value_cache)
    )


def _decode_triton_lacks(*args: Any) -> str | None:
    call = DecodeCall(*args)
    return _too_large(call.query.shape[-1], call.value_cache.shape[-1]) or cpu_lacks(*args)


VARLEN: dict[str, Kernel] = {
    "cuda": native("cuda", "attention_varlen"),
    "triton": triton("attention_varlen", "attention_varlen"),
    "cpu": native("cpu", "attention_varlen"),
}
VARLEN_LACKS = {"cuda": _varlen_cuda_lacks, "triton": _varlen_triton_lacks, "cpu": cpu_lacks}
VARLEN_BACKWARD: dict[str, Kernel] = {
    "cuda": native("cuda", "attention_varlen_backward"),
    "triton": triton("attention_varlen", "attention_varlen_backward"),
    "cpu": native("cpu", "attention_varlen_backward"),
}
VARLEN_BACKWARD_LACKS = {
    name: _backward_lacks(lacks) for name, lacks in {**VARLEN_LACKS, "cuda": _varlen_cuda_backward_lacks}.items()
}
DECODE: dict[str, Kernel] = {
    "cuda": native("cuda", "attention_decode"),
    "triton": triton("attention_decode", "attention_decode"),
    "cpu": native("cpu", "attention_decode"),
}
DECODE_LACKS = {"cuda": _decode_cuda_lacks, "triton": _decode_triton_lacks, "cpu": cpu_lacks}

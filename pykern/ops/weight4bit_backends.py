"""Which kernel serves which call on a 4-bit weight: the first of its device whose reason is None."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pykern.ops._backends import Kernel, native, triton

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
CUDA_VECTORS = 8  # rows of input up to which the CUDA kernel has a way for every weight: it reads the codes once
_CUDA_CHUNK = 32  # weights of a row that its tensor cores' kernels decode with one scale
_CUDA_COLUMNS = 65535 * 128  # tiles of columns are counted in a grid's second dimension


def _wide(tensors: Sequence[Tensor | None]) -> str | None:
    """Scales and tables may be fp64 for the reference's sake; kernels take them as every format stores them."""
    if any(t is not None and t.dtype == torch.float64 for t in tensors):
        return "takes scales and code tables of up to 32 bits, not torch.float64"
    return None


def weight_lacks(*weight: Any) -> str | None:
    """Why no kernel decodes this weight, given as `Weight4bit.arguments`."""
    code, blocksize = weight[5], weight[8]
    if code is not None and (blocksize < 32 or blocksize & (blocksize - 1)):
        return f"takes blocks of a power of two from 32 elements on, not {blocksize}"
    return _wide(weight[1:6])


def _float_lacks(dtype: torch.dtype) -> str | None:
    return None if dtype in _FLOATS else f"computes fp32, fp16 and bf16, not {dtype}"


def _quantize_lacks(weight: Tensor, quant_type: str, blocksize: int) -> str | None:
    return _float_lacks(weight.dtype)


def _quantize_int4_lacks(weight: Tensor, blocksize: int, symmetric: bool, scale_dtype: torch.dtype) -> str | None:
    return _float_lacks(weight.dtype) or _float_lacks(scale_dtype)


def _dequantize_lacks(*weight_and_dtype: Any) -> str | None:
    return weight_lacks(*weight_and_dtype[:9]) or _float_lacks(weight_and_dtype[9])


def _linear_lacks(input: Tensor, *rest: Any) -> str | None:
    return weight_lacks(*rest[:9]) or _float_lacks(input.dtype)


def _linear_backward_lacks(dy: Tensor | None, input: Tensor, *rest: Any) -> str | None:
    return _linear_lacks(input, *rest[:10])


def cuda_tiles_lack(input: Tensor, *weight: Any) -> str | None:
    """Why the CUDA kernels on tensor cores do not multiply by this weight."""
    code, (out, n), blocksize = weight[5], weight[7], weight[8]
    if input.dtype == torch.float32:
        return f"multiplies fp16 and bf16, torch.float32 in the forward of up to {CUDA_VECTORS} rows"
    if n % _CUDA_CHUNK:
        return f"takes rows of a multiple of {_CUDA_CHUNK} weights, not {n}"
    if code is None and blocksize % _CUDA_CHUNK and blocksize < n:
        return f"takes int4 groups of a multiple of {_CUDA_CHUNK} weights, not {blocksize}"
    if max(out, n) > _CUDA_COLUMNS or (code is None and n >= 2**20):
        return f"takes up to {_CUDA_COLUMNS} rows and columns, of int4 fewer than 2^20 columns, not {(out, n)}"
    return None


def _cuda_linear_lacks(input: Tensor, *rest: Any) -> str | None:
    reason = _linear_lacks(input, *rest)
    if reason or input.numel() <= CUDA_VECTORS * input.shape[-1]:
        return reason
    return cuda_tiles_lack(input, *rest[:9])


def _cuda_linear_backward_lacks(dy: Tensor | None, input: Tensor, *rest: Any) -> str | None:
    return _linear_backward_lacks(dy, input, *rest) or cuda_tiles_lack(input, *rest[:9])


QUANTIZE: dict[str, Kernel] = {
    "cuda": native("cuda", "quantize_4bit"),
    "triton": triton("quantize_4bit", "quantize_4bit"),
    "cpu": native("cpu", "quantize_4bit"),
}
QUANTIZE_LACKS = dict.fromkeys(("cuda", "triton", "cpu"), _quantize_lacks)
QUANTIZE_INT4: dict[str, Kernel] = {
    "cuda": native("cuda", "quantize_int4"),
    "triton": triton("quantize_4bit", "quantize_int4"),
    "cpu": native("cpu", "quantize_int4"),
}
QUANTIZE_INT4_LACKS = dict.fromkeys(("cuda", "triton", "cpu"), _quantize_int4_lacks)
DEQUANTIZE: dict[str, Kernel] = {
    "cuda": native("cuda", "dequantize_4bit"),
    "triton": triton("dequantize_4bit", "dequantize_4bit"),
    "cpu": native("cpu", "dequantize_4bit"),
}
DEQUANTIZE_LACKS = dict.fromkeys(("cuda", "triton", "cpu"), _dequantize_lacks)
LINEAR: dict[str, Kernel] = {
    "cuda": native("cuda", "linear_4bit"),
    "triton": triton("linear_4bit", "linear_4bit"),
    "cpu": native("cpu", "linear_4bit"),
}
LINEAR_LACKS = {"cuda": _cuda_linear_lacks, "triton": _linear_lacks, "cpu": _linear_lacks}
LINEAR_BACKWARD: dict[str, Kernel] = {
    "cuda": native("cuda", "linear_4bit_backward"),
    "triton": triton("linear_4bit", "linear_4bit_backward"),
    "cpu": native("cpu", "linear_4bit_backward"),
}
LINEAR_BACKWARD_LACKS = {
    "cuda": _cuda_linear_backward_lacks,
    "triton": _linear_backward_lacks,
    "cpu": _linear_backward_lacks,
}

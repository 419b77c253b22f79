"""Which kernel serves which call on a 4-bit weight: the first of its device whose reason is None."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pykern.ops._backends import Kernel

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


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


QUANTIZE: dict[str, Kernel] = {}
QUANTIZE_LACKS = dict.fromkeys(("cuda", "triton", "cpu"), _quantize_lacks)
QUANTIZE_INT4: dict[str, Kernel] = {}
QUANTIZE_INT4_LACKS = dict.fromkeys(("cuda", "triton", "cpu"), _quantize_int4_lacks)
DEQUANTIZE: dict[str, Kernel] = {}
DEQUANTIZE_LACKS = dict.fromkeys(("cuda", "triton", "cpu"), _dequantize_lacks)
LINEAR: dict[str, Kernel] = {}
LINEAR_LACKS = dict.fromkeys(("cuda", "triton", "cpu"), _linear_lacks)
LINEAR_BACKWARD: dict[str, Kernel] = {}
LINEAR_BACKWARD_LACKS = dict.fromkeys(("cuda", "triton", "cpu"), _linear_backward_lacks)

"""Which kernel serves which call of the ops with low-rank adapters: the first of its device whose reason is None."""

from typing import Any

import torch
from torch import Tensor

from pykern.ops._backends import Kernel
from pykern.ops.weight4bit_backends import weight_lacks

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def _float_lacks(input: Tensor, *_: Any) -> str | None:
    return None if input.dtype in _FLOATS else f"computes fp32, fp16 and bf16, not {input.dtype}"


def _float_backward_lacks(dy: Tensor | None, input: Tensor, *_: Any) -> str | None:
    return _float_lacks(input)


def _4bit_lacks(input: Tensor, *rest: Any) -> str | None:
    return weight_lacks(*rest[:9]) or _float_lacks(input)


def _4bit_backward_lacks(dy: Tensor | None, input: Tensor, *rest: Any) -> str | None:
    return _4bit_lacks(input, *rest)


LORA: dict[str, Kernel] = {}
LORA_LACKS = dict.fromkeys(("cuda", "triton", "cpu"), _float_lacks)
LORA_BACKWARD: dict[str, Kernel] = {}
LORA_BACKWARD_LACKS = dict.fromkeys(("cuda", "triton", "cpu"), _float_backward_lacks)
LORA_4BIT: dict[str, Kernel] = {}
LORA_4BIT_LACKS = dict.fromkeys(("cuda", "triton", "cpu"), _4bit_lacks)
LORA_4BIT_BACKWARD: dict[str, Kernel] = {}
LORA_4BIT_BACKWARD_LACKS = dict.fromkeys(("cuda", "triton", "cpu"), _4bit_backward_lacks)
MULTI: dict[str, Kernel] = {}
MULTI_LACKS = dict.fromkeys(("cuda", "triton", "cpu"), _float_lacks)
MULTI_BACKWARD: dict[str, Kernel] = {}
MULTI_BACKWARD_LACKS = dict.fromkeys(("cuda", "triton", "cpu"), _float_backward_lacks)
MULTI_4BIT: dict[str, Kernel] = {}
MULTI_4BIT_LACKS = dict.fromkeys(("cuda", "triton", "cpu"), _4bit_lacks)
MULTI_4BIT_BACKWARD: dict[str, Kernel] = {}
MULTI_4BIT_BACKWARD_LACKS = dict.fromkeys(("cuda", "triton", "cpu"), _4bit_backward_lacks)
DORA_NORM: dict[str, Kernel] = {}
DORA_NORM_LACKS = dict.fromkeys(("cuda", "triton", "cpu"), _float_lacks)

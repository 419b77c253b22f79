"""What every op that takes a 4-bit weight checks of it, and what reading it costs."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pykern.ops._weight4bit import NESTED_BLOCK, Weight4bit
from pykern.ops.norm import check_like


def check_weight(
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    nested_offset: Tensor | None,
    code: Tensor | None,
    zero_points: Tensor | None,
    shape: Sequence[int],
    blocksize: int,
) -> None:
    """Raises where a tensor is not of the size that shape and format call for, so that nothing is read beyond it."""
    # Plain tests, but of sizes, which can be unknown when compiling: torch._check costs a microsecond.
    if len(shape) == 0:
        raise ValueError("weight.shape: expected at least one dimension, got none")
    if blocksize <= 0:
        raise ValueError(f"weight.blocksize: expected a positive number, got {blocksize}")
    count = math.prod(shape)
    uint8, wide = (torch.uint8,), (torch.float32, torch.float64)
    expected = [("codes", codes, uint8, ((count + 1) // 2,))]
    if code is None:
        groups = (*shape[:-1], -(-shape[-1] // blocksize))
        if nested_absmax is not None:
            raise ValueError("weight.nested_absmax: int4 scales are not quantised")
        narrow = (torch.float16, torch.bfloat16)
        expected += [("absmax", absmax, wide + narrow, groups), ("zero_points", zero_points, uint8, groups)]
    else:
        blocks = -(-count // blocksize)
        if not (nested_absmax is None) == (nested_code is None) == (nested_offset is None):
            raise ValueError("weight: nested_absmax, nested_code and nested_offset belong together, got some of them")
        if zero_points is not None:
            raise ValueError("weight.zero_points: only int4 has zero points")
        expected += [
            ("absmax", absmax, wide if nested_absmax is None else uint8, (blocks,)),
            ("code", code, wide, (16,)),
            ("nested_absmax", nested_absmax, wide, (-(-blocks // NESTED_BLOCK),)),
            ("nested_code", nested_code, wide, (256,)),
            ("nested_offset", nested_offset, wide, ()),
        ]
    for name, tensor, dtypes, wanted in expected:
        check_like(f"weight.{name}", tensor, codes, wanted, dtypes)


def weight_bytes(weight: Sequence[Any]) -> int:
    """What reading a 4-bit weight moves; its code tables are small enough to stay in registers."""
    return sum(t.numel() * t.element_size() for t in weight[:2] + weight[2:3] + weight[6:7] if t is not None)


def require_weight(weight: object) -> None:
    if not isinstance(weight, Weight4bit):
        raise TypeError(f"weight: expected a Weight4bit, from quantize_4bit, got {type(weight).__name__}")

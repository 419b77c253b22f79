"""A 4-bit weight: its tensors, its code tables, and how they decode.

Formats: NF4 (Dettmers et al., QLoRA, arXiv:2305.14314), the FP4 of bitsandbytes, and linear int4 in groups (Frantar et
al., GPTQ, arXiv:2210.17323).

NF4 and FP4 blocks run over the flattened weight and may straddle rows; int4 groups run along the last dimension and
start anew in every row. The last block, or the last group of a row, may be shorter. In every format element 2i of the
flattened weight is in the high nibble of byte i, element 2i + 1 in the low one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pykern.ops.norm import check_like

# Quantiles of a normal distribution, asymmetric so that zero is exact: bitsandbytes' fp32 values, by code.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# Bit 3 is the sign, so code 8 is -0; the magnitudes do not grow with the code. It is not OCP's E2M1.
FP4 = tuple(sign * magnitude / 12 for sign in (1.0, -1.0) for magnitude in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0))
TABLES = {"nf4": NF4, "fp4": FP4}

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK = 256  # how many absmax values share one nested absmax
INT4_ZERO = 8  # the code of zero in a symmetric int4 weight

# What an op that takes a 4-bit weight has in its schema, in the order of `Weight4bit.arguments`.
SCHEMA = (
    "Tensor codes, Tensor absmax, Tensor? nested_absmax, Tensor? nested_code, Tensor? nested_offset, Tensor? code,"
    " Tensor? zero_points, SymInt[] shape, int blocksize"
)


def _dynamic_map() -> tuple[float, ...]:
    """The signed 8-bit dynamic map (Dettmers, arXiv:1511.04561): seven decades, each twice as fine as the one below."""
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32, device="cpu")
        middles = ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (exponent - 6)).tolist()
        values += [sign * middle for sign in (1, -1) for middle in middles]
    return tuple(sorted(values))


DYNAMIC_MAP = _dynamic_map()


@dataclass(eq=False)
class Weight4bit:
    """A quantised weight, as a plain record of tensors: build one on call, it traces under torch.compile.

    Attributes:
        codes: uint8 (ceil(n / 2),), two codes a byte, the first in the high nibble.
        absmax: the scale of each block. NF4, FP4: fp32 (ceil(n / blocksize),), or uint8 codes into `nested_code` where
            the scales are quantised themselves. int4: floating (*shape[:-1], ceil(shape[-1] / blocksize)).
        shape: of the weight; (out, in) for a linear layer.
        dtype: that was quantised, and the default of `dequantize_4bit`.
        quant_type: "nf4", "fp4" or "int4".
        blocksize: elements that share a scale.
        code: fp32 (16,), the value of each code; None for int4.
        nested_absmax, nested_code, nested_offset: fp32 (ceil(len(absmax) / 256),), (256,) and (); a block's scale is
            nested_code[absmax] * nested_absmax + nested_offset. None where scales are not quantised.
        zero_points: int4: uint8 codes of zero, as many as `absmax`; None where it is 8 everywhere.
    """

    codes: Tensor
    absmax: Tensor
    shape: Sequence[int]
    dtype: torch.dtype
    quant_type: str
    blocksize: int
    code: Tensor | None = None
    nested_absmax: Tensor | None = None
    nested_code: Tensor | None = None
    nested_offset: Tensor | None = None
    zero_points: Tensor | None = None

    @property
    def arguments(self) -> tuple[Tensor | Sequence[int] | int | None, ...]:
        """The weight as ops take it: `SCHEMA`."""
        nested = (self.nested_absmax, self.nested_code, self.nested_offset)
        return (self.codes, self.absmax, *nested, self.code, self.zero_points, self.shape, self.blocksize)


def decode(
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    nested_offset: Tensor | None,
    code: Tensor | None,
    zero_points: Tensor | None,
    shape: Sequence[int],
    blocksize: int,
    dtype: torch.dtype,
) -> Tensor:
    """The weight in `dtype`: the fp32 product of value and scale, whatever the dtype, rounded once."""
    count = math.prod(shape)
    byte = torch.arange(256, device=codes.device)
    table = torch.arange(16, device=codes.device) if code is None else code
    pairs = torch.stack([table[byte >> 4], table[byte & 15]], dim=-1).float()  # (256, 2)
    values = pairs[codes.int()].reshape(-1)[:count]
    if code is None:
        values = values.reshape(shape)
        zero = INT4_ZERO if zero_points is None else _spread(zero_points.float(), blocksize, shape[-1])
        return ((values - zero) * _spread(absmax.float(), blocksize, shape[-1])).to(dtype)
    if nested_absmax is not None:
        # Product and sum round separately, as bitsandbytes does in two kernels.
        scale = _spread(nested_absmax.float(), NESTED_BLOCK, absmax.shape[-1])
        absmax = nested_code.float()[absmax.int()] * scale + nested_offset.float()
    return (values * _spread(absmax.float(), blocksize, count)).to(dtype).reshape(shape)


def _spread(scales: Tensor, blocksize: int, count: int) -> Tensor:
    """Each scale for the `blocksize` elements it serves: (…, blocks) to (…, count)."""
    return scales.unsqueeze(-1).expand(*scales.shape, blocksize).flatten(-2)[..., :count]


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
    count = math.prod(shape)
    torch._check_value(len(shape) > 0, lambda: "weight.shape: expected at least one dimension, got none")
    torch._check_value(blocksize > 0, lambda: f"weight.blocksize: expected a positive number, got {blocksize}")
    uint8, wide = (torch.uint8,), (torch.float32, torch.float64)
    expected = [("codes", codes, uint8, ((count + 1) // 2,))]
    if code is None:
        groups = (*shape[:-1], -(-shape[-1] // blocksize))
        torch._check_value(nested_absmax is None, lambda: "weight.nested_absmax: int4 scales are not quantised")
        narrow = (torch.float16, torch.bfloat16)
        expected += [("absmax", absmax, wide + narrow, groups), ("zero_points", zero_points, uint8, groups)]
    else:
        blocks = -(-count // blocksize)
        nested = (nested_absmax, nested_code, nested_offset)
        torch._check_value(
            all(t is None for t in nested) or all(t is not None for t in nested),
            lambda: "weight: nested_absmax, nested_code and nested_offset belong together, only some were given",
        )
        torch._check_value(zero_points is None, lambda: "weight.zero_points: only int4 has zero points")
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

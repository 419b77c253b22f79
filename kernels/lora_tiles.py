"""What the kernels of low-rank adapters share: which rows a tile has, strides of matrices, tensor cores' precision.

One adapter for all rows and an adapter for each row are the same kernels. Rows with different adapters are sorted by
adapter; a slot is a place in that order. Tiles are cut within a group of slots, so that every tile has one adapter, and
rows are gathered when they are loaded and scattered when they are stored. How long the groups are is known on the
device alone: a program finds its tile's group by itself, and the host bounds the number of tiles.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from pykern.kernels.attention_scores import keep_threshold
from pykern.kernels.attention_tiles import dot_precision
from torch import Tensor


@dataclass(frozen=True)
class Route:
    """Which rows go through which of `groups` adapters; without `order` all through the only one."""

    groups: int = 1
    order: Tensor | None = None  # (rows,) rows by slot
    offs: Tensor | None = None  # (groups,) where a group of slots ends; behind the last are rows without adapter

    def tiles(self, rows: int, block: int) -> int:
        """How many tiles there are at most: each group may end within one, and none is empty."""
        return min(rows, triton.cdiv(rows, block) + (0 if self.offs is None else self.groups))

    def constants(self) -> dict[str, int]:
        return {"GROUPS": self.groups, "BLOCK_G": triton.next_power_of_2(self.groups + 1)}


@dataclass(frozen=True)
class Dropout:
    """`rng` of None drops nothing. What is kept is multiplied by `survival` where sums are scaled anyway."""

    rng: Tensor | None = None
    threshold: int = 0
    survival: float = 1.0

    @staticmethod
    def of(p: float, rng: Tensor | None) -> "Dropout":
        return KEEP if rng is None else Dropout(rng.contiguous(), *keep_threshold(p))


KEEP, ALIKE = Dropout(), Route()


@triton.jit
def tile_rows(order, offs, tile, rows, GROUPS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_M: tl.constexpr):
    """A tile's group, GROUPS for rows without adapter; (M,) its slots, its rows (int64), and which of them exist."""
    lane = tl.arange(0, BLOCK_M)
    if offs is None:
        group = 0
        slot = tile * BLOCK_M + lane
        live = slot < rows
        row = slot.to(tl.int64)
    else:
        each = tl.arange(0, BLOCK_G)
        end = tl.load(offs + each, mask=each < GROUPS, other=rows)
        begin = tl.load(offs + each - 1, mask=(each > 0) & (each <= GROUPS), other=0)
        begin = tl.where(each > GROUPS, rows, begin)
        last = tl.cumsum((end - begin + (BLOCK_M - 1)) // BLOCK_M, 0)  # the tile behind a group's last
        group = tl.sum((last <= tile).to(tl.int32), 0)
        before = tl.sum(tl.where(each == group - 1, last, 0), 0)
        slot = tl.sum(tl.where(each == group, begin, 0), 0) + (tile - before) * BLOCK_M + lane
        live = slot < tl.sum(tl.where(each == group, end, 0), 0)  # 0 behind the last tile
        row = tl.load(order + slot, mask=live, other=0)
        group = tl.minimum(group, GROUPS)
    return group, slot, row, live


@triton.jit
def step(index, stride, UNIT: tl.constexpr):
    """Offsets of elements with this stride in units; None stands for adjacent elements."""
    return index if stride is None else index.to(tl.int64) * stride * UNIT


@triton.jit
def _split(values):
    """fp32 as a sum of two numbers for tensor cores, which cut off the last 13 bits.

    The first is rounded to the nearest, so that what is cut off of the second has either sign.
    """
    bits = values.to(tl.uint32, bitcast=True)
    high = ((bits + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)
    return high, tl.where(values == high, 0.0, values - high)  # infinity has no rest


@triton.jit
def multiply(left, right, sums, PRECISION: tl.constexpr):
    """sums + left · right. Where one is fp32 and the other is not, see `wide_precision`."""
    if left.dtype == right.dtype:
        sums = tl.dot(left, right, sums, input_precision="ieee" if PRECISION == "split" else PRECISION)
    elif PRECISION != "split":
        sums = tl.dot(left.to(tl.float32), right.to(tl.float32), sums, input_precision=PRECISION)
    elif left.dtype == tl.float32:
        high, low = _split(left)
        right = right.to(tl.float32)
        sums = tl.dot(low, right, sums, input_precision="tf32")
        sums = tl.dot(high, right, sums, input_precision="tf32")
    else:
        high, low = _split(right)
        left = left.to(tl.float32)
        sums = tl.dot(left, low, sums, input_precision="tf32")
        sums = tl.dot(left, high, sums, input_precision="tf32")
    return sums


@triton.jit
def factor_of(scaling, offs, group, GROUPS: tl.constexpr):
    """The factor of a group's adapter: a number, with `offs` one of a tensor (GROUPS,)."""
    factor = scaling
    if offs is not None:
        factor = tl.load(scaling + tl.minimum(group, GROUPS - 1)).to(tl.float32)
    return factor


def wide_precision(adapter: torch.dtype) -> str:
    """For products of fp32 numbers, such as x · Aᵀ, with those of an adapter's dtype.

    Rounded to 16 bits they would make a result's error larger by a half, and might overflow. tf32 holds 16-bit numbers
    exactly, and the others in two parts. With an fp32 adapter gradients are to be as exact as fp32.
    """
    return dot_precision(adapter) if adapter == torch.float32 else "split"


def with_steps(matrix: Tensor) -> tuple[Tensor, int, list[int | None]]:
    """A matrix whose rows or columns have adjacent elements, copied if not; the unit of its strides, and these in it.

    A stride of one is None, but that of the first of three dimensions.
    """
    if 1 not in matrix.stride()[-2:]:
        matrix = matrix.contiguous()
    strides = [s if n > 1 or s == 1 else 0 for n, s in zip(matrix.shape, matrix.stride(), strict=True)]
    adjacent = [place >= matrix.dim() - 2 and s == 1 for place, s in enumerate(strides)]
    unit = math.gcd(16 // matrix.element_size(), *(s for s, one in zip(strides, adjacent, strict=True) if not one))
    return matrix, unit, [None if one else s // unit for s, one in zip(strides, adjacent, strict=True)]


def rank_block(rank: int, most: int) -> int:
    """Of at least the 16 that tensor cores take."""
    return min(max(triton.next_power_of_2(rank), 16), most)

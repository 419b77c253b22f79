"""Gradients of adapters and of what DoRA adds, sums over rows; and the rows that DoRA's base product has.

dA = f · (dy · B)ᵀ · D(x) and dB = f · dyᵀ · (D(x) · Aᵀ) are one kernel: a thin matrix, kept in fp32, transposed times a
wide one. Where rows are many they are divided among programs, whose sums a second kernel adds up in a fixed order.
x · Aᵀ is made anew for dB, and x is all that a forward keeps. To make it in one pass with dA, a program would own all
columns of some rows, and leave as many sums of dA as there are such programs: more than reading x once more.
What is linear in dB falls out of its tiles before they are scaled: Σ B · (dyᵀ · S), by column for DoRA's g, and added
up for the factor of an adapter.

The other part of g's gradient is Σ W · (dyᵀ · D(x)), by row: a tile of the product meets a tile of W that is read once.
That product is the gradient of W as well.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from pykern.kernels.attention_scores import kept
from pykern.kernels.attention_tiles import dot_precision
from pykern.kernels.linear_4bit import add_splits
from pykern.kernels.linear_4bit_config import split_count
from pykern.kernels.lora_tiles import ALIKE, KEEP, Dropout, Route, factor_of, multiply, rank_block, wide_precision
from pykern.kernels.norm import on
from torch import Tensor


@dataclass(frozen=True)
class Config:
    """Tiles of ranks × columns of a gradient, and how many `rows` are summed at a time."""

    ranks: int
    columns: int
    rows: int
    warps: int
    stages: int

    def blocks(self) -> dict[str, int]:
        sizes = {"BLOCK_R": self.ranks, "BLOCK_N": self.columns, "BLOCK_K": self.rows}
        return {**sizes, "num_warps": self.warps, "num_stages": self.stages}


def gradient_config(rank: int, exact: bool, device: torch.device) -> Config:
    """`exact`: fp32 without tensor cores, whose operands fill registers."""
    if device.type == "cpu":
        return Config(16, 32, 16, 1, 1)
    ranks = rank_block(rank, 32 if exact else 64)
    return Config(ranks, 64, 32, ranks // 4, 2) if exact else Config(ranks, 64, 32, 4, 3)


@triton.jit(do_not_specialize=["rows", "width", "wide_row", "small_splits", "splits", "threshold"])
def _gradient_kernel(
    small,  # (small_splits, rows, RANK) by slot
    wide,  # (rows, width) by wide_row
    column_scale,  # (width,) or None
    matrix,  # as one split of `out`, None without `along`
    out,  # (splits, GROUPS, RANK, width), or TRANSPOSED (splits, GROUPS, width, RANK), or None
    along,  # (splits, rank tiles, GROUPS, width) or None
    rng,
    order,
    offs,
    rows,
    width,  # this and the next in units of UNIT elements
    wide_row,
    small_splits,
    splits,
    scaling,  # a number, with offs (GROUPS,)
    threshold,
    TRANSPOSED: tl.constexpr,
    RANK: tl.constexpr,
    UNIT: tl.constexpr,
    GROUPS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    width *= UNIT
    rank_tiles: tl.constexpr = (RANK + BLOCK_R - 1) // BLOCK_R
    tile, part = tl.program_id(0) // rank_tiles, tl.program_id(0) % rank_tiles
    group, split = tl.program_id(1), tl.program_id(2)
    column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    rank = part * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = column < width
    first, last = 0, rows
    if offs is not None:
        first = tl.load(offs + group - 1, mask=group > 0, other=0)
        last = tl.load(offs + group)
    share = tl.cdiv(tl.cdiv(last - first, BLOCK_K), splits) * BLOCK_K
    begin = first + split * share
    end = tl.minimum(begin + share, last)

    sums = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    for start in range(begin, end, BLOCK_K):
        slot = start + tl.arange(0, BLOCK_K)
        live = slot < end
        row = slot.to(tl.int64)
        if order is not None:
            row = tl.load(order + slot, mask=live, other=0)
        mask = (rank < RANK)[:, None] & live[None, :]
        left = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
        for i in range(small_splits):
            place = (tl.cast(i, tl.int64) * rows + slot)[None, :] * RANK + rank[:, None]
            left += tl.load(small + place, mask=mask, other=0.0)
        right = wide + (row * wide_row * UNIT)[:, None] + column[None, :]
        right = tl.load(right, mask=live[:, None] & inside[None, :], other=0.0)
        if rng is not None:
            right = tl.where(kept(rng, row[:, None], tile * BLOCK_N, width, threshold, BLOCK_N), right, 0.0)
        sums = multiply(left, right, sums, PRECISION)

    # int64 from here: an adapter's gradients may have more than 2³¹ elements.
    at = tl.cast(group, tl.int64) * RANK * width
    if TRANSPOSED:
        at += column[None, :].to(tl.int64) * RANK + rank[:, None]
    else:
        at += rank[:, None].to(tl.int64) * width + column[None, :]
    mask = (rank < RANK)[:, None] & inside[None, :]
    if along is not None:
        products = sums * tl.load(matrix + at, mask=mask, other=0.0).to(tl.float32)
        line = (split * rank_tiles + part).to(tl.int64) * GROUPS + group
        # An adapter without rows has no gradient, though it be NaN.
        tl.store(along + line * width + column, tl.where(begin < end, tl.sum(products, 0), 0.0), mask=inside)
    if out is not None:
        sums *= factor_of(scaling, offs, group, GROUPS)
        if column_scale is not None:
            sums *= tl.load(column_scale + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        if offs is not None:
            sums = tl.where(begin < end, sums, 0.0)
        out += split.to(tl.int64) * GROUPS * RANK * width
        tl.store(out + at, sums.to(out.dtype.element_ty), mask=mask)


def adapter_gradient(
    small: Tensor,
    wide: Tensor,
    adapter: Tensor,
    transposed: bool,
    scaling: float | Tensor,
    column_scale: Tensor | None = None,
    dropout: Dropout = KEEP,
    route: Route = ALIKE,
    wanted: bool = True,
    wants_along: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """The adapter's gradient scaling · smallᵀ · wide, and (groups, width): Σ over ranks of adapter · (smallᵀ · wide).

    Args:
        small: (splits, rows, rank) by slot, fp32.
        wide: (rows, width), rows with adjacent elements.
        adapter: (groups, rank, width), or `transposed` (groups, width, rank).
        column_scale: (width,), factors of the gradient.
        dropout: of `wide`.
    """
    (small_splits, rows, rank), width = small.shape, wide.shape[1]
    precision = wide_precision(adapter.dtype)
    config = gradient_config(rank, precision == "ieee", wide.device)
    rank_tiles, columns = triton.cdiv(rank, config.ranks), triton.cdiv(width, config.columns)
    tasks = rank_tiles * columns * route.groups
    splits = split_count(config, rank, tasks, triton.cdiv(rows, config.rows * route.groups), wide.device)
    out = adapter.new_empty(adapter.shape) if wanted else None
    sums = out if splits == 1 or not wanted else wide.new_empty((splits, *adapter.shape), dtype=torch.float32)
    along = None
    if wants_along:
        along = wide.new_empty((splits * rank_tiles, route.groups, width), dtype=torch.float32)
    unit = math.gcd(16 // wide.element_size(), width, wide.stride(0))
    with on(wide.device):
        _gradient_kernel[(rank_tiles * columns, route.groups, splits)](
            *(small, wide, column_scale, adapter.contiguous() if wants_along else None, sums, along),
            *(dropout.rng, route.order, route.offs, rows, width // unit, wide.stride(0) // unit),
            *(small_splits, splits, scaling, dropout.threshold),
            TRANSPOSED=transposed,
            RANK=rank,
            UNIT=unit,
            GROUPS=route.groups,
            PRECISION=precision,
            **config.blocks(),
        )
        if wanted and splits > 1:
            add_splits(sums.view(splits, 1, -1), None, out.view(1, -1))
    return out, None if along is None else along.sum(0)


@triton.jit(do_not_specialize=["rows", "outs", "ins", "dy_row", "x_row", "weight_row", "threshold"])
def _dora_kernel(
    dy,  # (rows, outs) by dy_row
    x,  # (rows, ins) by x_row
    weight,  # (outs, ins) by weight_row, None without `along`
    scale,  # (outs,): g
    dweight,  # (outs, ins) or None
    along,  # (column tiles, outs) or None
    rng,
    rows,
    outs,  # this and the next in units of UNIT elements
    ins,
    dy_row,
    x_row,
    weight_row,
    survival,
    threshold,
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    outs *= UNIT
    ins *= UNIT
    tiles = tl.cdiv(outs, BLOCK_M)
    tile = tl.program_id(0) // tiles
    out = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < ins
    dropped = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if rng is not None and dweight is not None:
        whole = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, rows, BLOCK_K):
        row = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        left = dy + (row * dy_row * UNIT)[None, :] + out[:, None]
        left = tl.load(left, mask=(row < rows)[None, :] & (out < outs)[:, None], other=0.0)
        right = x + (row * x_row * UNIT)[:, None] + column[None, :]
        right = tl.load(right, mask=(row < rows)[:, None] & inside[None, :], other=0.0)
        if rng is not None:
            if dweight is not None:
                whole = tl.dot(left, right, whole, input_precision=PRECISION)
            right = tl.where(kept(rng, row[:, None], tile * BLOCK_N, ins, threshold, BLOCK_N), right, 0.0)
        dropped = tl.dot(left, right, dropped, input_precision=PRECISION)

    dropped *= survival
    mask = (out < outs)[:, None] & inside[None, :]
    if along is not None:
        matrix = weight + out.to(tl.int64)[:, None] * weight_row * UNIT + column[None, :]
        products = dropped * tl.load(matrix, mask=mask, other=0.0).to(tl.float32)
        tl.store(along + tile.to(tl.int64) * outs + out, tl.sum(products, 1), mask=out < outs)
    if dweight is not None:
        g = tl.load(scale + out, mask=out < outs, other=0.0).to(tl.float32)[:, None]
        result = dropped * g if rng is None else whole + dropped * (g - 1.0)
        target = dweight + out.to(tl.int64)[:, None] * ins + column[None, :]
        tl.store(target, result.to(dweight.dtype.element_ty), mask=mask)


def dora_gradients(
    dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor, dropout: Dropout, wants_weight: bool, wants_scale: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradient of W in x's dtype, and (out,) the part of g's that comes through W, in fp32.

    Args:
        weight: (out, in), of any dtype.
    """
    rows, (outs, ins) = len(x), weight.shape
    precision = dot_precision(x.dtype)
    if x.device.type == "cpu":
        blocks = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16, "num_warps": 1}
    elif x.dtype == torch.float32 and precision == "ieee":
        blocks = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "num_warps": 8, "num_stages": 2}
    else:
        blocks = {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3}
    tiles = triton.cdiv(ins, blocks["BLOCK_N"])
    dweight = x.new_empty((outs, ins)) if wants_weight else None
    along = x.new_empty((tiles, outs), dtype=torch.float32) if wants_scale else None
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    rows_apart = (dy.stride(0), x.stride(0), weight.stride(0))
    unit = math.gcd(16 // x.element_size(), outs, ins, *rows_apart)
    with on(x.device):
        _dora_kernel[(tiles * triton.cdiv(outs, blocks["BLOCK_M"]),)](
            *(dy, x, weight if wants_scale else None, scale, dweight, along, dropout.rng, rows),
            *(n // unit for n in (outs, ins, *rows_apart)),
            *(dropout.survival, dropout.threshold),
            UNIT=unit,
            PRECISION=precision,
            **blocks,
        )
    return dweight, None if along is None else along.sum(0)


@triton.jit(do_not_specialize=["rows", "width", "x_row", "threshold"])
def _rescale_kernel(
    x,  # (rows, width) by x_row
    scale,  # (width,): g, or None
    out,  # (rows, width), or with TWICE the rows: x as it is comes first
    rng,
    rows,
    width,  # this and the next in units of UNIT elements
    x_row,
    threshold,
    TWICE: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    width *= UNIT
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)[:, None]
    first = tl.program_id(1) * BLOCK
    column = first + tl.arange(0, BLOCK)[None, :]
    values = tl.load(x + row * x_row * UNIT + column, mask=column < width, other=0.0)
    if TWICE:
        tl.store(out + row * width + column, values, mask=column < width)
        out += tl.cast(rows, tl.int64) * width
    result = values.to(tl.float32)
    if scale is not None:
        g = tl.load(scale + column, mask=column < width, other=0.0).to(tl.float32)
        result *= g - 1.0 if TWICE else g
    if rng is not None:
        result = tl.where(kept(rng, row, first, width, threshold, BLOCK), result, 0.0)
    tl.store(out + row * width + column, result.to(out.dtype.element_ty), mask=column < width)


def rescaled(x: Tensor, scale: Tensor | None, dropout: Dropout, twice: bool) -> Tensor:
    """(rows, width) of scale · x, or `twice` the rows: those of x, then those of (scale − 1) · x; with dropout."""
    rows, width = x.shape
    out = x.new_empty((rows * (2 if twice else 1), width))
    unit = math.gcd(16 // x.element_size(), width, x.stride(0))
    sizes = (rows, width // unit, x.stride(0) // unit, dropout.threshold)
    with on(x.device):
        _rescale_kernel[(rows, triton.cdiv(width, 1024))](
            x, scale, out, dropout.rng, *sizes, TWICE=twice, UNIT=unit, BLOCK=1024
        )
    return out

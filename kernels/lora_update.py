"""A layer's result from its base product and x · Aᵀ, or the gradient of its input from dy · W and dy · B.

    y = base + f · (x · Aᵀ) · Bᵀ + bias           dx = base + keep · f · (dy · B) · A

One pass over the result, in fp32 and rounded once: sums of a divided base product are added up in a fixed order, the
rank product is made of tiles that stay on chip. DoRA multiplies it by g, and the base product as well; with dropout the
base product has twice the rows, those of x and then those of what dropout left of it (of dy and (g − 1) · dy for the
gradient), because the second part is rescaled or dropped and the first is not.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from pykern.kernels.attention_scores import kept
from pykern.kernels.lora_tiles import (
    ALIKE,
    KEEP,
    Dropout,
    Route,
    factor_of,
    multiply,
    rank_block,
    step,
    tile_rows,
    wide_precision,
    with_steps,
)
from pykern.kernels.norm import on
from torch import Tensor


@dataclass(frozen=True)
class Config:
    """Tiles of rows × columns of the result, and how many ranks are summed at a time."""

    rows: int
    columns: int
    ranks: int
    warps: int


def update_config(rows: int, rank: int, exact: bool, device: torch.device) -> Config:
    """`exact`: fp32 without tensor cores, whose operands fill registers."""
    if device.type == "cpu":
        return Config(16, 32, 16, 1)
    if exact:
        return Config(16 if rows <= 16 else 32, 64, 16, 4)
    return Config(16 if rows <= 16 else 64, 128, rank_block(rank, 64), 8)


@triton.jit
def _add_up(sums, splits, stride, place, mask):
    """What lies at `place` in each of `splits` parts, added up in fp32."""
    total = tl.load(sums + place, mask=mask, other=0.0).to(tl.float32)
    for split in range(1, splits):
        total += tl.load(sums + split * stride + place, mask=mask, other=0.0).to(tl.float32)
    return total


@triton.jit(
    do_not_specialize=[
        *("rows", "width", "adapter_group", "adapter_rank", "adapter_column"),
        *("base_splits", "splits", "threshold"),
    ]
)
def _update_kernel(
    base,  # (base_splits, rows, width), or with TWICE the rows
    small,  # (splits, rows, RANK) by slot
    adapter,  # (GROUPS, RANK, width)
    column_scale,  # (width,): g for the result, or None
    bias,  # (width,) or None
    out,  # (rows, width)
    rng,  # (2,) where dropout takes from the result, or None
    order,
    offs,
    rows,
    width,  # in units of UNIT elements
    adapter_group,  # strides in units of ADAPTER_UNIT, None for 1
    adapter_rank,
    adapter_column,
    base_splits,
    splits,
    scaling,  # a number, with offs (GROUPS,)
    survival,
    threshold,
    TWICE: tl.constexpr,
    RANK: tl.constexpr,
    UNIT: tl.constexpr,
    ADAPTER_UNIT: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    width *= UNIT
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < width
    group, slot, row, live = tile_rows(order, offs, tl.program_id(1), rows, GROUPS, BLOCK_G, BLOCK_M)

    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    small += slot.to(tl.int64)[:, None] * RANK
    adapter += tl.cast(group, tl.int64) * adapter_group * ADAPTER_UNIT
    adapter += step(column, adapter_column, ADAPTER_UNIT)[None, :]
    lane = tl.arange(0, BLOCK_R)
    for start in range(0, tl.where(group < GROUPS, RANK, 0), BLOCK_R):
        rank = start + lane
        mask = live[:, None] & (rank < RANK)[None, :]
        left = _add_up(small, splits, tl.cast(rows, tl.int64) * RANK, rank[None, :], mask)
        right = adapter + step(rank, adapter_rank, ADAPTER_UNIT)[:, None]
        right = tl.load(right, mask=(rank < RANK)[:, None] & inside[None, :], other=0.0)
        sums = multiply(left, right, sums, PRECISION)

    mask = live[:, None] & inside[None, :]
    place = row[:, None] * width + column[None, :]
    one = tl.cast(rows, tl.int64) * width  # a base product of all rows
    stride = one * 2 if TWICE else one
    result = _add_up(base, base_splits, stride, place, mask)
    update = sums * factor_of(scaling, offs, group, GROUPS)
    if TWICE:
        rescaled = _add_up(base + one, base_splits, stride, place, mask)
    if column_scale is not None:
        g = tl.load(column_scale + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        update *= g
        if TWICE:
            rescaled *= g - 1.0
        else:
            result *= g
    if TWICE:
        update += rescaled
    update *= survival
    if rng is not None:
        keep = kept(rng, row[:, None], tl.program_id(0) * BLOCK_N, width, threshold, BLOCK_N)
        update = tl.where(keep, update, 0.0)
    if offs is not None:
        update = tl.where(group < GROUPS, update, 0.0)  # no factor of another adapter, which may be NaN
    result += update
    if bias is not None:
        result += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    tl.store(out + place, result.to(out.dtype.element_ty), mask=mask)


def update(
    base: Tensor,
    small: Tensor,
    adapter: Tensor,
    scaling: float | Tensor,
    dtype: torch.dtype,
    column_scale: Tensor | None = None,
    bias: Tensor | None = None,
    survival: float = 1.0,
    dropout: Dropout = KEEP,
    route: Route = ALIKE,
) -> Tensor:
    """(rows, width) of `dtype`.

    Args:
        base: (splits, rows, width), or twice the rows.
        small: (splits, rows, rank) by slot, fp32.
        adapter: (groups, rank, width).
        scaling: of the adapter's part, one or for each group.
        column_scale: (width,), DoRA's g.
        survival: what is multiplied by because dropout has taken from the adapter's input.
        dropout: of the adapter's part of the result.
    """
    (splits, rows, rank), width = small.shape, base.shape[2]
    precision = wide_precision(adapter.dtype)
    config = update_config(rows, rank, precision == "ieee", base.device)
    out = base.new_empty((rows, width), dtype=dtype)
    adapter, adapter_unit, adapter_steps = with_steps(adapter)
    unit = next(n for n in (16, 8, 4, 2, 1) if width % n == 0)
    grid = (triton.cdiv(width, config.columns), route.tiles(rows, config.rows))
    column_scale, bias = (None if t is None else t.contiguous() for t in (column_scale, bias))
    with on(base.device):
        _update_kernel[grid](
            *(base, small, adapter, column_scale, bias, out, dropout.rng, route.order, route.offs),
            *(rows, width // unit, *adapter_steps, len(base), splits, scaling, survival, dropout.threshold),
            TWICE=base.shape[1] > rows,
            RANK=rank,
            UNIT=unit,
            ADAPTER_UNIT=adapter_unit,
            PRECISION=precision,
            BLOCK_M=config.rows,
            BLOCK_N=config.columns,
            BLOCK_R=config.ranks,
            num_warps=config.warps,
            **route.constants(),
        )
    return out

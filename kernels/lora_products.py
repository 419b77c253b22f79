"""The two products that a linear layer with an adapter begins with, of x or for the gradient of dy, in one launch.

x · Wᵀ and D(x) · Aᵀ, or dy · W and dy · B: programs of the second kind stand beside those of the first, whose loads of
the same rows they find in the caches. Few rows make few tiles, so the summed dimension is divided among programs. Each
leaves its sums in fp32, and the kernel that adds the adapter's part (lora_update.py) adds those up in a fixed order: it
takes the place of the one that would add them, so the rank product as an epilogue of this kernel would save nothing.

For many rows torch multiplies by W, and this kernel has the adapter's part alone. Fused, W comes out of memory once
while up to FUSED_ROWS rows are multiplied by it: on an H200 4096² bf16 weights take 7 µs to load and 64 rows 2.9 µs of
tensor cores, so that a launch and the sums' way through the caches, less than a µs each, count. With more rows the
product is bound by tensor cores, which cuBLAS keeps busier than this kernel could.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from pykern.kernels.attention_scores import kept
from pykern.kernels.linear_4bit import base_products
from pykern.kernels.linear_4bit_config import split_count
from pykern.kernels.lora_tiles import (
    ALIKE,
    KEEP,
    Dropout,
    Route,
    multiply,
    rank_block,
    step,
    tile_rows,
    wide_precision,
    with_steps,
)
from pykern.kernels.norm import on
from torch import Tensor

FUSED_ROWS = 64


@dataclass(frozen=True)
class Config:
    """Tiles of rows × columns of the result, or × ranks of the adapter's; `depth` of them are summed at a time."""

    rows: int
    columns: int
    ranks: int
    depth: int
    warps: int
    stages: int

    def blocks(self) -> dict[str, int]:
        sizes = {"BLOCK_M": self.rows, "BLOCK_N": self.columns, "BLOCK_R": self.ranks, "BLOCK_K": self.depth}
        return {**sizes, "num_warps": self.warps, "num_stages": self.stages}


def fused(rows: int, device: torch.device) -> bool:
    """Whether the kernel multiplies by the weight. In the interpreter few, so that short tests take both ways."""
    return rows <= (6 if device.type == "cpu" else FUSED_ROWS)


def products_config(rows: int, rank: int, exact: bool, scaled: bool, device: torch.device) -> Config:
    """`exact`: fp32 without tensor cores, whose operands fill registers. What is `scaled` goes through them as well."""
    if device.type == "cpu":
        return Config(16, 32, 16, 32, 1, 1)
    tall = 16 if rows <= 16 else 32 if rows <= 32 else 64
    if exact:
        return Config(min(tall, 32), 64, rank_block(rank, 64), 16, 4, 2)
    return Config(tall, 64, rank_block(rank, 64), 64, 4, 3 if scaled else 4)


@triton.jit
def _sum_products(
    left,
    row,
    live,
    right,
    right_depth,
    right_column,
    column,
    inside,
    scale,
    rng,
    threshold,
    depth,
    begin,
    end,
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """(M, N) of left · right, summed over the steps from `begin` to `end`.

    left: pointers (M, 1) to its rows, which dropout counts by `row`, and of which those `live` exist.
    right: (depth, ·) of which to take the columns (N,) that are `inside`.
    scale: (depth,), factors of the rows of right, or None.
    """
    lane = tl.arange(0, BLOCK_K)
    columns = step(column, right_column, UNIT)[None, :]
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for index in range(begin, end):
        place = index * BLOCK_K + lane
        given = place < depth
        tile = tl.load(left + place[None, :], mask=live & given[None, :], other=0.0)
        if rng is not None:
            tile = tl.where(kept(rng, row, index * BLOCK_K, depth, threshold, BLOCK_K), tile, 0.0)
        matrix = right + step(place, right_depth, UNIT)[:, None] + columns
        matrix = tl.load(matrix, mask=given[:, None] & inside[None, :], other=0.0)
        if scale is not None:
            matrix = matrix.to(tl.float32) * tl.load(scale + place, mask=given, other=0.0).to(tl.float32)[:, None]
        sums = multiply(tile, matrix, sums, PRECISION)
    return sums


@triton.jit(
    do_not_specialize=[
        *("base_rows", "rows", "depth", "width", "left_row", "given_row", "weight_depth", "weight_column"),
        *("adapter_group", "adapter_depth", "adapter_rank", "tiles", "splits", "threshold"),
    ]
)
def _products_kernel(
    left,  # (base_rows, depth) by left_row, None without weight
    weight,  # (depth, width) or None
    base,  # (splits, base_rows, width) or None
    given,  # (rows, depth) by given_row
    adapter,  # (GROUPS, depth, RANK)
    scale,  # (depth,), factors of the adapter's rows, or None
    small,  # (splits, rows, RANK) by slot
    rng,  # (2,) or None
    order,  # (rows,) or None, as in lora_tiles.Route
    offs,  # (GROUPS,) or None
    base_rows,
    rows,
    depth,  # this, width and the next two in units of UNIT elements
    width,
    left_row,
    given_row,
    weight_depth,  # strides in units of WEIGHT_UNIT, None for 1
    weight_column,
    adapter_group,  # in units of ADAPTER_UNIT
    adapter_depth,
    adapter_rank,
    tiles,  # of rows, for the adapter
    splits,
    threshold,
    RANK: tl.constexpr,
    UNIT: tl.constexpr,
    WEIGHT_UNIT: tl.constexpr,
    ADAPTER_UNIT: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    depth *= UNIT
    width *= UNIT
    row_tiles = tl.cdiv(base_rows, BLOCK_M)
    rank_tiles: tl.constexpr = (RANK + BLOCK_R - 1) // BLOCK_R
    tasks = tiles * rank_tiles
    if weight is not None:
        tasks += row_tiles * tl.cdiv(width, BLOCK_N)
    task, split = tl.program_id(0) % tasks, tl.program_id(0) // tasks
    steps = tl.cdiv(depth, BLOCK_K)
    share = tl.cdiv(steps, splits)
    begin, end = split * share, tl.minimum((split + 1) * share, steps)

    if task < tiles * rank_tiles:
        group, slot, row, live = tile_rows(order, offs, task // rank_tiles, rows, GROUPS, BLOCK_G, BLOCK_M)
        column = task % rank_tiles * BLOCK_R + tl.arange(0, BLOCK_R)
        if group < GROUPS:
            sums = _sum_products(
                given + (row * given_row * UNIT)[:, None],
                row[:, None],
                live[:, None],
                adapter + tl.cast(group, tl.int64) * adapter_group * ADAPTER_UNIT,
                adapter_depth,
                adapter_rank,
                column,
                column < RANK,
                scale,
                rng,
                threshold,
                depth,
                begin,
                end,
                ADAPTER_UNIT,
                PRECISION,
                BLOCK_M,
                BLOCK_R,
                BLOCK_K,
            )
            target = small + (split.to(tl.int64) * rows + slot)[:, None] * RANK + column[None, :]
            tl.store(target, sums, mask=live[:, None] & (column < RANK)[None, :])
    elif weight is not None:
        # Programs that read the same weights come one after another.
        other = task - tiles * rank_tiles
        base_row = (other % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
        base_column = other // row_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
        base_sums = _sum_products(
            left + base_row * left_row * UNIT,
            base_row,
            base_row < base_rows,
            weight,
            weight_depth,
            weight_column,
            base_column,
            base_column < width,
            None,
            None,
            threshold,
            depth,
            begin,
            end,
            WEIGHT_UNIT,
            PRECISION,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )
        base_target = base + (split.to(tl.int64) * base_rows + base_row) * width + base_column[None, :]
        tl.store(base_target, base_sums, mask=(base_row < base_rows) & (base_column < width)[None, :])


def products(
    left: Tensor | None,
    weight: Tensor | None,
    given: Tensor,
    adapter: Tensor,
    scale: Tensor | None = None,
    dropout: Dropout = KEEP,
    route: Route = ALIKE,
) -> tuple[Tensor | None, Tensor]:
    """(splits, base rows, width) of left · weight, None without weight, and (splits, rows, rank) of given · adapter.

    The second is by slot, and undefined for rows without adapter. Both in fp32, to be added up over the splits.

    Args:
        left: (base rows, depth), rows with adjacent elements.
        weight: (depth, width).
        given: (rows, depth), rows with adjacent elements.
        adapter: (groups, depth, rank).
        scale: (depth,), factors of the adapter's rows.
        dropout: of `given` on its way into the adapter.
    """
    (rows, depth), rank = given.shape, adapter.shape[-1]
    base_rows, width = (0, 0) if weight is None else (len(left), weight.shape[1])
    precision = wide_precision(adapter.dtype)
    config = products_config(max(rows, base_rows), rank, precision == "ieee", scale is not None, given.device)
    tiles = route.tiles(rows, config.rows)
    tasks = tiles * triton.cdiv(rank, config.ranks)
    tasks += triton.cdiv(base_rows, config.rows) * triton.cdiv(width, config.columns)
    # What a part costs beside its steps: its sums for each row of the weight, or for each of the adapter's columns.
    costs = rank if weight is None else rows
    splits = split_count(config, costs, tasks, triton.cdiv(depth, config.depth), given.device)
    base = None if weight is None else given.new_empty((splits, base_rows, width), dtype=torch.float32)
    small = given.new_empty((splits, rows, rank), dtype=torch.float32)
    weight_unit, weight_steps = 1, [None, None]
    if weight is not None:
        weight, weight_unit, weight_steps = with_steps(weight)
    adapter, adapter_unit, adapter_steps = with_steps(adapter)
    rows_apart = [given.stride(0)] if left is None else [given.stride(0), left.stride(0)]
    unit = math.gcd(16 // given.element_size(), depth, width, *rows_apart)
    with on(given.device):
        _products_kernel[(tasks * splits,)](
            *(left, weight, base, given, adapter, scale, small, dropout.rng, route.order, route.offs),
            *(base_rows, rows, depth // unit, width // unit, rows_apart[-1] // unit, rows_apart[0] // unit),
            *(*weight_steps, *adapter_steps, tiles, splits, dropout.threshold),
            RANK=rank,
            UNIT=unit,
            WEIGHT_UNIT=weight_unit,
            ADAPTER_UNIT=adapter_unit,
            PRECISION=precision,
            **route.constants(),
            **config.blocks(),
        )
    return base, small


def layer_products(
    weight: Tensor | Sequence[Any], gradient: bool, left: Tensor, given: Tensor, adapter: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    """left · Wᵀ, or for the `gradient` left · W, and given · adapter, as `products` returns them.

    Args:
        weight: (out, in), or a 4-bit weight's arguments.
        rest: those of `products`.
    """
    if isinstance(weight, Tensor):
        matrix = weight if gradient else weight.mT
        if fused(len(left), left.device):
            return products(left, matrix, given, adapter, *rest)
        base = (left @ matrix).unsqueeze(0)
    else:
        base = base_products(left, weight, gradient)
    return base, products(None, None, given, adapter, *rest)[1]

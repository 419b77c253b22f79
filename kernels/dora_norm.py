"""‖W + scaling · B · A‖ of each row, without the sum ever being in memory.

A program walks along some rows: a tile of W meets the same tile of B · A, which tensor cores make in registers, and the
squares are added up in fp32. W is read once, and A by each program: it stays in the caches.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from pykern.kernels.attention_tiles import dot_precision
from pykern.kernels.lora_tiles import rank_block, step, with_steps
from pykern.kernels.norm import as_rows, in_units, on
from torch import Tensor


@dataclass(frozen=True)
class Config:
    """Tiles of rows × columns of W; `ranks` are summed at a time."""

    rows: int
    columns: int
    ranks: int
    warps: int
    stages: int


def norm_config(rank: int, exact: bool, device: torch.device) -> Config:
    """Few rows, so that there are more programs than multiprocessors. `exact`: fp32, whose operands fill registers."""
    if device.type == "cpu":
        return Config(16, 32, 16, 1, 1)
    return Config(16, 64, 16, 4, 2) if exact else Config(16, 128, rank_block(rank, 64), 4, 3)


@triton.jit(do_not_specialize=["rows", "n", "weight_row", "a_rank", "a_column", "b_row", "b_rank"])
def _norm_kernel(
    weight,  # (rows, n) by weight_row
    lora_a,  # (RANK, n)
    lora_b,  # (rows, RANK)
    norm,  # (rows,)
    rows,
    n,  # this and the next in units of UNIT elements
    weight_row,
    a_rank,  # strides in units, None for 1
    a_column,
    b_row,
    b_rank,
    scaling,
    RANK: tl.constexpr,
    UNIT: tl.constexpr,
    A_UNIT: tl.constexpr,
    B_UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    n *= UNIT
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = row < rows
    b = lora_b + step(row, b_row, B_UNIT)[:, None]
    squares = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, n, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        inside = column < n
        a = lora_a + step(column, a_column, A_UNIT)[None, :]
        update = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for first in tl.static_range(0, RANK, BLOCK_R):
            rank = first + tl.arange(0, BLOCK_R)
            some = rank < RANK
            left = tl.load(b + step(rank, b_rank, B_UNIT)[None, :], mask=live[:, None] & some[None, :], other=0.0)
            right = tl.load(a + step(rank, a_rank, A_UNIT)[:, None], mask=some[:, None] & inside[None, :], other=0.0)
            update = tl.dot(left, right, update, input_precision=PRECISION)
        values = weight + (row * weight_row * UNIT)[:, None] + column[None, :]
        values = tl.load(values, mask=live[:, None] & inside[None, :], other=0.0).to(tl.float32) + update * scaling
        squares += values * values
    tl.store(norm + row, tl.sqrt_rn(tl.sum(squares, 1)), mask=live)


# The op's own signature; shapes, types and meaning are documented with it in pykern/ops/dora_norm.py.


def dora_norm(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    rows, n = weight.shape
    norm = weight.new_empty(rows, dtype=torch.float32)
    if weight.numel() == 0:
        return norm.zero_()
    weight = as_rows(weight, n)
    unit, sizes = in_units(n, weight)
    lora_a, a_unit, a_steps = with_steps(lora_a)
    lora_b, b_unit, b_steps = with_steps(lora_b)
    rank = len(lora_a)
    precision = dot_precision(lora_a.dtype)
    config = norm_config(rank, lora_a.dtype == torch.float32 and precision == "ieee", weight.device)
    with on(weight.device):
        _norm_kernel[(triton.cdiv(rows, config.rows),)](
            *(weight, lora_a, lora_b, norm, rows, *sizes, *a_steps, *b_steps, scaling),
            RANK=rank,
            UNIT=unit,
            A_UNIT=a_unit,
            B_UNIT=b_unit,
            PRECISION=precision,
            BLOCK_M=config.rows,
            BLOCK_N=config.columns,
            BLOCK_R=config.ranks,
            num_warps=config.warps,
            num_stages=config.stages,
        )
    return norm

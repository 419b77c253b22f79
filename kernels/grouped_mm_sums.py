"""Sums of rows in a fixed order: by group, for the gradient of a bias, and by target, for that of gathered rows."""

import torch
import triton
import triton.language as tl
from pykern.kernels.grouped_mm_tiles import at, group_ends, in_row, source_rows
from pykern.kernels.norm import on
from torch import Tensor


@triton.jit(do_not_specialize=["rows", "count"])
def _group_sums_kernel(
    values,  # (count, COLUMNS)
    offs,  # (GROUPS,)
    index,  # (rows,) or None: rows of values, those out of bounds are lost
    order,  # (rows,), None without weights
    weights,  # (rows,) or None
    sums,  # (GROUPS, COLUMNS)
    rows,
    count,
    GROUPS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    g = tl.program_id(1)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    ends = group_ends(offs, rows, GROUPS, BLOCK_G)
    end = at(ends, g)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(at(ends, g - 1), end, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        source, inside = source_rows(index, row, row < end, count, False)
        mask = inside[:, None] & (column < COLUMNS)[None, :]
        value = tl.load(values + source[:, None] * COLUMNS + column[None, :], mask=mask, other=0.0).to(tl.float32)
        if weights is not None:
            slot = tl.load(order + row, mask=inside, other=0)
            value *= tl.load(weights + slot, mask=inside, other=0.0).to(tl.float32)[:, None]
        total += value
    tl.store(sums + g * COLUMNS + column, tl.sum(total, 0), mask=column < COLUMNS)


@triton.jit
def _sum_rows_kernel(
    values,  # (rows, SIZE)
    order,  # (rows,) rows of `values`, those of one output row beside each other
    begins,  # (outputs + 1,) where they begin in it
    out,  # (outputs, SIZE)
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(tl.load(begins + row), tl.load(begins + row + 1)):
        total += tl.load(values + tl.load(order + i) * SIZE + column, mask=column < SIZE, other=0.0)
    tl.store(out + row * SIZE + column, total.to(out.dtype.element_ty), mask=column < SIZE)


def group_sums(
    values: Tensor,
    offs: Tensor,
    index: Tensor | None,
    order: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """(groups, columns) in fp32: the sums of each group's rows, which are those of `values`, or those at `index`.

    With `weights` row i counts weights[order[i]] times.
    """
    columns, groups = values.shape[1], len(offs)
    rows = len(values) if index is None else len(index)
    sums = values.new_empty((groups, columns), dtype=torch.float32)
    if columns:
        with on(values.device):
            _group_sums_kernel[(triton.cdiv(columns, 128), groups)](
                *(*in_row(values, offs, index, order, weights), sums, rows, len(values)),
                GROUPS=groups,
                COLUMNS=columns,
                BLOCK_G=triton.next_power_of_2(groups + 1),
                BLOCK_M=32,
                BLOCK_N=128,
            )
    return sums


def sum_rows(values: Tensor, index: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """(rows, size) with values[i] added to row index[i], in the order of i."""
    size = values.shape[1]
    if values.numel() == 0:
        return values.new_zeros((rows, size), dtype=dtype)
    out = values.new_empty((rows, size), dtype=dtype)
    index, order = index.clamp(0, rows - 1).sort(stable=True)
    begins = torch.searchsorted(index, torch.arange(rows + 1, device=index.device))
    with on(values.device):
        _sum_rows_kernel[(rows, triton.cdiv(size, 1024))](values, order, begins, out, SIZE=size, BLOCK=1024)
    return out

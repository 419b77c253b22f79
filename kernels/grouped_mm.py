"""A matmul per group of rows: the group's rows of one matrix times the group's own matrix, forward and backward.

Programs walk over the tiles of all groups, see grouped_mm_tiles.py. Rows behind the last offset become zeros.

Rows are gathered when they are loaded and scattered when they are stored, so no permuted copy is made. The gradient of
the rows is the same product with the matrices transposed, gathered where the forward scattered. Where it gathered, a
row's gradients are added up by a kernel of their own, in the order of the rows: grouped_mm_sums.py. The gradient of a
group's matrix sums over the group's rows; an empty group has none, and zeros are written.
"""

import math

import torch
import triton
import triton.language as tl
from pykern.kernels.attention_tiles import dot_precision
from pykern.kernels.grouped_mm_sums import group_sums, sum_rows
from pykern.kernels.grouped_mm_tiles import (
    at,
    bounded_programs,
    group_ends,
    group_tiles,
    in_row,
    product_config,
    rows_side_by_side,
    side_by_side,
    source_rows,
    strides_in_units,
    tile_product,
    tile_rows,
)
from pykern.kernels.norm import on
from torch import Tensor


@triton.jit(do_not_specialize=["rows", "a_rows", "a_row", "b_group", "b_inner", "b_column", "programs", "bias_group"])
def _product_kernel(
    a,  # (a_rows, INNER)
    b,  # (GROUPS, INNER, COLUMNS)
    offs,  # (GROUPS,)
    bias,  # (GROUPS or 1, COLUMNS) or None
    gather,  # (rows,) or None
    scatter,  # (rows,) or None; then the output is zeros
    out,  # (rows, COLUMNS)
    rows,
    a_rows,
    a_row,  # strides in units of UNIT elements, None for 1
    b_group,
    b_inner,
    b_column,
    programs,
    bias_group,  # 0 for one bias
    UNIT: tl.constexpr,
    GROUPS: tl.constexpr,
    INNER: tl.constexpr,
    COLUMNS: tl.constexpr,
    CLAMP: tl.constexpr,  # whether `gather` is clamped to the rows, or rows out of bounds are zeros
    PRECISION: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    begin, end, last = group_tiles(offs, rows, GROUPS, BLOCK_G, BLOCK_M)
    panels: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    for index in range(tl.program_id(0), tl.max(last, 0) * panels, programs):
        # Tiles next to each other share the group's matrix, and panels of it follow one another.
        g, row, inside = tile_rows(begin, end, last, index // panels, BLOCK_M)
        column = index % panels * BLOCK_N + tl.arange(0, BLOCK_N)
        source, read = source_rows(gather, row, inside, a_rows, CLAMP)
        acc = tile_product(
            *(a, b + g.to(tl.int64) * b_group * UNIT, source, read, column, tl.where(g < GROUPS, INNER, 0)),
            *(a_row, b_inner, b_column, UNIT, INNER, COLUMNS, PRECISION, BLOCK_K),
        )
        if bias is not None:
            added = tl.load(bias + tl.minimum(g, GROUPS - 1) * bias_group + column, mask=column < COLUMNS, other=0.0)
            acc += tl.where(g < GROUPS, added.to(tl.float32), 0.0)[None, :]
        target, write = source_rows(scatter, row, inside, rows, False)
        out_tile = out + target[:, None] * COLUMNS + column[None, :]
        tl.store(out_tile, acc.to(out.dtype.element_ty), mask=write[:, None] & (column < COLUMNS)[None, :])


@triton.jit(do_not_specialize=["rows", "a_rows", "a_row"])
def _matrix_gradient_kernel(
    a,  # (a_rows, INNER)
    grad,  # (rows, COLUMNS)
    offs,  # (GROUPS,)
    gather,  # (rows,) or None
    scatter,  # (rows,) or None
    db,  # (GROUPS, INNER, COLUMNS)
    rows,
    a_rows,
    a_row,
    UNIT: tl.constexpr,
    GROUPS: tl.constexpr,
    INNER: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    g = tl.program_id(1)
    panels: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    element = tl.program_id(0) // panels * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) % panels * BLOCK_N + tl.arange(0, BLOCK_N)
    ends = group_ends(offs, rows, GROUPS, BLOCK_G)
    end = at(ends, g)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(at(ends, g - 1), end, BLOCK_K):
        row = start + tl.arange(0, BLOCK_K)
        place, given = source_rows(scatter, row, row < end, rows, False)
        right = grad + place[:, None] * COLUMNS + column[None, :]
        right = tl.load(right, mask=given[:, None] & (column < COLUMNS)[None, :], other=0.0)  # (rows, columns)
        source, read = source_rows(gather, row, row < end, a_rows, True)
        left = a + element[:, None] + source[None, :] * a_row * UNIT
        left = tl.load(left, mask=(element < INNER)[:, None] & read[None, :], other=0.0)  # (inner, rows)
        acc = tl.dot(left, right.to(left.dtype), acc, input_precision=PRECISION)
    out = db + (g.to(tl.int64) * INNER + element)[:, None] * COLUMNS + column[None, :]
    tl.store(out, acc.to(db.dtype.element_ty), mask=(element < INNER)[:, None] & (column < COLUMNS)[None, :])


def product(
    a: Tensor,
    b: Tensor,
    offs: Tensor,
    bias: Tensor | None,
    gather: Tensor | None,
    scatter: Tensor | None,
    out: Tensor,
    clamp: bool,
) -> Tensor:
    """Writes to `out`, but not to rows to which `scatter` sends nothing."""
    rows, (groups, inner, columns) = len(out), b.shape
    if out.numel() == 0:
        return out
    a, b = rows_side_by_side(a), side_by_side(b)
    unit, steps = strides_in_units(a, b, inner, columns)
    config = product_config(rows // groups, columns, a.dtype, unit)
    programs = bounded_programs(config, rows, groups, columns, a.device)
    with on(a.device):
        _product_kernel[(programs,)](
            *(a, b, *in_row(offs, bias, gather, scatter), out, rows, len(a), *steps, programs),
            columns if bias is not None and bias.dim() == 2 else 0,
            UNIT=unit,
            GROUPS=groups,
            INNER=inner,
            COLUMNS=columns,
            CLAMP=clamp,
            PRECISION=dot_precision(a.dtype),
            BLOCK_G=triton.next_power_of_2(groups + 1),
            **config.blocks(),
        )
    return out


def matrix_gradients(
    a: Tensor, b: Tensor, grad: Tensor, offs: Tensor, gather: Tensor | None, scatter: Tensor | None, rows: int
) -> Tensor:
    """The gradients of the groups' matrices, which are like `b`."""
    groups, inner, columns = b.shape
    db = b.new_empty(b.shape)
    if db.numel() == 0:
        return db
    a, grad = rows_side_by_side(a), grad.contiguous()
    unit = math.gcd(16 // a.element_size(), inner, columns, a.stride(0))
    config = product_config(inner, columns, a.dtype, unit)
    with on(a.device):
        _matrix_gradient_kernel[(triton.cdiv(inner, config.rows) * triton.cdiv(columns, config.columns), groups)](
            *(a, grad, *in_row(offs, gather, scatter), db, rows, len(a), a.stride(0) // unit),
            UNIT=unit,
            GROUPS=groups,
            INNER=inner,
            COLUMNS=columns,
            PRECISION=dot_precision(a.dtype),
            BLOCK_G=triton.next_power_of_2(groups + 1),
            **config.blocks(),
        )
    return db


# The ops' own signatures; shapes, types and meaning are documented with them in pykern/ops/moe/grouped.py.


def grouped_mm(mat_a, mat_b, offs, bias, out_dtype, gather, scatter):
    rows = len(mat_a) if gather is None else len(gather)
    new = mat_a.new_empty if scatter is None else mat_a.new_zeros
    out = new((rows, mat_b.shape[2]), dtype=out_dtype or mat_a.dtype)
    return product(mat_a, mat_b, offs, bias, gather, scatter, out, clamp=True)


def grouped_mm_backward(doutput, mat_a, mat_b, offs, bias, out_dtype, gather, scatter, output_mask):
    rows = len(mat_a) if gather is None else len(gather)
    da = db = dbias = None
    if doutput.dtype != mat_a.dtype:
        doutput = doutput.to(mat_a.dtype)
    if output_mask[0]:
        da = mat_a.new_empty((rows, mat_b.shape[1]), dtype=mat_a.dtype if gather is None else torch.float32)
        da = product(doutput, mat_b.mT, offs, None, scatter, None, da, clamp=False)
        if gather is not None:
            da = sum_rows(da, gather, len(mat_a), mat_a.dtype)
    if output_mask[1]:
        db = matrix_gradients(mat_a, mat_b, doutput, offs, gather, scatter, rows)
    if output_mask[2]:
        dbias = group_sums(doutput, offs, scatter).sum_to_size(bias.shape).to(bias.dtype)
    return da, db, dbias

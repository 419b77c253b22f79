"""A matmul per group of rows: the group's rows of one matrix times the group's own matrix, forward and backward.

How the rows are cut into groups is known on the device alone. Each program reads the offsets and counts the tiles of
every group in registers; the host only bounds the number of tiles, and programs walk over as many as there are. Rows
behind the last offset are one more group, whose product has no summands: they become zeros.

Rows are gathered when they are loaded and scattered when they are stored, so no permuted copy is made. The gradient of
the rows is the same product with the matrices transposed, gathered where the forward scattered. Where it gathered, a
row's gradients are added up by a kernel of their own, in the order of the rows, which makes the sum repeatable.
The gradient of a group's matrix sums over the group's rows; an empty group has none, and zeros are written.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from pykern.kernels.attention_tiles import dot_precision
from pykern.kernels.norm import on
from torch import Tensor


@dataclass(frozen=True)
class Config:
    """Tiles of rows × columns of the product, how many summands are loaded at a time, and how far ahead."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int

    def blocks(self) -> dict[str, int]:
        sizes = {"BLOCK_M": self.rows, "BLOCK_N": self.columns, "BLOCK_K": self.inner}
        return sizes | {"num_warps": self.warps, "num_stages": self.stages}


def product_config(rows: int, columns: int, itemsize: int, exact: bool) -> Config:
    """For a product of about `rows` × `columns`. `exact`: fp32 without tensor cores, whose operands fill registers.

    With fewer rows than a tile has, what counts is to read the matrix once: short tiles leave room for depth.
    """
    if exact:
        return Config(min(max(triton.next_power_of_2(rows), 16), 64), 64, 16, warps=4, stages=2)
    inner = 128 // itemsize  # a line of 128 bytes
    if rows <= 32 or columns <= 32:
        return Config(32, 64, inner, warps=4, stages=4)
    if rows <= 64 or columns <= 128:
        return Config(64, 128, inner, warps=4, stages=3)
    return Config(128, 128, inner, warps=8, stages=3)


@lru_cache
def _processors(device: torch.device) -> int:
    # In the interpreter two, so that programs have several tiles.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _ends(offs, rows, GROUPS: tl.constexpr, BLOCK_G: tl.constexpr):
    """(BLOCK_G,) where groups end, no later than the rows do; behind the groups all rows that are left."""
    group = tl.arange(0, BLOCK_G)
    end = tl.load(offs + group, mask=group < GROUPS, other=0)
    end = tl.where(group < GROUPS, tl.minimum(tl.maximum(end, 0), rows), rows)
    return tl.associative_scan(end, 0, _larger)


@triton.jit
def _at(values, index):
    """One of a vector of numbers ≥ 0, as a scalar; 0 for an index below the first."""
    return tl.sum(tl.where(tl.arange(0, values.shape[0]) == index, values, 0), 0)


@triton.jit
def _source(index, row, inside, rows, CLAMP: tl.constexpr):
    """Which rows of a matrix to read and whether to: row itself, or where `index` points."""
    source = row.to(tl.int64)
    if index is not None:
        source = tl.load(index + row, mask=inside, other=0)
        if CLAMP:
            source = tl.minimum(tl.maximum(source, 0), rows - 1)
        else:
            inside &= (source >= 0) & (source < rows)
            source = tl.where(inside, source, 0)
    return source, inside


@triton.jit
def _step(index, stride, UNIT: tl.constexpr):
    """Offsets of elements with this stride in units; None stands for adjacent elements."""
    return index if stride is None else index.to(tl.int64) * stride * UNIT


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
    end = _ends(offs, rows, GROUPS, BLOCK_G)
    group = tl.arange(0, BLOCK_G)
    begin = tl.where(group == 0, 0, tl.gather(end, tl.maximum(group - 1, 0), 0))
    tiles = (end - begin + (BLOCK_M - 1)) // BLOCK_M
    last = tl.cumsum(tiles, 0)  # the tile behind a group's last
    panels: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    total = tl.sum(tiles, 0) * panels
    for index in range(tl.program_id(0), total, programs):
        # Tiles next to each other share the group's matrix, and panels of it follow one another.
        tile, panel = index // panels, index % panels
        g = tl.sum((last <= tile).to(tl.int32), 0)
        first = _at(begin, g) + (tile - _at(last, g - 1)) * BLOCK_M
        row = first + tl.arange(0, BLOCK_M)
        column = panel * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = row < _at(end, g)
        source, read = _source(gather, row, inside, a_rows, CLAMP)
        lane = tl.arange(0, BLOCK_K)
        a_tile = a + source[:, None] * a_row * UNIT + lane[None, :]
        b_tile = b + g.to(tl.int64) * b_group * UNIT
        b_tile += _step(lane, b_inner, UNIT)[:, None] + _step(column, b_column, UNIT)[None, :]
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        summands = tl.where(g < GROUPS, INNER, 0)
        for start in range(0, summands, BLOCK_K):
            some = lane < INNER - start
            left = tl.load(a_tile, mask=read[:, None] & some[None, :], other=0.0)
            right = tl.load(b_tile, mask=some[:, None] & (column < COLUMNS)[None, :], other=0.0)
            acc = tl.dot(left, right, acc, input_precision=PRECISION)
            a_tile += BLOCK_K
            b_tile += BLOCK_K if b_inner is None else tl.cast(b_inner, tl.int64) * (BLOCK_K * UNIT)
        if bias is not None:
            added = tl.load(bias + tl.minimum(g, GROUPS - 1) * bias_group + column, mask=column < COLUMNS, other=0.0)
            acc += tl.where(g < GROUPS, added.to(tl.float32), 0.0)[None, :]
        target, write = _source(scatter, row, inside, rows, False)
        out_tile = out + target[:, None] * COLUMNS + column[None, :]
        tl.store(out_tile, acc.to(out.dtype.element_ty), mask=write[:, None] & (column < COLUMNS)[None, :])


@triton.jit(do_not_specialize=["rows", "a_rows", "a_row"])
def _matrix_gradient_kernel(
    a,  # (a_rows, INNER)
    grad,  # (rows, COLUMNS)
    offs,  # (GROUPS,)
    gather,  # (rows,) or None
    scatter,  # (rows,) or None
    db,  # (GROUPS, INNER, COLUMNS) or None
    dbias,  # (GROUPS, COLUMNS) or None
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
    ends = _ends(offs, rows, GROUPS, BLOCK_G)
    end = _at(ends, g)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(_at(ends, g - 1), end, BLOCK_K):
        row = start + tl.arange(0, BLOCK_K)
        place, given = _source(scatter, row, row < end, rows, False)
        right = grad + place[:, None] * COLUMNS + column[None, :]
        right = tl.load(right, mask=given[:, None] & (column < COLUMNS)[None, :], other=0.0)  # (rows, columns)
        if dbias is not None:
            total += tl.sum(right.to(tl.float32), 0)
        if db is not None:
            source, read = _source(gather, row, row < end, a_rows, True)
            left = a + element[:, None] + source[None, :] * a_row * UNIT
            left = tl.load(left, mask=(element < INNER)[:, None] & read[None, :], other=0.0)  # (inner, rows)
            acc = tl.dot(left, right.to(left.dtype), acc, input_precision=PRECISION)
    if db is not None:
        out = db + (g.to(tl.int64) * INNER + element)[:, None] * COLUMNS + column[None, :]
        tl.store(out, acc.to(db.dtype.element_ty), mask=(element < INNER)[:, None] & (column < COLUMNS)[None, :])
    if dbias is not None and tl.program_id(0) < panels:
        tl.store(dbias + g * COLUMNS + column, total, mask=column < COLUMNS)


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


def _side_by_side(matrix: Tensor) -> Tensor:
    """The matrix, copied if neither its rows nor its columns have adjacent elements."""
    return matrix if 1 in matrix.stride()[-2:] else matrix.contiguous()


def _rows_side_by_side(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.clone(memory_format=torch.contiguous_format)


def _in_row(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def _unit(elements: int, *sizes: int) -> int:
    """The most elements, up to `elements`, that divide all sizes and strides."""
    return math.gcd(elements, *sizes)


def _product(
    a: Tensor,
    b: Tensor,
    offs: Tensor,
    bias: Tensor | None,
    gather: Tensor | None,
    scatter: Tensor | None,
    dtype: torch.dtype,
    rows: int,
    clamp: bool,
) -> Tensor:
    groups, inner, columns = b.shape
    out = (a.new_empty if scatter is None else a.new_zeros)((rows, columns), dtype=dtype)
    if out.numel() == 0:
        return out
    a, b = _rows_side_by_side(a), _side_by_side(b)
    strides = (a.stride(0), *b.stride())
    unit = _unit(16 // a.element_size(), inner, columns, *(stride for stride in strides if stride != 1))
    steps = [None if place > 1 and stride == 1 else stride // unit for place, stride in enumerate(strides)]
    precision = dot_precision(a.dtype)
    exact = a.dtype == torch.float32 and precision == "ieee"
    config = product_config(rows // groups, columns, a.element_size(), exact)
    tiles = (triton.cdiv(rows, config.rows) + groups) * triton.cdiv(columns, config.columns)
    programs = min(tiles, _processors(a.device))
    with on(a.device):
        _product_kernel[(programs,)](
            *(a, b, *_in_row(offs, bias, gather, scatter), out, rows, len(a), *steps, programs),
            columns if bias is not None and bias.dim() == 2 else 0,
            UNIT=unit,
            GROUPS=groups,
            INNER=inner,
            COLUMNS=columns,
            CLAMP=clamp,
            PRECISION=precision,
            BLOCK_G=triton.next_power_of_2(groups + 1),
            **config.blocks(),
        )
    return out


def _matrix_gradients(
    a: Tensor,
    b: Tensor,
    grad: Tensor,
    offs: Tensor,
    gather: Tensor | None,
    scatter: Tensor | None,
    rows: int,
    wants: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of the groups' matrices and, in fp32, of a bias for each group."""
    groups, inner, columns = b.shape
    db = b.new_empty(b.shape) if wants[0] else None
    dbias = b.new_empty((groups, columns), dtype=torch.float32) if wants[1] else None
    a, grad = _rows_side_by_side(a), grad.contiguous()
    unit = _unit(16 // a.element_size(), inner, columns, a.stride(0))
    precision = dot_precision(a.dtype)
    exact = a.dtype == torch.float32 and precision == "ieee"
    config = product_config(inner if wants[0] else 1, columns, a.element_size(), exact)
    blocks = triton.cdiv(inner, config.rows) if wants[0] else 1
    with on(a.device):
        _matrix_gradient_kernel[(max(blocks, 1) * triton.cdiv(columns, config.columns), groups)](
            *(a, grad, *_in_row(offs, gather, scatter), db, dbias, rows, len(a), a.stride(0) // unit),
            UNIT=unit,
            GROUPS=groups,
            INNER=inner,
            COLUMNS=columns,
            PRECISION=precision,
            BLOCK_G=triton.next_power_of_2(groups + 1),
            **config.blocks(),
        )
    return db, dbias


def _sum_rows(values: Tensor, index: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """(rows, size) with values[i] added to row index[i], in the order of i."""
    size = values.shape[1]
    out = values.new_empty((rows, size), dtype=dtype)
    index, order = index.clamp(0, rows - 1).sort(stable=True)
    begins = torch.searchsorted(index, torch.arange(rows + 1, device=index.device))
    with on(values.device):
        _sum_rows_kernel[(rows, triton.cdiv(size, 1024))](values, order, begins, out, SIZE=size, BLOCK=1024)
    return out


# The ops' own signatures; shapes, types and meaning are documented with them in pykern/ops/moe/grouped.py.


def grouped_mm(mat_a, mat_b, offs, bias, out_dtype, gather, scatter):
    rows = len(mat_a) if gather is None else len(gather)
    return _product(mat_a, mat_b, offs, bias, gather, scatter, out_dtype or mat_a.dtype, rows, clamp=True)


def grouped_mm_backward(doutput, mat_a, mat_b, offs, bias, out_dtype, gather, scatter, output_mask):
    rows = len(mat_a) if gather is None else len(gather)
    da = db = dbias = None
    if doutput.dtype != mat_a.dtype:
        doutput = doutput.to(mat_a.dtype)
    if output_mask[0]:
        dtype = mat_a.dtype if gather is None else torch.float32
        da = _product(doutput, mat_b.mT, offs, None, scatter, None, dtype, rows, clamp=False)
        if gather is not None and da.numel():
            da = _sum_rows(da, gather, len(mat_a), mat_a.dtype)
        elif gather is not None:
            da = mat_a.new_zeros(mat_a.shape)
    if output_mask[1] or output_mask[2]:
        if mat_b.shape[2] == 0:
            db, dbias = mat_b.new_empty(mat_b.shape), None if bias is None else bias.new_empty(bias.shape)
        else:
            wants = (output_mask[1], output_mask[2])
            db, dbias = _matrix_gradients(mat_a, mat_b, doutput, offs, gather, scatter, rows, wants)
    if dbias is not None:
        dbias = dbias.sum_to_size(bias.shape).to(bias.dtype)
    return da, db if output_mask[1] else None, dbias if output_mask[2] else None

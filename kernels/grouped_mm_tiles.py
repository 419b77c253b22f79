"""Tiles of grouped products: their sizes, and how programs find the rows of their tiles in groups.

How the rows are cut into groups is known on the device alone. Each program reads the offsets and counts the tiles of
every group in registers; the host only bounds the number of tiles, and programs walk over as many as there are. Rows
behind the last offset are one more group, whose product has no summands.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from pykern.kernels.attention_tiles import dot_precision
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


def product_config(rows: int, columns: int, dtype: torch.dtype, unit: int) -> Config:
    """For a product of about `rows` × `columns` whose memory is accessed by `unit` elements at a time.

    With fewer rows than a tile has, what counts is to read the matrix once: short tiles leave room for depth. fp32
    without tensor cores takes its operands in registers, and narrow accesses an address and a predicate each.
    """
    if dtype == torch.float32 and dot_precision(dtype) == "ieee":
        return Config(min(max(triton.next_power_of_2(rows), 16), 64), 64, 16, warps=4, stages=2)
    inner = 128 // dtype.itemsize  # a line of 128 bytes
    if rows <= 32 or columns <= 32:
        return Config(32, 64, inner, warps=4, stages=4)
    narrow = unit * dtype.itemsize < 16
    inner = inner // 2 if narrow else inner
    if rows <= 64 or columns <= 128:
        return Config(64, 128, inner, warps=8 if narrow else 4, stages=3)
    return Config(128, 128, inner, warps=8, stages=3)


@lru_cache
def processors(device: torch.device) -> int:
    # In the interpreter two, so that programs have several tiles.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def group_ends(offs, rows, GROUPS: tl.constexpr, BLOCK_G: tl.constexpr):
    """(BLOCK_G,) where groups end, no later than the rows do; behind the groups all rows that are left."""
    group = tl.arange(0, BLOCK_G)
    end = tl.load(offs + group, mask=group < GROUPS, other=0)
    end = tl.where(group < GROUPS, tl.minimum(tl.maximum(end, 0), rows), rows)
    return tl.associative_scan(end, 0, _larger)


@triton.jit
def at(values, index):
    """One of a vector of numbers ≥ 0, as a scalar; 0 for an index below the first."""
    return tl.sum(tl.where(tl.arange(0, values.shape[0]) == index, values, 0), 0)


@triton.jit
def group_tiles(offs, rows, GROUPS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_M: tl.constexpr):
    """Where groups begin and end, and the number of tiles up to the end of each: (BLOCK_G,), the last of them all."""
    end = group_ends(offs, rows, GROUPS, BLOCK_G)
    group = tl.arange(0, BLOCK_G)
    begin = tl.where(group == 0, 0, tl.gather(end, tl.maximum(group - 1, 0), 0))
    return begin, end, tl.cumsum((end - begin + (BLOCK_M - 1)) // BLOCK_M, 0)


@triton.jit
def tile_rows(begin, end, last, tile, BLOCK_M: tl.constexpr):
    """The group of a tile, its rows (M,), and which of them are the group's."""
    g = tl.sum((last <= tile).to(tl.int32), 0)
    row = at(begin, g) + (tile - at(last, g - 1)) * BLOCK_M + tl.arange(0, BLOCK_M)
    return g, row, row < at(end, g)


@triton.jit
def source_rows(index, row, inside, rows, CLAMP: tl.constexpr):
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
def step(index, stride, UNIT: tl.constexpr):
    """Offsets of elements with this stride in units; None stands for adjacent elements."""
    return index if stride is None else index.to(tl.int64) * stride * UNIT


@triton.jit
def tile_product(
    a,
    b,
    source,
    read,
    column,
    summands,
    a_row,
    b_inner,
    b_column,
    UNIT: tl.constexpr,
    INNER: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """(M, N) in fp32: the rows `source` (M,) of a, where `read`, times the columns (N,) of a group's matrix b."""
    lane = tl.arange(0, BLOCK_K)
    a += source[:, None] * a_row * UNIT + lane[None, :]
    b += step(lane, b_inner, UNIT)[:, None] + step(column, b_column, UNIT)[None, :]
    acc = tl.zeros((source.shape[0], column.shape[0]), tl.float32)
    for start in range(0, summands, BLOCK_K):
        some = lane < INNER - start
        left = tl.load(a, mask=read[:, None] & some[None, :], other=0.0)
        right = tl.load(b, mask=some[:, None] & (column < COLUMNS)[None, :], other=0.0)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
        a += BLOCK_K
        b += BLOCK_K if b_inner is None else tl.cast(b_inner, tl.int64) * (BLOCK_K * UNIT)
    return acc


def side_by_side(matrix: Tensor) -> Tensor:
    """The matrix, copied if neither its rows nor its columns have adjacent elements."""
    return matrix if 1 in matrix.stride()[-2:] else matrix.contiguous()


def rows_side_by_side(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.clone(memory_format=torch.contiguous_format)


def in_row(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def strides_in_units(a: Tensor, b: Tensor, *sizes: int) -> tuple[int, list[int | None]]:
    """The unit, the most elements up to 16 bytes that divide strides and sizes, and the strides in it, None for 1."""
    apart = [tensor.stride(0) if len(tensor) > 1 else 0 for tensor in (a, b)]  # 1 where they overlap
    steps = [None if stride == 1 else stride for stride in b.stride()[1:]]
    unit = math.gcd(16 // a.element_size(), *sizes, *apart, *(step for step in steps if step is not None))
    return unit, [None if step is None else step // unit for step in (*apart, *steps)]


def bounded_programs(config: Config, rows: int, groups: int, columns: int, device: torch.device) -> int:
    """No more programs than tiles, of which every group may have one that is not full."""
    return min((triton.cdiv(rows, config.rows) + groups) * triton.cdiv(columns, config.columns), processors(device))

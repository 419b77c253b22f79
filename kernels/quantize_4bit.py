"""Quantises a weight to 4 bits, bit for bit as pykern/ops/quantize_4bit.py says.

A tile is whole blocks, one a row, read once. Quotients are IEEE's and products are not contracted, or codes at the edge
between two would differ. Only the last tile takes masks, as in dequantize_4bit.py.

The nearest of 16 values is found by halving: the edge to compare with next is selected among constants. A NaN is above
every edge, as for torch.bucketize.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from pykern.kernels.code_tables import FP4, NF4
from pykern.kernels.norm import on
from pykern.kernels.weight4bit import EXACT


def _edges(table: tuple[float, ...]) -> tl.constexpr:
    """Halfway between neighbouring values, in fp32."""
    values = torch.tensor(table, dtype=torch.float32, device="cpu").sort().values
    return tl.constexpr(tuple(((values[:-1] + values[1:]) / 2).tolist()))


NF4_EDGES = _edges(NF4)
FP4_EDGES = _edges(FP4)
# The codes of FP4 by rank, the lowest four bits first; those of NF4 are the ranks.
_FP4_ORDER = torch.tensor(FP4, device="cpu").argsort(stable=True).tolist()
FP4_CODES = tl.constexpr(sum(code << (4 * rank) for rank, code in enumerate(_FP4_ORDER)))
SMALLEST = tl.constexpr(1e-38)  # below this a scale has no finite inverse
INT4_ZERO = tl.constexpr(8.0)
BEYOND = tl.constexpr(32.0)  # an int4 step from which on every code is 0 or 15, whatever the zero point
ROUND = tl.constexpr(12582912.0)  # 1.5 · 2²³: adding it rounds numbers below 2²² to integers, ties to even


@dataclass(frozen=True)
class Config:
    """A tile is `rows` blocks of up to `columns` elements (a power of two); a thread stores `bytes` side by side."""

    rows: int
    columns: int
    bytes: int
    warps: int

    @staticmethod
    def of(blocksize: int, dtype: torch.dtype, whole: bool, device: torch.device) -> "Config":
        """Two loads of 16 bytes a thread, up to 512 threads; not `whole`, with a mask each, as many elements as in one.

        An exact quotient takes some forty instructions for each element: more of them leave the instruction cache.
        """
        columns = max(triton.next_power_of_2(blocksize), 2)
        vector = 16 // dtype.itemsize
        each = (2 if whole else 1) * vector
        # In the interpreter small, so that short tests cross several tiles.
        elements = 256 if device.type == "cpu" else 4 * 32 * each
        rows = max(elements // columns, 1)
        warps = min(max(rows * columns // (32 * each), 1), 16)
        return Config(rows, columns, min(columns, vector) // 2, warps)

    def blocks(self) -> dict[str, int]:
        return {"ROWS": self.rows, "COLUMNS": self.columns, "BYTES": self.bytes, "num_warps": self.warps}


@triton.jit
def _largest(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _rank(x, EDGES: tl.constexpr):
    """How many of the 15 edges are below x."""
    b8 = ~(EDGES[7] >= x)
    b4 = ~(tl.where(b8, EDGES[11], EDGES[3]) >= x)
    upper, lower = tl.where(b4, EDGES[13], EDGES[9]), tl.where(b4, EDGES[5], EDGES[1])
    b2 = ~(tl.where(b8, upper, lower) >= x)
    upper = tl.where(b4, tl.where(b2, EDGES[14], EDGES[12]), tl.where(b2, EDGES[10], EDGES[8]))
    lower = tl.where(b4, tl.where(b2, EDGES[6], EDGES[4]), tl.where(b2, EDGES[2], EDGES[0]))
    b1 = ~(tl.where(b8, upper, lower) >= x)
    return (b8.to(tl.int32) << 3) | (b4.to(tl.int32) << 2) | (b2.to(tl.int32) << 1) | b1.to(tl.int32)


@triton.jit
def _store_packed(codes, first, q, length, MASKED: tl.constexpr, BYTES: tl.constexpr):
    """(R, C) codes of which `length` (R, 1) exist; `first` (R, 1) is the number of a row's first element, even."""
    high, low = q.reshape(q.shape[0], q.shape[1] // 2, 2).split()
    byte = tl.arange(0, q.shape[1] // 2)[None, :]
    mask = None
    if MASKED:
        mask = byte * 2 < length
    byte = tl.max_contiguous(first // 2 + byte, [1, BYTES])
    tl.store(codes + byte, ((high << 4) | low).to(tl.uint8), mask=mask)


@triton.jit
def _quantize_tile(
    weight,
    codes,
    absmax,
    tile,
    count,
    MASKED: tl.constexpr,
    FP4: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BYTES: tl.constexpr,
):
    block = tile * ROWS + tl.arange(0, ROWS)[:, None]  # (ROWS, 1)
    column = tl.arange(0, COLUMNS)[None, :]
    first = block * COLUMNS
    mask, block_mask = None, None
    if MASKED:
        mask, block_mask = column < count - first, first < count
        x = tl.load(weight + first + column, mask=mask, other=0.0).to(tl.float32)
    else:
        x = tl.load(weight + first + column).to(tl.float32)
    largest = tl.reduce(tl.abs(x), 1, _largest, keep_dims=True)  # (ROWS, 1)
    divisor = _largest(largest, tl.full(largest.shape, SMALLEST, tl.float32))
    scaled = x * tl.div_rn(1.0, divisor)
    if MASKED:
        short = first + COLUMNS > count
        scaled = tl.where(short, tl.div_rn(x, divisor), scaled)
        scaled = tl.where(mask, scaled, 0.0)
        largest = tl.where(short, divisor, largest)
    if FP4:
        order = tl.full(scaled.shape, FP4_CODES, tl.int64)
        q = (order >> (4 * _rank(scaled, FP4_EDGES)).to(tl.int64) & 15).to(tl.int32)
    else:
        q = _rank(scaled, NF4_EDGES)
    tl.store(absmax + block, largest, mask=block_mask)
    _store_packed(codes, first, q, count - first, MASKED, BYTES)


@triton.jit(do_not_specialize=["count"])
def _quantize_kernel(
    weight,  # (count,)
    codes,  # (ceil(count / 2),)
    absmax,  # (ceil(count / COLUMNS),)
    count,
    FP4: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,  # the block size
    BYTES: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    if (tile + 1) * (ROWS * COLUMNS) <= count:
        _quantize_tile(weight, codes, absmax, tile, count, False, FP4, ROWS, COLUMNS, BYTES)
    else:
        _quantize_tile(weight, codes, absmax, tile, count, True, FP4, ROWS, COLUMNS, BYTES)


@triton.jit
def _round(x):
    """To integers, ties to even; NaN to 0, and what is large to something as large as matters to a code."""
    x = tl.where(x != x, 0.0, tl.minimum(tl.maximum(x, -BEYOND), BEYOND))
    return (x + ROUND) - ROUND


@triton.jit
def _quantize_groups(x, SYMMETRIC: tl.constexpr, SCALE: tl.constexpr):
    """Scales (R, 1), as they are stored, zero points (R, 1) in fp32 and codes (R, C) of groups."""
    if SYMMETRIC:
        scale = tl.div_rn(tl.reduce(tl.abs(x), 1, _largest, keep_dims=True), 7.5)
        low = scale
    else:
        low = -_largest(tl.reduce(-x, 1, _largest, keep_dims=True), 0.0)
        scale = tl.div_rn(_largest(tl.reduce(x, 1, _largest, keep_dims=True), 0.0) - low, 15.0)
    scale = scale.to(SCALE)
    step = scale.to(tl.float32)
    step = tl.where(step > 0.0, step, 1.0)
    if SYMMETRIC:
        zero = tl.full(step.shape, INT4_ZERO, tl.float32)
    else:
        zero = tl.minimum(tl.maximum(_round(tl.div_rn(-low, step)), 0.0), 15.0)
    q = tl.minimum(tl.maximum(_round(tl.div_rn(x, step)) + zero, 0.0), 15.0)
    return scale, zero, q.to(tl.int32)


@triton.jit
def _quantize_int4_tile(
    weight,
    codes,
    scales,
    zero_points,
    tile,
    count,
    columns,
    MASKED: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BYTES: tl.constexpr,
):
    group = tile * ROWS + tl.arange(0, ROWS)[:, None]  # (ROWS, 1)
    column = tl.arange(0, COLUMNS)[None, :]
    first, length = group * BLOCKSIZE, 0
    if MASKED:
        groups = tl.cdiv(columns, BLOCKSIZE)
        begin = group % groups * BLOCKSIZE
        first = group // groups * columns + begin
        length = tl.where(group < count, tl.minimum(columns - begin, BLOCKSIZE), 0)  # (ROWS, 1)
        x = tl.load(weight + first + column, mask=column < length, other=0.0).to(tl.float32)
    else:
        x = tl.load(weight + first + column).to(tl.float32)
    scale, zero, q = _quantize_groups(x, SYMMETRIC, scales.dtype.element_ty)
    tl.store(scales + group, scale, mask=group < count)
    tl.store(zero_points + group, zero.to(tl.uint8), mask=group < count)
    if PACKED:
        _store_packed(codes, first, q, length, MASKED, BYTES)
    else:
        tl.store(codes + first + column, q.to(tl.uint8), mask=column < length)


@triton.jit(do_not_specialize=["count", "columns"])
def _quantize_int4_kernel(
    weight,  # (rows, columns)
    codes,  # (rows · columns / 2,), or not PACKED (rows, columns) one code a byte
    scales,  # (rows, ceil(columns / BLOCKSIZE))
    zero_points,  # likewise
    count,  # of groups
    columns,
    WHOLE: tl.constexpr,  # whether no group is shorter than COLUMNS, and they follow one another
    SYMMETRIC: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BYTES: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    tensors, sizes = (weight, codes, scales, zero_points), (tile, count, columns)
    if WHOLE and (tile + 1) * ROWS <= count:
        _quantize_int4_tile(*tensors, *sizes, False, SYMMETRIC, PACKED, BLOCKSIZE, ROWS, COLUMNS, BYTES)
    else:
        _quantize_int4_tile(*tensors, *sizes, True, SYMMETRIC, PACKED, BLOCKSIZE, ROWS, COLUMNS, BYTES)


# The ops' own signatures; shapes, types and meaning are documented with them in pykern/ops. Weights with gaps are
# copied first: a block may run over several rows.


def quantize_4bit(weight, quant_type, blocksize):
    count = weight.numel()
    codes = weight.new_empty((count + 1) // 2, dtype=torch.uint8)
    absmax = weight.new_empty(triton.cdiv(count, blocksize), dtype=torch.float32)
    if count == 0:
        return codes, absmax
    config = Config.of(blocksize, weight.dtype, True, weight.device)
    grid = (triton.cdiv(count, config.rows * blocksize),)
    with on(weight.device):
        tensors = (weight.contiguous(), codes, absmax)
        _quantize_kernel[grid](*tensors, count, FP4=quant_type == "fp4", **config.blocks(), **EXACT)
    return codes, absmax


def quantize_int4(weight, blocksize, symmetric, scale_dtype):
    count, n = weight.numel(), weight.shape[-1]
    shape = (*weight.shape[:-1], triton.cdiv(n, blocksize))
    scales = weight.new_empty(shape, dtype=scale_dtype)
    zero_points = weight.new_empty(shape, dtype=torch.uint8)
    packed = n % 2 == 0 and (blocksize % 2 == 0 or blocksize >= n)
    codes = weight.new_empty((count + 1) // 2 if packed else (count + 1) // 2 * 2, dtype=torch.uint8)
    if count == 0:
        return codes, scales, zero_points
    blocksize = min(blocksize, n)
    whole = n % blocksize == 0 and blocksize == triton.next_power_of_2(blocksize) > 1
    config = Config.of(blocksize, weight.dtype, whole, weight.device)
    constants = {
        "WHOLE": whole,
        "SYMMETRIC": symmetric,
        "PACKED": packed,
        "BLOCKSIZE": blocksize,
    }
    groups = scales.numel()
    with on(weight.device):
        tensors = (weight.contiguous(), codes, scales, zero_points)
        _quantize_int4_kernel[(triton.cdiv(groups, config.rows),)](
            *tensors, groups, n, **constants, **config.blocks(), **EXACT
        )
    if not packed:
        # Groups of odd sizes share bytes, which no two programs may write.
        codes[count:] = 0
        codes = codes[0::2] << 4 | codes[1::2]
    return codes, scales, zero_points

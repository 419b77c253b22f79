"""How kernels decode a 4-bit weight: codes to values, blocks to scales. The formats are in pykern/ops/_weight4bit.py.

What a weight does not have (nested scales, a code table, zero points) is None, which Triton takes as a constant:
nothing is loaded or computed for it. Kernels that decode are launched with `EXACT`.
"""

import triton
import triton.language as tl
from torch import Tensor

# Products and sums of scales round separately: no contraction to fused multiply-adds. Those of `tl.dot` stay fused.
EXACT = {"enable_fp_fusion": False}
ZERO = tl.constexpr(8.0)  # the code of zero where there are no zero points
NESTED_BLOCK = tl.constexpr(256)  # how many scales share a nested one


@triton.jit
def load(pointer, mask):
    return tl.load(pointer) if mask is None else tl.load(pointer, mask=mask, other=0)


@triton.jit
def block_scale(absmax, nested_absmax, nested_code, nested_offset, block, mask):
    """The fp32 scales of blocks, given by int64 numbers."""
    stored = load(absmax + block, mask)
    if nested_absmax is None:
        scale = stored.to(tl.float32)
    else:
        factor = load(nested_absmax + block // NESTED_BLOCK, mask)
        scale = tl.load(nested_code + stored.to(tl.int32)) * factor + tl.load(nested_offset)
    return scale


@triton.jit
def block_zero(zero_points, block, mask):
    """The codes of zero of blocks, in fp32."""
    return ZERO if zero_points is None else load(zero_points + block, mask).to(tl.float32)


@triton.jit
def centred(q, zero):
    """The fp32 values of int4 codes before they are scaled.

    A code in the last bits of 2²³ makes the float 2²³ + code: a logical instruction instead of a conversion, which has
    a fraction of its rate. The difference is exact.
    """
    return (q.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - (zero + 8388608.0)


@triton.jit
def in_order(high, low):
    """(R, C) of high and of low nibbles as (R, 2 C) elements."""
    return tl.join(high, low).reshape(high.shape[0], 2 * high.shape[1])


@triton.jit
def load_weight(
    codes,
    absmax,
    nested_absmax,
    nested_code,
    nested_offset,
    code,
    zero_points,
    table,
    row,
    live,
    part,
    columns,
    dtype: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    ALIGNED: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """(ROWS, COLUMNS) of the weight: its rows `row` (ROWS, 1) where `live`, its columns from part · COLUMNS on.

    `table`: the values of all codes, (16,), None for int4. They are looked up in shared memory, where 16 neighbouring
    numbers have no bank conflicts. Global memory would have the same rate, but the compiler prefetches whatever a
    product in a loop depends on, each looked up value by itself.
    """
    byte = tl.arange(0, COLUMNS // 2)[None, :]
    mask = live
    if not WHOLE:
        mask &= byte * 2 < columns - part * COLUMNS
    packed = load(codes + row * (columns // 2) + (part * (COLUMNS // 2) + byte), mask)
    if ALIGNED:
        block = row * (columns // BLOCKSIZE) + part * COLUMNS // BLOCKSIZE  # (ROWS, 1)
        mask = live
    else:
        element = part * COLUMNS + byte * 2  # blocks begin with a byte: both of its codes have one scale
        if code is None:
            block = row * tl.cdiv(columns, BLOCKSIZE) + element // BLOCKSIZE
        else:
            block = (row * columns + element) // BLOCKSIZE
    scale = block_scale(absmax, nested_absmax, nested_code, nested_offset, block, mask)
    if code is None:
        zero = block_zero(zero_points, block, mask)
        high, low = centred(packed >> 4, zero) * scale, centred(packed & 15, zero) * scale
        weight = in_order(high.to(dtype), low.to(dtype))
    else:
        q = in_order(packed >> 4, packed & 15).to(tl.int32).reshape(ROWS * COLUMNS)
        if not ALIGNED:
            scale = in_order(scale, scale)
        weight = (tl.gather(table, q, 0).reshape(ROWS, COLUMNS) * scale).to(dtype)
    return weight


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]

"""The values of a 4-bit weight in one pass, nested scales included; the decoding is in weight4bit.py.

It is bound by writing the values. A tile is whole pieces of blocks, one a row, so that a scale is loaded once a row. A
thread loads as many codes at a time as fill one store of 16 bytes: wider loads would have threads exchange values in
shared memory, while these are whole lines as well. Only the last tile takes masks: a count that is a multiple of
nothing known would turn every access into one of a single element.

Groups of int4 whose last one in a row is shorter, or which have an odd size, take a kernel of their own that finds the
scale of each element.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from pykern.kernels.norm import on
from pykern.kernels.weight4bit import EXACT, block_scale, block_zero, centred, contiguous, in_order


@dataclass(frozen=True)
class Config:
    """A tile is `rows` pieces of blocks, of `span` elements each; a thread loads `bytes` codes side by side."""

    span: int
    rows: int
    bytes: int
    warps: int = 4

    @staticmethod
    def of(blocksize: int, dtype: torch.dtype, device: torch.device) -> "Config":
        """Four stores a thread, whose codes are all under way before the first is decoded."""
        span = math.gcd(blocksize, 64)
        vector = 16 // dtype.itemsize
        # In the interpreter small, so that short tests cross several tiles.
        elements = 256 if device.type == "cpu" else 4 * 32 * 4 * vector
        return Config(span, elements // span, min(span, vector) // 2)


LEAST_SPAN = 8  # below this rows are too short to load a scale once for each
ELEMENTS = 1024  # of a tile where each element finds its scale


@triton.jit
def _value(q, code, zero):
    """The fp32 values of codes before they are scaled.

    A code table is 64 bytes of the first-level cache: a warp's 32 lookups are one access without conflicts. Shared
    memory has the same rate, and shuffles too with more instructions beside them; selections would take 15.
    """
    return centred(q, zero) if code is None else tl.load(code + q.to(tl.int32))


@triton.jit
def _dequantize_tile(
    codes,
    absmax,
    nested_absmax,
    nested_code,
    nested_offset,
    code,
    zero_points,
    out,
    start,
    count,
    MASKED: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    SPAN: tl.constexpr,
    ROWS: tl.constexpr,
    BYTES: tl.constexpr,
):
    row = tl.arange(0, ROWS)[:, None]  # (ROWS, 1)
    byte = row * (SPAN // 2) + tl.arange(0, SPAN // 2)[None, :]  # (ROWS, SPAN / 2)
    element = row * SPAN + tl.arange(0, SPAN)[None, :]  # (ROWS, SPAN)
    byte_mask, row_mask, element_mask = None, None, None
    if MASKED:
        left = count - start
        byte_mask, row_mask, element_mask = byte * 2 < left, row * SPAN < left, element < left
    # Told that no more are side by side, the compiler gives each thread the codes of its own stores.
    packed = tl.load(codes + start // 2 + tl.max_contiguous(byte, [1, BYTES]), mask=byte_mask)
    block = (start + row * SPAN) // BLOCKSIZE
    scale = block_scale(absmax, nested_absmax, nested_code, nested_offset, block, row_mask)
    zero = block_zero(zero_points, block, row_mask)
    high = (_value(packed >> 4, code, zero) * scale).to(out.dtype.element_ty)
    low = (_value(packed & 15, code, zero) * scale).to(out.dtype.element_ty)
    tl.store(out + start + element, in_order(high, low), mask=element_mask)


@triton.jit(do_not_specialize=["count"])
def _dequantize_kernel(
    codes,  # (ceil(count / 2),)
    absmax,  # (blocks,)
    nested_absmax,  # (ceil(blocks / 256),) or None, and so are the next two
    nested_code,  # (256,)
    nested_offset,  # ()
    code,  # (16,), None for int4
    zero_points,  # (blocks,) or None
    out,  # (count,)
    count,
    BLOCKSIZE: tl.constexpr,
    SPAN: tl.constexpr,
    ROWS: tl.constexpr,
    BYTES: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * (ROWS * SPAN)
    tensors = (codes, absmax, nested_absmax, nested_code, nested_offset, code, zero_points, out)
    if start + ROWS * SPAN <= count:
        _dequantize_tile(*tensors, start, count, False, BLOCKSIZE, SPAN, ROWS, BYTES)
    else:
        _dequantize_tile(*tensors, start, count, True, BLOCKSIZE, SPAN, ROWS, BYTES)


@triton.jit(do_not_specialize=["count", "columns"])
def _dequantize_groups_kernel(
    codes,  # (ceil(count / 2),)
    absmax,  # (rows, ceil(columns / BLOCKSIZE))
    zero_points,  # likewise, or None
    out,  # (rows, columns)
    count,
    columns,
    BLOCKSIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    mask = element < count
    row = element // columns
    group = row * tl.cdiv(columns, BLOCKSIZE) + (element - row * columns) // BLOCKSIZE
    packed = tl.load(codes + element // 2, mask=mask)
    q = tl.where(element % 2 == 0, packed >> 4, packed & 15)
    scale = block_scale(absmax, None, None, None, group, mask)
    value = centred(q, block_zero(zero_points, group, mask)) * scale
    tl.store(out + element, value.to(out.dtype.element_ty), mask=mask)


# The op's own signature; shapes, types and meaning are documented with it in pykern/ops.


def dequantize_4bit(
    codes, absmax, nested_absmax, nested_code, nested_offset, code, zero_points, shape, blocksize, dtype
):
    out = codes.new_empty(shape, dtype=dtype)
    count = out.numel()
    if count == 0:
        return out
    codes, absmax, code, zero_points = contiguous(codes, absmax, code, zero_points)
    nested = contiguous(nested_absmax, nested_code, nested_offset)
    config = Config.of(blocksize, dtype, codes.device)
    with on(codes.device):
        if config.span < LEAST_SPAN or (code is None and shape[-1] % blocksize != 0):
            tensors, sizes = (codes, absmax, zero_points, out), (count, shape[-1])
            grid = (triton.cdiv(count, ELEMENTS),)
            _dequantize_groups_kernel[grid](*tensors, *sizes, BLOCKSIZE=blocksize, BLOCK=ELEMENTS, **EXACT)
        else:
            tensors = (codes, absmax, *nested, code, zero_points, out)
            blocks = {"BLOCKSIZE": blocksize, "SPAN": config.span, "ROWS": config.rows, "BYTES": config.bytes}
            grid = (triton.cdiv(count, config.rows * config.span),)
            _dequantize_kernel[grid](*tensors, count, **blocks, num_warps=config.warps, **EXACT)
    return out

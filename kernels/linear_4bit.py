"""Products with a 4-bit weight, and the gradient of their input, which is one as well: dy · W.

A tile of codes is loaded once, decoded in registers to what dequantize_4bit gives, rounding included, and multiplied on
tensor cores. Few rows make few tiles: then the summed dimension is divided among more programs, each leaves its sums in
fp32, and a second kernel adds those in a fixed order. A single row has a kernel of its own (linear_4bit_gemv.py). For
many rows the weight is decoded once and torch multiplies: see FUSED_ROWS.

Sizes are not specialised. Those of the weight arrive in units, because a multiplication by a constant is what tells the
compiler that 16 bytes can move at once.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from pykern.kernels.attention_tiles import dot_precision
from pykern.kernels.dequantize_4bit import dequantize_4bit
from pykern.kernels.linear_4bit_config import FUSED_ROWS, LEAST, linear_config, split_count
from pykern.kernels.linear_4bit_gemv import serves as gemv_serves
from pykern.kernels.linear_4bit_gemv import vector_product
from pykern.kernels.norm import as_rows, on
from pykern.kernels.weight4bit import EXACT, contiguous, load_weight
from torch import Tensor


@triton.jit(do_not_specialize=["rows", "outs", "ins", "x_row", "splits"])
def _linear_kernel(
    x,  # (rows, ins) by x_row, for the gradient (rows, outs)
    codes,  # (outs · ins / 2,)
    absmax,  # (blocks,)
    nested_absmax,  # (ceil(blocks / 256),) or None, and so are the next two
    nested_code,  # (256,)
    nested_offset,  # ()
    code,  # (16,), None for int4
    zero_points,  # (blocks,) or None
    bias,  # (outs,) or None
    y,  # (splits, rows, outs), for the gradient (splits, rows, ins)
    rows,
    outs,
    ins,
    x_row,
    splits,
    OUT_UNIT: tl.constexpr,  # outs are counted in so many
    IN_UNIT: tl.constexpr,  # ins likewise
    X_UNIT: tl.constexpr,  # x_row likewise
    GRADIENT: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    ALIGNED: tl.constexpr,  # whether a row of a tile of the weight has a single scale
    WHOLE: tl.constexpr,  # whether the input dimension is a multiple of its tile
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    outs *= OUT_UNIT
    ins *= IN_UNIT
    if GRADIENT:
        width, depth = ins, outs
    else:
        width, depth = outs, ins

    # Programs that read the same codes come one after another.
    row_tiles, column_tiles = tl.cdiv(rows, BLOCK_M), tl.cdiv(width, BLOCK_N)
    task = tl.program_id(0)
    row = task % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]  # (M, 1)
    task = task // row_tiles
    tile = task % column_tiles
    split = task // column_tiles
    column = tile * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]  # (1, N)
    steps = tl.cdiv(depth, BLOCK_K)
    share = tl.cdiv(steps, splits)

    tensors = (codes, absmax, nested_absmax, nested_code, nested_offset, code, zero_points)
    table = None if code is None else tl.load(code + tl.arange(0, 16))
    x += row * (tl.cast(x_row, tl.int64) * X_UNIT)  # (M, 1)
    live = row < rows
    lane = tl.arange(0, BLOCK_K)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(split * share, tl.minimum((split + 1) * share, steps)):
        place = step * BLOCK_K + lane  # (K,)
        mask = live
        if GRADIENT or not WHOLE:
            mask &= place[None, :] < depth
        tile_x = tl.load(x + place[None, :], mask=mask, other=0.0)  # (M, K)
        if GRADIENT:
            w_row, part = place[:, None], tile
        else:
            w_row, part = column.reshape(BLOCK_N, 1), step
        weight = load_weight(
            *tensors,
            table,
            w_row.to(tl.int64),
            w_row < outs,
            part,
            ins,
            x.dtype.element_ty,
            BLOCKSIZE,
            ALIGNED,
            WHOLE,
            BLOCK_K if GRADIENT else BLOCK_N,
            BLOCK_N if GRADIENT else BLOCK_K,
        )
        sums = tl.dot(tile_x, weight if GRADIENT else weight.T, sums, input_precision=PRECISION)

    inside = column < width
    if bias is not None:
        sums += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    y += (split.to(tl.int64) * rows + row) * width + column
    tl.store(y, sums.to(y.dtype.element_ty), mask=live & inside)


@triton.jit(do_not_specialize=["rows", "columns", "splits"])
def _add_splits_kernel(
    sums,  # (splits, rows, columns)
    bias,  # (columns,) or None
    y,  # (rows, columns)
    rows,
    columns,
    splits,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    columns *= UNIT
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        total += tl.load(sums + (split * rows + row) * columns + column, mask=inside, other=0.0)
    if bias is not None:
        total += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * columns + column, total.to(y.dtype.element_ty), mask=inside)


def _fused(weight: Any, rows: int) -> bool:
    """Whether the kernel serves. A weight's row has to begin with a byte, and so has each of its groups."""
    code, (_, n), blocksize = weight[5], weight[7], weight[8]
    return rows <= FUSED_ROWS and n % 2 == 0 and (code is not None or blocksize % 2 == 0 or blocksize >= n)


def _partial_products(x: Tensor, weight: Any, bias: Tensor | None, gradient: bool) -> Tensor:
    """(splits, rows, width) that add up to (rows, in) · Wᵀ, or for the gradient to (rows, out) · W; nothing is empty.

    A single split is of x's dtype, with `bias` added; several are fp32 without it.
    """
    *tensors, (outs, ins), blocksize = weight
    code = tensors[5]
    rows, width, depth = len(x), *((ins, outs) if gradient else (outs, ins))
    blocksize = min(blocksize, ins) if code is None else blocksize
    aligned = ins % blocksize == 0 and blocksize % LEAST == 0
    config = linear_config(rows, blocksize, aligned, gradient, x.dtype, x.device)
    in_tile = config.columns if gradient else config.depth
    out_unit, in_unit = math.gcd(outs, 64), math.gcd(ins, 64)
    x_unit = math.gcd(x.stride(0), 16 // x.element_size())
    tiles = triton.cdiv(rows, config.rows) * triton.cdiv(width, config.columns)
    splits = split_count(config, rows, tiles, triton.cdiv(depth, config.depth), x.device)
    sums = x.new_empty(splits, rows, width, dtype=x.dtype if splits == 1 else torch.float32)
    constants = {
        "OUT_UNIT": out_unit,
        "IN_UNIT": in_unit,
        "X_UNIT": x_unit,
        "GRADIENT": gradient,
        "BLOCKSIZE": blocksize,
        "ALIGNED": aligned,
        "WHOLE": ins % in_tile == 0,
        "PRECISION": dot_precision(x.dtype),
    }
    with on(x.device):
        tensors = (x, *contiguous(*tensors), bias if splits == 1 else None, sums)
        sizes = (rows, outs // out_unit, ins // in_unit, x.stride(0) // x_unit, splits)
        _linear_kernel[(tiles * splits,)](*tensors, *sizes, **constants, **config.blocks(), **EXACT)
    return sums


def add_splits(sums: Tensor, bias: Tensor | None, y: Tensor) -> Tensor:
    """Writes the sums (splits, rows, columns) over their first dimension, with `bias` added, into y (rows, columns)."""
    splits, rows, columns = sums.shape
    unit = math.gcd(columns, 16)
    with on(y.device):
        grid = (rows, triton.cdiv(columns, 512))
        _add_splits_kernel[grid](sums, bias, y, rows, columns // unit, splits, UNIT=unit, BLOCK=512)
    return y


def _multiply(x: Tensor, weight: Any, bias: Tensor | None, gradient: bool) -> Tensor:
    """(rows, in) · Wᵀ + bias, or for the gradient (rows, out) · W; nothing is empty."""
    sums = _partial_products(x, weight, bias, gradient)
    return sums[0] if len(sums) == 1 else add_splits(sums, bias, x.new_empty(sums.shape[1:]))


def base_products(x: Tensor, weight: Any, gradient: bool) -> Tensor:
    """`_multiply` without bias, as (splits, rows, width) for a kernel that adds something of its own."""
    if len(x) == 1 and not gradient and gemv_serves(weight):
        return vector_product(x.contiguous().view(-1), weight, None).view(1, 1, -1)
    if _fused(weight, len(x)):
        return _partial_products(x, weight, None, gradient)
    dense = dequantize_4bit(*weight, x.dtype)
    return (x @ (dense if gradient else dense.T)).unsqueeze(0)


# The ops' own signatures; shapes, types and meaning are documented with them in pykern/ops.


def linear_4bit(input, *weight_and_bias):
    *weight, bias = weight_and_bias
    outs, ins = weight[7]
    shape = (*input.shape[:-1], outs)
    if math.prod(shape) == 0 or ins == 0:
        y = input.new_empty(shape)
        return y.zero_() if bias is None else y.copy_(bias)
    x = as_rows(input, ins)
    bias = None if bias is None else bias.contiguous()
    if len(x) == 1 and gemv_serves(weight):
        return vector_product(x.view(ins), weight, bias).view(shape)
    if _fused(weight, len(x)):
        return _multiply(x, weight, bias, gradient=False).view(shape)
    y = F.linear(x, dequantize_4bit(*weight, x.dtype))
    return (y if bias is None else (y + bias).to(x.dtype)).view(shape)


def linear_4bit_backward(dy, input, *rest):
    *weight, bias, (wants_input, wants_bias) = rest
    outs, ins = weight[7]
    dinput, dbias = None, None
    dy = None if dy is None else as_rows(dy, outs) if outs > 0 else dy.new_zeros(input.numel() // max(ins, 1), 0)
    if wants_input:
        if dy is None or dy.numel() == 0 or ins == 0:
            dinput = input.new_zeros(input.shape)
        elif _fused(weight, len(dy)):
            dinput = _multiply(dy, weight, None, gradient=True).view(input.shape)
        else:
            dinput = (dy @ dequantize_4bit(*weight, dy.dtype)).view(input.shape)
    if wants_bias and bias is not None:
        # In a fixed order, as torch's sums are.
        dbias = torch.zeros_like(bias) if dy is None else dy.sum(0, dtype=torch.float32).to(bias.dtype)
    return dinput, dbias

"""Grouped products with 4-bit experts (GROUPS, OUTS, INS), decoded in the load: a · Wᵀ, and its gradient dy · W.

The tiles of groups are those of grouped_mm_tiles.py, a tile of the weight is decoded as in linear_4bit.py: codes are
loaded once, become in registers what dequantize_4bit gives, and are multiplied on tensor cores. Where groups have more
rows than FUSED_ROWS it pays to decode all experts once, whatever rows they get, and to multiply those: for the time of
the call they are in memory. So they are where rows of a weight do not begin with a byte.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from pykern.kernels.attention_tiles import dot_precision
from pykern.kernels.dequantize_4bit import dequantize_4bit
from pykern.kernels.grouped_mm import product
from pykern.kernels.grouped_mm_sums import group_sums, sum_rows
from pykern.kernels.grouped_mm_tiles import (
    group_tiles,
    in_row,
    rows_side_by_side,
    source_rows,
    tile_rows,
)
from pykern.kernels.linear_4bit_config import FUSED_ROWS, LEAST, WARPS, linear_config, processors
from pykern.kernels.norm import on
from pykern.kernels.weight4bit import EXACT, load_weight
from torch import Tensor


@triton.jit(do_not_specialize=["rows", "a_rows", "a_row", "programs", "bias_group"])
def _product_4bit_kernel(
    a,  # (a_rows, INS), for the gradient (a_rows, OUTS)
    codes,  # (GROUPS · OUTS · INS / 2,)
    absmax,  # (blocks,)
    nested_absmax,  # (ceil(blocks / 256),) or None, and so are the next two
    nested_code,  # (256,)
    nested_offset,  # ()
    code,  # (16,), None for int4
    zero_points,  # (blocks,) or None
    offs,  # (GROUPS,)
    bias,  # (GROUPS or 1, OUTS) or None
    gather,  # (rows,) or None
    scatter,  # (rows,) or None; then the output is zeros
    out,  # (rows, OUTS), for the gradient (rows, INS)
    rows,
    a_rows,
    a_row,  # in units of UNIT elements
    programs,
    bias_group,  # 0 for one bias
    UNIT: tl.constexpr,
    GROUPS: tl.constexpr,
    OUTS: tl.constexpr,
    INS: tl.constexpr,
    GRADIENT: tl.constexpr,
    CLAMP: tl.constexpr,  # whether `gather` is clamped to the rows, or rows out of bounds are zeros
    BLOCKSIZE: tl.constexpr,
    ALIGNED: tl.constexpr,  # whether a row of a tile of the weight has a single scale
    WHOLE: tl.constexpr,  # whether INS is a multiple of its tile
    PRECISION: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    depth: tl.constexpr = OUTS if GRADIENT else INS
    width: tl.constexpr = INS if GRADIENT else OUTS
    tensors = (codes, absmax, nested_absmax, nested_code, nested_offset, code, zero_points)
    table = None if code is None else tl.load(code + tl.arange(0, 16))
    begin, end, last = group_tiles(offs, rows, GROUPS, BLOCK_G, BLOCK_M)
    panels: tl.constexpr = (width + BLOCK_N - 1) // BLOCK_N
    for index in range(tl.program_id(0), tl.max(last, 0) * panels, programs):
        panel = index % panels
        g, row, inside = tile_rows(begin, end, last, index // panels, BLOCK_M)
        column = panel * BLOCK_N + tl.arange(0, BLOCK_N)
        source, read = source_rows(gather, row, inside, a_rows, CLAMP)
        lane = tl.arange(0, BLOCK_K)
        a_tile = a + source[:, None] * a_row * UNIT + lane[None, :]
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in range(tl.where(g < GROUPS, (depth + BLOCK_K - 1) // BLOCK_K, 0)):
            place = step * BLOCK_K + lane
            left = tl.load(a_tile, mask=read[:, None] & (place < depth)[None, :], other=0.0)
            if GRADIENT:
                w_row, part = place[:, None], panel
            else:
                w_row, part = column[:, None], step
            weight = load_weight(
                *tensors,
                table,
                g.to(tl.int64) * OUTS + w_row,
                w_row < OUTS,
                part,
                INS,
                a.dtype.element_ty,
                BLOCKSIZE,
                ALIGNED,
                WHOLE,
                BLOCK_K if GRADIENT else BLOCK_N,
                BLOCK_N if GRADIENT else BLOCK_K,
            )
            acc = tl.dot(left, weight if GRADIENT else weight.T, acc, input_precision=PRECISION)
            a_tile += BLOCK_K
        if bias is not None:
            added = tl.load(bias + tl.minimum(g, GROUPS - 1) * bias_group + column, mask=column < width, other=0.0)
            acc += tl.where(g < GROUPS, added.to(tl.float32), 0.0)[None, :]
        target, write = source_rows(scatter, row, inside, rows, False)
        out_tile = out + target[:, None] * width + column[None, :]
        tl.store(out_tile, acc.to(out.dtype.element_ty), mask=write[:, None] & (column < width)[None, :])


def _fused(weight: Any, rows: int) -> bool:
    """Whether the kernel decodes for groups of so many rows. A row of a weight has to begin with a byte, and so has
    each of its groups."""
    code, ins, blocksize = weight[5], weight[7][2], weight[8]
    return rows <= FUSED_ROWS and ins % 2 == 0 and (code is not None or blocksize % 2 == 0 or blocksize >= ins)


def _multiply(
    a: Tensor,
    weight: Any,
    offs: Tensor,
    bias: Tensor | None,
    gather: Tensor | None,
    scatter: Tensor | None,
    out: Tensor,
    gradient: bool,
) -> Tensor:
    """Writes to `out`, but not to rows to which `scatter` sends nothing."""
    *tensors, (groups, outs, ins), blocksize = weight
    rows = len(out)
    if out.numel() == 0:
        return out
    if a.shape[1] == 0 or not _fused(weight, rows // groups):
        dense = dequantize_4bit(*weight, a.dtype)
        return product(a, dense if gradient else dense.mT, offs, bias, gather, scatter, out, clamp=not gradient)
    code = tensors[5]
    blocksize = min(blocksize, ins) if code is None else blocksize
    aligned = ins % blocksize == 0 and blocksize % LEAST == 0
    config = linear_config(rows // groups, blocksize, aligned, gradient, a.dtype, a.device)
    a = rows_side_by_side(a)
    unit = math.gcd(a.stride(0), 16 // a.element_size())
    tiles = (triton.cdiv(rows, config.rows) + groups) * triton.cdiv(ins if gradient else outs, config.columns)
    resident = 2 if a.device.type == "cpu" else processors(a.device) * (WARPS // config.warps)
    programs = min(tiles, resident)
    with on(a.device):
        _product_4bit_kernel[(programs,)](
            *(a, *in_row(*tensors, offs, bias, gather, scatter), out, rows, len(a), a.stride(0) // unit, programs),
            outs if bias is not None and bias.dim() == 2 else 0,
            UNIT=unit,
            GROUPS=groups,
            OUTS=outs,
            INS=ins,
            GRADIENT=gradient,
            CLAMP=not gradient,
            BLOCKSIZE=blocksize,
            ALIGNED=aligned,
            WHOLE=ins % (config.columns if gradient else config.depth) == 0,
            PRECISION=dot_precision(a.dtype),
            BLOCK_G=triton.next_power_of_2(groups + 1),
            **config.blocks(),
            **EXACT,
        )
    return out


# The ops' own signatures; shapes, types and meaning are documented with them in pykern/ops/moe/grouped_4bit.py.


def grouped_mm_4bit(mat_a, *rest):
    *weight, offs, bias, out_dtype, gather, scatter = rest
    rows = len(mat_a) if gather is None else len(gather)
    new = mat_a.new_empty if scatter is None else mat_a.new_zeros
    out = new((rows, weight[7][1]), dtype=out_dtype or mat_a.dtype)
    return _multiply(mat_a, weight, offs, bias, gather, scatter, out, gradient=False)


def grouped_mm_4bit_backward(doutput, mat_a, *rest):
    *weight, offs, bias, _, gather, scatter, (wants_a, wants_bias) = rest
    rows = len(mat_a) if gather is None else len(gather)
    da = dbias = None
    doutput = doutput.to(mat_a.dtype)
    if wants_a:
        da = mat_a.new_empty((rows, mat_a.shape[1]), dtype=mat_a.dtype if gather is None else torch.float32)
        da = _multiply(doutput, weight, offs, None, scatter, None, da, gradient=True)
        if gather is not None:
            da = sum_rows(da, gather, len(mat_a), mat_a.dtype)
    if wants_bias:
        dbias = group_sums(doutput, offs, scatter).sum_to_size(bias.shape).to(bias.dtype)
    return da, dbias

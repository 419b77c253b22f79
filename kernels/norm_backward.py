"""The backward of LayerNorm and RMSNorm over the last dimension; what norm.py says of arguments and sizes holds here.

dx needs two sums over its row, the weights' gradients a sum over all rows. So a fixed number of programs walk over row
tiles, write dx, and keep their share of the sums in registers; each writes one row of partial sums, and a second kernel
adds those up in a fixed order. There are no atomics: the same inputs give the same bits. Rows whose sums do not fit
into registers take two kernels, each reading x and dy once: the first takes the two sums of each row, the second walks
over tiles narrower than a row.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from pykern.kernels.norm import Config, as_rows, in_units, load_factor, on
from torch import Tensor


def backward_config(rows: int, n: int, wide: bool, processors: int, wants_dx: bool, wants_weights: bool) -> Config:
    """Whole rows where dx is wanted and a thread's 16 columns of x, dy and both sums fit into its registers.

    With weights' gradients there are two programs a processor, or one whose threads fill it: each costs a row of
    partial sums. They prefetch the next tile into shared memory. Without, each tile has a program of its own.
    """
    columns = triton.next_power_of_2(n)
    if wants_dx and columns <= (8192 if wide else 4096):
        programs = processors * (2 if columns <= 4096 else 1)
    else:
        columns = min(columns, 4096)
        programs = 2 * processors // triton.cdiv(n, columns)
    return Config.of(rows, columns, 4096, programs if wants_weights else None, stages=2 if wants_weights else 1)


def reduce_config(n: int, processors: int) -> Config:
    """Narrow columns, so that there are two programs a processor, but whole 128-byte lines of partial sums."""
    columns = min(max(triton.next_power_of_2(n // (2 * processors)), 32), 256)
    return Config(2048 // columns, columns, 4, triton.cdiv(n, columns))


@triton.jit
def _plus3(a0, a1, a2, b0, b1, b2):
    return a0 + b0, a1 + b1, a2 + b2


@triton.jit
def _row_projections(along, level, shift, mean, n):
    """(M, 1) of what dx has along the normalised row, and of its level, from the (M, N) lanes' sums.

    They are of gradient · normed, of gradient and of normed. The last is not quite 0 where the mean of x is large.
    """
    if mean is not None:
        along, level, shift = tl.reduce((along, level, shift), 1, _plus3, keep_dims=True)
        along, level, shift = along / n, level / n, shift / n
        along -= shift * level
        level -= shift * along
    else:
        along, level = tl.sum(along, 1, keep_dims=True) / n, 0.0
    return along, level


@triton.jit
def _load_normed(x, mean, rstd, row, live, column, mask):
    """(M, N) normalised values, 0 where masked, and (M, 1) rstd."""
    scale = tl.load(rstd + row, mask=live, other=0.0)
    values = tl.load(x + column, mask=mask, other=0.0).to(tl.float32)
    if mean is not None:
        values = tl.where(mask, values - tl.load(mean + row, mask=live, other=0.0), 0.0)
    return values * scale, scale


@triton.jit(do_not_specialize=["rows", "n", "dy_stride", "x_stride"])
def _projections_kernel(
    dy,  # (rows, n) by dy_stride
    x,  # (rows, n) by x_stride
    weight,  # (n,) or None
    mean,  # (rows,), None for RMSNorm
    rstd,  # (rows,)
    projections,  # (2, rows): see _row_projections
    rows,
    n,
    dy_stride,
    x_stride,
    weight_offset,
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    n *= UNIT
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)[:, None]  # (1, 1)
    lane = tl.arange(0, BLOCK_N)[None, :]  # (1, N)
    along = tl.zeros((1, BLOCK_N), tl.float32)
    level = tl.zeros((1, BLOCK_N), tl.float32)
    shift = tl.zeros((1, BLOCK_N), tl.float32)
    for start in range(0, n, BLOCK_N):
        column, inside = start + lane, lane < n - start
        gradient = tl.load(dy + row * dy_stride * UNIT + column, mask=inside, other=0.0).to(tl.float32)
        if weight is not None:
            gradient *= load_factor(weight, column, inside, weight_offset)
        normed, _ = _load_normed(x + row * x_stride * UNIT, mean, rstd, row, True, column, inside)
        along += gradient * normed
        level += gradient
        shift += normed
    along, level = _row_projections(along, level, shift, mean, n)
    tl.store(projections + row, along)
    if mean is not None:
        tl.store(projections + rows + row, level)


@triton.jit(do_not_specialize=["rows", "n", "dy_stride", "dsummed_stride", "x_stride"])
def _backward_kernel(
    dy,  # (rows, n) by dy_stride
    dsummed,  # (rows, n) by dsummed_stride, or None
    x,  # (rows, n) by x_stride
    weight,  # (n,) or None
    mean,  # (rows,), None for RMSNorm
    rstd,  # (rows,)
    projections,  # (2, rows), None where the tile holds whole rows
    dx,  # (rows, n) or None
    dweight,  # (programs, n) partial sums, or None
    dbias,  # (programs, n) partial sums, or None
    rows,
    n,
    dy_stride,
    dsummed_stride,
    x_stride,
    weight_offset,
    UNIT: tl.constexpr,
    ROUND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    n *= UNIT
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]  # (1, N)
    inside = column < n
    if dweight is not None:
        dweight_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if dbias is not None:
        dbias_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if dx is not None and weight is not None and STAGES > 1:
        factor = load_factor(weight, column, inside, weight_offset)  # (1, N), kept for all tiles

    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.num_programs(0), num_stages=STAGES):
        row = tl.cast(tile, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]  # (M, 1)
        live = row < rows
        mask = live & inside
        gradient = tl.load(dy + row * dy_stride * UNIT + column, mask=mask, other=0.0).to(tl.float32)
        if dbias is not None:
            dbias_sum += gradient
        if dx is not None or dweight is not None:
            normed, scale = _load_normed(x + row * x_stride * UNIT, mean, rstd, row, live, column, mask)
        if dweight is not None:
            dweight_sum += gradient * (normed.to(x.dtype.element_ty).to(tl.float32) if ROUND else normed)
        if dx is not None:
            if weight is not None:
                gradient *= factor if STAGES > 1 else load_factor(weight, column, inside, weight_offset)
            if projections is None:
                along, level = _row_projections(gradient * normed, gradient, normed, mean, n)
            else:
                along = tl.load(projections + row, mask=live, other=0.0)  # (M, 1)
                level = tl.load(projections + rows + row, mask=live, other=0.0) if mean is not None else 0.0
            result = (gradient - normed * along - level) * scale
            if dsummed is not None:
                passed = tl.load(dsummed + row * dsummed_stride * UNIT + column, mask=mask, other=0.0)
                result += passed.to(tl.float32)
            tl.store(dx + row * n + column, result.to(dx.dtype.element_ty), mask=mask)

    partial = tl.program_id(0).to(tl.int64) * n + column  # (1, N)
    if dweight is not None:
        tl.store(dweight + partial, tl.sum(dweight_sum, 0, keep_dims=True), mask=inside)
    if dbias is not None:
        tl.store(dbias + partial, tl.sum(dbias_sum, 0, keep_dims=True), mask=inside)


@triton.jit
def _store_sum(partials, total, programs, n, column, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, programs, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)[:, None]  # (M, 1)
        sums += tl.load(partials + row.to(tl.int64) * n + column, mask=(row < programs) & (column < n), other=0.0)
    tl.store(total + column, tl.sum(sums, 0, keep_dims=True).to(total.dtype.element_ty), mask=column < n)


@triton.jit(do_not_specialize=["programs", "n"])
def _reduce_kernel(
    dweight_partials,  # (programs, n) or None
    dbias_partials,  # (programs, n) or None
    dweight,  # (n,) or None
    dbias,  # (n,) or None
    programs,
    n,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    n *= UNIT
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]  # (1, N)
    if dweight is not None:
        _store_sum(dweight_partials, dweight, programs, n, column, BLOCK_M, BLOCK_N)
    if dbias is not None:
        _store_sum(dbias_partials, dbias, programs, n, column, BLOCK_M, BLOCK_N)


@lru_cache
def _processors(device: torch.device) -> int:
    # In the interpreter two, so that there are several partial sums to add.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _backward(
    dy: Tensor | None,
    dsummed: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    wants: Sequence[bool],
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    n = x.shape[-1]
    dx = x.new_empty(x.shape) if wants[0] else None
    dweight, dbias = (
        torch.empty_like(parameter, memory_format=torch.contiguous_format) if wanted and parameter is not None else None
        for wanted, parameter in zip(wants[1:], (weight, bias), strict=True)
    )
    if dy is None or x.numel() == 0:  # then only dsummed arrives
        if wants[0]:
            dx.zero_() if dsummed is None else dx.copy_(dsummed)
        return dx, *(None if total is None else total.zero_() for total in (dweight, dbias))
    wants_weights = dweight is not None or dbias is not None
    if not (wants[0] or wants_weights):
        return None, None, None
    dy, dsummed, x = as_rows(dy, n), as_rows(dsummed if wants[0] else None, n), as_rows(x, n)
    weight, mean, rstd = (None if t is None else t.contiguous() for t in (weight, mean, rstd))
    rows = len(x)
    unit, (columns, dy_stride, x_stride, dsummed_stride) = in_units(n, dy, x, dsummed)
    wide = unit * x.element_size() == 16
    config = backward_config(rows, n, wide, _processors(x.device), wants[0], wants_weights)
    partials = [None if d is None else x.new_empty(config.programs, n, dtype=torch.float32) for d in (dweight, dbias)]
    constants = {"UNIT": unit, "ROUND": round_before_weight, "STAGES": config.stages}
    projections = None
    with on(x.device):
        if wants[0] and config.columns < n:
            projections = x.new_empty(2, rows, dtype=torch.float32)
            tensors = (dy, x, weight, mean, rstd, projections)
            sizes = (rows, columns, dy_stride, x_stride, weight_offset)
            _projections_kernel[(rows,)](*tensors, *sizes, UNIT=unit, BLOCK_N=4096, num_warps=8)
        tensors = (dy, dsummed, x, weight, mean, rstd, projections, dx, *partials)
        sizes = (rows, columns, dy_stride, dsummed_stride, x_stride, weight_offset)
        grid = (config.programs, triton.cdiv(n, config.columns))
        _backward_kernel[grid](*tensors, *sizes, **constants, **config.blocks())
        if wants_weights:
            tensors, sizes = (*partials, dweight, dbias), (config.programs, columns)
            config = reduce_config(n, _processors(x.device))
            _reduce_kernel[(config.programs,)](*tensors, *sizes, UNIT=unit, **config.blocks())
    return dx, dweight, dbias


# The ops' own signatures; shapes, types and meaning are documented with them in pykern/ops.


def layer_norm_backward(dy, x, weight, bias, eps, mean, rstd, output_mask):
    return _backward(dy, None, x, weight, bias, mean, rstd, output_mask)


def rms_norm_backward(dy, x, weight, eps, weight_offset, round_before_weight, rstd, output_mask):
    wants = (*output_mask, False)
    return _backward(dy, None, x, weight, None, None, rstd, wants, weight_offset, round_before_weight)[:2]


def add_layer_norm_backward(dy, dsummed, summed, weight, bias, eps, mean, rstd, output_mask):
    return _backward(dy, dsummed, summed, weight, bias, mean, rstd, output_mask)


def add_rms_norm_backward(dy, dsummed, summed, weight, eps, weight_offset, round_before_weight, rstd, output_mask):
    wants = (*output_mask, False)
    return _backward(dy, dsummed, summed, weight, None, None, rstd, wants, weight_offset, round_before_weight)[:2]

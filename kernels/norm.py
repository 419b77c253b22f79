"""LayerNorm and RMSNorm over the last dimension, with or without a residual added first, forward and backward.

Both are one family: RMSNorm is LayerNorm that does not subtract the mean. A tensor that a call has no use for is passed
as None, which Triton takes as a constant: nothing is loaded or computed for it. `mean` of None means RMSNorm.

All of them are bound by memory, so what counts is how often a row is read.

- Forward: a tile of rows stays in registers from the one load to the one store. Rows too long for that are read twice,
  block by block. Each lane then keeps a mean and the squares about it (Welford), and lanes are combined at the end: as
  accurate as two passes, and no reduction across the program until the row is done.
- Backward: dx needs two sums over its row, the weights' gradients a sum over all rows. So a fixed number of programs
  walk over row tiles, write dx, and keep their share of the sums in registers; each writes one row of partial sums, and
  a second kernel adds those up in a fixed order. There are no atomics: the same inputs give the same bits. Rows whose
  sums do not fit into registers take two kernels, each reading x and dy once: the first takes the two sums of each row,
  the second walks over tiles narrower than a row.

Sizes and strides are not specialised, or each new length would compile anew. They arrive in units of UNIT elements,
because a multiplication by a constant is what tells the compiler that 16 bytes can move at once (`tl.multiple_of` on a
kernel argument is dropped). Rows may be more than 2³¹ elements apart: their offsets are products of int64.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class Config:
    """How a kernel is cut: tiles of rows × columns (a power of two), and how many programs walk over the row tiles."""

    rows: int
    columns: int
    warps: int
    programs: int
    stages: int = 1  # depth of prefetch, for programs that walk over many tiles

    @staticmethod
    def of(rows: int, columns: int, elements: int, programs: int | None = None, stages: int = 1) -> "Config":
        """Tiles of about `elements`, 16 to a thread up to 512 threads: two 16-byte loads of 16-bit numbers."""
        tile = min(max(elements // columns, 1), 64)
        tiles = triton.cdiv(rows, tile)
        warps = min(max(tile * columns // 512, 1), 16)
        return Config(tile, columns, warps, tiles if programs is None else max(1, min(tiles, programs)), stages)

    def blocks(self) -> dict[str, int]:
        return {"BLOCK_M": self.rows, "BLOCK_N": self.columns, "num_warps": self.warps}


def forward_config(rows: int, n: int, wide: bool) -> Config:
    """Whole rows while a thread holds no more than 32 columns, blocks of 4096 beyond.

    `wide`: accesses of 16 bytes. Narrower ones take a predicate and part of an address each: registers hold half.
    """
    columns = triton.next_power_of_2(n)
    return Config.of(rows, columns if columns <= (16384 if wide else 8192) else 4096, elements=2048)


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
def _load_row_sum(x, residual, summed, column, mask):
    """(M, N) values to normalise, in fp32. With a residual they are the sum as it is stored: rounded."""
    values = tl.load(x + column, mask=mask, other=0.0)
    if residual is not None:
        added = values.to(tl.float32) + tl.load(residual + column, mask=mask, other=0.0).to(tl.float32)
        values = added.to(summed.dtype.element_ty)
        tl.store(summed + column, values, mask=mask)
    return values.to(tl.float32)


@triton.jit
def _plus(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit
def _plus3(a0, a1, a2, b0, b1, b2):
    return a0 + b0, a1 + b1, a2 + b2


@triton.jit
def _row_moments(level, spread, count, n):
    """Mean, what is missing in it, and variance, each (M, 1), of rows from what their (M, N) lanes saw.

    A lane saw `count` values of mean `level`, with squares `spread` about it. What is missing: where the mean is large,
    its last bit would shift the whole row (the corrected two-pass algorithm of Chan, Golub and LeVeque 1983).
    """
    centre = tl.div_rn(tl.sum(level * count, 1, keep_dims=True), n)
    gap = level - centre
    missing, square = tl.reduce((gap * count, spread + gap * gap * count), 1, _plus, keep_dims=True)
    missing = missing / n
    return centre, missing, tl.div_rn(square, n) - missing * missing


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
def _load_factor(weight, column, inside, weight_offset):
    return tl.load(weight + column, mask=inside, other=0.0).to(tl.float32) + weight_offset


@triton.jit
def _store_normed(
    values, centre, missing, scale, weight, bias, y, column, mask, inside, weight_offset, ROUND: tl.constexpr
):
    normed = (values - centre) * scale - missing * scale
    if ROUND:
        normed = normed.to(y.dtype.element_ty).to(tl.float32)
    if weight is not None:
        normed *= _load_factor(weight, column, inside, weight_offset)
    if bias is not None:
        normed += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + column, normed.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "n", "x_stride", "residual_stride"])
def _forward_kernel(
    x,  # (rows, n) by x_stride
    residual,  # (rows, n) by residual_stride, or None
    weight,  # (n,) or None
    bias,  # (n,) or None
    y,  # (rows, n)
    summed,  # (rows, n), None without residual
    mean,  # (rows,), None for RMSNorm
    rstd,  # (rows,)
    rows,
    n,
    x_stride,
    residual_stride,
    eps,
    weight_offset,
    UNIT: tl.constexpr,
    ROUND: tl.constexpr,
    LOOP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    n *= UNIT
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]  # (M, 1)
    lane = tl.arange(0, BLOCK_N)[None, :]  # (1, N)
    live = row < rows
    x += row * x_stride * UNIT  # (M, 1)
    if residual is not None:
        residual += row * residual_stride * UNIT
        summed += row * n

    if LOOP:
        count = ((n - lane + (BLOCK_N - 1)) // BLOCK_N).to(tl.float32)  # (1, N): how many values the lane will see
        level = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        spread = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, n, BLOCK_N):
            mask = live & (lane < n - start)
            values = _load_row_sum(x, residual, summed, start + lane, mask)
            if mean is not None:
                step = tl.where(mask, values - level, 0.0)
                level += step * (1.0 / (start // BLOCK_N + 1))
                spread += step * (values - level)
            else:
                spread += values * values
    else:
        count = (lane < n).to(tl.float32)
        values = _load_row_sum(x, residual, summed, lane, live & (lane < n))
        level = values
        spread = 0.0 if mean is not None else values * values

    if mean is not None:
        centre, missing, variance = _row_moments(level, spread, count, n.to(tl.float32))
        tl.store(mean + row, centre, mask=live)
    else:
        centre, missing = 0.0, 0.0
        variance = tl.div_rn(tl.sum(spread, 1, keep_dims=True), n.to(tl.float32))
    # The approximate square root and quotient would shift a whole row by as much as an ulp.
    variance = tl.where(variance < 0.0, 0.0, variance)  # not tl.maximum, which drops NaN
    scale = tl.div_rn(1.0, tl.sqrt_rn(variance + tl.cast(eps, tl.float32)))

    y += row * n
    if LOOP:
        if residual is not None:
            x = summed
            tl.debug_barrier()  # a thread may read here what another one has written above
        for start in range(0, n, BLOCK_N):
            inside, column = lane < n - start, start + lane
            values = tl.load(x + column, mask=live & inside, other=0.0).to(tl.float32)
            _store_normed(
                values, centre, missing, scale, weight, bias, y, column, live & inside, inside, weight_offset, ROUND
            )
    else:
        inside = lane < n
        _store_normed(
            values, centre, missing, scale, weight, bias, y, lane, live & inside, inside, weight_offset, ROUND
        )
    tl.store(rstd + row, scale, mask=live)


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
            gradient *= _load_factor(weight, column, inside, weight_offset)
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
        factor = _load_factor(weight, column, inside, weight_offset)  # (1, N), kept for all tiles

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
                gradient *= factor if STAGES > 1 else _load_factor(weight, column, inside, weight_offset)
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


def _on(device: torch.device):
    """Triton launches on the current device and its current stream: make that the tensors' device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _as_rows(tensor: Tensor | None, n: int) -> Tensor | None:
    """(…, n) as (rows, n) with elements side by side: in place where one stride leads from row to row, else a copy."""
    if tensor is None:
        return None
    flat = tensor.reshape(-1, n)
    return flat if flat.stride(1) == 1 or n == 1 else flat.contiguous()


def _in_units(n: int, *rows: Tensor | None) -> tuple[int, list[int]]:
    """The most elements, up to 16 bytes, that divide n and all row strides; n and the strides, counted in them."""
    strides = [0 if tensor is None else tensor.stride(0) for tensor in rows]
    unit = math.gcd(n, 16 // rows[0].element_size(), *strides)
    return unit, [n // unit, *(stride // unit for stride in strides)]


def _forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
    *,
    centred: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    n = x.shape[-1]
    y = x.new_empty(x.shape)
    summed = None if residual is None else x.new_empty(x.shape)
    mean = x.new_empty(x.shape[:-1], dtype=torch.float32) if centred else None
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    if n == 0:
        return y, summed, mean.zero_() if centred else None, rstd.fill_(eps).rsqrt_()
    if rstd.numel() == 0:
        return y, summed, mean, rstd
    x, residual = _as_rows(x, n), _as_rows(residual, n)
    weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
    unit, sizes = _in_units(n, x, residual)
    config = forward_config(len(x), n, wide=unit * x.element_size() == 16)
    tensors = (x, residual, weight, bias, y, summed, mean, rstd)
    constants = {"UNIT": unit, "ROUND": round_before_weight, "LOOP": config.columns < n}
    with _on(x.device):
        _forward_kernel[(config.programs,)](
            *tensors, len(x), *sizes, eps, weight_offset, **constants, **config.blocks()
        )
    return y, summed, mean, rstd


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
    dy, dsummed, x = _as_rows(dy, n), _as_rows(dsummed if wants[0] else None, n), _as_rows(x, n)
    weight, mean, rstd = (None if t is None else t.contiguous() for t in (weight, mean, rstd))
    rows = len(x)
    unit, (columns, dy_stride, x_stride, dsummed_stride) = _in_units(n, dy, x, dsummed)
    wide = unit * x.element_size() == 16
    config = backward_config(rows, n, wide, _processors(x.device), wants[0], wants_weights)
    partials = [None if d is None else x.new_empty(config.programs, n, dtype=torch.float32) for d in (dweight, dbias)]
    constants = {"UNIT": unit, "ROUND": round_before_weight, "STAGES": config.stages}
    projections = None
    with _on(x.device):
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


def layer_norm(x, weight, bias, eps):
    y, _, mean, rstd = _forward(x, None, weight, bias, eps, centred=True)
    return y, mean, rstd


def layer_norm_backward(dy, x, weight, bias, eps, mean, rstd, output_mask):
    return _backward(dy, None, x, weight, bias, mean, rstd, output_mask)


def rms_norm(x, weight, eps, weight_offset, round_before_weight):
    y, _, _, rstd = _forward(x, None, weight, None, eps, weight_offset, round_before_weight, centred=False)
    return y, rstd


def rms_norm_backward(dy, x, weight, eps, weight_offset, round_before_weight, rstd, output_mask):
    wants = (*output_mask, False)
    return _backward(dy, None, x, weight, None, None, rstd, wants, weight_offset, round_before_weight)[:2]


def add_layer_norm(x, residual, weight, bias, eps):
    return _forward(x, residual, weight, bias, eps, centred=True)


def add_layer_norm_backward(dy, dsummed, summed, weight, bias, eps, mean, rstd, output_mask):
    return _backward(dy, dsummed, summed, weight, bias, mean, rstd, output_mask)


def add_rms_norm(x, residual, weight, eps, weight_offset, round_before_weight):
    y, summed, _, rstd = _forward(x, residual, weight, None, eps, weight_offset, round_before_weight, centred=False)
    return y, summed, rstd


def add_rms_norm_backward(dy, dsummed, summed, weight, eps, weight_offset, round_before_weight, rstd, output_mask):
    wants = (*output_mask, False)
    return _backward(dy, dsummed, summed, weight, None, None, rstd, wants, weight_offset, round_before_weight)[:2]

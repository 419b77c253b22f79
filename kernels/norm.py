"""LayerNorm and RMSNorm over the last dimension, with or without a residual added first; backward: norm_backward.py.

Both are one family: RMSNorm is LayerNorm that does not subtract the mean. A tensor that a call has no use for is passed
as None, which Triton takes as a constant: nothing is loaded or computed for it. `mean` of None means RMSNorm.

All of them are bound by memory, so what counts is how often a row is read: a tile of rows stays in registers from the
one load to the one store. Rows too long for that are read twice, block by block. Each lane then keeps a mean and the
squares about it (Welford), and lanes are combined at the end: as accurate as two passes, and no reduction across the
program until the row is done.

Sizes and strides are not specialised, or each new length would compile anew. They arrive in units of UNIT elements,
because a multiplication by a constant is what tells the compiler that 16 bytes can move at once (`tl.multiple_of` on a
kernel argument is dropped). Rows may be more than 2³¹ elements apart: their offsets are products of int64.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass

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
def load_factor(weight, column, inside, weight_offset):
    return tl.load(weight + column, mask=inside, other=0.0).to(tl.float32) + weight_offset


@triton.jit
def _store_normed(
    values, centre, missing, scale, weight, bias, y, column, mask, inside, weight_offset, ROUND: tl.constexpr
):
    normed = (values - centre) * scale - missing * scale
    if ROUND:
        normed = normed.to(y.dtype.element_ty).to(tl.float32)
    if weight is not None:
        normed *= load_factor(weight, column, inside, weight_offset)
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


def on(device: torch.device):
    """Triton launches on the current device and its current stream: make that the tensors' device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def as_rows(tensor: Tensor | None, n: int) -> Tensor | None:
    """(…, n) as (rows, n) with elements side by side: in place where one stride leads from row to row, else a copy."""
    if tensor is None:
        return None
    flat = tensor.reshape(-1, n)
    return flat if flat.stride(1) == 1 or n == 1 else flat.contiguous()


def in_units(n: int, *rows: Tensor | None) -> tuple[int, list[int]]:
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
    x, residual = as_rows(x, n), as_rows(residual, n)
    weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
    unit, sizes = in_units(n, x, residual)
    config = forward_config(len(x), n, wide=unit * x.element_size() == 16)
    tensors = (x, residual, weight, bias, y, summed, mean, rstd)
    constants = {"UNIT": unit, "ROUND": round_before_weight, "LOOP": config.columns < n}
    with on(x.device):
        _forward_kernel[(config.programs,)](
            *tensors, len(x), *sizes, eps, weight_offset, **constants, **config.blocks()
        )
    return y, summed, mean, rstd


# The ops' own signatures; shapes, types and meaning are documented with them in pykern/ops.


def layer_norm(x, weight, bias, eps):
    y, _, mean, rstd = _forward(x, None, weight, bias, eps, centred=True)
    return y, mean, rstd


def rms_norm(x, weight, eps, weight_offset, round_before_weight):
    y, _, _, rstd = _forward(x, None, weight, None, eps, weight_offset, round_before_weight, centred=False)
    return y, rstd


def add_layer_norm(x, residual, weight, bias, eps):
    return _forward(x, residual, weight, bias, eps, centred=True)


def add_rms_norm(x, residual, weight, eps, weight_offset, round_before_weight):
    y, summed, _, rstd = _forward(x, residual, weight, None, eps, weight_offset, round_before_weight, centred=False)
    return y, summed, rstd

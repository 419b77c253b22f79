"""The experts of a mixture-of-experts layer: sort, gate-up product, activation, down product, combination.

Each product walks over tiles of groups, see grouped_mm_tiles.py. A tile of the first one has gate and up of the same
columns, so that the activation is its epilogue, on fp32 sums, and hidden = activation(gate) · up a second output.
Computed on the load of the down product instead, hidden would take no memory, but each panel of 128 output columns
would read twice as many bytes and take all exponentials again. Global memory moves four times hidden either way, the
caches half with the epilogue. `hidden` is freed with the call: the backward takes the input, the pre-activation and the
indices.

Rows are gathered when they are loaded. The down product is written for each slot at its own place, token · top_k + k,
and a last kernel adds a token's slots in fp32 in the order of k: no atomics, the same bits every time.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from pykern.kernels.attention_tiles import dot_precision
from pykern.kernels.grouped_mm import product
from pykern.kernels.grouped_mm_tiles import (
    Config,
    bounded_programs,
    group_tiles,
    in_row,
    product_config,
    rows_side_by_side,
    side_by_side,
    source_rows,
    step,
    strides_in_units,
    tile_rows,
)
from pykern.kernels.moe_sort import moe_sort
from pykern.kernels.norm import on
from torch import Tensor


@triton.jit
def _normal(x):
    """The cumulative normal distribution."""
    return 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)


@triton.jit
def _tanh_argument(x):
    """z with gelu_tanh(x) = x · sigmoid(z), as 1 + tanh(z / 2) = 2 · sigmoid(z)."""
    return 1.5957691216057308 * (x + 0.044715 * x * x * x)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        y = x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        y = x * _normal(x)
    elif ACTIVATION == "gelu_tanh":
        y = x * tl.sigmoid(_tanh_argument(x))
    else:
        y = tl.where(x <= 0.0, 0.0, x)  # NaN stays NaN
    return y


@triton.jit
def activation_gradient(grad, x, ACTIVATION: tl.constexpr):
    """`grad` of the activation's output as a gradient of its input."""
    if ACTIVATION == "silu":
        s = tl.sigmoid(x)
        dx = grad * (s * (1.0 + x * (1.0 - s)))
    elif ACTIVATION == "gelu":
        dx = grad * (_normal(x) + x * (0.3989422804014327 * tl.exp(-0.5 * x * x)))
    elif ACTIVATION == "gelu_tanh":
        s = tl.sigmoid(_tanh_argument(x))
        dx = grad * (s + x * (s * (1.0 - s)) * (1.5957691216057308 * (1.0 + 0.134145 * x * x)))
    else:
        dx = tl.where(x <= 0.0, 0.0, grad)
    return dx


@triton.jit
def _add_bias(sums, bias, column, live):
    """Adds biases to the columns of (M, N) sums that are `live`, where there are any."""
    if bias is not None:
        sums += tl.load(bias + column, mask=live, other=0.0).to(tl.float32)[None, :]
    return sums


@triton.jit(do_not_specialize=["rows", "x_rows", "x_row", "b_group", "b_inner", "b_column", "programs"])
def _gate_up_kernel(
    x,  # (x_rows, SIZE)
    b,  # (GROUPS, SIZE, 2 · WIDTH)
    offs,  # (GROUPS,)
    bias,  # (GROUPS, 2 · WIDTH) or None
    token,  # (rows,) rows of x
    preactivation,  # (rows, 2 · WIDTH)
    hidden,  # (rows, WIDTH)
    rows,
    x_rows,
    x_row,  # strides in units of UNIT elements, None for 1
    b_group,
    b_inner,
    b_column,
    programs,
    UNIT: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    begin, end, last = group_tiles(offs, rows, GROUPS, BLOCK_G, BLOCK_M)
    panels: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    for index in range(tl.program_id(0), tl.max(last, 0) * panels, programs):
        g, row, inside = tile_rows(begin, end, last, index // panels, BLOCK_M)
        column = index % panels * BLOCK_N + tl.arange(0, BLOCK_N)
        wide = column < WIDTH
        source, read = source_rows(token, row, inside, x_rows, True)
        lane = tl.arange(0, BLOCK_K)
        x_tile = x + source[:, None] * x_row * UNIT + lane[None, :]
        gate_tile = b + g.to(tl.int64) * b_group * UNIT + step(lane, b_inner, UNIT)[:, None]
        up_tile = gate_tile + step(column + WIDTH, b_column, UNIT)[None, :]
        gate_tile += step(column, b_column, UNIT)[None, :]
        gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        # Rows that are dropped have no summands: their pre-activation is zeros.
        for start in range(0, tl.where(g < GROUPS, SIZE, 0), BLOCK_K):
            some = lane < SIZE - start
            left = tl.load(x_tile, mask=read[:, None] & some[None, :], other=0.0)
            mask = some[:, None] & wide[None, :]
            gate = tl.dot(left, tl.load(gate_tile, mask=mask, other=0.0), gate, input_precision=PRECISION)
            up = tl.dot(left, tl.load(up_tile, mask=mask, other=0.0), up, input_precision=PRECISION)
            x_tile += BLOCK_K
            ahead = BLOCK_K if b_inner is None else tl.cast(b_inner, tl.int64) * (BLOCK_K * UNIT)
            gate_tile += ahead
            up_tile += ahead
        biased = column < tl.where(g < GROUPS, WIDTH, 0)
        gate = _add_bias(gate, bias, g * (2 * WIDTH) + column, biased)
        up = _add_bias(up, bias, g * (2 * WIDTH) + WIDTH + column, biased)
        mask = inside[:, None] & wide[None, :]
        row = row.to(tl.int64)[:, None]
        gate_out = preactivation + row * (2 * WIDTH) + column[None, :]
        tl.store(gate_out, gate.to(preactivation.dtype.element_ty), mask=mask)
        tl.store(gate_out + WIDTH, up.to(preactivation.dtype.element_ty), mask=mask)
        value = activate(gate, ACTIVATION) * up
        tl.store(hidden + row * WIDTH + column[None, :], value.to(hidden.dtype.element_ty), mask=mask)


@triton.jit
def _combine_kernel(
    values,  # (tokens, TOP_K, SIZE)
    weights,  # (tokens, TOP_K) or None
    expert_ids,  # (tokens, TOP_K)
    out,  # (tokens, SIZE)
    SIZE: tl.constexpr,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(TOP_K):
        slot = token * TOP_K + k
        expert = tl.load(expert_ids + slot)
        kept = (expert >= 0) & (expert < EXPERTS)
        read = column < tl.where(kept, SIZE, 0)
        value = tl.load(values + slot * SIZE + column, mask=read, other=0.0).to(tl.float32)
        if weights is not None:
            value *= tl.load(weights + slot, mask=kept, other=0.0).to(tl.float32)
        total += value
    tl.store(out + token * SIZE + column, total.to(out.dtype.element_ty), mask=column < SIZE)


def combine(values: Tensor, weights: Tensor | None, expert_ids: Tensor, experts: int) -> Tensor:
    """(tokens, size): the sum of a token's rows among `values` (slots, size), weighted, without those dropped."""
    (tokens, top_k), size = expert_ids.shape, values.shape[1]
    out = values.new_empty((tokens, size))
    if out.numel():
        block = min(triton.next_power_of_2(size), 1024)  # 16 bytes to a thread of 128
        with on(values.device):
            _combine_kernel[(tokens, triton.cdiv(size, block))](
                *(values, *in_row(weights, expert_ids), out),
                SIZE=size,
                TOP_K=top_k,
                EXPERTS=experts,
                BLOCK=block,
            )
    return out


def gate_up_config(rows: int, width: int, dtype: torch.dtype, unit: int) -> Config:
    """Gate and up share the columns of a tile."""
    config = product_config(rows, 2 * width, dtype, unit)
    return replace(config, columns=config.columns // 2)


def _gate_up(
    x: Tensor, gate_up: Tensor, offs: Tensor, bias: Tensor | None, token: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """The pre-activation and the hidden rows of all slots, in sorted order."""
    rows, (groups, two_widths, size) = len(token), gate_up.shape
    width = two_widths // 2
    preactivation, hidden = x.new_empty((rows, two_widths)), x.new_empty((rows, width))
    if hidden.numel() == 0:
        return preactivation, hidden
    x, b = rows_side_by_side(x), side_by_side(gate_up.mT)
    unit, steps = strides_in_units(x, b, size, width)
    config = gate_up_config(rows // groups, width, x.dtype, unit)
    programs = bounded_programs(config, rows, groups, width, x.device)
    with on(x.device):
        _gate_up_kernel[(programs,)](
            *(x, b, *in_row(offs, bias, token), preactivation, hidden, rows, len(x), *steps, programs),
            UNIT=unit,
            GROUPS=groups,
            SIZE=size,
            WIDTH=width,
            ACTIVATION=activation,
            PRECISION=dot_precision(x.dtype),
            BLOCK_G=triton.next_power_of_2(groups + 1),
            **config.blocks(),
        )
    return preactivation, hidden


# The op's own signature; shapes, types and meaning are documented with it in pykern/ops/moe/mlp.py.


def moe_mlp(input, gate_up, down, weights, expert_ids, gate_up_bias, down_bias, activation):
    experts, top_k = len(gate_up), expert_ids.shape[1]
    order, _, offs = moe_sort(expert_ids, experts)
    if order.numel() == 0:
        return input.new_zeros(input.shape), input.new_empty((0, gate_up.shape[1])), order, offs
    token = order.div(top_k, rounding_mode="floor")
    preactivation, hidden = _gate_up(input, gate_up, offs, gate_up_bias, token, activation)
    # `order` has every slot, so all of it is written.
    values = product(hidden, down.mT, offs, down_bias, None, order, input.new_empty((len(order), len(input.T))), True)
    return combine(values, weights, expert_ids, experts), preactivation, order, offs

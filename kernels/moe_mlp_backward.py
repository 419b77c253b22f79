"""The gradients of a layer's experts, from the input, the pre-activation and the indices alone.

For a slot with hidden row h and weight w, the layer adds w · (h Wᵀ + b) to its token, whose gradient is dy. So

- dh = w · (dy W), and the product with W has all columns of a row in a few tiles. Their epilogue recomputes h from the
  pre-activation's tile, and writes the gradient of the pre-activation and w · h; dy W itself is not stored.
- dw = ⟨dy, h Wᵀ + b⟩ = ⟨dy W, h⟩ + ⟨dy, b⟩: no down product. Each tile leaves its part of the sum, a kernel adds them.
- dW = Σ dy ⊗ (w · h), over the slots of each expert, with dy gathered: rounded is w · h, once, and not w · dy.
- the gradient of the input is a product for each slot, put at the slot's own place and added up by token.
"""

import torch
import triton
import triton.language as tl
from pykern.kernels.attention_tiles import dot_precision
from pykern.kernels.grouped_mm import matrix_gradients, product
from pykern.kernels.grouped_mm_sums import group_sums
from pykern.kernels.grouped_mm_tiles import (
    at,
    bounded_programs,
    group_tiles,
    in_row,
    product_config,
    rows_side_by_side,
    side_by_side,
    source_rows,
    strides_in_units,
    tile_product,
    tile_rows,
)
from pykern.kernels.moe_mlp import activate, activation_gradient, combine
from pykern.kernels.norm import on
from torch import Tensor


@triton.jit
def _halves(tile):
    """The left and the right half of the columns."""
    split: tl.constexpr = (tile.shape[0], 2, tile.shape[1] // 2)
    return tl.split(tl.permute(tl.reshape(tile, split), (0, 2, 1)))


@triton.jit
def _finish(
    dhidden,
    weight,
    row,
    inside,
    column,
    preactivation,
    dpreactivation,
    weighted,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Stores what is wanted of these rows and columns; returns ⟨dhidden, hidden⟩ of each row. Not yet weighted."""
    mask = inside[:, None] & (column < WIDTH)[None, :]
    row = row.to(tl.int64)[:, None]
    place = row * (2 * WIDTH) + column[None, :]
    gate = tl.load(preactivation + place, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(preactivation + place + WIDTH, mask=mask, other=0.0).to(tl.float32)
    activated = activate(gate, ACTIVATION)
    hidden = activated * up
    products = tl.sum(dhidden * hidden, 1)
    if weighted is not None:
        value = hidden * weight[:, None]
        tl.store(weighted + row * WIDTH + column[None, :], value.to(weighted.dtype.element_ty), mask=mask)
    if dpreactivation is not None:
        dhidden *= weight[:, None]
        dgate = activation_gradient(dhidden * up, gate, ACTIVATION)
        tl.store(dpreactivation + place, dgate.to(dpreactivation.dtype.element_ty), mask=mask)
        dup = dhidden * activated
        tl.store(dpreactivation + place + WIDTH, dup.to(dpreactivation.dtype.element_ty), mask=mask)
    return products


@triton.jit(do_not_specialize=["rows", "tokens", "dy_row", "b_group", "b_inner", "b_column", "programs"])
def _hidden_kernel(
    dy,  # (tokens, SIZE)
    down,  # (GROUPS, SIZE, WIDTH)
    offs,  # (GROUPS,)
    token,  # (rows,) rows of dy
    order,  # (rows,) where `weights` has the rows'
    weights,  # (rows,)
    preactivation,  # (rows, 2 · WIDTH)
    dpreactivation,  # (rows, 2 · WIDTH) or None
    weighted,  # (rows, WIDTH) or None: hidden times weight
    parts,  # (panels, rows) or None: what each panel adds to ⟨dy · down, hidden⟩
    rows,
    tokens,
    dy_row,  # strides in units of UNIT elements, None for 1
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
    # Nothing is asked of dropped slots, which are behind the groups.
    for index in range(tl.program_id(0), at(last, GROUPS - 1) * panels, programs):
        panel = index % panels
        g, row, inside = tile_rows(begin, end, last, index // panels, BLOCK_M)
        column = panel * BLOCK_N + tl.arange(0, BLOCK_N)
        source, read = source_rows(token, row, inside, tokens, True)
        dhidden = tile_product(
            *(dy, down + g.to(tl.int64) * b_group * UNIT, source, read, column, SIZE),
            *(dy_row, b_inner, b_column, UNIT, SIZE, WIDTH, PRECISION, BLOCK_K),
        )
        weight = tl.load(weights + tl.load(order + row, mask=inside, other=0), mask=inside, other=0.0).to(tl.float32)
        # In quarters: all columns' values at once would fill the registers of a tile as large as products like it.
        column = panel * BLOCK_N + tl.arange(0, BLOCK_N // 4)
        tensors = (preactivation, dpreactivation, weighted)
        first, second = _halves(dhidden)
        a, b = _halves(first)
        total = _finish(a, weight, row, inside, column, *tensors, WIDTH, ACTIVATION)
        total += _finish(b, weight, row, inside, column + BLOCK_N // 4, *tensors, WIDTH, ACTIVATION)
        a, b = _halves(second)
        total += _finish(a, weight, row, inside, column + BLOCK_N // 2, *tensors, WIDTH, ACTIVATION)
        total += _finish(b, weight, row, inside, column + BLOCK_N // 4 * 3, *tensors, WIDTH, ACTIVATION)
        if parts is not None:
            tl.store(parts + panel.to(tl.int64) * rows + row, total, mask=inside)


@triton.jit(do_not_specialize=["rows", "panels"])
def _weights_kernel(
    parts,  # (panels, rows)
    dy,  # (tokens, SIZE)
    bias,  # (EXPERTS, SIZE) or None
    order,  # (rows,)
    expert_ids,  # (rows,)
    dweights,  # (rows,)
    rows,
    panels,
    SIZE: tl.constexpr,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = row < rows
    slot = tl.load(order + row, mask=live, other=0)
    expert = tl.load(expert_ids + slot, mask=live, other=-1)
    kept = (expert >= 0) & (expert < EXPERTS)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for panel in range(panels):
        total += tl.load(parts + tl.cast(panel, tl.int64) * rows + row, mask=kept, other=0.0)
    if bias is not None:
        grads = dy + (slot // TOP_K * SIZE)[:, None]
        biases = bias + (expert.to(tl.int64) * SIZE)[:, None]
        for start in range(0, SIZE, BLOCK_N):
            column = start + tl.arange(0, BLOCK_N)[None, :]
            mask = kept[:, None] & (column < SIZE)
            grad = tl.load(grads + column, mask=mask, other=0.0).to(tl.float32)
            total += tl.sum(grad * tl.load(biases + column, mask=mask, other=0.0).to(tl.float32), 1)
    tl.store(dweights + slot, total.to(dweights.dtype.element_ty), mask=live)


class _Slots:
    """The slots of a call: what the gradients of its hidden rows need."""

    def __init__(
        self, doutput: Tensor, expert_ids: Tensor, weights: Tensor, order: Tensor, offs: Tensor, preactivation: Tensor
    ) -> None:
        self.dy = rows_side_by_side(doutput)
        self.expert_ids, self.weights, self.order, self.offs, self.preactivation = in_row(
            expert_ids, weights, order, offs, preactivation
        )
        self.token = self.order.div(max(expert_ids.shape[1], 1), rounding_mode="floor")

    def hidden(
        self, down: Tensor, activation: str, wants: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The pre-activation's gradient, hidden times weight, and the panels' parts of the weights' gradient."""
        rows, (groups, size, width) = len(self.order), down.shape
        down = side_by_side(down)
        unit, steps = strides_in_units(self.dy, down, size, width)
        config = product_config(rows // groups, width, self.dy.dtype, unit)
        like, panels = self.preactivation, triton.cdiv(width, config.columns)
        dpreactivation = torch.empty_like(like) if wants[0] else None
        weighted = like.new_empty((rows, width)) if wants[1] else None
        parts = like.new_empty((panels, rows), dtype=torch.float32) if wants[2] else None
        if rows * width == 0 or not any(wants):
            return dpreactivation, weighted, parts
        programs = bounded_programs(config, rows, groups, width, like.device)
        tensors = (self.dy, down, self.offs, self.token, self.order, self.weights, like, dpreactivation, weighted)
        with on(like.device):
            _hidden_kernel[(programs,)](
                *(*tensors, parts, rows, len(self.dy), *steps, programs),
                UNIT=unit,
                GROUPS=groups,
                SIZE=size,
                WIDTH=width,
                ACTIVATION=activation,
                PRECISION=dot_precision(self.dy.dtype),
                BLOCK_G=triton.next_power_of_2(groups + 1),
                **config.blocks(),
            )
        return dpreactivation, weighted, parts

    def dweights(self, parts: Tensor, down_bias: Tensor | None, experts: int) -> Tensor:
        dweights = self.weights.new_empty(self.weights.shape)
        if dweights.numel():
            dy = self.dy if down_bias is None else self.dy.contiguous()
            tensors = (parts, dy, *in_row(down_bias), self.order, self.expert_ids, dweights)
            with on(dy.device):
                _weights_kernel[(triton.cdiv(dweights.numel(), 32),)](
                    *(*tensors, dweights.numel(), len(parts)),
                    SIZE=dy.shape[1],
                    TOP_K=self.expert_ids.shape[1],
                    EXPERTS=experts,
                    BLOCK_M=32,
                    BLOCK_N=128,
                )
        return dweights


# The op's own signature; shapes, types and meaning are documented with it in pykern/ops/moe/mlp.py.


def moe_mlp_backward(
    doutput,
    input,
    gate_up,
    down,
    weights,
    expert_ids,
    gate_up_bias,
    down_bias,
    activation,
    preactivation,
    order,
    offs,
    output_mask,
):
    wants_input, wants_gate_up, wants_down, wants_weights, wants_gate_up_bias, wants_down_bias = output_mask
    slots, rows, experts = _Slots(doutput, expert_ids, weights, order, offs, preactivation), len(order), len(gate_up)
    dinput = dgate_up = ddown = dweights = dgate_up_bias = ddown_bias = None
    wants = (wants_input or wants_gate_up or wants_gate_up_bias, wants_down, wants_weights)
    dpreactivation, weighted, parts = slots.hidden(down, activation, wants)
    if wants_weights:
        dweights = slots.dweights(parts, down_bias, experts)
    if wants_down:
        ddown = matrix_gradients(slots.dy, down, weighted, offs, slots.token, None, rows)
    if wants_down_bias:
        ddown_bias = group_sums(slots.dy, offs, slots.token, slots.order, slots.weights).to(down_bias.dtype)
    if wants_input:
        values = input.new_empty((rows, input.shape[1]))
        values = product(dpreactivation, gate_up, offs, None, None, slots.order, values, clamp=True)
        dinput = combine(values, None, slots.expert_ids, experts)
    if wants_gate_up:
        dgate_up = matrix_gradients(dpreactivation, gate_up, input, offs, None, slots.token, rows)
    if wants_gate_up_bias:
        dgate_up_bias = group_sums(dpreactivation, offs, None).to(gate_up_bias.dtype)
    return dinput, dgate_up, ddown, dweights, dgate_up_bias, ddown_bias

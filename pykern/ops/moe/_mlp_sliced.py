"""The experts on CPU tensors: one expert after the other, its products handed to BLAS, while its rows are in cache."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from pykern.ops.moe._common import is_expert, wide_dtype
from pykern.ops.moe._products import dense
from pykern.ops.moe.activations import ACTIVATIONS, DERIVATIVES
from pykern.ops.moe.sort import moe_sort_reference


class _Widened:
    """An expert's matrix in `wide`: as it is, or in a scratch that serves every expert and so stays in cache."""

    def __init__(self, matrices: Tensor, wide: torch.dtype) -> None:
        self._scratch = None if matrices.dtype == wide else matrices.new_empty(matrices.shape[1:], dtype=wide)

    def __call__(self, matrix: Tensor) -> Tensor:
        return dense(matrix) if self._scratch is None else self._scratch.copy_(matrix)


def _groups(offs: Tensor) -> list[tuple[int, slice]]:
    """The experts that have slots, and which."""
    return [(e, slice(start, end)) for e, (start, end) in enumerate(pairwise([0, *offs.tolist()])) if start < end]


def _combined(rows: Tensor, inverse: Tensor, weights: Tensor | None, shape: torch.Size) -> Tensor:
    """Σₖ weights[t, k] · rows[inverse[t, k]], summed in the order of k."""
    if not inverse.numel():
        return rows.new_zeros(shape[0], rows.shape[1])
    return F.embedding_bag(inverse.view(shape), rows, mode="sum", per_sample_weights=weights)


def moe_mlp_sliced(
    input: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    expert_ids: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide, (experts, size, width) = wide_dtype(input.dtype), down.shape
    order, inverse, offs = moe_sort_reference(expert_ids, experts)
    groups = _groups(offs)
    rows = input.to(wide).index_select(0, order.div(max(expert_ids.shape[1], 1), rounding_mode="floor"))
    preactivation = input.new_empty(order.shape[0], 2 * width, dtype=wide)
    out = input.new_empty(order.shape[0], size, dtype=wide)
    dropped = groups[-1][1].stop if groups else 0
    preactivation[dropped:].zero_()
    out[dropped:].zero_()
    wide_gate_up, wide_down = _Widened(gate_up, wide), _Widened(down, wide)
    for e, part in groups:
        pre = torch.mm(rows[part], wide_gate_up(gate_up[e]).T, out=preactivation[part])
        if gate_up_bias is not None:
            pre.add_(gate_up_bias[e])
        gate, up = pre.chunk(2, -1)
        y = torch.mm(ACTIVATIONS[activation](gate).mul_(up), wide_down(down[e]).T, out=out[part])
        if down_bias is not None:
            y.add_(down_bias[e])
    kept = is_expert(expert_ids, experts)
    output = _combined(out, inverse, weights.to(wide).where(kept, 0.0), expert_ids.shape)
    return output.to(input.dtype), preactivation.to(input.dtype), order, offs


def moe_mlp_backward_sliced(
    doutput: Tensor,
    input: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    expert_ids: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    preactivation: Tensor,
    order: Tensor,
    offs: Tensor,
    output_mask: list[bool],
) -> tuple[Tensor | None, ...]:
    wide, (experts, size, _) = wide_dtype(input.dtype), down.shape
    groups, slots = _groups(offs), order.shape[0]
    wants_dpre = output_mask[0] or output_mask[1] or output_mask[4]
    token = order.div(max(expert_ids.shape[1], 1), rounding_mode="floor")
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(slots))
    grads = doutput.to(wide).index_select(0, token)
    rows = input.to(wide).index_select(0, token) if output_mask[1] else None
    slot_weights = weights.to(wide).flatten().index_select(0, order).unsqueeze(1)
    dinput = input.new_zeros(slots, size, dtype=wide) if output_mask[0] else None
    dweights = input.new_zeros(slots, 1, dtype=wide) if output_mask[3] else None
    parameters = {1: gate_up, 2: down, 4: gate_up_bias, 5: down_bias}
    dgate_up, ddown, dgate_up_bias, ddown_bias = gradients = [
        torch.empty_like(t, memory_format=torch.contiguous_format) if output_mask[i] else None
        for i, t in parameters.items()
    ]
    idle = sorted({*range(experts)}.difference(e for e, _ in groups))
    for gradient in gradients:
        if gradient is not None:
            gradient[idle] = 0
    wide_gate_up, wide_down = _Widened(gate_up, wide), _Widened(down, wide)
    for e, part in groups:
        grad, weight = grads[part], slot_weights[part]
        gate, up = preactivation[part].to(wide).chunk(2, -1)
        activated = ACTIVATIONS[activation](gate)
        hidden = activated * up
        dhidden = grad @ wide_down(down[e])
        if dweights is not None:
            # ⟨dC, hidden·downᵀ⟩ = ⟨dC·down, hidden⟩, so the down product itself need not be kept.
            torch.sum(dhidden * hidden, 1, keepdim=True, out=dweights[part])
            if down_bias is not None:
                dweights[part] += (grad @ down_bias[e].to(wide)).unsqueeze(1)
        if ddown is not None:
            _multiply(grad.T, hidden.mul_(weight), ddown[e])
        if ddown_bias is not None:
            ddown_bias[e] = weight.T @ grad
        if not wants_dpre:
            continue
        dhidden.mul_(weight)
        dpre = torch.cat([DERIVATIVES[activation](dhidden * up, gate), dhidden.mul_(activated)], -1)
        if dinput is not None:
            torch.mm(dpre, wide_gate_up(gate_up[e]), out=dinput[part])
        if dgate_up is not None:
            _multiply(dpre.T, rows[part], dgate_up[e])
        if dgate_up_bias is not None:
            dgate_up_bias[e] = dpre.sum(0)
    if dinput is not None:
        dinput = _combined(dinput, inverse, None, expert_ids.shape).to(input.dtype)
    if dweights is not None:
        dweights = dweights.flatten().index_select(0, inverse).view(weights.shape).to(weights.dtype)
    return dinput, dgate_up, ddown, dweights, dgate_up_bias, ddown_bias


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)

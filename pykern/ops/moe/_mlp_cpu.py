"""The experts on CPU tensors: grouped products of all experts at once, and between them torch's elementwise kernels."""

import torch
import torch.nn.functional as F
from torch import Tensor

from pykern.ops.moe._backends import SORT, SORT_LACKS
from pykern.ops.moe._common import is_expert, wide_dtype
from pykern.ops.moe._grouped_cpu import grouped_mm_backward_cpu, grouped_mm_cpu
from pykern.ops.moe.activations import ACTIVATIONS, DERIVATIVES
from pykern.ops.moe.sort import moe_sort_reference


def _sorted(expert_ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    kernel = SORT["cpu"]
    if SORT_LACKS["cpu"](expert_ids, experts) is None and kernel.missing("cpu") is None:
        return kernel.resolve("cpu")(expert_ids, experts)
    return moe_sort_reference(expert_ids, experts)


def _tokens(order: Tensor, top_k: int) -> Tensor:
    """The token of each slot."""
    return order.div(max(top_k, 1), rounding_mode="floor")


def _combined(rows: Tensor, inverse: Tensor, weights: Tensor | None, shape: torch.Size) -> Tensor:
    """Σₖ weights[t, k] · rows[inverse[t, k]], summed in the order of k."""
    if not inverse.numel():
        return rows.new_zeros(shape[0], rows.shape[1])
    return F.embedding_bag(inverse.view(shape), rows, mode="sum", per_sample_weights=weights)


def moe_mlp_cpu(
    input: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    expert_ids: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide, experts = wide_dtype(input.dtype), down.shape[0]
    order, inverse, offs = _sorted(expert_ids, experts)
    token = _tokens(order, expert_ids.shape[1])
    preactivation = grouped_mm_cpu(input, gate_up.mT, offs, gate_up_bias, wide, token)
    gate, up = preactivation.chunk(2, -1)
    out = grouped_mm_cpu(ACTIVATIONS[activation](gate).mul_(up), down.mT, offs, down_bias, wide)
    kept = is_expert(expert_ids, experts)
    output = _combined(out, inverse, weights.to(wide).where(kept, 0.0), expert_ids.shape)
    return output.to(input.dtype), preactivation.to(input.dtype), order, offs


def moe_mlp_backward_cpu(
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
    wide, slots = wide_dtype(input.dtype), order.shape[0]
    token = _tokens(order, expert_ids.shape[1])
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(slots))
    weight = weights.to(wide).flatten().index_select(0, order).unsqueeze(1)
    dinput = dgate_up = ddown = dweights = dgate_up_bias = ddown_bias = None

    def sums(a: Tensor, b: Tensor, like: Tensor, gather: Tensor | None = None) -> Tensor | None:
        """aᵀ·b over each expert's slots, in the shape and dtype of `like`."""
        mask = [False, True, False]
        return grouped_mm_backward_cpu(b, a, like, offs, None, None, gather, None, mask)[1]

    if output_mask[5]:
        ddown_bias = sums(weight, doutput.index_select(0, token), down_bias.unsqueeze(1)).squeeze(1)
    dhidden = grouped_mm_cpu(doutput, down, offs, None, wide, token)
    gate, up = preactivation.to(wide).chunk(2, -1)
    activated = ACTIVATIONS[activation](gate)
    if output_mask[3]:
        # ⟨dC, hidden·downᵀ⟩ = ⟨dC·down, hidden⟩, so the down product itself need not be kept.
        dweights = torch.linalg.vecdot(dhidden, activated * up).unsqueeze(1)
        if down_bias is not None:
            dweights += grouped_mm_cpu(doutput, down_bias.unsqueeze(2), offs, None, wide, token)
        dweights = dweights.flatten().index_select(0, inverse).view(weights.shape).to(weights.dtype)
    if output_mask[2]:
        ddown = sums(doutput, (activated * up).mul_(weight), down, token)
    if output_mask[0] or output_mask[1] or output_mask[4]:
        dhidden.mul_(weight)
        dpre = torch.cat([DERIVATIVES[activation](dhidden * up, gate), dhidden.mul_(activated)], -1)
        if output_mask[0]:
            dinput = _combined(grouped_mm_cpu(dpre, gate_up, offs, None, wide), inverse, None, expert_ids.shape)
            dinput = dinput.to(input.dtype)
        if output_mask[1]:
            dgate_up = sums(dpre, input.index_select(0, token), gate_up)
        if output_mask[4]:
            dgate_up_bias = sums(dpre.new_ones(slots, 1), dpre, gate_up_bias.unsqueeze(1)).squeeze(1)
    return dinput, dgate_up, ddown, dweights, dgate_up_bias, ddown_bias

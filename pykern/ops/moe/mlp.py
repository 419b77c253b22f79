"""The experts of a mixture-of-experts layer: two grouped products around a gated activation, combined per token.

Gated linear units: Shazeer, arXiv:2002.05202. What is kept for the backward, and the gradient of the routing weights
without the down product: SonicMoE, Guo et al., arXiv:2512.14080.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pykern.ops._backends import triton
from pykern.ops._spec import define, define_backward
from pykern.ops.moe._backends import mlp_backward_lacks, mlp_lacks
from pykern.ops.moe._common import FLOAT_DTYPES, check_choice, check_id_values, check_ids, is_expert, wide_dtype
from pykern.ops.moe._mlp_cpu import moe_mlp_backward_cpu, moe_mlp_cpu
from pykern.ops.moe._products import grouped_mm_reference
from pykern.ops.moe.activations import ACTIVATIONS
from pykern.ops.moe.mlp_samples import bad_mlps, mlp_samples
from pykern.ops.moe.sort import moe_sort_reference
from pykern.ops.norm import check_like


def moe_mlp_reference(
    input: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    expert_ids: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = wide_dtype(input.dtype)
    x, w1, w2, b1, b2 = (None if t is None else t.to(wide) for t in (input, gate_up, down, gate_up_bias, down_bias))
    tokens, top_k = expert_ids.shape
    order, inverse, offs = moe_sort_reference(expert_ids, gate_up.shape[0])
    # Repeated, then permuted: the gradient of a permutation needs no sum, and that of the repeat has an order.
    rows = x.unsqueeze(1).expand(-1, top_k, -1).reshape(tokens * top_k, x.shape[1])[order]
    preactivation = grouped_mm_reference(rows, w1.mT, offs, b1, None, None, None)
    gate, up = preactivation.chunk(2, -1)
    hidden = ACTIVATIONS[activation](gate) * up
    out = grouped_mm_reference(hidden, w2.mT, offs, b2, None, None, None)[inverse]
    kept = is_expert(expert_ids, gate_up.shape[0])
    weighted = out.unflatten(0, (tokens, top_k)) * weights.to(wide).where(kept, 0.0).unsqueeze(-1)
    return weighted.sum(1).to(input.dtype), preactivation.to(input.dtype), order, offs


def _check(
    input: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    expert_ids: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
) -> None:
    torch._check_type(input.is_floating_point(), lambda: f"input: expected a floating dtype, got {input.dtype}")
    torch._check_value(input.dim() == 2, lambda: f"input: expected shape (tokens, H), got {tuple(input.shape)}")
    torch._check_value(
        gate_up.dim() == 3 and gate_up.shape[0] > 0 and gate_up.shape[1] % 2 == 0,
        lambda: f"gate_up: expected shape (E, 2·I, H) with at least one expert, got {tuple(gate_up.shape)}",
    )
    check_choice("activation", activation, tuple(ACTIVATIONS))
    check_ids(expert_ids)
    experts, two_widths, _ = gate_up.shape
    tokens, size = input.shape
    check_like("gate_up", gate_up, input, (experts, two_widths, size), (input.dtype,))
    check_like("down", down, input, (experts, size, two_widths // 2), (input.dtype,))
    check_like("expert_ids", expert_ids, input, (tokens, expert_ids.shape[1]), (expert_ids.dtype,))
    check_like("weights", weights, input, expert_ids.shape, FLOAT_DTYPES)
    check_like("gate_up_bias", gate_up_bias, input, (experts, two_widths), FLOAT_DTYPES)
    check_like("down_bias", down_bias, input, (experts, size), FLOAT_DTYPES)


def _fake(
    input: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, expert_ids: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    slots = expert_ids.shape[0] * expert_ids.shape[1]
    return (
        input.new_empty(input.shape),
        input.new_empty((slots, gate_up.shape[1])),
        input.new_empty((slots,), dtype=torch.int64),
        input.new_empty((gate_up.shape[0],), dtype=torch.int32),
    )


def _torch(
    input: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    expert_ids: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
) -> Tensor:
    """A loop over the experts that finds each one's tokens and adds its output, as models write it in torch."""
    out = torch.zeros_like(input)
    for e in range(gate_up.shape[0]):
        token, slot = torch.where(expert_ids == e)
        gate, up = F.linear(input[token], gate_up[e], None if gate_up_bias is None else gate_up_bias[e]).chunk(2, -1)
        y = F.linear(ACTIVATIONS[activation](gate) * up, down[e], None if down_bias is None else down_bias[e])
        out = out.index_add(0, token, (y * weights[token, slot, None]).to(out.dtype))
    return out.to(y.dtype)


def _cost(input: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, expert_ids: Tensor, *_: Any) -> Any:
    """Three matrices' worth of flops a slot; tokens in and out, the pre-activation, and the experts that can be hit."""
    slots, (experts, two_widths, size) = expert_ids.numel(), gate_up.shape
    matrices = min(experts, slots) * 1.5 * two_widths * size
    moved = (2 * input.numel() + slots * two_widths + matrices) * input.element_size()
    return 3.0 * slots * two_widths * size, moved + slots * (8.0 + expert_ids.element_size() + weights.element_size())


_ARGUMENTS = (
    "Tensor input, Tensor gate_up, Tensor down, Tensor weights, Tensor expert_ids, Tensor? gate_up_bias,"
    " Tensor? down_bias, str activation"
)

_moe_mlp_backward = define_backward(
    f"pykern::moe_mlp_backward(Tensor? doutput, {_ARGUMENTS}, Tensor preactivation, Tensor order, Tensor offs,"
    " bool[6] output_mask, *, str? backend=None) -> (Tensor dinput, Tensor dgate_up, Tensor ddown, Tensor dweights,"
    " Tensor dgate_up_bias, Tensor ddown_bias)",
    check=lambda doutput, input, *rest: (
        _check(input, *rest[:7]),
        check_like("doutput", doutput, input, input.shape, (input.dtype,)),
    ),
    backends={"triton": triton("moe_mlp_backward", "moe_mlp_backward"), "cpu": moe_mlp_backward_cpu},
    supports={
        "triton": mlp_backward_lacks,
        "cpu": lambda doutput, *args: "no gradient to start from" if doutput is None else None,
    },
    cost=lambda doutput, *args: tuple(2 * c for c in _cost(*args)),
    traffic=lambda backend, *_: 1.2,
)

_moe_mlp = define(
    f"pykern::moe_mlp({_ARGUMENTS}, *, str? backend=None)"
    " -> (Tensor output, Tensor preactivation, Tensor order, Tensor offs)",
    reference=moe_mlp_reference,
    check=_check,
    fake=_fake,
    backward=_moe_mlp_backward,
    traffic=lambda backend, *_: 1.2,  # the activation goes through memory between the two products
    backends={"triton": triton("moe_mlp", "moe_mlp"), "cpu": moe_mlp_cpu},
    supports={"triton": mlp_lacks},
    autocast=dict.fromkeys(("input", "gate_up", "down", "gate_up_bias", "down_bias"), "lower"),
    samples=mlp_samples,
    bad=bad_mlps,
    cost=_cost,
    peers={"torch": _torch},
    # Rounding the pre-activation to 16 bits costs the gradients, dot products that cancel, up to five times what
    # rounding the result once does; measured over eight seeds.
    tolerance=6.0,
)


@_moe_mlp.public
def moe_mlp(
    input: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    expert_ids: Tensor,
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "silu",
) -> Tensor:
    """The routed experts of a layer: Σₖ weights[t, k] · downₑ(activation(gateₑ(x)) · upₑ(x)) with e = expert_ids[t, k].

    Products accumulate in fp32 (fp64 for fp64), and the slots of a token are summed in the order of k.

    Args:
        input: (tokens, H), any floating dtype and strides.
        gate_up: (E, 2·I, H), the gate's rows first, in the input's dtype, as transformers stores it.
        down: (E, H, I), in the input's dtype.
        weights: (tokens, top_k), any floating dtype, as `moe_route` gives them.
        expert_ids: (tokens, top_k) int64 or int32. −1 drops the slot, and so does any other id that is no expert (with
            PYKERN_CHECKS=1 such an id raises); the weight of a dropped slot is not looked at and gets a zero gradient.
        gate_up_bias, down_bias: (E, 2·I) and (E, H).
        activation: of the gate: "silu", "gelu" (exact), "gelu_tanh" or "relu".

    Returns:
        (tokens, H) in the input's dtype.

    Raises:
        ValueError, TypeError: a shape, dtype, device or option does not fit; the message names the argument.
    """
    if gate_up.dim():
        check_id_values(expert_ids, gate_up.shape[0])
    return _moe_mlp(input, gate_up, down, weights, expert_ids, gate_up_bias, down_bias, activation)[0]

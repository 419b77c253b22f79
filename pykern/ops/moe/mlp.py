"""The experts of a mixture-of-experts layer: two grouped products around a gated activation, combined per token.

Gated linear units: Shazeer, arXiv:2002.05202. What is kept for the backward, and the gradient of the routing weights
without the down product: SonicMoE, Guo et al., arXiv:2512.14080.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pykern.ops._spec import Sample, define, define_backward
from pykern.ops.moe._common import FLOAT_DTYPES, check_choice, check_id_values, check_ids, is_expert, wide_dtype
from pykern.ops.moe._products import grouped_mm_reference, grouped_mm_sliced, put_rows
from pykern.ops.moe.sort import moe_sort_reference
from pykern.ops.norm import check_like

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
_DERIVATIVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": torch.ops.aten.silu_backward,
    "gelu": torch.ops.aten.gelu_backward,
    "gelu_tanh": lambda grad, x: torch.ops.aten.gelu_backward(grad, x, approximate="tanh"),
    "relu": lambda grad, x: torch.ops.aten.threshold_backward(grad, x, 0),
}


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


def _sliced(
    input: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    expert_ids: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide, (tokens, top_k) = wide_dtype(input.dtype), expert_ids.shape
    order, _, offs = moe_sort_reference(expert_ids, gate_up.shape[0])
    token = order.div(top_k, rounding_mode="floor")
    preactivation = grouped_mm_sliced(input, gate_up.mT, offs, gate_up_bias, wide, token, None)
    gate, up = preactivation.chunk(2, -1)
    hidden = ACTIVATIONS[activation](gate).mul_(up)
    out = grouped_mm_sliced(hidden, down.mT, offs, down_bias, wide, None, order).view(tokens, top_k, input.shape[1])
    kept = is_expert(expert_ids, gate_up.shape[0])
    out = out.mul_(weights.to(wide).where(kept, 0.0).unsqueeze(-1)).sum(1)
    return out.to(input.dtype), preactivation.to(input.dtype), order, offs


def _backward_sliced(
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
    wide, (tokens, top_k), experts = wide_dtype(input.dtype), expert_ids.shape, gate_up.shape[0]
    token = order.div(top_k, rounding_mode="floor")
    grad = doutput.to(wide)[token]
    kept = is_expert(expert_ids, experts)
    weight = weights.to(wide).where(kept, 0.0).flatten()[order].unsqueeze(1)
    gate, up = preactivation.to(wide).chunk(2, -1)
    activated = ACTIVATIONS[activation](gate)
    hidden = activated * up
    unweighted = grouped_mm_sliced(grad, down, offs, None, wide, None, None)
    dinput = dgate_up = ddown = dweights = dgate_up_bias = ddown_bias = None
    if output_mask[3]:
        # ⟨dC, hidden·downᵀ⟩ = ⟨dC·down, hidden⟩, so the down product itself need not be kept.
        products = (unweighted * hidden).sum(1, keepdim=True)
        if down_bias is not None:
            expert = expert_ids.flatten()[order].clamp(0, experts - 1).long()
            products += (grad * down_bias.to(wide)[expert]).sum(1, keepdim=True)
        dweights = put_rows(products, order).view(tokens, top_k).where(kept, 0.0).to(weights.dtype)
    grad = grad.mul_(weight)
    if output_mask[2]:
        ddown = grouped_mm_sliced(grad.mT, hidden, offs, None, wide, None, None).to(down.dtype)
    if output_mask[5]:
        ddown_bias = _group_sums(grad, offs).to(down_bias.dtype)
    if not (output_mask[0] or output_mask[1] or output_mask[4]):
        return dinput, dgate_up, ddown, dweights, dgate_up_bias, ddown_bias
    dhidden = unweighted.mul_(weight)
    dpre = torch.cat([_DERIVATIVES[activation](dhidden * up, gate), dhidden * activated], -1)
    if output_mask[0]:
        rows = grouped_mm_sliced(dpre, gate_up, offs, None, wide, None, order)
        dinput = rows.view(tokens, top_k, input.shape[1]).sum(1).to(input.dtype)
    if output_mask[1]:
        dgate_up = grouped_mm_sliced(dpre.mT, input[token], offs, None, wide, None, None).to(gate_up.dtype)
    if output_mask[4]:
        dgate_up_bias = _group_sums(dpre, offs).to(gate_up_bias.dtype)
    return dinput, dgate_up, ddown, dweights, dgate_up_bias, ddown_bias


def _group_sums(rows: Tensor, offs: Tensor) -> Tensor:
    return grouped_mm_sliced(rows.new_ones(1, rows.shape[0]), rows, offs, None, None, None, None).squeeze(1)


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


def _samples(kind: str, make: Any) -> Iterator[Sample]:
    def layer(tokens: int, top_k: int, experts: int, size: int, width: int, ids: Tensor | None = None) -> list[Any]:
        if ids is None:
            ids = make(tokens, experts, grad=False).argsort(-1)[:, :top_k].contiguous()
        weights = make(tokens, top_k)
        gate_up = make(experts, 2 * width, size, scale=size**-0.5)
        return [make(tokens, size), gate_up, make(experts, size, width, scale=width**-0.5), weights, ids, None, None]

    if kind == "bench":
        if make.device.type == "cuda":
            yield Sample("mixtral 4096 tokens 8x2", (*layer(4096, 2, 8, 4096, 14336), "silu"))
            yield Sample("qwen3 8192 tokens 128x8", (*layer(8192, 8, 128, 2048, 768), "silu"))
        else:
            yield Sample("mixtral/8 512 tokens 8x2", (*layer(512, 2, 8, 512, 1792), "silu"))
            yield Sample("qwen3/4 512 tokens 64x8", (*layer(512, 8, 64, 512, 192), "silu"))
        return
    yield Sample("small", (*layer(10, 2, 3, 8, 6), "silu"))
    for activation in ACTIVATIONS:
        yield Sample(activation, (*layer(33, 2, 4, 32, 24), activation))
    yield Sample("prime sizes", (*layer(23, 3, 5, 31, 19), "silu"))
    yield Sample("one token", (*layer(1, 7, 11, 32, 24), "silu"))
    yield Sample("no tokens", (*layer(0, 2, 3, 8, 5), "silu"))
    yield Sample("one expert", (*layer(33, 1, 1, 32, 24), "silu"))
    yield Sample("every expert", (*layer(5, 4, 4, 32, 24), "silu"))
    yield Sample("all to one", (*layer(33, 1, 5, 32, 24, make(33, 1, dtype=torch.int64, low=3, high=4)), "silu"))
    yield Sample("dropped slots", (*layer(17, 2, 4, 32, 24, make(17, 2, dtype=torch.int64, low=-1, high=4)), "silu"))
    x, gate_up, down, weights, ids, _, _ = layer(17, 2, 4, 32, 24)
    yield Sample("biases", (x, gate_up, down, weights, ids, make(4, 48), make(4, 32), "gelu"))
    # Their gradient is in fp32 too, but no nearer than the pre-activation, which is kept in the input's dtype.
    single = make(17, 2, dtype=torch.float32, grad=make.dtype == torch.float32)
    yield Sample("fp32 weights", (x, gate_up, down, single, ids, None, None, "silu"))
    transposed = (make(4, 32, 48, scale=0.2).mT, make(4, 24, 32, scale=0.2).mT)
    yield Sample("transposed", (make(32, 17).t(), *transposed, weights, ids.int(), None, None, "silu"))
    frozen = (gate_up.detach(), down.detach())
    yield Sample("frozen experts", (x, *frozen, weights, ids, None, None, "silu"))
    if kind == "full":
        yield Sample("many tiles", (*layer(259, 4, 7, 72, 40), "silu"))
        yield Sample("64 experts", (*layer(130, 8, 61, 24, 16), "silu"))


def _bad(make: Any) -> Iterator[tuple[str, tuple[Any, ...], type[Exception], str]]:
    x, w1, w2, w = make(6, 8), make(3, 10, 8), make(3, 8, 5), make(6, 2)
    ids = make(6, 2, dtype=torch.int64, low=0, high=3)
    none = (None, None, "silu")
    yield "rank", (x[0], w1, w2, w, ids, *none), ValueError, r"input: expected shape \(tokens, H\), got \(8,\)"
    yield "integers", (x.long(), w1, w2, w, ids, *none), TypeError, "input: expected a floating dtype"
    yield "odd gate_up", (x, make(3, 9, 8), w2, w, ids, *none), ValueError, r"gate_up: .* got \(3, 9, 8\)"
    yield "gate_up", (x, make(3, 10, 7), w2, w, ids, *none), ValueError, r"gate_up: expected shape \(3, 10, 8\)"
    yield (
        "down",
        (x, w1, make(3, 5, 8), w, ids, *none),
        ValueError,
        r"down: expected shape \(3, 8, 5\), got \(3, 5, 8\)",
    )
    yield "two dtypes", (x, w1, w2.to(torch.float64), w, ids, *none), TypeError, "down: expected dtype"
    yield "weights", (x, w1, w2, w[:, :1], ids, *none), ValueError, r"weights: expected shape \(6, 2\), got \(6, 1\)"
    yield "ids", (x, w1, w2, w, ids[:5], *none), ValueError, r"expert_ids: expected shape \(6, 2\), got \(5, 2\)"
    yield "float ids", (x, w1, w2, w, make(6, 2), *none), TypeError, "expert_ids: expected dtype int64 or int32"
    yield "bias", (x, w1, w2, w, ids, None, make(3, 5), "silu"), ValueError, r"down_bias: expected shape \(3, 8\)"
    yield "activation", (x, w1, w2, w, ids, None, None, "swish"), ValueError, "activation: .* got 'swish'"


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
    backends={"cpu": _backward_sliced},
    supports={"cpu": lambda doutput, *args: "no gradient to start from" if doutput is None else None},
    cost=lambda doutput, *args: tuple(2 * c for c in _cost(*args)),
)

_moe_mlp = define(
    f"pykern::moe_mlp({_ARGUMENTS}, *, str? backend=None)"
    " -> (Tensor output, Tensor preactivation, Tensor order, Tensor offs)",
    reference=moe_mlp_reference,
    check=_check,
    fake=_fake,
    backward=_moe_mlp_backward,
    backends={"cpu": _sliced},
    autocast=dict.fromkeys(("input", "gate_up", "down", "gate_up_bias", "down_bias"), "lower"),
    samples=_samples,
    bad=_bad,
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

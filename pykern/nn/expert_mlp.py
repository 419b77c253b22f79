"""The experts of a layer, whatever stands for their weights: floats, 4-bit codes, low-rank adapters."""

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from pykern import ops
from pykern.nn.lora_experts import AddLowRank
from pykern.nn.quantize_model import Decode4bit
from pykern.ops import Weight4bit
from pykern.ops.moe.activations import ACTIVATIONS

_Weight = tuple[Tensor | Weight4bit, AddLowRank | None]


def expert_mlp(
    module: torch.nn.Module,
    gate_up: str,
    down: str,
    input: Tensor,
    weights: Tensor,
    expert_ids: Tensor,
    activation: str = "silu",
) -> Tensor:
    """`pykern.ops.moe_mlp` with the parameters of these names.

    Where one is kept in 4 bits or has adapters, its product is a grouped one of what there is: no expert is decoded
    that nobody chose, no sum of experts and adapters is ever in memory, and an adapter of fp32 on 16-bit experts is not
    rounded away in such a sum.
    """
    first, second = (_weight(module, name) for name in (gate_up, down))
    if isinstance(first[0], Tensor) and isinstance(second[0], Tensor) and first[1] is second[1] is None:
        return ops.moe_mlp(input, first[0], second[0], weights, expert_ids, activation=activation)
    experts, (tokens, top_k) = first[0].shape[0], expert_ids.shape
    order, _, offs = ops.moe_sort(expert_ids, experts)
    token = order.div(max(top_k, 1), rounding_mode="floor")
    gate, up = _multiply(input, first, offs, gather=token).chunk(2, -1)
    out = _multiply(ACTIVATIONS[activation](gate) * up, second, offs, scatter=order).view(tokens, top_k, -1)
    wide = torch.promote_types(out.dtype, torch.float32)
    kept = (expert_ids >= 0) & (expert_ids < experts)  # the weight of a dropped slot may be NaN
    weights = weights.to(wide).where(kept, 0.0)
    return (weights.unsqueeze(-1) * out).sum(1).to(out.dtype)  # no matmul, which autocast would round


def _weight(module: torch.nn.Module, name: str) -> _Weight:
    """What the parameter is made of; as it reads, where other parametrizations have a part in that."""
    if not parametrize.is_parametrized(module, name):
        return getattr(module, name), None
    chain = module.parametrizations[name]
    weight, steps, adapter = chain.original, list(chain), None
    if isinstance(steps[0], Decode4bit):
        weight = steps.pop(0).with_codes(weight)
    if steps and isinstance(steps[0], AddLowRank) and not steps[0].transposed:
        adapter = steps.pop(0)
    return (getattr(module, name), None) if steps else (weight, adapter)


def _multiply(rows: Tensor, of: _Weight, offs: Tensor, **places: Tensor) -> Tensor:
    weight, adapter = of
    matrices = weight if isinstance(weight, Weight4bit) else weight.mT
    if adapter is None:
        return ops.grouped_mm(rows, matrices, offs=offs, **places)
    low_rank = adapter.lora_A.weight, adapter.lora_B.weight
    return ops.lora_grouped_mm(rows, matrices, *low_rank, offs=offs, scaling=adapter.scaling, **places)

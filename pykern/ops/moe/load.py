"""How the router's choices are spread over the experts, for the log of a training."""

from typing import NamedTuple

import torch
from torch import Tensor

from pykern.ops.moe._common import check_id_values, check_ids, is_expert
from pykern.ops.norm import check_like


class ExpertLoad(NamedTuple):
    counts: Tensor
    """(num_experts,) int64: the slots that each expert got."""
    fractions: Tensor
    """(num_experts,) fp32: the share of all slots; 1 / num_experts each when balanced, 0 without a slot."""
    max_violation: Tensor
    """Scalar fp32: by how much the fullest expert exceeds the mean load, over that mean; 0 when balanced."""


def expert_counts(expert_ids: Tensor, num_experts: int) -> Tensor:
    """(rows, ids) -> (rows, num_experts) int64: how often each id occurs in a row; ids of no expert are left out."""
    slots = torch.where(is_expert(expert_ids, num_experts), expert_ids.long(), num_experts)
    # Counted in integers, so that no order of summation can matter.
    counts = slots.new_zeros(slots.shape[0], num_experts + 1).scatter_add(1, slots, torch.ones_like(slots))
    return counts[:, :num_experts]


def moe_load(expert_ids: Tensor, num_experts: int, *, attention_mask: Tensor | None = None) -> ExpertLoad:
    """Counts the slots of every expert, without waiting for the device.

    Args:
        expert_ids: (tokens, top_k) int64 or int32, as `moe_route` gives them; an id that is no expert is not counted.
        num_experts: the experts that there are.
        attention_mask: tokens' worth of bool or integers in any shape, 0 for padding, which does not count.

    Returns:
        counts, fractions and max_violation (DeepSeek's MaxVio, arXiv:2408.15664).

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit; the message names the argument.
    """
    flat = None if attention_mask is None else attention_mask.reshape(-1)
    if not torch.compiler.is_compiling():  # which cannot trace the messages
        check_ids(expert_ids)
        torch._check_value(num_experts > 0, lambda: f"num_experts: expected at least one, got {num_experts}")
        check_id_values(expert_ids, num_experts)
        if flat is not None:
            check_like("attention_mask", flat, expert_ids, expert_ids.shape[:1], (flat.dtype,))
    if flat is not None:
        expert_ids = expert_ids.where((flat != 0).unsqueeze(1), -1)
    counts = expert_counts(expert_ids.reshape(1, -1), num_experts).squeeze(0)
    fractions = counts.float() / counts.sum().clamp(min=1)
    return ExpertLoad(counts, fractions, (fractions.max() * num_experts - 1).clamp(min=0))

"""What the MoE ops share: the dtype they compute in, the routing scores, and the checks of expert ids."""

import os

import torch
from torch import Tensor

SCORES = ("softmax", "sigmoid")
ID_DTYPES = (torch.int64, torch.int32)
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that is computed in: fp32, and fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def normalized_sigmoid(logits: Tensor) -> Tensor:
    """sigmoid(logits) / sum(sigmoid(logits)) over the last dimension, also where every sigmoid underflows.

    σ(x) = eˣ·σ(−x), and a factor common to the row leaves the quotient as it is; so where all logits are negative the
    largest exponential is taken out first. The inner `where` keeps the branch not taken, and its gradient, finite.
    """
    top = logits.detach().amax(-1, keepdim=True)
    below = top < 0
    shifted = torch.where(below, logits - top, 0.0)
    scores = torch.where(below, shifted.exp() * (-logits).sigmoid(), logits.sigmoid())
    return scores / scores.sum(-1, keepdim=True)


def is_expert(expert_ids: Tensor, num_experts: int) -> Tensor:
    """Where an id names an expert; every other id, −1 above all, means a dropped slot."""
    return (expert_ids >= 0) & (expert_ids < num_experts)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    torch._check_value(value in choices, lambda: f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def check_logits(logits: Tensor) -> None:
    torch._check_type(logits.is_floating_point(), lambda: f"logits: expected a floating dtype, got {logits.dtype}")
    torch._check_value(
        logits.dim() == 2, lambda: f"logits: expected shape (tokens, experts), got {tuple(logits.shape)}"
    )


def check_ids(expert_ids: Tensor) -> None:
    torch._check_type(
        expert_ids.dtype in ID_DTYPES, lambda: f"expert_ids: expected dtype int64 or int32, got {expert_ids.dtype}"
    )
    torch._check_value(
        expert_ids.dim() == 2, lambda: f"expert_ids: expected shape (tokens, top_k), got {tuple(expert_ids.shape)}"
    )


def checks_on_host() -> bool:
    """Whether the values of ids and offsets are to be read and checked, which waits for the device."""
    if os.environ.get("PYKERN_CHECKS") != "1":
        return False
    return not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())


def check_id_values(expert_ids: Tensor, num_experts: int) -> None:
    """With PYKERN_CHECKS=1, refuses ids that are neither an expert nor −1."""
    if not checks_on_host() or not expert_ids.numel():
        return
    low, high = (int(x) for x in expert_ids.aminmax())
    if low < -1 or high >= num_experts:
        raise ValueError(f"expert_ids: expected ids from -1 to {num_experts - 1}, got {low if low < -1 else high}")

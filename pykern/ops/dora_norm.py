"""The norm of each row of a weight with its adapter, by which DoRA divides. Liu et al., arXiv:2402.09353."""

import torch
from torch import Tensor

from pykern.ops._spec import define
from pykern.ops.lora_backends import DORA_NORM, DORA_NORM_LACKS
from pykern.ops.lora_common import check_adapter, lora_cost, widened
from pykern.ops.lora_samples import bad_dora_norm, dora_norm_samples


def dora_norm_reference(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    # Contiguous, because torch adds up the products of strided matrices, and of their gradients, in another order.
    update = widened(lora_b).contiguous() @ widened(lora_a).contiguous()
    adapted = widened(weight) + scaling * update
    return torch.linalg.vector_norm(adapted, dim=-1)


def _check_dora_norm(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> None:
    torch._check_type(weight.is_floating_point(), lambda: f"weight: expected a floating dtype, got {weight.dtype}")
    torch._check_value(weight.dim() == 2, lambda: f"weight: expected shape (out, in), got {tuple(weight.shape)}")
    check_adapter(weight, weight.shape[0], lora_a, lora_b)


dora_norm = define(
    "pykern::dora_norm(Tensor weight, Tensor lora_a, Tensor lora_b, float scaling, *, str? backend=None)"
    " -> Tensor norm",
    reference=dora_norm_reference,
    check=_check_dora_norm,
    fake=lambda weight, *_: weight.new_empty(
        weight.shape[0], dtype=torch.float64 if weight.dtype == torch.float64 else torch.float32
    ),
    backends=DORA_NORM,
    supports=DORA_NORM_LACKS,
    samples=dora_norm_samples,
    bad=bad_dora_norm,
    cost=lambda weight, lora_a, lora_b, _: lora_cost(
        lora_a, weight.shape[0], weight.numel() * weight.element_size(), lora_a, lora_b
    ),
)

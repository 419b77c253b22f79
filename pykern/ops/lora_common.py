"""What the ops with low-rank adapters have in common: argument errors, costs, and pieces of their references."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pykern.ops._weight4bit import decode
from pykern.ops.norm import check_like


def widened(x: Tensor) -> Tensor:
    """In the dtype that is computed in: fp32, and fp64 for fp64."""
    return x if x.dtype == torch.float64 else x.float()


def low_rank(x: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
    return F.linear(F.linear(x, widened(lora_a)), widened(lora_b))


def decode_wide(input: Tensor, weight: Sequence[Any]) -> Tensor:
    """A 4-bit weight in the dtype that is computed in, so that it need not be rounded to the input's."""
    return decode(*weight, torch.float64 if input.dtype == torch.float64 else torch.float32)


def check_base(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """The argument errors of a linear layer with a float weight."""
    torch._check_type(input.is_floating_point(), lambda: f"input: expected a floating dtype, got {input.dtype}")
    torch._check_value(
        weight.dim() == 2, lambda: f"weight: expected a weight of shape (out, in), got {tuple(weight.shape)}"
    )
    torch._check_value(
        input.dim() > 0 and input.shape[-1] == weight.shape[1],
        lambda: (
            f"input: expected shape (…, {weight.shape[1]}) for a weight of shape {tuple(weight.shape)}, "
            f"got {tuple(input.shape)}"
        ),
    )
    check_like("weight", weight, input, weight.shape, (input.dtype,))
    check_like("bias", bias, input, (weight.shape[0],), (input.dtype, torch.float32))


def check_adapter(input: Tensor, out: int, lora_a: Tensor, lora_b: Tensor, *adapters: int) -> None:
    """The shapes (*adapters, r, in) and (*adapters, out, r), and the dtype: the input's or fp32."""
    lead = ", ".join([*map(str, adapters), ""])
    torch._check_value(
        lora_a.dim() == len(adapters) + 2 and lora_a.shape[-2] > 0,
        lambda: f"lora_a: expected shape ({lead}r, {input.shape[-1]}) with r > 0, got {tuple(lora_a.shape)}",
    )
    rank = lora_a.shape[-2]
    check_like("lora_a", lora_a, input, (*adapters, rank, input.shape[-1]), (input.dtype, torch.float32))
    check_like("lora_b", lora_b, input, (*adapters, out, rank), (lora_a.dtype,))


def lora_cost(input: Tensor, out: int, weight: float, lora_a: Tensor, lora_b: Tensor) -> tuple[float, float]:
    """`weight` in bytes; every tensor moved once, the rank product kept on chip."""
    n, rank = lora_a.shape[-2:][::-1]
    rows = input.numel() // max(n, 1)
    adapter = (lora_a.numel() + lora_b.numel()) * lora_a.element_size()
    return 2.0 * rows * (n * out + rank * (n + out)), weight + adapter + rows * (n + out) * input.element_size()

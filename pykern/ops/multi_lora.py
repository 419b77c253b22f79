"""A linear layer whose tokens go through different low-rank adapters, or through none.

Batched adapters: Chen et al., Punica, arXiv:2310.18547; for training as well as for serving here.
"""

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pykern.ops._spec import define, define_backward
from pykern.ops._weight4bit import SCHEMA, Weight4bit, decode
from pykern.ops.linear_4bit import check_linear_4bit
from pykern.ops.lora_backends import (
    MULTI,
    MULTI_4BIT,
    MULTI_4BIT_BACKWARD,
    MULTI_4BIT_BACKWARD_LACKS,
    MULTI_4BIT_LACKS,
    MULTI_BACKWARD,
    MULTI_BACKWARD_LACKS,
    MULTI_LACKS,
)
from pykern.ops.lora_common import check_adapter, check_base, decode_wide, lora_cost, low_rank, widened
from pykern.ops.lora_samples import bad_multi, bad_multi_4bit, multi_samples, multi_samples_4bit
from pykern.ops.norm import check_like
from pykern.ops.weight4bit_checks import weight_bytes


def multi_lora_linear_reference(
    input: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    adapter_ids: Tensor,
    bias: Tensor | None,
    scaling: Tensor,
) -> Tensor:
    x = widened(input)
    base = F.linear(x, widened(weight))
    tokens = x.reshape(-1, x.shape[-1])
    update = base.new_zeros(tokens.shape[0], base.shape[-1])
    for i, (a, b, factor) in enumerate(zip(lora_a, lora_b, scaling, strict=True)):
        # Chosen before and after the product, so that no adapter's NaN reaches another one's tokens or gradients.
        chosen = (adapter_ids == i).unsqueeze(-1)
        own = low_rank(torch.where(chosen, tokens, 0.0), a, b)
        update = torch.where(chosen, own * factor, update)
    y = base + update.reshape(base.shape)
    return (y if bias is None else y + bias).to(input.dtype)


def multi_lora_linear_4bit_reference(input: Tensor, *rest: Any) -> Tensor:
    return multi_lora_linear_reference(input, decode_wide(input, rest[:9]), *rest[9:])


def _check_adapters(
    input: Tensor, out: int, lora_a: Tensor, lora_b: Tensor, adapter_ids: Tensor, scaling: Tensor
) -> None:
    torch._check_value(
        lora_a.dim() == 3, lambda: f"lora_a: expected shape (n, r, {input.shape[-1]}), got {tuple(lora_a.shape)}"
    )
    count = lora_a.shape[0]
    check_adapter(input, out, lora_a, lora_b, count)
    tokens = 1
    for size in input.shape[:-1]:
        tokens = tokens * size
    check_like("adapter_ids", adapter_ids, input, (tokens,), (torch.int64, torch.int32))
    check_like("scaling", scaling, input, (count,), (input.dtype, torch.float32))


def _check(
    input: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    adapter_ids: Tensor,
    bias: Tensor | None,
    scaling: Tensor,
) -> None:
    check_base(input, weight, bias)
    _check_adapters(input, weight.shape[0], lora_a, lora_b, adapter_ids, scaling)


def _check_4bit(input: Tensor, *rest: Any) -> None:
    weight, (lora_a, lora_b, adapter_ids, bias, scaling) = rest[:9], rest[9:]
    check_linear_4bit(input, weight, bias)
    _check_adapters(input, weight[-2][0], lora_a, lora_b, adapter_ids, scaling)


def _cost(input: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, *_: Any) -> tuple[float, float]:
    return lora_cost(input, weight.shape[0], weight.numel() * weight.element_size(), lora_a, lora_b)


def _cost_4bit(input: Tensor, *rest: Any) -> tuple[float, float]:
    return lora_cost(input, rest[7][0], weight_bytes(rest[:9]), rest[9], rest[10])


def _loop(input: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    """Token by token, with the adapter it names: how torch alone has to be used."""
    lora_a, lora_b, adapter_ids, bias, scaling = rest
    base = F.linear(input, weight, None if bias is None else bias.to(input.dtype))
    rows = []
    for token, adapter in zip(input.reshape(-1, input.shape[-1]), adapter_ids.tolist(), strict=True):
        used = 0 <= adapter < lora_a.shape[0]
        update = base.new_zeros(base.shape[-1])
        if used:
            update = F.linear(F.linear(token.to(lora_a.dtype), lora_a[adapter]), lora_b[adapter]) * scaling[adapter]
        rows.append(update.to(base.dtype))
    return base + torch.stack(rows).reshape(base.shape) if rows else base


_REST = "Tensor lora_a, Tensor lora_b, Tensor adapter_ids, Tensor? bias, Tensor scaling"

_multi_lora_linear_backward = define_backward(
    f"pykern::multi_lora_linear_backward(Tensor? dy, Tensor input, Tensor weight, {_REST}, bool[6] output_mask, *,"
    " str? backend=None)"
    " -> (Tensor dinput, Tensor dweight, Tensor dlora_a, Tensor dlora_b, Tensor dbias, Tensor dscaling)",
    check=lambda dy, input, weight, *rest: (
        _check(input, weight, *rest[:-1]),
        check_like("dy", dy, input, (*input.shape[:-1], weight.shape[0]), (input.dtype,)),
    ),
    backends=MULTI_BACKWARD,
    supports=MULTI_BACKWARD_LACKS,
    cost=lambda dy, *rest: _cost(*rest),
    traffic=lambda backend, *_: 1.3,  # sums of a divided depth, as in lora.py; every adapter's gradient is written
)

_multi_lora_linear = define(
    f"pykern::multi_lora_linear(Tensor input, Tensor weight, {_REST}, *, str? backend=None) -> Tensor y",
    reference=multi_lora_linear_reference,
    check=_check,
    fake=lambda input, weight, *_: input.new_empty((*input.shape[:-1], weight.shape[0])),
    backends=MULTI,
    supports=MULTI_LACKS,
    backward=_multi_lora_linear_backward,
    autocast=dict.fromkeys(("input", "weight", "lora_a", "lora_b", "bias"), "lower"),
    samples=multi_samples,
    bad=bad_multi,
    cost=_cost,
    peers={"torch": _loop},
)

_multi_lora_linear_4bit_backward = define_backward(
    f"pykern::multi_lora_linear_4bit_backward(Tensor? dy, Tensor input, {SCHEMA}, {_REST}, bool[5] output_mask, *,"
    " str? backend=None) -> (Tensor dinput, Tensor dlora_a, Tensor dlora_b, Tensor dbias, Tensor dscaling)",
    check=lambda dy, input, *rest: (
        _check_4bit(input, *rest[:-1]),
        check_like("dy", dy, input, (*input.shape[:-1], rest[7][0]), (input.dtype,)),
    ),
    backends=MULTI_4BIT_BACKWARD,
    supports=MULTI_4BIT_BACKWARD_LACKS,
    cost=lambda dy, *rest: _cost_4bit(*rest),
    traffic=lambda backend, *_: 1.6,
)

_multi_lora_linear_4bit = define(
    f"pykern::multi_lora_linear_4bit(Tensor input, {SCHEMA}, {_REST}, *, str? backend=None) -> Tensor y",
    reference=multi_lora_linear_4bit_reference,
    check=_check_4bit,
    fake=lambda input, *rest: input.new_empty((*input.shape[:-1], rest[7][0])),
    backends=MULTI_4BIT,
    supports=MULTI_4BIT_LACKS,
    backward=_multi_lora_linear_4bit_backward,
    autocast=dict.fromkeys(("input", "lora_a", "lora_b", "bias"), "lower"),
    samples=multi_samples_4bit,
    bad=bad_multi_4bit,
    cost=_cost_4bit,
    # As in linear_4bit, kernels multiply by a weight rounded to the input's dtype, besides rounding the result.
    tolerance=3.0,
    peers={"torch": lambda input, *rest: _loop(input, decode(*rest[:9], input.dtype), *rest[9:])},
)


@_multi_lora_linear_4bit.public
@_multi_lora_linear.public
def multi_lora_linear(
    input: Tensor,
    weight: Tensor | Weight4bit,
    lora_a: Tensor,
    lora_b: Tensor,
    adapter_ids: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float | Tensor = 1.0,
) -> Tensor:
    """A linear layer with an adapter for each token: input · Wᵀ + scaling[i] · input · A[i]ᵀ · B[i]ᵀ + bias.

    Args:
        input: (…, in), fp32, fp16, bf16 or fp64, any strides.
        weight: (out, in) in the input's dtype, or a `Weight4bit`, which is frozen.
        lora_a, lora_b: (n, r, in) and (n, out, r) of one dtype, the input's or fp32; smaller ranks padded with zeros.
        adapter_ids: int64 or int32, for each token the adapter i, or -1 for none: (tokens,), or of the input's shape
            without its last dimension. An id that names no adapter counts as none; with PYKERN_CHECKS=1 it raises.
        bias: (out,), in the input's dtype or fp32.
        scaling: for all adapters, or (n,), in the input's dtype or fp32, for each.

    Returns:
        (…, out) in the input's dtype.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit; the message names the argument.
    """
    if not isinstance(scaling, Tensor):
        scaling = torch.full(lora_a.shape[:1], scaling, dtype=torch.float32, device=input.device)
    if adapter_ids.shape == input.shape[:-1]:
        adapter_ids = adapter_ids.reshape(-1)
    if os.environ.get("PYKERN_CHECKS") == "1" and not torch.compiler.is_compiling() and adapter_ids.numel():
        low, high = (int(i) for i in adapter_ids.aminmax())
        if low < -1 or high >= lora_a.shape[0]:
            raise ValueError(
                f"adapter_ids: expected ids from -1 to {lora_a.shape[0] - 1}, got {low if low < -1 else high}"
            )
    rest = (lora_b, adapter_ids, bias, scaling)
    if isinstance(weight, Weight4bit):
        return _multi_lora_linear_4bit(weight.ordered(input), *weight.arguments, weight.ordered(lora_a), *rest)
    return _multi_lora_linear(input, weight, lora_a, *rest)

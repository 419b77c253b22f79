"""A linear layer with a low-rank adapter, on a float or a 4-bit weight.

LoRA: Hu et al., arXiv:2106.09685. DoRA: Liu et al., arXiv:2402.09353. QLoRA: Dettmers et al., arXiv:2305.14314.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pykern.ops._philox import draw_rng, keep_mask, row_index
from pykern.ops._spec import define, define_backward
from pykern.ops._weight4bit import SCHEMA, Weight4bit, decode
from pykern.ops.dequantize_4bit import dequantize_4bit
from pykern.ops.dora_norm import dora_norm
from pykern.ops.linear_4bit import check_linear_4bit
from pykern.ops.lora_backends import (
    LORA,
    LORA_4BIT,
    LORA_4BIT_BACKWARD,
    LORA_4BIT_BACKWARD_LACKS,
    LORA_4BIT_LACKS,
    LORA_BACKWARD,
    LORA_BACKWARD_LACKS,
    LORA_LACKS,
)
from pykern.ops.lora_common import check_adapter, check_base, decode_wide, lora_cost, low_rank, widened
from pykern.ops.lora_samples import bad_lora, bad_lora_4bit, lora_samples, lora_samples_4bit
from pykern.ops.norm import check_like
from pykern.ops.weight4bit_checks import weight_bytes


def lora_linear_reference(
    input: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    dora_scale: Tensor | None,
    scaling: float,
    dropout_p: float,
    rng: Tensor | None,
) -> Tensor:
    x = widened(input)
    dropped = drop(x, dropout_p, rng)
    base = F.linear(x, widened(weight))
    update = low_rank(dropped, lora_a, lora_b) * scaling
    if dora_scale is not None:
        # PEFT's DoRA: what dropout takes from the adapter it takes from the rescaling of the base as well.
        rescaled = base if rng is None else F.linear(dropped, widened(weight))
        dora_scale = widened(dora_scale)
        update = dora_scale * update + (dora_scale - 1) * rescaled
    y = base + update
    return (y if bias is None else y + bias).to(input.dtype)


def drop(x: Tensor, dropout_p: float, rng: Tensor | None) -> Tensor:
    if rng is None:
        return x
    keep = keep_mask(rng, row_index(x.shape, x.device), x.shape[-1], dropout_p)
    return torch.where(keep, x * (1 / (1 - dropout_p) if dropout_p < 1 else 0.0), 0.0)


def lora_linear_4bit_reference(input: Tensor, *rest: Any) -> Tensor:
    return lora_linear_reference(input, decode_wide(input, rest[:9]), *rest[9:])


def _check_rest(
    input: Tensor,
    out: int,
    lora_a: Tensor,
    lora_b: Tensor,
    dora_scale: Tensor | None,
    dropout_p: float,
    rng: Tensor | None,
) -> None:
    check_adapter(input, out, lora_a, lora_b)
    check_like("dora_scale", dora_scale, input, (out,), (input.dtype, torch.float32))
    torch._check_value(0 <= dropout_p <= 1, lambda: f"dropout_p: expected a number from 0 to 1, got {dropout_p}")
    check_like("rng", rng, input, (2,), (torch.int64,))


def _check(
    input: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    dora_scale: Tensor | None,
    scaling: float,
    dropout_p: float,
    rng: Tensor | None,
) -> None:
    check_base(input, weight, bias)
    _check_rest(input, weight.shape[0], lora_a, lora_b, dora_scale, dropout_p, rng)


def _check_4bit(input: Tensor, *rest: Any) -> None:
    weight, (lora_a, lora_b, bias, dora_scale, _, dropout_p, rng) = rest[:9], rest[9:]
    check_linear_4bit(input, weight, bias)
    _check_rest(input, weight[-2][0], lora_a, lora_b, dora_scale, dropout_p, rng)


def _cost(input: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, *_: Any) -> tuple[float, float]:
    return lora_cost(input, weight.shape[0], weight.numel() * weight.element_size(), lora_a, lora_b)


def _cost_4bit(input: Tensor, *rest: Any) -> tuple[float, float]:
    return lora_cost(input, rest[7][0], weight_bytes(rest[:9]), rest[9], rest[10])


def _peft(
    input: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    dora_scale: Tensor | None,
    scaling: float,
    dropout_p: float,
    rng: Tensor | None,
) -> Tensor:
    """As PEFT puts it together from torch's ops, on our mask."""
    base = F.linear(input, weight, None if bias is None else bias.to(input.dtype))
    dropped = drop(input, dropout_p, rng)
    update = F.linear(F.linear(dropped.to(lora_a.dtype), lora_a), lora_b) * scaling
    if dora_scale is not None:
        update = (dora_scale - 1) * F.linear(dropped, weight) + dora_scale * update
    return (base + update).to(base.dtype)


_REST = "Tensor lora_a, Tensor lora_b, Tensor? bias, Tensor? dora_scale, float scaling, float dropout_p, Tensor? rng"

_lora_linear_backward = define_backward(
    f"pykern::lora_linear_backward(Tensor? dy, Tensor input, Tensor weight, {_REST}, bool[6] output_mask, *,"
    " str? backend=None)"
    " -> (Tensor dinput, Tensor dweight, Tensor dlora_a, Tensor dlora_b, Tensor dbias, Tensor ddora_scale)",
    check=lambda dy, input, weight, *rest: (
        _check(input, weight, *rest[:-1]),
        check_like("dy", dy, input, (*input.shape[:-1], weight.shape[0]), (input.dtype,)),
    ),
    backends=LORA_BACKWARD,
    supports=LORA_BACKWARD_LACKS,
    cost=lambda dy, *rest: _cost(*rest),
    traffic=lambda backend, *_: 1.25,
)

_lora_linear = define(
    f"pykern::lora_linear(Tensor input, Tensor weight, {_REST}, *, str? backend=None) -> Tensor y",
    reference=lora_linear_reference,
    check=_check,
    fake=lambda input, weight, *_: input.new_empty((*input.shape[:-1], weight.shape[0])),
    backends=LORA,
    supports=LORA_LACKS,
    backward=_lora_linear_backward,
    autocast=dict.fromkeys(("input", "weight", "lora_a", "lora_b", "bias"), "lower"),
    samples=lora_samples,
    bad=bad_lora,
    cost=_cost,
    peers={"torch": _peft},
    # A divided depth's sums go through the caches in fp32: of the samples' weight a tenth, of 4 bits a third.
    traffic=lambda backend, *_: 1.1,
)

_lora_linear_4bit_backward = define_backward(
    f"pykern::lora_linear_4bit_backward(Tensor? dy, Tensor input, {SCHEMA}, {_REST}, bool[5] output_mask, *,"
    " str? backend=None) -> (Tensor dinput, Tensor dlora_a, Tensor dlora_b, Tensor dbias, Tensor ddora_scale)",
    check=lambda dy, input, *rest: (
        _check_4bit(input, *rest[:-1]),
        check_like("dy", dy, input, (*input.shape[:-1], rest[7][0]), (input.dtype,)),
    ),
    backends=LORA_4BIT_BACKWARD,
    supports=LORA_4BIT_BACKWARD_LACKS,
    cost=lambda dy, *rest: _cost_4bit(*rest),
    traffic=lambda backend, *_: 1.7,
)

_lora_linear_4bit = define(
    f"pykern::lora_linear_4bit(Tensor input, {SCHEMA}, {_REST}, *, str? backend=None) -> Tensor y",
    reference=lora_linear_4bit_reference,
    check=_check_4bit,
    fake=lambda input, *rest: input.new_empty((*input.shape[:-1], rest[7][0])),
    backends=LORA_4BIT,
    supports=LORA_4BIT_LACKS,
    backward=_lora_linear_4bit_backward,
    autocast=dict.fromkeys(("input", "lora_a", "lora_b", "bias"), "lower"),
    samples=lora_samples_4bit,
    bad=bad_lora_4bit,
    cost=_cost_4bit,
    traffic=lambda backend, *_: 1.35,
    # As in linear_4bit, kernels multiply by a weight rounded to the input's dtype, besides rounding the result.
    tolerance=3.0,
    peers={"torch": lambda input, *rest: _peft(input, decode(*rest[:9], input.dtype), *rest[9:])},
)


@_lora_linear_4bit.public
@_lora_linear.public
def lora_linear(
    input: Tensor,
    weight: Tensor | Weight4bit,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    training: bool = True,
    magnitude: Tensor | None = None,
) -> Tensor:
    """A linear layer with a LoRA adapter: input · Wᵀ + scaling · dropout(input) · Aᵀ · Bᵀ + bias.

    With `magnitude` it is DoRA as in PEFT: g = magnitude / ‖W + scaling · B · A‖, row by row and without gradient
    through the norm, scales the adapter's part by g and adds (g − 1) · dropout(input) · Wᵀ; without dropout that is
    g · (W + scaling · B · A). A row of norm zero is divided by one.

    Args:
        input: (…, in), fp32, fp16, bf16 or fp64, any strides.
        weight: (out, in) in the input's dtype, or a `Weight4bit`, which is frozen.
        lora_a, lora_b: (r, in) and (out, r) of one dtype, the input's or fp32.
        bias: (out,), in the input's dtype or fp32.
        scaling: alpha / r, or alpha / √r for rsLoRA.
        dropout_p: probability of dropping an element of the input on its way into the adapter, drawn by torch's default
            generator of the device; by the element's index, so that every backend drops the same ones.
        training: False turns dropout off.
        magnitude: (out,), in the input's dtype or fp32.

    Returns:
        (…, out) in the input's dtype.

    Raises:
        ValueError, TypeError: a shape, dtype, device or number does not fit; the message names the argument.
    """
    rng = draw_rng(input.device) if training and dropout_p > 0 else None
    dora_scale = None if magnitude is None else _dora_scale(input, weight, lora_a, lora_b, scaling, magnitude)
    rest = (lora_b, bias, dora_scale, scaling, dropout_p, rng)
    if isinstance(weight, Weight4bit):
        return _lora_linear_4bit(weight.ordered(input), *weight.arguments, weight.ordered(lora_a), *rest)
    return _lora_linear(input, weight, lora_a, *rest)


def _dora_scale(
    input: Tensor, weight: Tensor | Weight4bit, lora_a: Tensor, lora_b: Tensor, scaling: float, magnitude: Tensor
) -> Tensor:
    # Outside the op, whose gradient would else have to leave out the part of its own function that the norm is.
    # Not rounded on its way: an error of the norm is one of every gradient.
    wide = torch.float64 if input.dtype == torch.float64 else torch.float32
    check_like("magnitude", magnitude, input, weight.shape[:1], (input.dtype, torch.float32))
    weight = dequantize_4bit(weight, wide) if isinstance(weight, Weight4bit) else weight.detach()
    lora_a, lora_b = ((t if t.dtype == weight.dtype else t.to(wide)).detach() for t in (lora_a, lora_b))
    norm = dora_norm(weight, lora_a, lora_b, scaling)
    return magnitude / torch.where(norm > 0, norm, 1.0)

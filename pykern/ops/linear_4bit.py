"""Multiply by a 4-bit weight. The formats are in `_weight4bit`."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pykern.ops._spec import Sample, define, define_backward
from pykern.ops._weight4bit import SCHEMA, Weight4bit, decode
from pykern.ops.norm import check_like
from pykern.ops.quantize_4bit import quantize_4bit
from pykern.ops.weight4bit_backends import LINEAR, LINEAR_BACKWARD, LINEAR_BACKWARD_LACKS, LINEAR_LACKS
from pykern.ops.weight4bit_checks import check_weight, require_weight, weight_bytes
from pykern.ops.weight4bit_samples import bad_weights, sample_weights


def linear_4bit_reference(input: Tensor, *weight_and_bias: Any) -> Tensor:
    *weight, bias = weight_and_bias
    weight = decode(*weight, input.dtype)
    if bias is None or bias.dtype == input.dtype:
        return F.linear(input, weight, bias)
    return (F.linear(input, weight) + bias).to(input.dtype)


def check_linear_4bit(input: Tensor, weight: Sequence[Any], bias: Tensor | None) -> None:
    """The argument errors of every op that multiplies by a 4-bit weight."""
    check_weight(*weight)
    codes, shape = weight[0], weight[-2]
    if not input.is_floating_point():
        raise TypeError(f"input: expected a floating dtype, got {input.dtype}")
    if len(shape) != 2:
        raise ValueError(f"weight: expected a weight of shape (out, in), got {tuple(shape)}")
    torch._check_value(
        input.dim() > 0 and input.shape[-1] == shape[1],
        lambda: f"input: expected shape (…, {shape[1]}) for a weight of shape {tuple(shape)}, got {tuple(input.shape)}",
    )
    if codes.device != input.device:
        raise ValueError(f"weight: expected device {input.device} as the input, got {codes.device}")
    check_like("bias", bias, input, (shape[0],), (input.dtype, torch.float32))


def fake_linear_4bit(input: Tensor, weight: Sequence[Any]) -> Tensor:
    return input.new_empty((*input.shape[:-1], weight[-2][0]))


def linear_4bit_cost(input: Tensor, weight: Sequence[Any]) -> tuple[float, float]:
    rows, (out, n) = input.numel() // max(input.shape[-1], 1), weight[-2]
    return 2.0 * rows * n * out, weight_bytes(weight) + rows * (n + out) * input.element_size()


def _linear_4bit_samples(kind: str, make: Any) -> Iterator[Sample]:
    for name, weight in sample_weights(kind, make):
        out, n = weight.shape
        few = (1,) if kind == "traffic" or not name.startswith("nf4 llama") else (1, 16, 512)
        for rows in few if kind in ("bench", "traffic") else (9,):
            bias = None if kind in ("bench", "traffic") else make(out)
            yield Sample(f"{name}, {rows} rows", (make(rows, n), *weight.arguments, bias))
    if kind not in ("bench", "traffic"):
        # Every height of tile, depths and columns that end within one, sums split over the depth.
        tall = quantize_4bit(make(160, 320), double_quant=True)
        for rows in (1, 3, 20, 70) if kind == "smoke" else (1, 2, 8, 9, 16, 17, 33, 70, 200, 300):
            yield Sample(f"tiles, {rows} rows", (make(rows, 320), *tall.arguments, None))
        yield Sample("deep", (make(16, 1056), *quantize_4bit(make(33, 1056)).arguments, None))
        groups = quantize_4bit(make(130, 160), quant_type="int4", blocksize=96, symmetric=False)
        yield Sample("int4, short groups", (make(40, 160), *groups.arguments, make(130)))
        yield Sample("rows apart", (make(20, 331)[:, :320], *tall.arguments, None))
        weight = quantize_4bit(make(24, 64))
        yield Sample("no bias, one vector", (make(64), *weight.arguments, None))
        yield Sample("no tokens", (make(0, 64), *weight.arguments, make(24)))
        yield Sample("strided batch", (make(64, 3, 2).permute(2, 1, 0), *weight.arguments, make(24, grad=False)))
        yield Sample(
            "fp32 bias, frozen input", (make(4, 64, grad=False), *weight.arguments, make(24, dtype=torch.float32))
        )


def _linear_4bit_bad(make: Any) -> Iterator[tuple[str, tuple[Any, ...], type[Exception], str]]:
    for name, weight, error, pattern in bad_weights(make):
        yield name, (make(2, 64), *weight, None), error, pattern
    weight, experts = quantize_4bit(make(4, 64)).arguments, quantize_4bit(make(2, 4, 64)).arguments
    yield "input", (make(2, 65), *weight, None), ValueError, r"input: expected shape \(…, 64\).*got \(2, 65\)"
    yield "integers", (make(2, 64).long(), *weight, None), TypeError, "input: expected a floating dtype"
    yield "bias", (make(2, 64), *weight, make(5)), ValueError, r"bias: expected shape \(4,\), got \(5,\)"
    yield "experts", (make(2, 64), *experts, None), ValueError, r"weight: expected a weight of shape \(out, in\)"


_linear_4bit_backward = define_backward(
    f"pykern::linear_4bit_backward(Tensor? dy, Tensor input, {SCHEMA}, Tensor? bias, bool[2] output_mask, *,"
    " str? backend=None) -> (Tensor dinput, Tensor dbias)",
    check=lambda dy, input, *rest: (
        check_linear_4bit(input, rest[:9], rest[9]),
        check_like("dy", dy, input, (*input.shape[:-1], rest[7][0]), (input.dtype,)),
    ),
    backends=LINEAR_BACKWARD,
    supports=LINEAR_BACKWARD_LACKS,
    cost=lambda dy, input, *rest: linear_4bit_cost(input, rest[:9]),
    unread=("input",),
)

_linear_4bit = define(
    f"pykern::linear_4bit(Tensor input, {SCHEMA}, Tensor? bias, *, str? backend=None) -> Tensor y",
    reference=linear_4bit_reference,
    check=lambda input, *rest: check_linear_4bit(input, rest[:-1], rest[-1]),
    fake=lambda input, *rest: fake_linear_4bit(input, rest[:-1]),
    backward=_linear_4bit_backward,
    autocast=dict.fromkeys(("input", "bias"), "lower"),
    backends=LINEAR,
    supports=LINEAR_LACKS,
    samples=_linear_4bit_samples,
    bad=_linear_4bit_bad,
    cost=lambda input, *rest: linear_4bit_cost(input, rest[:-1]),
    peers={"torch": linear_4bit_reference},
    traffic=lambda backend, *_: 1.02,
    # Besides the result the decoded weight is rounded to the input's dtype, as in dequantise and multiply.
    tolerance=3.0,
)


@_linear_4bit.public
def linear_4bit(input: Tensor, weight: Weight4bit, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` with a 4-bit weight: input · Wᵀ + bias, W = `dequantize_4bit(weight, input.dtype)`.

    Gradients flow to input and bias; the weight is frozen.

    Args:
        input: (…, in), fp32, fp16, bf16 or fp64, any strides.
        weight: of shape (out, in), quantised from any dtype.
        bias: (out,), in the input's dtype or fp32; the sum is rounded to the input's dtype.

    Returns:
        (…, out) in the input's dtype.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit, or tensors of the weight contradict its shape or
            format; the message names the argument.
    """
    require_weight(weight)
    return _linear_4bit(weight.ordered(input), *weight.arguments, bias)

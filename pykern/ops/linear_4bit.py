"""Dequantise a 4-bit weight and multiply by it. The formats are in `_weight4bit`."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pykern.ops._spec import Sample, define, define_backward
from pykern.ops._weight4bit import BLOCK_SIZES, SCHEMA, Weight4bit, check_weight, decode
from pykern.ops.norm import check_like
from pykern.ops.quant import quantize_4bit


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
    torch._check_type(input.is_floating_point(), lambda: f"input: expected a floating dtype, got {input.dtype}")
    torch._check_value(len(shape) == 2, lambda: f"weight: expected a weight of shape (out, in), got {tuple(shape)}")
    torch._check_value(
        input.dim() > 0 and input.shape[-1] == shape[1],
        lambda: f"input: expected shape (…, {shape[1]}) for a weight of shape {tuple(shape)}, got {tuple(input.shape)}",
    )
    torch._check_value(
        codes.device == input.device, lambda: f"weight: expected device {input.device} as the input, got {codes.device}"
    )
    check_like("bias", bias, input, (shape[0],), (input.dtype, torch.float32))


def fake_linear_4bit(input: Tensor, weight: Sequence[Any]) -> Tensor:
    return input.new_empty((*input.shape[:-1], weight[-2][0]))


def weight_bytes(weight: Sequence[Any]) -> int:
    """What reading a 4-bit weight moves; its code tables are small enough to stay in registers."""
    return sum(t.numel() * t.element_size() for t in weight[:2] + weight[2:3] + weight[6:7] if t is not None)


def linear_4bit_cost(input: Tensor, weight: Sequence[Any]) -> tuple[float, float]:
    rows, (out, n) = input.numel() // max(input.shape[-1], 1), weight[-2]
    return 2.0 * rows * n * out, weight_bytes(weight) + rows * (n + out) * input.element_size()


def sample_weights(kind: str, make: Any) -> Iterator[tuple[str, Weight4bit]]:
    """4-bit weights (out, in) for samples: every format, blocks that straddle rows, short last blocks, odd counts."""
    if kind == "bench":
        for name, shape in (
            ("llama-8b q_proj 4096x4096", (4096, 4096)),
            ("llama-8b down_proj 4096x14336", (4096, 14336)),
        ):
            yield f"nf4 {name}", quantize_4bit(make(*shape))
            yield f"nf4 nested {name}", quantize_4bit(make(*shape), double_quant=True)
        return
    yield "nf4 whole blocks", quantize_4bit(make(8, 128))
    yield "nf4 straddling blocks", quantize_4bit(make(7, 48), blocksize=32)
    yield "nf4 odd count", quantize_4bit(make(3, 17))
    yield "nf4 nested", quantize_4bit(make(33, 256), blocksize=32, double_quant=True)
    yield "nf4 zeros", quantize_4bit(make(4, 64) * 0)
    yield "fp4 whole blocks", quantize_4bit(make(4, 64), quant_type="fp4")
    yield "fp4 short block", quantize_4bit(make(5, 30), quant_type="fp4", blocksize=64)
    yield "fp4 nested", quantize_4bit(make(5, 130), quant_type="fp4", blocksize=128, double_quant=True)
    yield "int4 symmetric", quantize_4bit(make(6, 64), quant_type="int4", blocksize=32)
    yield (
        "int4 asymmetric, short group",
        quantize_4bit(make(5, 50) + 1, quant_type="int4", blocksize=32, symmetric=False),
    )
    yield "no rows", quantize_4bit(make(0, 64))
    if kind == "full":
        for blocksize in BLOCK_SIZES:
            yield (
                f"nf4 nested, block {blocksize}",
                quantize_4bit(make(300, 520), blocksize=blocksize, double_quant=True),
            )
            yield f"fp4 block {blocksize}", quantize_4bit(make(130, 258), quant_type="fp4", blocksize=blocksize)


def format_weights(make: Any) -> Iterator[tuple[str, Weight4bit]]:
    """One small weight (16, 24) of each format, for ops whose decoding is another op's."""
    yield "nf4", quantize_4bit(make(16, 24), blocksize=32)
    yield "fp4 nested", quantize_4bit(make(16, 24), quant_type="fp4", blocksize=32, double_quant=True)
    yield "int4", quantize_4bit(make(16, 24), quant_type="int4", blocksize=16, symmetric=False)


def _dequantize_4bit_samples(kind: str, make: Any) -> Iterator[Sample]:
    for name, weight in sample_weights(kind, make):
        yield Sample(name, (*weight.arguments, make.dtype))


def _linear_4bit_samples(kind: str, make: Any) -> Iterator[Sample]:
    for name, weight in sample_weights(kind, make):
        out, n = weight.shape
        for rows in (1, 16, 512) if kind == "bench" else (9,):
            yield Sample(
                f"{name}, {rows} rows", (make(rows, n), *weight.arguments, None if kind == "bench" else make(out))
            )
    if kind != "bench":
        weight = quantize_4bit(make(24, 64))
        yield Sample("no bias, one vector", (make(64), *weight.arguments, None))
        yield Sample("no tokens", (make(0, 64), *weight.arguments, make(24)))
        yield Sample("strided batch", (make(64, 3, 2).permute(2, 1, 0), *weight.arguments, make(24, grad=False)))
        yield Sample(
            "fp32 bias, frozen input", (make(4, 64, grad=False), *weight.arguments, make(24, dtype=torch.float32))
        )


def bad_weights(make: Any) -> Iterator[tuple[str, tuple[Any, ...], type[Exception], str]]:
    """Weights (4, 64) whose tensors contradict one another."""
    plain, nested = quantize_4bit(make(4, 64)), quantize_4bit(make(4, 64), double_quant=True)
    asymmetric = quantize_4bit(make(4, 64), quant_type="int4", symmetric=False)

    def altered(weight: Weight4bit, **changes: Any) -> tuple[Any, ...]:
        return Weight4bit(**{**vars(weight), **changes}).arguments

    yield (
        "codes cut",
        altered(plain, codes=plain.codes[:-1]),
        ValueError,
        r"codes: expected shape \(128,\), got \(127,\)",
    )
    yield (
        "scales cut",
        altered(plain, absmax=plain.absmax[1:]),
        ValueError,
        r"absmax: expected shape \(4,\), got \(3,\)",
    )
    yield "scales' dtype", altered(plain, absmax=plain.absmax.half()), TypeError, "absmax: expected dtype torch.float32"
    yield "code table", altered(plain, code=plain.code[:8]), ValueError, r"code: expected shape \(16,\), got \(8,\)"
    yield "nested, half", altered(nested, nested_offset=None), ValueError, "belong together"
    yield "shape", altered(plain, shape=(4, 66)), ValueError, r"codes: expected shape \(132,\), got \(128,\)"
    yield (
        "zero points",
        altered(asymmetric, zero_points=asymmetric.zero_points[1:]),
        ValueError,
        "weight.zero_points: expected",
    )


def _dequantize_4bit_bad(make: Any) -> Iterator[tuple[str, tuple[Any, ...], type[Exception], str]]:
    for name, weight, error, pattern in bad_weights(make):
        yield name, (*weight, torch.float32), error, pattern
    weight = quantize_4bit(make(4, 64)).arguments
    yield "dtype", (*weight, torch.int32), ValueError, "dtype: expected a floating dtype, got torch.int32"


def _linear_4bit_bad(make: Any) -> Iterator[tuple[str, tuple[Any, ...], type[Exception], str]]:
    for name, weight, error, pattern in bad_weights(make):
        yield name, (make(2, 64), *weight, None), error, pattern
    weight, experts = quantize_4bit(make(4, 64)).arguments, quantize_4bit(make(2, 4, 64)).arguments
    yield "input", (make(2, 65), *weight, None), ValueError, r"input: expected shape \(…, 64\).*got \(2, 65\)"
    yield "integers", (make(2, 64).long(), *weight, None), TypeError, "input: expected a floating dtype"
    yield "bias", (make(2, 64), *weight, make(5)), ValueError, r"bias: expected shape \(4,\), got \(5,\)"
    yield "experts", (make(2, 64), *experts, None), ValueError, r"weight: expected a weight of shape \(out, in\)"


def _check_dequantize(*weight_and_dtype: Any) -> None:
    *weight, dtype = weight_and_dtype
    check_weight(*weight)
    torch._check_value(dtype.is_floating_point, lambda: f"dtype: expected a floating dtype, got {dtype}")


def _dequantize_cost(*weight_and_dtype: Any) -> tuple[float, float]:
    *weight, dtype = weight_and_dtype
    count = math.prod(weight[-2])
    return 1.0 * count, weight_bytes(weight) + count * dtype.itemsize


_dequantize_4bit = define(
    f"pykern::dequantize_4bit({SCHEMA}, ScalarType dtype, *, str? backend=None) -> Tensor weight",
    reference=decode,
    check=_check_dequantize,
    fake=lambda codes, *rest: codes.new_empty(rest[-3], dtype=rest[-1]),
    samples=_dequantize_4bit_samples,
    bad=_dequantize_4bit_bad,
    cost=_dequantize_cost,
)

_linear_4bit_backward = define_backward(
    f"pykern::linear_4bit_backward(Tensor? dy, Tensor input, {SCHEMA}, Tensor? bias, bool[2] output_mask, *,"
    " str? backend=None) -> (Tensor dinput, Tensor dbias)",
    check=lambda dy, input, *rest: (
        check_linear_4bit(input, rest[:9], rest[9]),
        check_like("dy", dy, input, (*input.shape[:-1], rest[7][0]), (input.dtype,)),
    ),
    cost=lambda dy, input, *rest: linear_4bit_cost(input, rest[:9]),
)

_linear_4bit = define(
    f"pykern::linear_4bit(Tensor input, {SCHEMA}, Tensor? bias, *, str? backend=None) -> Tensor y",
    reference=linear_4bit_reference,
    check=lambda input, *rest: check_linear_4bit(input, rest[:-1], rest[-1]),
    fake=lambda input, *rest: fake_linear_4bit(input, rest[:-1]),
    backward=_linear_4bit_backward,
    autocast=dict.fromkeys(("input", "bias"), "lower"),
    samples=_linear_4bit_samples,
    bad=_linear_4bit_bad,
    cost=lambda input, *rest: linear_4bit_cost(input, rest[:-1]),
    peers={"torch": linear_4bit_reference},
    # Besides the result the decoded weight is rounded to the input's dtype, as in dequantise and multiply.
    tolerance=3.0,
)


@_dequantize_4bit.public
def dequantize_4bit(weight: Weight4bit, dtype: torch.dtype | None = None) -> Tensor:
    """The values of a 4-bit weight: value of the code × scale, multiplied in fp32 and rounded once, to `dtype`.

    Args:
        weight: from `quantize_4bit`, of any shape.
        dtype: floating; by default the dtype that was quantised.

    Returns:
        A contiguous tensor of the weight's shape.

    Raises:
        ValueError, TypeError: tensors of the weight contradict its shape or format; the message names the tensor.
    """
    _require_weight(weight)
    return _dequantize_4bit(*weight.arguments, weight.dtype if dtype is None else dtype)


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
    _require_weight(weight)
    return _linear_4bit(input, *weight.arguments, bias)


def _require_weight(weight: Weight4bit) -> None:
    if not isinstance(weight, Weight4bit):
        raise TypeError(f"weight: expected a Weight4bit, from quantize_4bit, got {type(weight).__name__}")

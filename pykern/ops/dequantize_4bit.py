"""The values of a 4-bit weight. The formats are in `_weight4bit`."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pykern.ops._spec import Sample, define
from pykern.ops._weight4bit import SCHEMA, Weight4bit, decode
from pykern.ops.quantize_4bit import quantize_4bit
from pykern.ops.weight4bit_backends import DEQUANTIZE, DEQUANTIZE_LACKS
from pykern.ops.weight4bit_checks import check_weight, require_weight, weight_bytes
from pykern.ops.weight4bit_samples import bad_weights, sample_weights


def _dequantize_4bit_samples(kind: str, make: Any) -> Iterator[Sample]:
    for name, weight in sample_weights(kind, make):
        yield Sample(name, (*weight.arguments, make.dtype))


def _dequantize_4bit_bad(make: Any) -> Iterator[tuple[str, tuple[Any, ...], type[Exception], str]]:
    for name, weight, error, pattern in bad_weights(make):
        yield name, (*weight, torch.float32), error, pattern
    weight = quantize_4bit(make(4, 64)).arguments
    yield "dtype", (*weight, torch.int32), ValueError, "dtype: expected a floating dtype, got torch.int32"


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
    backends=DEQUANTIZE,
    supports=DEQUANTIZE_LACKS,
    samples=_dequantize_4bit_samples,
    bad=_dequantize_4bit_bad,
    cost=_dequantize_cost,
    traffic=lambda backend, *_: 1.02,
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
    require_weight(weight)
    values = _dequantize_4bit(*weight.arguments, weight.dtype if dtype is None else dtype)
    return values if weight.order is None else values.index_select(-1, weight.order.argsort())

"""The residual added, then layer norm or RMS norm of the sum: one pass over memory instead of two."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pykern.ops._spec import define, define_backward
from pykern.ops.norm import (
    check_like,
    check_norm,
    default_eps,
    empty_statistic,
    flatten_normalized,
    kernels,
    layer_norm_reference,
    norm_cost,
    rms_norm_oracle,
    rms_norm_reference,
    round_through,
    torch_rms_norm,
)
from pykern.ops.norm_samples import (
    add_layer_norm_bad,
    add_layer_norm_samples,
    add_rms_norm_bad,
    add_rms_norm_samples,
)


def add_layer_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    summed = x + residual
    y, mean, rstd = layer_norm_reference(summed, weight, bias, eps)
    return y, summed, mean, rstd


def add_rms_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, weight_offset: float, round_before_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    summed = x + residual
    y, rstd = rms_norm_reference(summed, weight, eps, weight_offset, round_before_weight)
    return y, summed, rstd


def _layer_norm_oracle(dtype: torch.dtype, x: Tensor, residual: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    summed = round_through(x + residual, dtype)
    y, mean, rstd = layer_norm_reference(summed, *rest)
    return y, summed, mean, rstd


def _rms_norm_oracle(dtype: torch.dtype, x: Tensor, residual: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    summed = round_through(x + residual, dtype)
    y, rstd = rms_norm_oracle(dtype, summed, *rest)
    return y, summed, rstd


def _check(x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    check_norm(x, weight, bias)
    check_like("residual", residual, x, x.shape, (x.dtype,))


def _check_backward(dy: Tensor | None, dsummed: Tensor | None, summed: Tensor, **statistics: Tensor) -> None:
    check_like("dy", dy, summed, summed.shape, (summed.dtype,))
    check_like("dsummed", dsummed, summed, summed.shape, (summed.dtype,))
    for name, statistic in statistics.items():
        check_like(name, statistic, summed, summed.shape[:-1], (torch.float32, torch.float64))


# The kernels need only the sum, so only the sum is kept: the backward differentiates the norm of `summed`, and its
# first result is the gradient of the input and of the residual alike.


def _layer_norm_of_sum(summed: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *_: Any) -> Any:
    return layer_norm_reference(summed, weight, bias, eps)[0], summed


def _rms_norm_of_sum(
    summed: Tensor, weight: Tensor | None, eps: float, weight_offset: float, round_before_weight: bool, *_: Any
) -> Any:
    return rms_norm_reference(summed, weight, eps, weight_offset, round_before_weight)[0], summed


_add_layer_norm_backward = define_backward(
    "pykern::add_layer_norm_backward(Tensor? dy, Tensor? dsummed, Tensor summed, Tensor? weight, Tensor? bias,"
    " float eps, Tensor mean, Tensor rstd, bool[3] output_mask, *, str? backend=None)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)",
    primal=_layer_norm_of_sum,
    wrt=("summed", "weight", "bias"),
    check=lambda dy, dsummed, summed, weight, bias, eps, mean, rstd, output_mask: (
        check_norm(summed, weight, bias),
        _check_backward(dy, dsummed, summed, mean=mean, rstd=rstd),
    ),
    cost=lambda dy, dsummed, summed, weight, bias, eps, mean, rstd, output_mask: norm_cost(
        summed, 2 + (dsummed is not None) + output_mask[0], 2, weight, weight, bias
    ),
    **kernels("add_layer_norm_backward", position=2),
)


def _torch_add_layer_norm(x: Tensor, residual: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    summed = x + residual
    return F.layer_norm(summed, x.shape[-1:], *rest), summed


_add_layer_norm = define(
    "pykern::add_layer_norm(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps, *, str? backend=None)"
    " -> (Tensor y, Tensor summed, Tensor mean, Tensor rstd)",
    reference=add_layer_norm_reference,
    check=lambda x, residual, weight, bias, eps: _check(x, residual, weight, bias),
    fake=lambda x, *_: (x.new_empty(x.shape), x.new_empty(x.shape), empty_statistic(x), empty_statistic(x)),
    backward=_add_layer_norm_backward,
    tied={"residual": "x"},
    autocast=dict.fromkeys(("x", "residual", "weight", "bias"), torch.float32),
    samples=add_layer_norm_samples,
    bad=add_layer_norm_bad,
    cost=lambda x, residual, weight, bias, eps: norm_cost(x, 4, 2, weight, bias),
    peers={"torch": _torch_add_layer_norm},
    oracle=_layer_norm_oracle,
    **kernels("add_layer_norm"),
)

_add_rms_norm_backward = define_backward(
    "pykern::add_rms_norm_backward(Tensor? dy, Tensor? dsummed, Tensor summed, Tensor? weight, float eps,"
    " float weight_offset, bool round_before_weight, Tensor rstd, bool[2] output_mask, *, str? backend=None)"
    " -> (Tensor dx, Tensor dweight)",
    primal=_rms_norm_of_sum,
    wrt=("summed", "weight"),
    check=lambda dy, dsummed, summed, weight, eps, weight_offset, round_before_weight, rstd, output_mask: (
        check_norm(summed, weight),
        _check_backward(dy, dsummed, summed, rstd=rstd),
    ),
    cost=lambda dy, dsummed, summed, weight, *rest: norm_cost(
        summed, 2 + (dsummed is not None) + rest[-1][0], 1, weight, weight
    ),
    **kernels("add_rms_norm_backward", position=2),
)


def _torch_add_rms_norm(x: Tensor, residual: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    summed = x + residual
    return torch_rms_norm(summed, *rest), summed


_add_rms_norm = define(
    "pykern::add_rms_norm(Tensor x, Tensor residual, Tensor? weight, float eps, float weight_offset,"
    " bool round_before_weight, *, str? backend=None) -> (Tensor y, Tensor summed, Tensor rstd)",
    reference=add_rms_norm_reference,
    check=lambda x, residual, weight, *_: _check(x, residual, weight, None),
    fake=lambda x, *_: (x.new_empty(x.shape), x.new_empty(x.shape), empty_statistic(x)),
    backward=_add_rms_norm_backward,
    tied={"residual": "x"},
    autocast=dict.fromkeys(("x", "residual", "weight"), torch.float32),
    samples=add_rms_norm_samples,
    bad=add_rms_norm_bad,
    cost=lambda x, residual, weight, *_: norm_cost(x, 4, 1, weight),
    peers={"torch": _torch_add_rms_norm},
    oracle=_rms_norm_oracle,
    **kernels("add_rms_norm"),
)


@_add_layer_norm.public
def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """`summed = input + residual`, rounded to their dtype, and `layer_norm` of it; returns (normed, summed).

    Args:
        input, residual: (…, *normalized_shape) of one shape, dtype and device; fp32, fp16, bf16 or fp64, any strides.
        normalized_shape, weight, bias, eps: as in `layer_norm`.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit; the message names the argument.
    """
    input, residual = _promote(input, residual)
    x, w, b = flatten_normalized(input, normalized_shape, weight, bias)
    y, summed, _, _ = _add_layer_norm(x, _like(residual, input, x), w, b, eps)
    return (y, summed) if x is input else (y.view(input.shape), summed.view(input.shape))


@_add_rms_norm.public
def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
) -> tuple[Tensor, Tensor]:
    """`summed = input + residual`, rounded to their dtype, and `rms_norm` of it; returns (normed, summed).

    Args:
        input, residual: (…, *normalized_shape) of one shape, dtype and device; fp32, fp16, bf16 or fp64, any strides.
        normalized_shape, weight, eps, weight_offset, round_before_weight: as in `rms_norm`.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit; the message names the argument.
    """
    input, residual = _promote(input, residual)
    x, w = flatten_normalized(input, normalized_shape, weight)
    eps = default_eps(input, eps)
    y, summed, _ = _add_rms_norm(x, _like(residual, input, x), w, eps, weight_offset, round_before_weight)
    return (y, summed) if x is input else (y.view(input.shape), summed.view(input.shape))


def _promote(input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Under autocast the branch comes in 16 bits and the residual in 32; their sum is of the wider type, as torch's."""
    if input.dtype != residual.dtype and torch.is_autocast_enabled(input.device.type):
        wide = torch.promote_types(input.dtype, residual.dtype)
        return input.to(wide), residual.to(wide)
    return input, residual


def _like(residual: Tensor, input: Tensor, flattened: Tensor) -> Tensor:
    if flattened is input:
        return residual
    if residual.shape != input.shape:
        raise ValueError(f"residual: expected shape {tuple(input.shape)}, got {tuple(residual.shape)}")
    return residual.reshape(flattened.shape)

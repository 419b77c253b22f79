"""Layer norm and RMS norm over the last dimensions.

LayerNorm: Ba, Kiros, Hinton, arXiv:1607.06450. RMSNorm: Zhang, Sennrich, arXiv:1910.07467.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pykern.ops._spec import define, define_backward, native, triton
from pykern.ops.norm_samples import layer_norm_bad, layer_norm_samples, rms_norm_bad, rms_norm_samples


def layer_norm_reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    wide = x if x.dtype == torch.float64 else x.float()
    count = max(x.shape[-1], 1)
    mean = wide.sum(-1) / count
    centred = wide - mean.unsqueeze(-1)
    rstd = torch.rsqrt(centred.square().sum(-1) / count + eps)
    y = centred * rstd.unsqueeze(-1)
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    return y.to(x.dtype), mean, rstd


def rms_norm_reference(
    x: Tensor, weight: Tensor | None, eps: float, weight_offset: float, round_before_weight: bool
) -> tuple[Tensor, Tensor]:
    wide = x if x.dtype == torch.float64 else x.float()
    rstd = torch.rsqrt(wide.square().sum(-1) / max(x.shape[-1], 1) + eps)
    y = wide * rstd.unsqueeze(-1)
    if round_before_weight:
        y = y.to(x.dtype)
    if weight is not None:
        y = y * (weight.to(wide.dtype) + weight_offset)
    return y.to(x.dtype), rstd


def round_through(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x rounded to `dtype` but kept in its own, with the gradient of the identity; for oracles."""
    return x + (x.to(dtype).to(x.dtype) - x).detach()


def rms_norm_oracle(
    dtype: torch.dtype, x: Tensor, weight: Tensor | None, eps: float, weight_offset: float, round_before_weight: bool
) -> tuple[Tensor, Tensor]:
    y, rstd = rms_norm_reference(x, None, eps, 0.0, False)
    if round_before_weight:
        y = round_through(y, dtype)
    return y if weight is None else y * (weight + weight_offset), rstd


def check_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None = None) -> None:
    shape, dtypes = x.shape[-1:], (x.dtype, torch.float32)
    if not x.is_floating_point():
        raise TypeError(f"input: expected a floating dtype, got {x.dtype}")
    if not shape:
        raise ValueError("input: expected at least one dimension, got a scalar")
    check_like("weight", weight, x, shape, dtypes)
    check_like("bias", bias, x, shape, dtypes)


def check_like(
    name: str, tensor: Tensor | None, x: Tensor, shape: Sequence[int], dtypes: Sequence[torch.dtype]
) -> None:
    """Shape, dtype and device of an argument that goes with x; nothing to check where it is left out."""
    # The good case first and without a closure: this runs at every call, and torch._check costs a microsecond.
    if tensor is None or (tensor.shape == shape and tensor.dtype in dtypes and tensor.device == x.device):
        return
    torch._check_value(
        tensor.shape == shape, lambda: f"{name}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}"
    )
    torch._check_type(
        tensor.dtype in dtypes,
        lambda: f"{name}: expected dtype {' or '.join(map(str, dict.fromkeys(dtypes)))}, got {tensor.dtype}",
    )
    torch._check_value(
        tensor.device == x.device, lambda: f"{name}: expected device {x.device} as the input, got {tensor.device}"
    )


def kernels(name: str, position: int = 0) -> dict[str, Any]:
    """The backends of a norm op whose activation is its argument number `position`."""

    def supports(*args: Any) -> str | None:
        dtype = args[position].dtype
        if dtype is torch.float32 or dtype is torch.bfloat16 or dtype is torch.float16:
            return None
        return f"computes fp32, fp16 and bf16, not {dtype}"

    backward = name.endswith("_backward")
    module = "norm_backward" if backward else "norm"
    backends = {"cuda": native("cuda", name), "triton": triton(module, name), "cpu": native("cpu", name)}
    limit = _backward_traffic if backward else _forward_traffic
    return {
        "backends": backends,
        "supports": dict.fromkeys(backends, supports),
        "traffic": lambda backend, *args: limit(backend, args[position]),
    }


def _forward_traffic(backend: str, x: Tensor) -> float:
    """Triton keeps rows of up to 16384 elements in registers, and reads longer ones twice."""
    return 1.5 if backend == "triton" and x.shape[-1] > 16384 else 1.0


def _backward_traffic(backend: str, x: Tensor) -> float:
    """Where no block has room for a long row beside its sums of the weights' gradients, x and dy are read twice."""
    longest = 8192 if backend == "triton" else 48 * 1024 // x.element_size()
    return 1.75 if x.shape[-1] > longest else 1.1


def empty_statistic(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def norm_cost(x: Tensor, activations: int, statistics: int, *parameters: Tensor | None) -> tuple[float, float]:
    """Activations, statistics and parameters moved once each; the arithmetic is a handful of flops an element."""
    moved = activations * x.numel() * x.element_size()
    moved += statistics * x.shape[:-1].numel() * (8 if x.dtype == torch.float64 else 4)
    return 8.0 * x.numel(), moved + sum(p.numel() * p.element_size() for p in parameters if p is not None)


_layer_norm_backward = define_backward(
    "pykern::layer_norm_backward(Tensor? dy, Tensor x, Tensor? weight, Tensor? bias, float eps, Tensor mean,"
    " Tensor rstd, bool[3] output_mask, *, str? backend=None) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    check=lambda dy, x, weight, bias, eps, mean, rstd, output_mask: (
        check_norm(x, weight, bias),
        check_like("dy", dy, x, x.shape, (x.dtype,)),
        check_like("mean", mean, x, x.shape[:-1], (torch.float32, torch.float64)),
        check_like("rstd", rstd, x, x.shape[:-1], (torch.float32, torch.float64)),
    ),
    cost=lambda dy, x, weight, bias, eps, mean, rstd, output_mask: norm_cost(
        x, 2 + output_mask[0], 2, weight, weight, bias
    ),
    **kernels("layer_norm_backward", position=1),
)

_layer_norm = define(
    "pykern::layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, *, str? backend=None)"
    " -> (Tensor y, Tensor mean, Tensor rstd)",
    reference=layer_norm_reference,
    check=lambda x, weight, bias, eps: check_norm(x, weight, bias),
    fake=lambda x, weight, bias, eps: (x.new_empty(x.shape), empty_statistic(x), empty_statistic(x)),
    backward=_layer_norm_backward,
    autocast=dict.fromkeys(("x", "weight", "bias"), torch.float32),
    samples=layer_norm_samples,
    bad=layer_norm_bad,
    cost=lambda x, weight, bias, eps: norm_cost(x, 2, 2, weight, bias),
    peers={"torch": lambda x, weight, bias, eps: F.layer_norm(x, x.shape[-1:], weight, bias, eps)},
    **kernels("layer_norm"),
)

_rms_norm_backward = define_backward(
    "pykern::rms_norm_backward(Tensor? dy, Tensor x, Tensor? weight, float eps, float weight_offset,"
    " bool round_before_weight, Tensor rstd, bool[2] output_mask, *, str? backend=None) -> (Tensor dx, Tensor dweight)",
    check=lambda dy, x, weight, eps, weight_offset, round_before_weight, rstd, output_mask: (
        check_norm(x, weight),
        check_like("dy", dy, x, x.shape, (x.dtype,)),
        check_like("rstd", rstd, x, x.shape[:-1], (torch.float32, torch.float64)),
    ),
    cost=lambda dy, x, weight, *rest: norm_cost(x, 2 + rest[-1][0], 1, weight, weight),
    **kernels("rms_norm_backward", position=1),
)


def torch_rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, weight_offset: float, round_before_weight: bool
) -> Tensor:
    """The nearest stock torch has; the two models' variants are put together as their authors do."""
    if weight is not None and weight_offset:
        weight = weight + weight_offset
    if round_before_weight and weight is not None:
        return (F.rms_norm(x, x.shape[-1:], None, eps) * weight).to(x.dtype)
    return F.rms_norm(x, x.shape[-1:], weight, eps).to(x.dtype)


_rms_norm = define(
    "pykern::rms_norm(Tensor x, Tensor? weight, float eps, float weight_offset, bool round_before_weight, *,"
    " str? backend=None) -> (Tensor y, Tensor rstd)",
    reference=rms_norm_reference,
    check=lambda x, weight, eps, weight_offset, round_before_weight: check_norm(x, weight),
    fake=lambda x, *_: (x.new_empty(x.shape), empty_statistic(x)),
    backward=_rms_norm_backward,
    autocast=dict.fromkeys(("x", "weight"), torch.float32),
    samples=rms_norm_samples,
    bad=rms_norm_bad,
    cost=lambda x, weight, *_: norm_cost(x, 2, 1, weight),
    peers={"torch": torch_rms_norm},
    oracle=rms_norm_oracle,
    **kernels("rms_norm"),
)


def flatten_normalized(
    input: Tensor, normalized_shape: Sequence[int], *tensors: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The tensors with the normalized dimensions of `input` made one, parameters made vectors."""
    # Plain raises: this runs in the public function, where Dynamo refuses torch._check's message closures.
    shape = torch.Size((normalized_shape,) if isinstance(normalized_shape, int) else normalized_shape)
    count = len(shape)
    if not 0 < count <= input.dim() or input.shape[input.dim() - count :] != shape:
        raise ValueError(
            f"normalized_shape: expected the last dimensions of an input {tuple(input.shape)}, got {tuple(shape)}"
        )
    if count == 1:
        return (input, *tensors)
    lead, n = input.shape[: input.dim() - count], math.prod(shape)
    flat = []
    for name, tensor in zip(("weight", "bias"), tensors, strict=False):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name}: expected shape {tuple(shape)} as normalized_shape, got {tuple(tensor.shape)}")
        flat.append(None if tensor is None else tensor.reshape(n))
    return (input.reshape(*lead, n), *flat)


def default_eps(input: Tensor, eps: float | None) -> float:
    """torch's: the epsilon of the dtype computed in."""
    if eps is not None:
        return eps
    return torch.finfo(torch.float64 if input.dtype == torch.float64 else torch.float32).eps


@_layer_norm.public
def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Layer norm, a drop-in for `torch.nn.functional.layer_norm`: (x − mean) · rsqrt(var + eps) · weight + bias.

    Args:
        input: (…, *normalized_shape), fp32, fp16, bf16 or fp64, any strides. Statistics are taken in fp32 (fp64).
        normalized_shape: the trailing dimensions to normalize over.
        weight, bias: of shape normalized_shape, in the input's dtype or fp32.
        eps: added to the variance.

    Returns:
        A contiguous tensor of the input's shape and dtype.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit; the message names the argument.
    """
    if normalized_shape == input.shape[-1:]:  # the common case, without the work for several dimensions
        return _layer_norm(input, weight, bias, eps)[0]
    x, w, b = flatten_normalized(input, normalized_shape, weight, bias)
    return _layer_norm(x, w, b, eps)[0].view(input.shape)


@_rms_norm.public
def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
) -> Tensor:
    """RMS norm, a drop-in for `torch.nn.functional.rms_norm`: x · rsqrt(mean(x²) + eps) · (weight_offset + weight).

    Args:
        input: (…, *normalized_shape), fp32, fp16, bf16 or fp64, any strides. Statistics are taken in fp32 (fp64).
        normalized_shape: the trailing dimensions to normalize over.
        weight: of shape normalized_shape, in the input's dtype or fp32.
        eps: added to the mean square; by default the epsilon of fp32 (of fp64 for fp64), as torch does.
        weight_offset: 1.0 gives Gemma's norm.
        round_before_weight: rounds to the input's dtype before the weight is applied, as Llama does.

    Returns:
        A contiguous tensor of the input's shape and dtype.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit; the message names the argument.
    """
    eps = default_eps(input, eps)
    if normalized_shape == input.shape[-1:]:  # the common case, without the work for several dimensions
        return _rms_norm(input, weight, eps, weight_offset, round_before_weight)[0]
    x, w = flatten_normalized(input, normalized_shape, weight)
    return _rms_norm(x, w, eps, weight_offset, round_before_weight)[0].view(input.shape)

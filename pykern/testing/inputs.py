"""Random inputs for samples, reproducible from a seed, and the handling of an op's argument list."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pykern.ops._spec import OpSpec, Sample


class Make:
    """Makes the tensors of a sample: floats in the dtype under test, on the device under test."""

    def __init__(self, device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        self.device, self.dtype = torch.device(device), dtype
        self.generator = torch.Generator(self.device).manual_seed(seed)

    def __call__(
        self,
        *shape: int,
        dtype: torch.dtype | None = None,
        scale: float = 1.0,
        grad: bool = True,
        low: int | None = None,
        high: int | None = None,
    ) -> Tensor:
        """Normal floats times `scale` (they want a gradient unless `grad` is False), or integers in [low, high)."""
        dtype = dtype or self.dtype
        if not dtype.is_floating_point:
            return torch.randint(low or 0, high, shape, generator=self.generator, device=self.device, dtype=dtype)
        # Drawn in fp32 and rounded, so that a sample has the same values in every dtype but for their rounding.
        values = torch.randn(shape, generator=self.generator, device=self.device) * scale
        return values.to(dtype).requires_grad_(grad)

    def tensor(self, values: Sequence[Any], dtype: torch.dtype | None = None) -> Tensor:
        return torch.tensor(values, dtype=dtype or self.dtype, device=self.device)


def samples(spec: OpSpec, kind: str, device: str, dtype: torch.dtype, seed: int = 0) -> Iterator[Sample]:
    if spec.samples is not None:
        yield from spec.samples(kind, Make(device, dtype, seed))


def map_tensors(fn: Callable[[Tensor], Any], args: Sequence[Any]) -> list[Any]:
    return [fn(a) if isinstance(a, Tensor) else a for a in args]


def fresh(args: Sequence[Any], dtype: torch.dtype | None = None) -> list[Any]:
    """Leaves with the same values and strides, wanting the same gradients; floats converted to `dtype` if given."""

    def leaf(tensor: Tensor) -> Tensor:
        wanted = tensor.requires_grad
        tensor = tensor.detach()
        if dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(dtype)
        strided = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
        return strided.copy_(tensor).requires_grad_(wanted)

    return map_tensors(leaf, args)


def scattered(args: Sequence[Any]) -> list[Any]:
    """The same values, every tensor with gaps between its elements."""

    def spread(tensor: Tensor) -> Tensor:
        wanted = tensor.requires_grad
        wide = torch.empty((*tensor.shape, 2), dtype=tensor.dtype, device=tensor.device)
        return wide[..., 0].copy_(tensor.detach()).requires_grad_(wanted)

    return map_tensors(spread, args)


def far(args: Sequence[Any]) -> list[Any] | None:
    """The same values, with 2³¹ elements and more from the first to the last row of the first floats that have rows.

    The memory between the rows is never touched, so it takes no room. None where no argument has rows.
    """
    chosen = next(
        (t for t in args if isinstance(t, Tensor) and t.is_floating_point() and t.dim() > 1 and t.shape[0] > 1), None
    )
    if chosen is None or chosen.numel() == 0:
        return None
    inner = chosen[0].numel()
    apart = 2**31 // (chosen.shape[0] - 1) + inner
    memory = torch.empty((chosen.shape[0] - 1) * apart + inner, dtype=chosen.dtype, device=chosen.device)
    strides = (apart, *torch.empty(chosen.shape[1:], device="meta").stride())
    spread = memory.as_strided(chosen.shape, strides).copy_(chosen.detach()).requires_grad_(chosen.requires_grad)
    return map_tensors(lambda t: spread if t is chosen else fresh([t])[0], args)


def differentiable(args: Sequence[Any]) -> list[int]:
    return [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.requires_grad]


def as_tuple(result: Any) -> tuple[Any, ...]:
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)

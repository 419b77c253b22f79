"""Inputs and comparisons that tests of attention share."""

import torch
from torch import Tensor


def normal(*shape: int, grad: bool = False, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, requires_grad=grad)


def int32(values) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def assert_same(ours: Tensor, theirs: Tensor, relative: float = 1e-12) -> None:
    """Alike where not finite, and close in the 2-norm where finite; not merely zeros on both sides."""
    assert ours.shape == theirs.shape
    ours, theirs = ours.double(), theirs.double()
    finite = theirs.isfinite()
    assert torch.equal(ours[~finite].nan_to_num(1.5), theirs[~finite].nan_to_num(1.5))
    assert (ours[finite] - theirs[finite]).norm() <= relative * theirs[finite].norm()


def gradients(outputs, inputs):
    weights = torch.Generator().manual_seed(3)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    incoming = [torch.randn(o.shape, generator=weights).to(o.dtype) for o in outputs]
    return torch.autograd.grad(outputs, inputs, incoming)

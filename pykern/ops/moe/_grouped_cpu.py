"""`grouped_mm` on CPU tensors: a kernel for groups of rows, and a BLAS call per group for what it does not serve."""

from typing import Any

import torch
from torch import Tensor

from pykern.ops._backends import native
from pykern.ops.moe._products import grouped_mm_backward_sliced, grouped_mm_sliced

_FORWARD, _BACKWARD = native("cpu", "grouped_mm"), native("cpu", "grouped_mm_backward")


def _serves(mat_a: Tensor, mat_b: Tensor, bias: Tensor | None, *others: torch.dtype | None) -> bool:
    dtypes = {mat_a.dtype, mat_b.dtype, None if bias is None else bias.dtype, *others}
    groups_of_rows = (mat_a.dim(), mat_b.dim()) == (2, 3)
    return groups_of_rows and torch.float64 not in dtypes and _FORWARD.missing("cpu") is None


def grouped_mm_cpu(
    mat_a: Tensor,
    mat_b: Tensor,
    offs: Tensor | None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    gather: Tensor | None = None,
    scatter: Tensor | None = None,
) -> Tensor:
    """The matrices may be of another dtype than the rows."""
    args = (mat_a, mat_b, offs, bias, out_dtype, gather, scatter)
    return (_FORWARD.resolve("cpu") if _serves(mat_a, mat_b, bias, out_dtype) else grouped_mm_sliced)(*args)


def grouped_mm_backward_cpu(doutput: Tensor, mat_a: Tensor, mat_b: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
    served = _serves(mat_a, mat_b, rest[1], doutput.dtype)
    return (_BACKWARD.resolve("cpu") if served else grouped_mm_backward_sliced)(doutput, mat_a, mat_b, *rest)

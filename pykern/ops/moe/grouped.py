"""Grouped matmul: one product per expert over its group of rows, of summands or of columns, in one call.

Rows are gathered on load and scattered on store as in ScatterMoE (Tan et al., arXiv:2403.08245), so that no permuted
copy of the tokens is kept.
"""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pykern.ops._backends import triton
from pykern.ops._spec import define, define_backward
from pykern.ops.moe._common import FLOAT_DTYPES, checks_on_host
from pykern.ops.moe._products import (
    grouped_mm_backward_sliced,
    grouped_mm_reference,
    grouped_mm_sliced,
    jagged_length,
)
from pykern.ops.moe.grouped_samples import bad_groups, grouped_samples
from pykern.ops.norm import check_like


def _check(
    mat_a: Tensor,
    mat_b: Tensor,
    offs: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype | None,
    gather: Tensor | None,
    scatter: Tensor | None,
) -> None:
    for name, mat in (("mat_a", mat_a), ("mat_b", mat_b)):
        torch._check_value(mat.dim() in (2, 3), lambda n=name, m=mat: f"{n}: expected 2 or 3 dimensions, got {m.dim()}")
    torch._check_type(mat_a.is_floating_point(), lambda: f"mat_a: expected a floating dtype, got {mat_a.dtype}")
    shape = (*mat_b.shape[:-2], mat_a.shape[-1], mat_b.shape[-1])
    if mat_a.dim() == 3 and mat_b.dim() == 3:
        shape = (mat_a.shape[0], *shape[1:])
    check_like("mat_b", mat_b, mat_a, shape, (mat_a.dtype,))
    jagged = mat_a.dim() == 2 or mat_b.dim() == 2
    torch._check_value(
        (offs is not None) == jagged,
        lambda: "offs: expected " + ("where a matrix is 2-D, got None" if jagged else "None where both are 3-D"),
    )
    if offs is not None:
        groups = mat_a.shape[0] if mat_a.dim() == 3 else mat_b.shape[0] if mat_b.dim() == 3 else offs.shape[-1]
        check_like("offs", offs, mat_a, (groups,), (torch.int32,))
        torch._check_value(offs.shape[0] > 0, lambda: "offs: expected at least one group, got none")
    if bias is not None:
        torch._check_value(
            not (mat_a.dim() == 3 and mat_b.dim() == 2),
            lambda: "bias: expected None for a 3-D mat_a and 2-D mat_b, whose columns are the groups",
        )
        groups = mat_b.shape[0] if mat_b.dim() == 3 else offs.shape[0]
        wanted = (mat_b.shape[-1],) if bias.dim() == 1 else (groups, mat_b.shape[-1])
        check_like("bias", bias, mat_a, wanted, FLOAT_DTYPES)
    torch._check_type(
        out_dtype is None or out_dtype in FLOAT_DTYPES,
        lambda: f"out_dtype: expected a floating dtype, got {out_dtype}",
    )
    rows = jagged_length(mat_a, mat_b, gather)
    for name, index in (("gather", gather), ("scatter", scatter)):
        torch._check_value(
            index is None or (mat_a.dim() == 2 and mat_b.dim() == 3),
            lambda n=name: f"{n}: expected None unless mat_a is 2-D and mat_b 3-D",
        )
        if index is not None:
            torch._check_value(index.dim() == 1, lambda n=name, i=index: f"{n}: expected 1 dimension, got {i.dim()}")
            check_like(name, index, mat_a, (rows,), (torch.int64,))
    torch._check_value(
        gather is None or gather.shape[0] == 0 or mat_a.shape[0] > 0,
        lambda: "mat_a: expected rows for gather to read, got none",
    )


def _check_backward(doutput: Tensor | None, mat_a: Tensor, *rest: Any) -> None:
    _check(mat_a, *rest[:-1])
    out = _fake(mat_a, *rest[:-1])
    check_like("doutput", doutput, mat_a, out.shape, (out.dtype,))


def _fake(
    mat_a: Tensor,
    mat_b: Tensor,
    offs: Tensor | None,
    bias: Any,
    out_dtype: torch.dtype | None,
    gather: Any,
    scatter: Any,
) -> Tensor:
    rows = mat_a.shape[-2] if gather is None else gather.shape[0]
    lead = () if mat_a.dim() != mat_b.dim() else (mat_a.shape[0] if mat_a.dim() == 3 else offs.shape[0],)
    return mat_a.new_empty((*lead, rows, mat_b.shape[-1]), dtype=out_dtype or mat_a.dtype)


def _torch(
    mat_a: Tensor,
    mat_b: Tensor,
    offs: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype | None,
    gather: Tensor | None,
    scatter: Tensor | None,
) -> Tensor:
    """A loop over the groups, because `F.grouped_mm` has neither bias nor odd sizes, and no zeros behind the end."""
    a = mat_a if gather is None else mat_a[gather]
    if offs is None:
        out = a @ mat_b
        return out if bias is None else out + bias.broadcast_to(out.shape[0], out.shape[2]).unsqueeze(1)
    parts = list(enumerate(pairwise([0, *offs.tolist()])))
    if mat_b.dim() == 2 and mat_a.dim() == 2:
        out = torch.stack([a[:, s:e] @ mat_b[s:e] for _, (s, e) in parts])
        return out if bias is None else out + bias.broadcast_to(out.shape[0], out.shape[2]).unsqueeze(1)
    if mat_a.dim() == 3:
        products = [a[g] @ mat_b[:, s:e] for g, (s, e) in parts]
        rest = products[0].new_zeros(a.shape[1], mat_b.shape[1] - parts[-1][1][1])
        return torch.cat([*products, rest], 1)
    products = [a[s:e] @ mat_b[g] for g, (s, e) in parts]
    if bias is not None:
        biases = bias.broadcast_to(mat_b.shape[0], mat_b.shape[2])
        products = [product + biases[g] for g, product in enumerate(products)]
    out = torch.cat([*products, products[0].new_zeros(a.shape[0] - parts[-1][1][1], mat_b.shape[2])])
    return out if scatter is None else torch.zeros_like(out).index_copy(0, scatter, out)


def _torch_grouped_mm(
    mat_a: Tensor, mat_b: Tensor, offs: Any, bias: Any, out_dtype: Any, gather: Tensor | None, scatter: Tensor | None
) -> Tensor:
    out = F.grouped_mm(mat_a if gather is None else mat_a[gather], mat_b, offs=offs, bias=bias, out_dtype=out_dtype)
    return out if scatter is None else torch.zeros_like(out).index_copy(0, scatter, out)


def _cost(
    mat_a: Tensor, mat_b: Tensor, offs: Any, bias: Tensor | None, out_dtype: Any, gather: Tensor | None, scatter: Any
) -> tuple[float, float]:
    out = _fake(mat_a, mat_b, offs, bias, out_dtype, gather, scatter)
    outputs = out.numel() / (out.shape[0] if mat_a.dim() == mat_b.dim() == 2 else 1)
    index = 8.0 * out.shape[0] * ((gather is not None) + (scatter is not None))
    moved = sum(t.numel() * t.element_size() for t in (mat_a, mat_b, out, bias, offs) if t is not None)
    return 2.0 * outputs * mat_a.shape[-1], moved + index


def _triton_lacks(mat_a: Tensor, mat_b: Tensor, offs: Any, bias: Any, out_dtype: torch.dtype | None, *_: Any) -> Any:
    if (mat_a.dim(), mat_b.dim()) != (2, 3):
        return f"multiplies groups of rows, a 2-D mat_a by a 3-D mat_b, not {mat_a.dim()}-D by {mat_b.dim()}-D"
    for dtype in (mat_a.dtype, out_dtype or mat_a.dtype):
        if dtype == torch.float64:
            return f"computes fp32, fp16 and bf16, not {dtype}"
    return None


def _triton_backward_lacks(doutput: Tensor | None, *args: Any) -> str | None:
    return "no gradient to start from" if doutput is None else _triton_lacks(*args[:5])


_SCHEMA = (
    "Tensor mat_a, Tensor mat_b, Tensor? offs, Tensor? bias, ScalarType? out_dtype, Tensor? gather, Tensor? scatter"
)

_grouped_mm_backward = define_backward(
    f"pykern::grouped_mm_backward(Tensor? doutput, {_SCHEMA}, bool[3] output_mask, *, str? backend=None)"
    " -> (Tensor dmat_a, Tensor dmat_b, Tensor dbias)",
    check=_check_backward,
    backends={"triton": triton("grouped_mm", "grouped_mm_backward"), "cpu": grouped_mm_backward_sliced},
    supports={
        "triton": _triton_backward_lacks,
        "cpu": lambda doutput, *args: "no gradient to start from" if doutput is None else None,
    },
    cost=lambda doutput, *args: tuple(2 * c for c in _cost(*args[:-1])),
)

_grouped_mm = define(
    f"pykern::grouped_mm({_SCHEMA}, *, str? backend=None) -> (Tensor output)",
    reference=grouped_mm_reference,
    check=_check,
    fake=_fake,
    backward=_grouped_mm_backward,
    backends={"triton": triton("grouped_mm", "grouped_mm"), "cpu": grouped_mm_sliced},
    supports={"triton": _triton_lacks},
    autocast=dict.fromkeys(("mat_a", "mat_b", "bias"), "lower"),
    samples=grouped_samples,
    bad=bad_groups,
    cost=_cost,
    peers={"torch": _torch, "F.grouped_mm": _torch_grouped_mm},
)


def _check_values(mat_a: Tensor, mat_b: Tensor, offs: Tensor | None, gather: Any, scatter: Any) -> None:
    """With PYKERN_CHECKS=1, refuses offsets and indices that would otherwise be clamped or lost."""
    length = jagged_length(mat_a, mat_b, gather)
    if offs is not None:
        ends = offs.tolist()
        if any(a > b for a, b in pairwise([0, *ends, length])):
            raise ValueError(f"offs: expected ends that rise from 0 to at most {length}, got {ends}")
    for name, index, rows in (("gather", gather, mat_a.shape[0]), ("scatter", scatter, length)):
        if index is not None and index.numel() and not 0 <= int(index.min()) <= int(index.max()) < rows:
            raise ValueError(
                f"{name}: expected rows from 0 to {rows - 1}, got {int(index.min())} to {int(index.max())}"
            )
    if scatter is not None and scatter.unique().numel() != scatter.numel():
        raise ValueError("scatter: expected rows that differ, got one twice")


@_grouped_mm.public
def grouped_mm(
    mat_a: Tensor,
    mat_b: Tensor,
    *,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    gather: Tensor | None = None,
    scatter: Tensor | None = None,
) -> Tensor:
    """A matmul per group, a drop-in for `torch.nn.functional.grouped_mm`; accumulates in fp32 (fp64 for fp64).

    Group g reaches from offs[g−1] (0) to offs[g] along the dimension that the offsets cut:

    - mat_a (M, K), mat_b (G, K, N): rows; the output is (M, N). Rows behind the last offset are zeros.
    - mat_a (M, K), mat_b (K, N): summands; the output is (G, M, N), zeros for an empty group.
    - mat_a (G, M, K), mat_b (K, N): columns; the output is (M, N). Columns behind the last offset are zeros.
    - mat_a (G, M, K), mat_b (G, K, N): a batched matmul, without offs.

    An empty group's gradient is zero. Sizes and strides are free.

    Args:
        mat_a, mat_b: of one floating dtype.
        offs: (G,) int32, not decreasing. An offset below the one before it counts as that one, and one behind the end
            as the end; with PYKERN_CHECKS=1 both raise.
        bias: (G, N), a row for each group, or (N,) for all; added before rounding, and not to rows behind the last
            offset. Not for a 3-D mat_a with a 2-D mat_b.
        out_dtype: of the output, by default mat_a's; gradients flow through it.
        gather: (rows,) int64, for the first form: row i reads mat_a[gather[i]], and there are as many rows as it has
            entries. Clamped to the rows there are.
        scatter: (rows,) int64, for the first form: row i is written to row scatter[i] of the output, no two to the
            same. A row sent out of bounds is lost, a row to which nothing is sent is zeros.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit; the message names the argument.
    """
    if checks_on_host():
        _check(mat_a, mat_b, offs, bias, out_dtype, gather, scatter)
        _check_values(mat_a, mat_b, offs, gather, scatter)
    return _grouped_mm(mat_a, mat_b, offs, bias, out_dtype, gather, scatter)

"""Grouped matmul: one product per expert over its group of rows, of summands or of columns, in one call.

Rows are gathered on load and scattered on store as in ScatterMoE (Tan et al., arXiv:2403.08245), so that no permuted
copy of the tokens is kept.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pykern.ops._spec import Sample, define, define_backward
from pykern.ops.moe._common import FLOAT_DTYPES, checks_on_host
from pykern.ops.moe._products import (
    grouped_mm_backward_sliced,
    grouped_mm_reference,
    grouped_mm_sliced,
    jagged_length,
)
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


def _samples(kind: str, make: Any) -> Iterator[Sample]:
    def ends(*values: int) -> Tensor:
        return make.tensor([float(v) for v in values]).to(torch.int32)

    def even(groups: int, rows: int) -> Tensor:
        return (torch.arange(1, groups + 1, device=make.device) * (rows // groups)).int()

    if kind == "bench":
        part = 1 if make.device.type == "cuda" else 8  # of the experts' width and of the rows, to fit a CPU
        for name, experts, width, size, rows in (("mixtral", 8, 28672, 4096, 4096), ("qwen3", 128, 1536, 2048, 8192)):
            weight = make(experts, width // part, size, scale=0.02).mT
            args = (make(rows // part, size), weight, even(experts, rows // part), None, None, None, None)
            yield Sample(f"{name}/{part} gate_up {rows // part} rows", args)
        return
    none = (None, None, None, None)
    yield Sample("rows", (make(11, 8), make(3, 8, 16), ends(4, 9, 11), *none))
    yield Sample("rows, transposed weight", (make(11, 8), make(3, 16, 8).mT, ends(4, 9, 11), *none))
    yield Sample("odd sizes", (make(13, 7), make(3, 7, 5), ends(2, 3, 13), *none))
    yield Sample("empty groups and rows behind", (make(10, 6), make(5, 6, 3), ends(0, 4, 4, 7, 7), *none))
    yield Sample("every group empty", (make(4, 6), make(3, 6, 3), ends(0, 0, 0), *none))
    yield Sample("all to the last", (make(9, 6), make(4, 6, 3), ends(0, 0, 0, 9), *none))
    yield Sample("one row", (make(1, 5), make(2, 5, 4), ends(0, 1), *none))
    yield Sample("no rows", (make(0, 5), make(2, 5, 4), ends(0, 0), *none))
    yield Sample("empty sum", (make(3, 0), make(2, 0, 4), ends(1, 3), *none))
    yield Sample("rows apart", (make(10, 3, 8)[:, 1], make(2, 8, 4), ends(6, 10), *none))
    yield Sample("bias of each group", (make(9, 6), make(3, 6, 5), ends(4, 4, 8), make(3, 5), None, None, None))
    yield Sample("one bias", (make(9, 6), make(3, 6, 5), ends(4, 4, 9), make(5), None, None, None))
    gather = make(9, dtype=torch.int64, low=0, high=5)
    yield Sample("gather", (make(5, 6), make(3, 6, 4), ends(4, 4, 8), None, None, gather, None))
    scatter = make(9, grad=False).argsort()
    yield Sample("scatter", (make(9, 6), make(3, 6, 4), ends(4, 4, 8), None, None, None, scatter))
    yield Sample("both and bias", (make(5, 6), make(3, 6, 4), ends(4, 4, 9), make(3, 4), None, gather, scatter))
    yield Sample("summands", (make(6, 11), make(11, 5), ends(4, 4, 9), *none))
    yield Sample("summands, bias", (make(6, 11), make(11, 5), ends(4, 4, 9), make(3, 5), None, None, None))
    yield Sample("columns", (make(3, 6, 4), make(4, 11), ends(4, 4, 9), *none))
    yield Sample("batch", (make(3, 6, 4), make(3, 4, 5), None, *none))
    yield Sample("batch, bias", (make(3, 6, 4), make(3, 4, 5), None, make(3, 5), None, None, None))
    yield Sample("frozen weight", (make(11, 8), make(3, 8, 16, grad=False), ends(4, 9, 11), *none))
    yield Sample("frozen rows", (make(11, 8, grad=False), make(3, 8, 16), ends(4, 9, 11), *none))
    if kind == "full":
        yield Sample("many tiles", (make(517, 96), make(7, 96, 130), ends(0, 129, 130, 258, 500, 500, 517), *none))
        yield Sample("64 groups", (make(300, 40), make(64, 40, 24), even(64, 300), *none))


def _bad(make: Any) -> Iterator[tuple[str, tuple[Any, ...], type[Exception], str]]:
    a, b, offs = make(6, 8), make(2, 8, 4), make.tensor([2.0, 6.0]).int()
    none = (None, None, None, None)
    yield "rank", (a[0], b, offs, *none), ValueError, "mat_a: expected 2 or 3 dimensions, got 1"
    yield (
        "inner size",
        (a, make(2, 7, 4), offs, *none),
        ValueError,
        r"mat_b: expected shape \(2, 8, 4\), got \(2, 7, 4\)",
    )
    yield "batch", (make(3, 6, 8), b, None, *none), ValueError, r"mat_b: expected shape \(3, 8, 4\), got \(2, 8, 4\)"
    yield "integers", (a.long(), b, offs, *none), TypeError, "mat_a: expected a floating dtype"
    yield "two dtypes", (a, b.to(torch.float64), offs, *none), TypeError, "mat_b: expected dtype"
    yield "no offs", (a, b, None, *none), ValueError, "offs: expected where a matrix is 2-D, got None"
    yield "offs for a batch", (make(2, 6, 8), b, offs, *none), ValueError, "offs: expected None where both are 3-D"
    yield "length of offs", (a, b, offs[:1], *none), ValueError, r"offs: expected shape \(2,\), got \(1,\)"
    yield "dtype of offs", (a, b, offs.long(), *none), TypeError, "offs: expected dtype torch.int32, got torch.int64"
    yield "bias", (a, b, offs, make(3, 4), None, None, None), ValueError, r"bias: expected shape \(2, 4\)"
    yield "bias of columns", (b, make(4, 6), offs, make(2, 6), None, None, None), ValueError, "bias: expected None for"
    yield "out_dtype", (a, b, offs, None, torch.int32, None, None), TypeError, "out_dtype: expected a floating dtype"
    yield "gather", (a, b, offs, None, None, make(6), None), TypeError, "gather: expected dtype torch.int64"
    long = make(5, dtype=torch.int64, low=0, high=5)
    yield "scatter", (a, b, offs, None, None, None, long), ValueError, r"scatter: expected shape \(6,\), got \(5,\)"
    yield "gather a batch", (make(2, 6, 8), b, None, None, None, long, None), ValueError, "gather: expected None unless"


def _cost(
    mat_a: Tensor, mat_b: Tensor, offs: Any, bias: Tensor | None, out_dtype: Any, gather: Tensor | None, scatter: Any
) -> tuple[float, float]:
    out = _fake(mat_a, mat_b, offs, bias, out_dtype, gather, scatter)
    outputs = out.numel() / (out.shape[0] if mat_a.dim() == mat_b.dim() == 2 else 1)
    index = 8.0 * out.shape[0] * ((gather is not None) + (scatter is not None))
    moved = sum(t.numel() * t.element_size() for t in (mat_a, mat_b, out, bias) if t is not None)
    return 2.0 * outputs * mat_a.shape[-1], moved + index


_SCHEMA = (
    "Tensor mat_a, Tensor mat_b, Tensor? offs, Tensor? bias, ScalarType? out_dtype, Tensor? gather, Tensor? scatter"
)

_grouped_mm_backward = define_backward(
    f"pykern::grouped_mm_backward(Tensor? doutput, {_SCHEMA}, bool[3] output_mask, *, str? backend=None)"
    " -> (Tensor dmat_a, Tensor dmat_b, Tensor dbias)",
    check=_check_backward,
    backends={"cpu": grouped_mm_backward_sliced},
    supports={"cpu": lambda doutput, *args: "no gradient to start from" if doutput is None else None},
    cost=lambda doutput, *args: tuple(2 * c for c in _cost(*args[:-1])),
)

_grouped_mm = define(
    f"pykern::grouped_mm({_SCHEMA}, *, str? backend=None) -> (Tensor output)",
    reference=grouped_mm_reference,
    check=_check,
    fake=_fake,
    backward=_grouped_mm_backward,
    backends={"cpu": grouped_mm_sliced},
    autocast=dict.fromkeys(("mat_a", "mat_b", "bias"), "lower"),
    samples=_samples,
    bad=_bad,
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

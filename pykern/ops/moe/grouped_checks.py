"""The argument errors of grouped products, and the shape of what they give."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from pykern.ops.moe._common import FLOAT_DTYPES
from pykern.ops.moe._products import jagged_length
from pykern.ops.norm import check_like


def check_grouped(
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
        torch._check_value(offs.dim() == 1, lambda: f"offs: expected 1 dimension, got {offs.dim()}")
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


def fake_grouped(
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


def check_grouped_values(
    length: int, mat_a: Tensor, offs: Tensor | None, gather: Tensor | None, scatter: Tensor | None
) -> None:
    """With PYKERN_CHECKS=1, refuses offsets into this length, and indices, that would else be clamped or lost."""
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

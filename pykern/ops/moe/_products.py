"""The products of `grouped_mm`: the reference, and the one on CPU tensors that hands each group to BLAS."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from pykern.ops.moe._common import wide_dtype


def jagged_length(mat_a: Tensor, mat_b: Tensor, gather: Tensor | None) -> int:
    """The length of what the offsets cut: rows (2-D × 3-D), summands (2-D × 2-D) or columns (3-D × 2-D)."""
    if mat_a.dim() == 3:
        return mat_b.shape[1]
    if mat_b.dim() == 2:
        return mat_a.shape[1]
    return mat_a.shape[0] if gather is None else gather.shape[0]


def put_rows(rows: Tensor, scatter: Tensor) -> Tensor:
    """rows[i] at scatter[i], and zeros where nothing is put; a row sent out of bounds is lost."""
    count = rows.shape[0]
    target = torch.where((scatter >= 0) & (scatter < count), scatter, count)
    return rows.new_zeros(count + 1, rows.shape[1]).index_copy(0, target, rows)[:count]


def take_rows(rows: Tensor, scatter: Tensor) -> Tensor:
    """The gradient of `put_rows`: rows[scatter[i]] at i, and zeros for a row that was lost."""
    count = rows.shape[0]
    source = torch.where((scatter >= 0) & (scatter < count), scatter, count)
    return F.pad(rows, (0, 0, 0, 1))[source]


def grouped_mm_reference(
    mat_a: Tensor,
    mat_b: Tensor,
    offs: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype | None,
    gather: Tensor | None,
    scatter: Tensor | None,
) -> Tensor:
    dtype = out_dtype or mat_a.dtype
    wide = torch.promote_types(wide_dtype(mat_a.dtype), dtype)
    a, b = mat_a.to(wide), mat_b.to(wide)
    if gather is not None:
        # An embedding, because unlike indexing its gradient is summed in a fixed order on every device.
        a = F.embedding(gather.clamp(0, mat_a.shape[0] - 1), a)
    form = (a.dim(), b.dim())
    group = None
    # Where a row (summand, column) is another group's, it is masked before the product and not only after it: a NaN
    # there must reach no gradient of this group. The price, a dense product per group, is the reference's alone.
    if form == (3, 3):
        out = a @ b
    else:
        # The number of ends at or below a position; an end below the one before it makes an empty group.
        position = torch.arange(jagged_length(a, b, None), device=a.device)
        group = (position.unsqueeze(1) >= offs.cummax(0).values).sum(1)
        mine = [group == g for g in range(offs.shape[0])]
        if form == (2, 2):
            out = torch.stack([a.where(m, 0.0) @ b.where(m.unsqueeze(1), 0.0) for m in mine])
        elif form == (3, 2):
            out = a.new_zeros(a.shape[1], b.shape[1])
            for matrix, m in zip(a.unbind(), mine, strict=True):  # whose gradient is one stack, not a sum of zeros
                out = torch.where(m, matrix @ b.where(m, 0.0), out)
        else:
            out = a.new_zeros(a.shape[0], b.shape[2])
            for matrix, m in zip(b.unbind(), mine, strict=True):
                out = torch.where(m.unsqueeze(1), a.where(m.unsqueeze(1), 0.0) @ matrix, out)
    if bias is not None:
        biases = bias.to(wide).broadcast_to(b.shape[0] if form[1] == 3 else offs.shape[0], b.shape[-1])
        out = out + (F.embedding(group, F.pad(biases, (0, 0, 0, 1))) if form == (2, 3) else biases.unsqueeze(1))
    return (out if scatter is None else put_rows(out, scatter)).to(dtype)


def dense(matrix: Tensor) -> Tensor:
    """The matrix with rows or columns of adjacent elements. Left to torch, the copy's layout, and with it the order of
    summation in BLAS, would differ from that of a packed matrix, and so would the last bits."""
    if 1 in matrix.stride()[-2:]:
        return matrix
    return matrix.contiguous() if matrix.stride(-2) >= matrix.stride(-1) else matrix.mT.contiguous().mT


def grouped_mm_sliced(
    mat_a: Tensor,
    mat_b: Tensor,
    offs: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype | None,
    gather: Tensor | None,
    scatter: Tensor | None,
) -> Tensor:
    """A BLAS call per group on slices cut by the offsets, which have to be on the host. 16-bit groups are widened."""
    dtype = out_dtype or mat_a.dtype
    wide = torch.promote_types(wide_dtype(mat_a.dtype), dtype)
    form, columns = (mat_a.dim(), mat_b.dim()), mat_b.shape[-1]
    groups = mat_b.shape[0] if offs is None else offs.shape[0]
    biases = None if bias is None else bias.to(wide).broadcast_to(groups, columns)
    if form == (3, 3):
        out = dense(mat_a.to(wide)) @ dense(mat_b.to(wide))
        return (out if biases is None else out.add_(biases.unsqueeze(1))).to(dtype)
    length = jagged_length(mat_a, mat_b, gather)
    if form == (2, 2):
        out = mat_a.new_empty(groups, mat_a.shape[0], columns, dtype=wide)
    else:
        out = mat_a.new_zeros(length if form == (2, 3) else mat_a.shape[1], columns, dtype=wide)
    ends = offs.cummax(0).values.clamp(0, length).tolist()
    for g, (start, end) in enumerate(pairwise([0, *ends])):
        part = slice(start, end)
        if form == (2, 2):
            result, a, b = out[g], mat_a[:, part], mat_b[part]
        elif start == end:
            continue
        elif form == (3, 2):
            result, a, b = out[:, part], mat_a[g], mat_b[:, part]
        else:
            a = mat_a[part] if gather is None else mat_a[gather[part].clamp(0, mat_a.shape[0] - 1)]
            result, b = out[part], mat_b[g]
        torch.mm(dense(a.to(wide)), dense(b.to(wide)), out=result)
        if biases is not None:
            result.add_(biases[g])
    return (out if scatter is None else put_rows(out, scatter)).to(dtype)


def grouped_mm_backward_sliced(
    doutput: Tensor,
    mat_a: Tensor,
    mat_b: Tensor,
    offs: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype | None,
    gather: Tensor | None,
    scatter: Tensor | None,
    output_mask: list[bool],
) -> tuple[Tensor | None, ...]:
    """In each of the four forms the gradients are grouped products again: dA = dC·Bᵀ and dB = Aᵀ·dC."""
    wide = torch.promote_types(wide_dtype(mat_a.dtype), doutput.dtype)
    grad = doutput.to(wide) if scatter is None else take_rows(doutput.to(wide), scatter)
    source = None if gather is None else gather.clamp(0, mat_a.shape[0] - 1)
    da = db = dbias = None
    if output_mask[0]:
        da = grouped_mm_sliced(grad, mat_b.mT, offs, None, wide, None, None)
        if source is not None:
            da = da.new_zeros(mat_a.shape).index_add_(0, source, da)
        da = da.to(mat_a.dtype)
    if output_mask[1]:
        a = mat_a if source is None else mat_a[source]
        db = grouped_mm_sliced(a.mT, grad, offs, None, wide, None, None).to(mat_b.dtype)
    if output_mask[2]:
        if (mat_a.dim(), mat_b.dim()) == (2, 3):
            ones = grad.new_ones(1, grad.shape[0])
            dbias = grouped_mm_sliced(ones, grad, offs, None, wide, None, None).squeeze(1)
        else:
            dbias = grad.sum(1)
        dbias = dbias.sum_to_size(bias.shape).to(bias.dtype)
    return da, db, dbias

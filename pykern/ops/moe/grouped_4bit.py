"""Grouped matmul with 4-bit experts, which are frozen. The formats are in pykern/ops/_weight4bit.py."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from pykern.ops._backends import triton
from pykern.ops._spec import define, define_backward
from pykern.ops._weight4bit import NESTED_BLOCK, SCHEMA, decode
from pykern.ops.moe._common import FLOAT_DTYPES, wide_dtype
from pykern.ops.moe._products import dense, grouped_mm_reference, grouped_mm_sliced, put_rows, take_rows
from pykern.ops.moe.grouped_checks import check_grouped
from pykern.ops.moe.grouped_peers import loop_over_groups
from pykern.ops.moe.grouped_samples_4bit import bad_groups_4bit, grouped_4bit_samples
from pykern.ops.norm import check_like
from pykern.ops.weight4bit_backends import weight_lacks
from pykern.ops.weight4bit_checks import check_weight, weight_bytes


def grouped_mm_4bit_reference(mat_a: Tensor, *rest: Any) -> Tensor:
    *weight, offs, bias, out_dtype, gather, scatter = rest
    return grouped_mm_reference(mat_a, decode(*weight, mat_a.dtype).mT, offs, bias, out_dtype, gather, scatter)


def _experts(weight: Sequence[Any], dtype: torch.dtype) -> Callable[[int], Tensor]:
    """What decodes one expert. Where an expert does not begin with a byte and a block, all of them are decoded."""
    codes, absmax, nested_absmax, nested_code, nested_offset, code, zero_points, (_, out, n), blocksize = weight
    dequantize, count = torch.ops.pykern.dequantize_4bit.default, out * n
    if count % 2 or (code is not None and count % blocksize):
        return dequantize(*weight, dtype).__getitem__
    if nested_absmax is not None:
        factor = nested_absmax.float().repeat_interleave(NESTED_BLOCK)[: len(absmax)]
        absmax = nested_code.float()[absmax.int()] * factor + nested_offset.float()

    def expert(g: int) -> Tensor:
        scales = absmax[g] if code is None else absmax.view(-1, count // blocksize)[g]
        zeros = None if zero_points is None else zero_points[g]
        mine = codes.view(-1, count // 2)[g]
        return dequantize(mine, scales, None, None, None, code, zeros, (out, n), blocksize, dtype)

    return expert


def _multiply(
    a: Tensor, weight: Sequence[Any], offs: Tensor, gather: Tensor | None, wide: torch.dtype, gradient: bool
) -> Tensor:
    """Row i of each group, a[gather[i]], times the group's Wᵀ, or for the gradient times W; zeros behind the groups."""
    (_, out, n), expert = weight[7], _experts(weight, a.dtype)
    rows = len(a) if gather is None else len(gather)
    result = a.new_zeros(rows, n if gradient else out, dtype=wide)
    ends = offs.cummax(0).values.clamp(0, rows).tolist()
    for g, (start, end) in enumerate(pairwise([0, *ends])):
        if start < end:
            part = a[start:end] if gather is None else a[gather[start:end].clamp(0, len(a) - 1)]
            matrix = expert(g).to(wide)
            torch.mm(dense(part.to(wide)), matrix if gradient else matrix.mT, out=result[start:end])
    return result


def _sliced(mat_a: Tensor, *rest: Any) -> Tensor:
    """A BLAS call per group, for which its expert alone is decoded: the offsets have to be on the host."""
    *weight, offs, bias, out_dtype, gather, scatter = rest
    dtype = out_dtype or mat_a.dtype
    wide = torch.promote_types(wide_dtype(mat_a.dtype), dtype)
    out = _multiply(mat_a, weight, offs, gather, wide, gradient=False)
    if bias is not None:
        biases = torch.cat([bias.to(wide).broadcast_to(len(offs), out.shape[1]), out.new_zeros(1, out.shape[1])])
        group = torch.searchsorted(offs.cummax(0).values, torch.arange(len(out), dtype=torch.int32), right=True)
        out += biases[group]
    return (out if scatter is None else put_rows(out, scatter)).to(dtype)


def _backward_sliced(doutput: Tensor, mat_a: Tensor, *rest: Any) -> tuple[Tensor | None, Tensor | None]:
    *weight, offs, bias, _, gather, scatter, output_mask = rest
    wide = torch.promote_types(wide_dtype(mat_a.dtype), doutput.dtype)
    grad = doutput if scatter is None else take_rows(doutput, scatter)
    da = dbias = None
    if output_mask[0]:
        da = _multiply(grad.to(mat_a.dtype), weight, offs, None, wide, gradient=True)
        if gather is not None:
            da = da.new_zeros(mat_a.shape).index_add_(0, gather.clamp(0, mat_a.shape[0] - 1), da)
        da = da.to(mat_a.dtype)
    if output_mask[1]:
        grad = grad.to(wide)
        dbias = grouped_mm_sliced(grad.new_ones(1, len(grad)), grad, offs, None, wide, None, None).squeeze(1)
        dbias = dbias.sum_to_size(bias.shape).to(bias.dtype)
    return da, dbias


def check_grouped_4bit(mat_a: Tensor, *rest: Any) -> None:
    *weight, offs, bias, out_dtype, gather, scatter = rest
    check_weight(*weight)
    codes, shape = weight[0], tuple(weight[7])
    torch._check_value(len(shape) == 3, lambda: f"mat_b: expected 4-bit experts of shape (G, N, K), got {shape}")
    torch._check_value(
        mat_a.dim() == 2 and mat_a.shape[1] == shape[2],
        lambda: f"mat_a: expected shape (rows, {shape[2]}) for experts of shape {shape}, got {tuple(mat_a.shape)}",
    )
    torch._check_value(
        codes.device == mat_a.device, lambda: f"mat_b: expected device {mat_a.device} as mat_a, got {codes.device}"
    )
    matrices = mat_a.new_empty(()).expand(shape[0], shape[2], shape[1])  # of which only the shape is looked at
    check_grouped(mat_a, matrices, offs, bias, out_dtype, gather, scatter)


def _fake(mat_a: Tensor, *rest: Any) -> Tensor:
    *weight, _, _, out_dtype, gather, _ = rest
    return mat_a.new_empty(((mat_a if gather is None else gather).shape[0], weight[7][1]), dtype=out_dtype)


def _check_backward(doutput: Tensor | None, mat_a: Tensor, *rest: Any) -> None:
    check_grouped_4bit(mat_a, *rest[:-1])
    out = _fake(mat_a, *rest[:-1])
    check_like("doutput", doutput, mat_a, out.shape, (out.dtype,))


def _cost(mat_a: Tensor, *rest: Any) -> tuple[float, float]:
    *weight, _, bias, out_dtype, gather, scatter = rest
    out = (len(mat_a) if gather is None else len(gather)) * weight[7][1]
    moved = weight_bytes(weight) + mat_a.numel() * mat_a.element_size() + out * (out_dtype or mat_a.dtype).itemsize
    moved += sum(t.numel() * t.element_size() for t in (bias, gather, scatter) if t is not None)
    return 2.0 * out * weight[7][2], moved


def _torch(mat_a: Tensor, *rest: Any) -> Tensor:
    return loop_over_groups(mat_a, decode(*rest[:9], mat_a.dtype).mT, *rest[9:])


def _lacks(mat_a: Tensor, *rest: Any) -> str | None:
    for dtype in (mat_a.dtype, rest[11] or mat_a.dtype):
        if dtype not in FLOAT_DTYPES or dtype == torch.float64:
            return f"computes fp32, fp16 and bf16, not {dtype}"
    return weight_lacks(*rest[:9])


def _backward_lacks(doutput: Tensor | None, *args: Any) -> str | None:
    return "no gradient to start from" if doutput is None else _lacks(*args)


_SCHEMA = f"Tensor mat_a, {SCHEMA}, Tensor? offs, Tensor? bias, ScalarType? out_dtype, Tensor? gather, Tensor? scatter"

_grouped_mm_4bit_backward = define_backward(
    f"pykern::grouped_mm_4bit_backward(Tensor? doutput, {_SCHEMA}, bool[2] output_mask, *, str? backend=None)"
    " -> (Tensor dmat_a, Tensor dbias)",
    check=_check_backward,
    backends={"triton": triton("grouped_mm_4bit", "grouped_mm_4bit_backward"), "cpu": _backward_sliced},
    supports={
        "triton": _backward_lacks,
        "cpu": lambda doutput, *_: "no gradient to start from" if doutput is None else None,
    },
    cost=lambda doutput, *args: _cost(*args[:-1]),
    unread=("mat_a",),
)

grouped_mm_4bit = define(
    f"pykern::grouped_mm_4bit({_SCHEMA}, *, str? backend=None) -> (Tensor output)",
    reference=grouped_mm_4bit_reference,
    check=check_grouped_4bit,
    fake=_fake,
    backward=_grouped_mm_4bit_backward,
    backends={"triton": triton("grouped_mm_4bit", "grouped_mm_4bit"), "cpu": _sliced},
    supports={"triton": _lacks},
    autocast=dict.fromkeys(("mat_a", "bias"), "lower"),
    samples=grouped_4bit_samples,
    bad=bad_groups_4bit,
    cost=_cost,
    peers={"torch": _torch},
    traffic=lambda backend, *_: 1.02,
    # Besides the result the decoded weight is rounded to mat_a's dtype, as in dequantise and multiply.
    tolerance=3.0,
)

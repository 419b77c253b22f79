"""Grouped matmul: one product per expert over its group of rows, of summands or of columns, in one call.

Rows are gathered on load and scattered on store as in ScatterMoE (Tan et al., arXiv:2403.08245), so that no permuted
copy of the tokens is kept.
"""

from typing import Any

import torch
from torch import Tensor

from pykern.ops._backends import native, triton
from pykern.ops._spec import define, define_backward
from pykern.ops._weight4bit import Weight4bit
from pykern.ops.moe._common import checks_on_host
from pykern.ops.moe._grouped_cpu import grouped_mm_backward_cpu, grouped_mm_cpu
from pykern.ops.moe._products import grouped_mm_reference, jagged_length
from pykern.ops.moe.grouped_4bit import check_grouped_4bit, grouped_mm_4bit
from pykern.ops.moe.grouped_checks import check_grouped, check_grouped_values, fake_grouped
from pykern.ops.moe.grouped_peers import loop_over_groups, torch_grouped_mm
from pykern.ops.moe.grouped_samples import bad_groups, grouped_samples
from pykern.ops.norm import check_like


def _check_backward(doutput: Tensor | None, mat_a: Tensor, *rest: Any) -> None:
    check_grouped(mat_a, *rest[:-1])
    out = fake_grouped(mat_a, *rest[:-1])
    check_like("doutput", doutput, mat_a, out.shape, (out.dtype,))


def _cost(
    mat_a: Tensor, mat_b: Tensor, offs: Any, bias: Tensor | None, out_dtype: Any, gather: Tensor | None, scatter: Any
) -> tuple[float, float]:
    out = fake_grouped(mat_a, mat_b, offs, bias, out_dtype, gather, scatter)
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


def _cuda_lacks(mat_a: Tensor, mat_b: Tensor, offs: Any, bias: Tensor | None, out_dtype: Any, *_: Any) -> str | None:
    if mat_a.dtype not in (torch.float16, torch.bfloat16):
        return f"computes fp16 and bf16, not {mat_a.dtype}"
    if bias is not None and bias.dtype == torch.float64:
        return "takes a bias of up to 32 bits, not torch.float64"
    return _triton_lacks(mat_a, mat_b, offs, bias, out_dtype)


def _backward_lacks(lacks: Any) -> Any:
    return lambda doutput, *args: "no gradient to start from" if doutput is None else lacks(*args[:5])


_SCHEMA = (
    "Tensor mat_a, Tensor mat_b, Tensor? offs, Tensor? bias, ScalarType? out_dtype, Tensor? gather, Tensor? scatter"
)

_grouped_mm_backward = define_backward(
    f"pykern::grouped_mm_backward(Tensor? doutput, {_SCHEMA}, bool[3] output_mask, *, str? backend=None)"
    " -> (Tensor dmat_a, Tensor dmat_b, Tensor dbias)",
    check=_check_backward,
    backends={
        "cuda": native("cuda", "grouped_mm_backward"),
        "triton": triton("grouped_mm", "grouped_mm_backward"),
        "cpu": grouped_mm_backward_cpu,
    },
    supports={
        "cuda": _backward_lacks(_cuda_lacks),
        "triton": _backward_lacks(_triton_lacks),
        "cpu": _backward_lacks(lambda *args: None),
    },
    cost=lambda doutput, *args: tuple(2 * c for c in _cost(*args[:-1])),
)

_grouped_mm = define(
    f"pykern::grouped_mm({_SCHEMA}, *, str? backend=None) -> (Tensor output)",
    reference=grouped_mm_reference,
    check=check_grouped,
    fake=fake_grouped,
    backward=_grouped_mm_backward,
    backends={
        "cuda": native("cuda", "grouped_mm"),
        "triton": triton("grouped_mm", "grouped_mm"),
        "cpu": grouped_mm_cpu,
    },
    supports={"cuda": _cuda_lacks, "triton": _triton_lacks},
    autocast=dict.fromkeys(("mat_a", "mat_b", "bias"), "lower"),
    samples=grouped_samples,
    bad=bad_groups,
    cost=_cost,
    peers={"torch": loop_over_groups, "F.grouped_mm": torch_grouped_mm},
)


@grouped_mm_4bit.public
@_grouped_mm.public
def grouped_mm(
    mat_a: Tensor,
    mat_b: Tensor | Weight4bit,
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

    An empty group's gradient is zero. Sizes and strides are free. Experts may be 4-bit: a `Weight4bit` of shape
    (G, N, K), which is how they are stored, stands for the mat_b (G, K, N) of the first form, and is frozen.

    Args:
        mat_a, mat_b: of one floating dtype; a 4-bit mat_b may have been quantised from any.
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
    rest = (offs, bias, out_dtype, gather, scatter)
    if isinstance(mat_b, Weight4bit):
        if checks_on_host():
            check_grouped_4bit(mat_a, *mat_b.arguments, *rest)
            check_grouped_values(len(mat_a) if gather is None else len(gather), mat_a, offs, gather, scatter)
        return grouped_mm_4bit(mat_b.ordered(mat_a), *mat_b.arguments, *rest)
    if checks_on_host():
        check_grouped(mat_a, mat_b, *rest)
        check_grouped_values(jagged_length(mat_a, mat_b, gather), mat_a, offs, gather, scatter)
    return _grouped_mm(mat_a, mat_b, *rest)

"""Experts with low-rank adapters (Hu et al., arXiv:2106.09685), as three grouped products."""

from torch import Tensor

from pykern.ops._weight4bit import Weight4bit
from pykern.ops.moe.grouped import grouped_mm


def lora_grouped_mm(
    mat_a: Tensor,
    mat_b: Tensor | Weight4bit,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    offs: Tensor,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    gather: Tensor | None = None,
    scatter: Tensor | None = None,
) -> Tensor:
    """`grouped_mm` with an adapter for each group: a · W + scaling · (a · Aᵀ) · Bᵀ (+ bias).

    No sum of an expert and its adapter is ever in memory. The narrow product is kept for the backward beside what
    `grouped_mm` keeps.

    Args:
        mat_a: (M, K).
        mat_b: (G, K, N), or 4-bit experts (G, N, K).
        lora_a, lora_b: (G, r, K) and (G, N, r), both of mat_a's dtype or wider; a wider one's products are computed in
            its dtype, on a copy of mat_a.
        offs, bias, gather, scatter: as for `grouped_mm`.

    Returns:
        (rows, N) in mat_a's dtype.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit; the message names the argument of `grouped_mm`.
    """
    base = grouped_mm(mat_a, mat_b, offs=offs, bias=bias, gather=gather, scatter=scatter)
    narrow = grouped_mm(mat_a.to(lora_a.dtype), lora_a.mT, offs=offs, gather=gather)
    update = grouped_mm(narrow * scaling, lora_b.mT, offs=offs, out_dtype=base.dtype, scatter=scatter)
    return base + update

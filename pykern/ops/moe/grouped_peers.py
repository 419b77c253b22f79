"""Grouped products as torch has them, to measure against."""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def loop_over_groups(
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
    # unbind, whose gradient is one stack; that of indexing is a sum of as many zeros as there are groups.
    if mat_a.dim() == 3:
        products = [matrix @ mat_b[:, s:e] for matrix, (_, (s, e)) in zip(a.unbind(), parts, strict=True)]
        rest = products[0].new_zeros(a.shape[1], mat_b.shape[1] - parts[-1][1][1])
        return torch.cat([*products, rest], 1)
    products = [a[s:e] @ matrix for matrix, (_, (s, e)) in zip(mat_b.unbind(), parts, strict=True)]
    if bias is not None:
        biases = bias.broadcast_to(mat_b.shape[0], mat_b.shape[2])
        products = [product + biases[g] for g, product in enumerate(products)]
    out = torch.cat([*products, products[0].new_zeros(a.shape[0] - parts[-1][1][1], mat_b.shape[2])])
    return out if scatter is None else torch.zeros_like(out).index_copy(0, scatter, out)


def torch_grouped_mm(
    mat_a: Tensor, mat_b: Tensor, offs: Any, bias: Any, out_dtype: Any, gather: Tensor | None, scatter: Tensor | None
) -> Tensor:
    out = F.grouped_mm(mat_a if gather is None else mat_a[gather], mat_b, offs=offs, bias=bias, out_dtype=out_dtype)
    return out if scatter is None else torch.zeros_like(out).index_copy(0, scatter, out)

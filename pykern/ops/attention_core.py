"""What dense, packed and cached attention share: the mathematics in plain torch, and the checks on common arguments.

Softmax attention: Vaswani et al., arXiv:1706.03762. ALiBi: Press, Smith, Lewis, arXiv:2108.12409. Sinks: Xiao et al.,
arXiv:2309.17453, as a learned logit that only joins the denominator. Softcap: Gemma 2, arXiv:2408.00118.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


def statistic_dtype(query: Tensor) -> torch.dtype:
    """What attention computes in, and the dtype of lse."""
    return torch.float64 if query.dtype == torch.float64 else torch.float32


class DenseCall(NamedTuple):
    """The arguments of the dense op, in its order; query (…, L, H, E), key (…, S, Hkv, E), value (…, S, Hkv, Ev)."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    rng: Tensor | None
    dropout_p: float
    scale: float
    enable_gqa: bool
    window_left: int | None
    window_right: int | None
    softcap: float | None
    align: str

    @property
    def lead(self) -> torch.Size:
        return self.query.shape[:-3]

    @property
    def offset(self) -> int:
        """The key position of query 0."""
        return self.key.shape[-3] - self.query.shape[-3] if self.align == "bottom_right" else 0

    @property
    def scores_shape(self) -> tuple[int, ...]:
        return (*self.lead, self.query.shape[-2], self.query.shape[-3], self.key.shape[-3])


class DecodeCall(NamedTuple):
    """The arguments of the cached op, in its order; query (B, L, H, E)."""

    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    cache_seqlens: Tensor
    block_table: Tensor | None
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    scale: float
    window_left: int | None
    softcap: float | None

    @property
    def capacity(self) -> int:
        """How many keys a sequence can have."""
        return self.key_cache.shape[1] if self.block_table is None else room_in_pages(self.key_cache, self.block_table)


@dataclass(frozen=True)
class Scoring:
    """How a score becomes a weight, apart from what tensors say.

    The query at row i sits at key position i + offset (a number, or a tensor that broadcasts against the scores) and
    may see keys from left before to right after that position; None is unlimited.
    """

    scale: float
    offset: int | Tensor
    left: int | None
    right: int | None
    softcap: float | None
    dropout_p: float = 0.0


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scoring: Scoring,
    *,
    mask: Tensor | None = None,
    present: Tensor | None = None,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention on (…, H, L, E), (…, Hkv, S, E), (…, Hkv, S, Ev): out (…, H, L, Ev) in fp32 (fp64), and lse.

    Args:
        mask: bool or additive, broadcasts to the scores (…, H, L, S).
        present: bool like a bool mask, for keys that exist.
        slopes: (H,) or (…, H).
        sinks: (H,).
        keep: bool (…, H, L, S), the weights that survive dropout.
    """
    dtype = statistic_dtype(query)
    scores = head_matmul(query.to(dtype), key.to(dtype).mT) * scoring.scale
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    row = torch.arange(query.shape[-2], device=query.device).unsqueeze(-1)
    distance = row + scoring.offset - torch.arange(key.shape[-2], device=query.device)
    if slopes is not None:
        scores = scores - slopes.to(dtype)[..., None, None] * distance.abs()
    allowed = [] if present is None else [present]
    if scoring.left is not None:
        allowed.append(distance <= scoring.left)
    if scoring.right is not None:
        allowed.append(distance >= -scoring.right)
    if mask is not None and mask.dtype == torch.bool:
        allowed.append(mask)
    elif mask is not None:
        scores = scores + mask.to(dtype)
    for permission in allowed:
        scores = torch.where(permission, scores, -math.inf)
    weights, lse = softmax(scores, None if sinks is None else sinks.to(dtype)[:, None, None])
    if keep is not None:
        survival = 1.0 - scoring.dropout_p
        weights = torch.where(keep, weights * (1.0 / survival if survival > 0 else 0.0), 0.0)
    return head_matmul(weights, value.to(dtype)), lse


def softmax(scores: Tensor, sinks: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Weights and their log-sum-exp; zeros and -inf where nothing is allowed, without a NaN in any derivative."""
    top = scores.new_full((*scores.shape[:-1], 1), -math.inf)
    if scores.shape[-1] > 0:
        top = scores.amax(-1, keepdim=True)
    if sinks is not None:
        top = torch.maximum(top, sinks)
    # The result does not depend on `top`, so it is a constant to differentiation.
    top = top.detach()
    top = torch.where(top == -math.inf, 0.0, top)
    exponentials = torch.exp(scores - top)
    total = exponentials.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks - top)
    empty = total == 0
    total = torch.where(empty, 1.0, total)
    lse = torch.where(empty, -math.inf, top + torch.log(total))
    return exponentials / total, lse.squeeze(-1)


def head_matmul(rows: Tensor, columns: Tensor) -> Tensor:
    """(…, H, L, K) @ (…, Hkv, K, N), a group of heads sharing each of the second's, which are not repeated."""
    heads, shared = rows.shape[-3], columns.shape[-3]
    if heads == shared:
        return rows @ columns
    length, lead = rows.shape[-2], rows.shape[:-3]
    grouped = rows.reshape(*lead, shared, heads // shared * length, rows.shape[-1])
    return (grouped @ columns).reshape(*lead, heads, length, columns.shape[-1])


def default_scale(query: Tensor, scale: float | None) -> float:
    """1/√E; without any elements of E every score is zero, whatever the scale."""
    size = query.shape[-1]
    return scale if scale is not None else 1.0 / math.sqrt(size) if size > 0 else 1.0


def key_padding(length: Tensor, longest: int) -> Tensor:
    """(B, longest) bool, whether a key exists, of lengths (B,)."""
    return torch.arange(longest, device=length.device) < length.unsqueeze(-1)


def take_rows(rows: Tensor, index: Tensor, inside: Tensor, fill: float = 0.0) -> Tensor:
    """`rows[index]` where inside, else `fill`: there nothing is read, NaN included, and no gradient flows."""
    if rows.shape[0] == 0:
        rows = torch.cat([rows, rows.new_full((1, *rows.shape[1:]), fill)])
    taken = rows[torch.where(inside, index, 0)]
    return torch.where(inside.reshape(*inside.shape, *[1] * (rows.dim() - 1)), taken, fill)


def room_in_pages(cache: Tensor, block_table: Tensor) -> int:
    """How many keys a sequence can have in pages (blocks, block_size, Hkv, E), of which there may be none at all."""
    return block_table.shape[1] * cache.shape[1] if cache.shape[0] > 0 else 0


def take_pages(cache: Tensor, block_table: Tensor, length: Tensor, longest: int) -> Tensor:
    """(B, longest, Hkv, E) from pages (blocks, block_size, Hkv, E): zeros beyond each length, block ids clamped."""
    blocks, block_size = cache.shape[:2]
    position = torch.arange(longest, device=cache.device)
    page = block_table.long()[:, position // max(block_size, 1)].clamp(0, max(blocks - 1, 0))
    rows = cache.reshape(blocks * block_size, *cache.shape[2:])
    return take_rows(rows, page * block_size + position % max(block_size, 1), key_padding(length, longest))

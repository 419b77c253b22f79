"""torch's own attention, which the ops are measured against."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pykern.kernels.attention_calls import VarlenCall
from pykern.ops._philox import keep_mask, row_index
from pykern.ops.attention_core import DecodeCall, DenseCall


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -math.inf)
    return mask.to(dtype)


def torch_attention(*args: Any) -> Tensor:
    """F.scaled_dot_product_attention, with an explicit mask if needed; written out where it lacks a feature."""
    call = DenseCall(*args)
    query, key, value = (x.transpose(-3, -2) for x in (call.query, call.key, call.value))
    is_causal = call.window_right == 0 and call.offset == 0 and call.window_left is None
    is_causal = is_causal and call.attn_mask is None and call.alibi_slopes is None
    bias = None if is_causal else _explicit_mask(call)
    if call.softcap is None and call.sinks is None and call.dropout_p == 0:
        out = F.scaled_dot_product_attention(
            query, key, value, bias, is_causal=is_causal, scale=call.scale, enable_gqa=call.enable_gqa
        )
        return out.transpose(-3, -2)
    groups = query.shape[-3] // max(key.shape[-3], 1)
    scores = query @ key.repeat_interleave(groups, -3).mT * call.scale
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    if is_causal:
        scores = scores + scores.new_full(scores.shape[-2:], -math.inf).triu(1)
    elif bias is not None:
        scores = scores + bias
    if call.sinks is not None:
        sink = call.sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sink], -1)
    weights = torch.softmax(scores, -1)[..., : key.shape[-2]]
    if call.dropout_p > 0:
        keep = keep_mask(call.rng, row_index(call.scores_shape, query.device), call.scores_shape[-1], call.dropout_p)
        weights = torch.where(keep, weights / (1.0 - call.dropout_p), 0.0)
    return (weights @ value.repeat_interleave(groups, -3)).transpose(-3, -2)


def _explicit_mask(call: DenseCall) -> Tensor | None:
    length, keys = call.scores_shape[-2:]
    device, dtype = call.query.device, call.query.dtype
    distance = torch.arange(length, device=device)[:, None] + call.offset - torch.arange(keys, device=device)
    bias = None if call.attn_mask is None else _additive(call.attn_mask, dtype)
    if call.alibi_slopes is not None:
        alibi = (-call.alibi_slopes[..., None, None] * distance.abs()).to(dtype)
        bias = alibi if bias is None else bias + alibi
    if call.window_left is not None or call.window_right is not None:
        left = length + keys if call.window_left is None else call.window_left
        right = length + keys if call.window_right is None else call.window_right
        hidden = (distance > left) | (distance < -right)
        bias = (call.query.new_zeros(length, keys) if bias is None else bias).masked_fill(hidden, -math.inf)
    return bias


def key_lengths(args: Sequence[Any]) -> list[int]:
    """Of a packed call; reads them back, so it is for tests and benchmarks."""
    call = VarlenCall(*args)
    boundaries = call.cu_seqlens_k.tolist()
    if call.seqused_k is not None:
        return call.seqused_k.tolist()
    return [b - a for a, b in zip(boundaries, boundaries[1:], strict=False)]


def _padded(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Sequence[int],
    lengths: Sequence[int],
    call: VarlenCall | DecodeCall,
    right: int | None,
) -> Tensor:
    """torch on sequences side by side, query (B, L, H, E), each at its own offset; without a mask where none is needed.

    Rows and keys that fill up a sequence come last, so that causality alone hides the keys from the rows that count.
    """
    rows, keys, device = query.shape[1], key.shape[1], query.device
    grouped = query.shape[-2] != key.shape[-2]
    slopes, mask = call.alibi_slopes, None
    plain = slopes is None and call.window_left is None
    causal = plain and right == 0 and not any(offsets)
    if not (causal or (plain and right in (None, 0) and set(lengths) <= {keys} and (right is None or rows == 1))):
        position = torch.arange(rows, device=device)[:, None] + torch.tensor(offsets, device=device)[:, None, None]
        distance = position - torch.arange(keys, device=device)  # (B, L, S)
        mask = torch.arange(keys, device=device) < torch.tensor(lengths, device=device)[:, None, None]
        mask = mask if call.window_left is None else mask & (distance <= call.window_left)
        mask = (mask if right is None else mask & (distance >= -right))[:, None]
        if slopes is not None:
            bias = (-slopes[..., None, None] * distance[:, None].abs()).to(query.dtype)
            mask = bias.masked_fill(~mask, -math.inf)
    call = (mask, None, call.sinks, None, 0.0, call.scale, grouped, None, 0 if causal else None, call.softcap)
    return torch_attention(query, key, value, *call, "top_left")


def _from_pages(cache: Tensor, table: Tensor) -> Tensor:
    return cache[table.long().clamp(0, cache.shape[0] - 1)].flatten(1, 2)


def torch_varlen(*args: Any) -> Tensor | None:
    """torch on the sequences padded to the longest, unpacked before and packed again; None for keys in no pages."""
    call = VarlenCall(*args)
    if call.block_table is not None and call.key.shape[0] == 0:
        return None
    bounds, starts, lengths = call.cu_seqlens_q.tolist(), call.cu_seqlens_k.tolist(), key_lengths(args)
    counts = [b - a for a, b in zip(bounds, bounds[1:], strict=False)]
    if not counts:
        return call.query.new_zeros(*call.query.shape[:-1], call.value.shape[-1])
    query = pad_sequence([call.query[a:b] for a, b in zip(bounds, bounds[1:], strict=False)], batch_first=True)
    if call.block_table is None:
        key, value = (
            pad_sequence([x[a:][:n] for a, n in zip(starts, lengths, strict=False)], batch_first=True)
            for x in (call.key, call.value)
        )
    else:
        key, value = (_from_pages(x, call.block_table)[:, : max(lengths)] for x in (call.key, call.value))
    offsets = [n - m for n, m in zip(lengths, counts, strict=True)]
    out = _padded(query, key, value, offsets, lengths, call, call.window_right)
    padding = out.new_zeros(call.query.shape[0] - bounds[-1], *out.shape[2:])
    return torch.cat([*(rows[:n] for rows, n in zip(out, counts, strict=True)), padding])


def torch_decode(*args: Any) -> Tensor | None:
    """torch on the cache as far as its longest sequence; pages are put together first, and None if there are none."""
    call = DecodeCall(*args)
    if call.block_table is not None and call.key_cache.shape[0] == 0:
        return None
    lengths = call.cache_seqlens.tolist()
    longest = max(lengths, default=0)
    key, value = (
        (x if call.block_table is None else _from_pages(x, call.block_table))[:, :longest]
        for x in (call.key_cache, call.value_cache)
    )
    return _padded(call.query, key, value, [n - call.query.shape[1] for n in lengths], lengths, call, 0)

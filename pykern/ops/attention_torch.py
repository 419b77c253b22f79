"""torch's own attention, which the ops are measured against."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pykern.ops._philox import keep_mask, row_index
from pykern.ops.attention_core import DenseCall


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
    boundaries, used = args[4].tolist(), args[9]
    return used.tolist() if used is not None else [b - a for a, b in zip(boundaries, boundaries[1:], strict=False)]


def _one_sequence(
    query: Tensor, key: Tensor, value: Tensor, slopes: Tensor | None, sinks: Tensor | None, *rest: Any
) -> Tensor:
    """torch on a batch of one, aligned bottom-right; rest: scale, window_left, window_right, softcap."""
    scale, left, right, softcap = rest
    grouped = query.shape[-2] != key.shape[-2]
    call = (None, slopes, sinks, None, 0.0, scale, grouped, left, right, softcap, "bottom_right")
    return torch_attention(query[None], key[None], value[None], *call)[0]


def _pages(cache: Tensor, table: Tensor, length: int) -> Tensor:
    return cache[table.long()].flatten(0, 1)[:length]


def _slopes_of(slopes: Tensor | None, sequence: int) -> Tensor | None:
    return slopes if slopes is None or slopes.dim() == 1 else slopes[sequence]


def torch_varlen(*args: Any) -> Tensor:
    """One torch call a sequence."""
    query, key, value, bounds, starts = *args[:3], args[3].tolist(), args[4].tolist()
    slopes, sinks, table, scoring = args[7], args[8], args[10], args[13:]
    out = []
    for i, length in enumerate(key_lengths(args)):
        if table is not None:
            keys, values = _pages(key, table[i], length), _pages(value, table[i], length)
        else:
            keys, values = key[starts[i] :][:length], value[starts[i] :][:length]
        rows = query[bounds[i] : bounds[i + 1]]
        out.append(_one_sequence(rows, keys, values, _slopes_of(slopes, i), sinks, *scoring))
    padding = (out[0] if out else query).new_zeros(query.shape[0] - bounds[-1], query.shape[1], value.shape[-1])
    return torch.cat([*out, padding])


def torch_decode(*args: Any) -> Tensor:
    """One torch call a sequence."""
    query, key, value, lengths, table, slopes, sinks, scale, left, softcap = args
    out = []
    for i, length in enumerate(lengths.tolist()):
        if table is not None:
            keys, values = _pages(key, table[i], length), _pages(value, table[i], length)
        else:
            keys, values = key[i, :length], value[i, :length]
        out.append(_one_sequence(query[i], keys, values, _slopes_of(slopes, i), sinks, scale, left, 0, softcap))
    return torch.stack(out) if out else query.new_zeros(0, *query.shape[1:-1], value.shape[-1])

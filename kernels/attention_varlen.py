"""Packed attention: sequences that lie end to end, keys also in pages; the kernels are those of dense attention.

To them packed tensors are a batch of one, and a program looks up where its sequence lies, attention_sequences.py. What
lies before, between and behind sequences is in no sum, and gets zeros from the same programs. No length is known here:
grids are for the longest, and neither tiles nor the order of a sum depend on lengths, so that each sequence has the
bits that dense attention gives it alone. (In the backward dense attention has another way for few keys, is_exact.)
"""

import math
from typing import Any

import torch
from pykern.kernels.attention import run_forward
from pykern.kernels.attention_backward import is_exact, run_backward
from pykern.kernels.attention_calls import VarlenCall
from pykern.kernels.attention_scores import LOG2E, Band, score_arguments
from pykern.kernels.attention_tiles import Operands
from torch import Tensor


def _pages(call: VarlenCall) -> tuple[Tensor, Tensor]:
    """Key and value (blocks, block_size, Hkv, …); contiguous ones are one block."""
    if call.block_table is None:
        return call.key.unsqueeze(0), call.value.unsqueeze(0)
    if call.key.shape[0] == 0:  # of which nothing is read
        return call.key.new_zeros(1, *call.key.shape[1:]), call.value.new_zeros(1, *call.value.shape[1:])
    return call.key, call.value


def _longest(call: VarlenCall) -> tuple[int, int]:
    """How many queries and keys a sequence can have."""
    capacity = call.key.shape[0]
    if call.block_table is not None and capacity > 0:
        capacity = call.block_table.shape[1] * call.key.shape[1]
    return min(call.max_seqlen_q, call.query.shape[0]), min(call.max_seqlen_k, capacity)


def _band(call: VarlenCall) -> Band:
    """Each sequence has an offset of its own. A bound that hides nothing from the longest is None."""
    queries, keys = _longest(call)
    left = call.window_left if call.window_left is not None and call.window_left < keys - 1 else None
    right = call.window_right if call.window_right is not None and call.window_right < queries - 1 else None
    return Band(0, left, right)


def _scores(call: VarlenCall, scale: float, base: float) -> dict[str, Any]:
    shape = call.query.shape[-2], call.key.shape[-2], *_longest(call)
    return score_arguments(
        shape, _band(call), scale, call.softcap, call.alibi_slopes, call.rng, call.dropout_p, base=base
    )


def _sequences(call: VarlenCall, key: Tensor) -> dict[str, Any]:
    """The kernels' arguments about sequences; key as `_pages` gives it."""
    table, used = call.block_table, call.seqused_k
    sequences: dict[str, Any] = {
        "cu_queries": call.cu_seqlens_q.contiguous(),
        "cu_keys": call.cu_seqlens_k.contiguous(),
        "used": None if used is None else used.contiguous(),
        "query_rows": call.query.shape[0],
        "key_rows": key.shape[1] if table is None else key.shape[0],
        "columns": call.max_seqlen_k,
    }
    if table is not None:
        sequences |= {"table": table.contiguous(), "pages": table.shape[1], "PAGE": max(key.shape[1], 1)}
    return sequences


def attention_varlen(*args: Any) -> tuple[Tensor, Tensor]:
    """Takes a `VarlenCall`."""
    call = VarlenCall(*args)
    query, scale, (total, heads, _) = call.query, call.scale, call.query.shape
    out = query.new_empty((total, heads, call.value.shape[-1]))
    lse = query.new_empty((heads, total), dtype=torch.float32)
    batch = len(call.cu_seqlens_q) - 1
    if lse.numel() == 0 or batch == 0 or call.max_seqlen_q == 0:
        return out.zero_(), lse.fill_(-math.inf)
    if scale < 0:  # the largest score is found among the products
        query, scale = -query, -scale
    key, value = _pages(call)
    operands = Operands(query.unsqueeze(0), key, value)
    operands.packed = True
    if call.block_table is not None:
        operands.paged, operands.describable = True, False  # a tile has rows of many pages
    run_forward(out, lse, call.sinks, operands, _scores(call, scale, LOG2E.value), batch, **_sequences(call, key))
    return out, lse


def attention_varlen_backward(dout: Tensor | None, dlse: Tensor | None, *args: Any) -> tuple[Tensor | None, ...]:
    """Takes a `VarlenCall`, out, lse and output_mask; keys in pages have no gradient here."""
    *forward, out, lse, output_mask = args
    call = VarlenCall(*forward)
    operated = (call.query, call.key, call.value, call.alibi_slopes, call.sinks)
    gradients = [
        torch.empty_like(x, memory_format=torch.contiguous_format) if wanted else None
        for x, wanted in zip(operated, output_mask, strict=True)
    ]
    batch = len(call.cu_seqlens_q) - 1
    if lse.numel() == 0 or batch == 0 or call.max_seqlen_q == 0:
        return tuple(None if x is None else x.zero_() for x in gradients)
    query, (key, value) = call.query.unsqueeze(0), _pages(call)
    operands = Operands(query, key, value, dout=None if dout is None else dout.unsqueeze(0))
    operands.packed = True
    exact = is_exact(gradients, query, _band(call), _longest(call)[1])
    run_backward(
        (*gradients[:3], None, *gradients[3:]),
        None if dlse is None else dlse.unsqueeze(0).contiguous(),
        call.sinks,
        out.unsqueeze(0).contiguous(),
        lse.unsqueeze(0).contiguous(),
        operands,
        _scores(call, call.scale, 1.0 if exact else LOG2E.value),
        call.scale,
        batch,
        exact,
        **_sequences(call, key),
    )
    return tuple(gradients)

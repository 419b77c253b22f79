"""Attention of a few new tokens against a cache of keys and values, contiguous or in pages."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pykern.ops._spec import define
from pykern.ops.attention_checks import (
    check_heads,
    check_integers,
    check_lengths,
    check_pages,
    check_scoring,
    checks_on_host,
    require,
    window_bounds,
)
from pykern.ops.attention_core import (
    DecodeCall,
    Scoring,
    attend,
    default_scale,
    key_padding,
    statistic_dtype,
    take_pages,
)
from pykern.ops.attention_cost import decode_cost, decode_traffic
from pykern.ops.attention_decode_samples import decode_bad, decode_samples
from pykern.ops.attention_packed_backends import DECODE, DECODE_LACKS
from pykern.ops.attention_torch import torch_decode
from pykern.ops.attention_varlen import attention_varlen

MAX_LENGTH = 16


def attention_decode_reference(*args: Any) -> tuple[Tensor, Tensor]:
    call = DecodeCall(*args)
    length = call.cache_seqlens.long().clamp(0, call.capacity)
    present = key_padding(length, call.capacity)
    if call.block_table is None:
        # A cache is not initialised behind its length, and zero times NaN is NaN.
        key, value = (torch.where(present[..., None, None], x, 0.0) for x in (call.key_cache, call.value_cache))
    else:
        pages = (call.block_table, length, call.capacity)
        key, value = take_pages(call.key_cache, *pages), take_pages(call.value_cache, *pages)
    offset = (length - call.query.shape[1])[:, None, None, None]
    out, lse = attend(
        *(x.transpose(1, 2) for x in (call.query, key, value)),
        Scoring(call.scale, offset, call.window_left, 0, call.softcap),
        present=present[:, None, None, :],
        slopes=call.alibi_slopes,
        sinks=call.sinks,
    )
    return out.transpose(1, 2).to(call.query.dtype), lse


def _check(*args: Any) -> None:
    call = DecodeCall(*args)
    query, key, table = call.query, call.key_cache, call.block_table
    require(query.dim() == 4, lambda: f"query: expected (B, L, heads, size), got {tuple(query.shape)}")
    batch, length = query.shape[:2]
    require(length <= MAX_LENGTH, lambda: f"query: expected at most {MAX_LENGTH} tokens a sequence, got {length}")
    _check_cache("key_cache", key, call)
    _check_cache("value_cache", call.value_cache, call)
    check_heads(query, key, call.value_cache, grouped=True, names=("key_cache", "value_cache"))
    check_integers("cache_seqlens", call.cache_seqlens, query, (batch,))
    if table is not None:
        check_integers("block_table", table, query, (batch, -1))
    check_scoring(query, (batch,), call.alibi_slopes, call.sinks, call.window_left, 0, call.softcap)


def _check_cache(name: str, x: Tensor, call: DecodeCall) -> None:
    batch = call.query.shape[0]
    layout = f"({batch}, S, heads, size)" if call.block_table is None else "(blocks, block_size, heads, size)"
    require(x.dim() == 4, lambda: f"{name}: expected {layout}, got {tuple(x.shape)}")
    wanted = call.key_cache.shape[:2]
    require(
        x.shape[:2] == wanted and (call.block_table is not None or x.shape[0] == batch),
        lambda: f"{name}: expected {layout}, the first two as key_cache's {tuple(wanted)}, got {tuple(x.shape[:2])}",
    )


_attention_decode = define(
    "pykern::attention_decode(Tensor query, Tensor key_cache, Tensor value_cache, Tensor cache_seqlens,"
    " Tensor? block_table, Tensor? alibi_slopes, Tensor? sinks, float scale, int? window_left, float? softcap, *,"
    " str? backend=None) -> (Tensor out, Tensor lse)",
    reference=attention_decode_reference,
    check=_check,
    fake=lambda query, key_cache, value_cache, *_: (
        query.new_empty((*query.shape[:-1], value_cache.shape[-1])),
        query.new_empty((query.shape[0], query.shape[2], query.shape[1]), dtype=statistic_dtype(query)),
    ),
    backends=DECODE,
    supports=DECODE_LACKS,
    autocast=dict.fromkeys(("query", "key_cache", "value_cache"), "lower"),
    samples=decode_samples,
    bad=decode_bad,
    cost=decode_cost,
    traffic=decode_traffic,
    peers={"torch": torch_decode},
)


def _as_packed(call: DecodeCall) -> tuple[Tensor, Tensor]:
    """The same by attention_varlen, for which a contiguous cache is one page a sequence."""
    (batch, length), device = call.query.shape[:2], call.query.device
    table, boundaries = call.block_table, torch.arange(batch + 1, dtype=torch.int32, device=device)
    out, lse = attention_varlen(
        call.query.flatten(0, 1),
        call.key_cache,
        call.value_cache,
        boundaries * length,
        torch.zeros_like(boundaries),
        length,
        call.capacity,
        is_causal=True,
        scale=call.scale,
        window=(call.window_left, 0),
        softcap=call.softcap,
        alibi_slopes=call.alibi_slopes,
        sinks=call.sinks,
        seqused_k=call.cache_seqlens,
        block_table=boundaries[:-1, None] if table is None else table,
        return_lse=True,
    )
    return out.unflatten(0, (batch, length)), lse.unflatten(1, (batch, length)).transpose(0, 1)


@_attention_decode.public
def attention_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    block_table: Tensor | None = None,
    scale: float | None = None,
    window: Sequence[int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    batch_invariant: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of the last L tokens of each sequence against its cache; causal, aligned bottom-right.

    Whatever a cache holds behind cache_seqlens, NaN included, changes nothing. A token before the first key (L greater
    than the length) sees nothing and gives zeros. Values that lead outside the cache are clamped on the device;
    PYKERN_CHECKS=1 raises for them, which synchronises.

    Args:
        query: (B, L, H, E), L at most 16, fp32, fp16, bf16 or fp64 (by the reference), any strides.
        key_cache, value_cache: (B, S, Hkv, E) and (B, S, Hkv, Ev), Hkv a divisor of H; with block_table pages
            (blocks, block_size, Hkv, E) and (blocks, block_size, Hkv, Ev).
        cache_seqlens: (B,) int32, the keys present, the query's own included.
        block_table: (B, max_blocks) int32, the pages of each sequence in order.
        scale: 1/√E by default.
        window: (left, right), keys from position - left; causality leaves nothing to the right.
        softcap, sinks: as in `attention`.
        alibi_slopes: (H,) or (B, H).
        return_lse: also return the log-sum-exp of the scores.
        batch_invariant: computed by the kernel of `attention_varlen`, which never divides a sequence's keys: a result
            does not depend on the rest of the batch, on L or on the pages, and equals that of a packed batch in which
            the token is one of many, as in training. Slower where there are few sequences and many keys.

    Returns:
        (B, L, H, Ev) in the query's dtype, with return_lse followed by (B, H, L) in fp32 (fp64 for fp64).

    Raises:
        ValueError, TypeError: a shape, dtype, device or number does not fit; the message names the argument.
    """
    left, _ = window_bounds(window, is_causal=True)
    call = DecodeCall(
        query,
        key_cache,
        value_cache,
        cache_seqlens,
        block_table,
        alibi_slopes,
        sinks,
        default_scale(query, scale),
        left,
        softcap,
    )
    if checks_on_host(query):
        _check(*call)
        lengths = cache_seqlens.tolist()
        check_lengths("cache_seqlens", lengths, [call.capacity] * len(lengths))
        if block_table is not None:
            check_pages(block_table.tolist(), lengths, key_cache)
    out, lse = _as_packed(call) if batch_invariant else _attention_decode(*call)
    return (out, lse) if return_lse else out

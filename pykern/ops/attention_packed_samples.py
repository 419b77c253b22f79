"""Inputs for tests and benchmarks of packed and cached attention, in the ops' argument order and layout."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pykern.ops._spec import Sample
from pykern.ops.attention_samples import Bad, random_slopes


def _int32(make: Any, values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=make.device)


def _boundaries(make: Any, lengths: Sequence[int]) -> Tensor:
    return _int32(make, [sum(lengths[:i]) for i in range(len(lengths) + 1)])


def _varlen(
    make: Any, queries: Sequence[int], keys: Sequence[int], heads: Sequence[int], **given: Any
) -> tuple[Any, ...]:
    """Arguments for sequences of these lengths and (H, Hkv, E, Ev) heads; `padding` rows of NaN follow."""
    padding, block_size = given.pop("padding", 0), given.pop("block_size", 0)
    count, shared, size, value_size = heads

    def packed(total: int, *shape: int) -> Tensor:
        return torch.cat([make(total, *shape), make(padding, *shape) * math.nan]) if padding else make(total, *shape)

    table = None
    key, value = packed(sum(keys), shared, size), packed(sum(keys), shared, value_size)
    if block_size:
        pages = max(-(-length // block_size) for length in keys)
        table = _int32(make, [[(7 * i + 3 * p) % 11 for p in range(pages)] for i in range(len(keys))])
        key, value = make(11, block_size, shared, size), make(11, block_size, shared, value_size)
    args: dict[str, Any] = {"query": packed(sum(queries), count, size), "key": key, "value": value}
    args |= {"cu_seqlens_q": _boundaries(make, queries), "cu_seqlens_k": _boundaries(make, keys)}
    args |= {"max_seqlen_q": max(queries, default=0), "max_seqlen_k": max(keys, default=0)}
    args |= {
        "alibi_slopes": None,
        "sinks": None,
        "seqused_k": None,
        "block_table": table,
        "rng": None,
        "dropout_p": 0.0,
    }
    args |= {"scale": size**-0.5, "window_left": None, "window_right": None, "softcap": None}
    return tuple((args | given).values())


def varlen_samples(kind: str, make: Any) -> Iterator[Sample]:
    causal = {"window_right": 0}
    if kind == "bench":
        lengths = [64, 512, 128, 384, 256, 100, 300, 304]
        yield Sample("gpt2 8 sequences of 256 x12x64", _varlen(make, lengths, lengths, (12, 12, 64, 64), **causal))
        return
    ragged, heads = [3, 0, 5, 1], (4, 2, 8, 8)
    yield Sample("causal", _varlen(make, ragged, ragged, heads, **causal))
    yield Sample("full, padded with NaN", _varlen(make, [2, 4], [5, 3], heads, padding=3))
    yield Sample("window", _varlen(make, [7, 2], [9, 6], heads, window_left=2, window_right=1))
    yield Sample("softcap, sinks", _varlen(make, [4, 3], [6, 3], heads, softcap=2.0, sinks=make(4), **causal))
    yield Sample("alibi", _varlen(make, [4, 3], [6, 3], heads, alibi_slopes=random_slopes(make, 2, 4)))
    yield Sample("seqused_k", _varlen(make, [2, 3], [6, 5], heads, seqused_k=_int32(make, [4, 0]), **causal))
    yield Sample("pages", _varlen(make, [2, 3], [6, 9], heads, block_size=4, **causal))
    yield Sample("other keys", _varlen(make, ragged, [4, 2, 0, 6], (2, 2, 8, 5), **causal))
    yield Sample("no sequences", _varlen(make, [], [], heads))
    yield Sample("nothing but padding", _varlen(make, [0], [0], heads, padding=2, **causal))
    if kind == "full":
        many = [1, 97, 128, 33, 0, 200]
        yield Sample("many", _varlen(make, many, many, (4, 2, 64, 64), padding=5, **causal))


def varlen_bad(make: Any) -> Bad:
    names = ["query", "key", "value", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "alibi_slopes"]
    names += ["sinks", "seqused_k", "block_table"]

    def bad(**given: Any) -> tuple[Any, ...]:
        args = list(_varlen(make, [2, 3], [4, 3], (4, 2, 8, 8)))
        for name, value in given.items():
            args[names.index(name)] = value
        return tuple(args)

    yield (
        "query's rank",
        bad(query=make(1, 5, 4, 8)),
        ValueError,
        r"query: expected \(total, heads, size\), got \(1, 5, 4",
    )
    yield "key's rank", bad(key=make(4, 2, 2, 8)), ValueError, r"key: expected \(total, heads, size\)"
    yield (
        "value's length",
        bad(value=make(6, 2, 8)),
        ValueError,
        r"value: expected \(7,\) in .* as the key's, got \(6,\)",
    )
    yield "heads", bad(key=make(7, 3, 8), value=make(7, 3, 8)), ValueError, "key: .* divides the query's 4, got 3"
    yield "int64 lengths", bad(cu_seqlens_q=_int32(make, [0, 2, 5]).long()), TypeError, "cu_seqlens_q: expected dtype"
    yield (
        "sequences",
        bad(cu_seqlens_k=_int32(make, [0, 7])),
        ValueError,
        r"cu_seqlens_k: expected shape \(3,\), got \(2,\)",
    )
    yield "seqused_k", bad(seqused_k=_int32(make, [1])), ValueError, r"seqused_k: expected shape \(2,\), got \(1,\)"
    yield "max_seqlen_q", bad(max_seqlen_q=-1), ValueError, "max_seqlen_q: expected at least 0, got -1"
    table = _int32(make, [[0], [1]])
    yield "pages of rank 3", bad(block_table=table), ValueError, r"key: expected \(blocks, block_size, heads, size\)"
    yield (
        "slopes",
        bad(alibi_slopes=make(3, 4)),
        ValueError,
        r"alibi_slopes: expected shape \(4,\) or \(2, 4\), got \(3, 4\)",
    )


def _decode(
    make: Any, lengths: Sequence[int], tokens: int, capacity: int, heads: Sequence[int], **given: Any
) -> tuple[Any, ...]:
    """Arguments for sequences of these lengths and (H, Hkv, E, Ev) heads; with block_size in pages."""
    count, shared, size, value_size = heads
    batch, block_size = len(lengths), given.pop("block_size", 0)
    shape = (batch, capacity)
    args: dict[str, Any] = {"query": make(batch, tokens, count, size), "key_cache": None, "value_cache": None}
    args |= {"cache_seqlens": _int32(make, list(lengths)), "block_table": None}
    if block_size:
        pages = -(-capacity // block_size)
        shape = (batch * pages, block_size)
        args["block_table"] = _int32(make, [[p * batch + i for p in range(pages)] for i in range(batch)])
    args |= {"key_cache": make(*shape, shared, size), "value_cache": make(*shape, shared, value_size)}
    args |= {"alibi_slopes": None, "sinks": None, "scale": size**-0.5, "window_left": None, "softcap": None}
    return tuple((args | given).values())


def decode_samples(kind: str, make: Any) -> Iterator[Sample]:
    if kind == "bench":
        yield Sample("llama-8b 1x8192 32/8x128", _decode(make, [8192], 1, 8192, (32, 8, 128, 128)))
        yield Sample("gpt2 4 ragged x1024 12x64", _decode(make, [100, 900, 512, 300], 1, 1024, (12, 12, 64, 64)))
        return
    heads = (4, 2, 8, 8)
    yield Sample("one token", _decode(make, [5, 1, 6], 1, 6, (4, 2, 8, 4)))
    yield Sample("some tokens", _decode(make, [5, 8], 3, 8, heads))
    yield Sample("pages", _decode(make, [5, 11], 2, 12, heads, block_size=4))
    yield Sample("window", _decode(make, [5, 9], 2, 9, heads, window_left=2))
    yield Sample("softcap, sinks", _decode(make, [5, 6], 2, 6, heads, softcap=2.0, sinks=make(4)))
    yield Sample("alibi, value size", _decode(make, [5, 9], 2, 9, (4, 1, 8, 3), alibi_slopes=random_slopes(make, 4)))
    yield Sample("no sequences", _decode(make, [], 1, 4, heads))
    yield Sample("fewer keys than tokens", _decode(make, [2, 0], 4, 6, heads))
    yield Sample("no cache", _decode(make, [0, 0], 1, 0, heads))
    if kind == "full":
        yield Sample("long", _decode(make, [700, 1025], 16, 1025, (8, 2, 64, 64)))


def decode_bad(make: Any) -> Bad:
    def bad(position: int = 0, value: Any = None) -> tuple[Any, ...]:
        args = list(_decode(make, [5, 8], 3, 8, (4, 2, 8, 8)))
        args[position] = value
        return tuple(args)

    yield "query's rank", bad(0, make(2, 4, 8)), ValueError, r"query: expected \(B, L, heads, size\), got \(2, 4, 8\)"
    yield (
        "too many tokens",
        bad(0, make(2, 17, 4, 8)),
        ValueError,
        "query: expected at most 16 tokens a sequence, got 17",
    )
    yield "cache's batch", bad(1, make(3, 8, 2, 8)), ValueError, r"key_cache: expected .*got \(3, 8\)"
    yield "cache's size", bad(1, make(2, 8, 2, 6)), ValueError, "key_cache: expected heads of size 8 .* got 6"
    yield "value's heads", bad(2, make(2, 8, 4, 8)), ValueError, "value_cache: expected 2 heads as key_cache, got 4"
    yield "lengths", bad(3, _int32(make, [5])), ValueError, r"cache_seqlens: expected shape \(2,\), got \(1,\)"
    yield "float lengths", bad(3, make(2)), TypeError, "cache_seqlens: expected dtype torch.int32"
    yield "table", bad(4, _int32(make, [[0]])), ValueError, r"block_table: expected shape \(2, 'any'\), got \(1, 1\)"

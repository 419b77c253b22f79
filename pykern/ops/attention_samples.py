"""Inputs for tests and benchmarks of the three attention ops, and what a call costs at the least.

Everything is in the ops' argument order and layout: (…, length, heads, size).
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pykern.ops._spec import Sample
from pykern.ops.attention_core import DenseCall
from pykern.ops.attention_torch import key_lengths

Bad = Iterator[tuple[str, tuple[Any, ...], type[Exception], str]]


def _projected(make: Any, *shape: int) -> Tensor:
    """(…, length, heads, size) as a projection leaves it."""
    return make(*shape)


def _transposed(make: Any, *shape: int) -> Tensor:
    """The same, laid out (…, heads, length, size) in memory."""
    *lead, length, heads, size = shape
    return make(*lead, heads, length, size).transpose(-3, -2)


def _dense(make: Any, query: Sequence[int], key: Sequence[int], value_size: int = 0, **given: Any) -> tuple[Any, ...]:
    """Arguments for query (…, L, H, E) and key (S, Hkv); the rest plain unless given."""
    *lead, _length, heads, size = query
    build = given.pop("build", _projected)
    call = DenseCall(
        query=build(make, *query),
        key=build(make, *lead, *key, size),
        value=build(make, *lead, *key, value_size or size),
        attn_mask=None,
        alibi_slopes=None,
        sinks=None,
        rng=None,
        dropout_p=0.0,
        scale=size**-0.5 if size else 1.0,
        enable_gqa=key[1] != heads,
        window_left=None,
        window_right=None,
        softcap=None,
        align="top_left",
    )
    return tuple(call._replace(**given))


def _slopes(make: Any, *shape: int) -> Tensor:
    return make(*shape, dtype=torch.float32, grad=False).abs()


def _rng(make: Any) -> Tensor:
    return make(2, dtype=torch.int64, low=0, high=2**62)


def dense_samples(kind: str, make: Any) -> Iterator[Sample]:
    causal = {"window_right": 0}
    if kind == "bench":
        yield Sample("nanogpt-cpu 12x4x64x32", _dense(make, (12, 64, 4, 32), (64, 4), **causal))
        yield Sample("gpt2 4x12x1024x64", _dense(make, (4, 1024, 12, 64), (1024, 12), **causal))
        yield Sample("llama-8b 1x32/8x1024x128", _dense(make, (1, 1024, 32, 128), (1024, 8), **causal))
        window = {"window_left": 255, "window_right": 0}
        yield Sample("mistral window 256 1x8/2x2048x128", _dense(make, (1, 2048, 8, 128), (2048, 2), **window))
        yield Sample("gemma softcap 1x8/4x1024x128", _dense(make, (1, 1024, 8, 128), (1024, 4), softcap=50.0, **causal))
        return
    yield Sample("full", _dense(make, (2, 5, 3, 8), (7, 3)))
    yield Sample("causal", _dense(make, (2, 9, 2, 16), (9, 2), **causal))
    everything = {"softcap": 4.0, "sinks": make(4), "alibi_slopes": _slopes(make, 2, 4), "attn_mask": make(4, 1, 6)}
    everything |= {"window_left": 3, "window_right": 2, "align": "bottom_right"}
    yield Sample("everything", _dense(make, (2, 5, 4, 4), (6, 2), 3, **everything))
    yield Sample("causal, transposed", _dense(make, (2, 9, 2, 16), (9, 2), build=_transposed, **causal))
    yield Sample("causal, more queries", _dense(make, (1, 9, 2, 8), (4, 2), **causal))
    yield Sample("causal, bottom right", _dense(make, (1, 3, 2, 8), (7, 2), align="bottom_right", **causal))
    yield Sample("grouped heads", _dense(make, (2, 5, 6, 8), (7, 2), **causal))
    yield Sample("one key head", _dense(make, (1, 5, 4, 8), (6, 1)))
    yield Sample("window", _dense(make, (1, 11, 2, 8), (11, 2), window_left=3, window_right=1))
    yield Sample("window of one", _dense(make, (1, 6, 2, 8), (6, 2), window_left=0, window_right=0))
    yield Sample("softcap", _dense(make, (1, 7, 2, 8), (7, 2), softcap=1.5, **causal))
    yield Sample("alibi", _dense(make, (2, 7, 2, 8), (9, 2), alibi_slopes=_slopes(make, 2, 2), align="bottom_right"))
    yield Sample("sinks", _dense(make, (1, 7, 3, 8), (7, 3), sinks=make(3, dtype=torch.float32), **causal))
    yield Sample("bool mask", _dense(make, (2, 5, 2, 8), (6, 2), attn_mask=make(2, 1, 5, 6, grad=False) > -0.5))
    yield Sample("additive mask", _dense(make, (2, 5, 2, 8), (6, 2), attn_mask=make(2, 1, 6)))
    yield Sample("rows with nothing", _dense(make, (1, 6, 2, 8), (3, 2), align="bottom_right", **causal))
    hidden = make(5, 6, grad=False).masked_fill(make(5, 6, grad=False) > 0, -math.inf)
    yield Sample("frozen mask with -inf", _dense(make, (2, 5, 2, 8), (6, 2), attn_mask=hidden.detach(), **causal))
    yield Sample("dropout", _dense(make, (1, 6, 2, 8), (6, 2), rng=_rng(make), dropout_p=0.3))
    yield Sample("value size", _dense(make, (1, 5, 2, 8), (6, 2), 3, **causal))
    yield Sample("no batch", _dense(make, (5, 2, 8), (5, 2), **causal))
    yield Sample("two batches", _dense(make, (2, 3, 4, 2, 8), (5, 2)))
    yield Sample("one element", _dense(make, (1, 1, 1, 1), (1, 1)))
    yield Sample("no keys", _dense(make, (1, 3, 2, 8), (0, 2)))
    yield Sample("no queries", _dense(make, (1, 0, 2, 8), (3, 2)))
    yield Sample("no batch entries", _dense(make, (0, 3, 2, 8), (3, 2)))
    yield Sample("heads of nothing", _dense(make, (1, 3, 2, 0), (4, 2), 5))
    yield Sample("large scores", _dense(make, (1, 6, 2, 8), (6, 2), scale=3.0, **causal))
    if kind == "full":
        for size in (32, 40, 59, 64, 96, 111, 128, 192, 256):
            yield Sample(f"head size {size}", _dense(make, (1, 97, 2, size), (128, 1), **causal))
        for length in (1, 97, 128, 1025):
            yield Sample(f"length {length}", _dense(make, (1, length, 2, 64), (length, 2), **causal))
        everything |= {"softcap": 20.0, "attn_mask": make(4, 1, 70), "window_left": 40, "window_right": 9}
        yield Sample("everything, longer", _dense(make, (2, 65, 4, 32), (70, 2), 48, **everything))


def dense_bad(make: Any) -> Bad:
    def bad(**given: Any) -> tuple[Any, ...]:
        return tuple(DenseCall(*_dense(make, (2, 5, 4, 8), (7, 4)))._replace(**given))

    yield "integers", bad(query=make(2, 5, 4, 8).long()), TypeError, "query: expected a floating dtype, got torch.int64"
    yield "key's rank", bad(key=make(7, 4, 8)), ValueError, "key: expected at least 3 dimensions .* got 3"
    yield "key's batch", bad(key=make(3, 7, 4, 8)), ValueError, r"key: expected leading dimensions \(2,\) .*\(3,\)"
    yield "value's dtype", bad(value=make(2, 7, 4, 8, dtype=torch.float64)), TypeError, "value: expected dtype"
    yield "value's length", bad(value=make(2, 6, 4, 8)), ValueError, "value: expected length 7 .* got 6"
    yield "key's size", bad(key=make(2, 7, 4, 6)), ValueError, "key: expected heads of size 8 .* got 6"
    two_heads = {"key": make(2, 7, 2, 8), "value": make(2, 7, 2, 8)}
    yield "heads differ", bad(**two_heads), ValueError, "key: expected as many heads as the query's 4 .* got 2"
    three_heads = {"key": make(2, 7, 3, 8), "value": make(2, 7, 3, 8), "enable_gqa": True}
    yield "heads do not divide", bad(**three_heads), ValueError, "key: .* divides the query's 4, got 3"
    yield "value's heads", bad(value=make(2, 7, 2, 8)), ValueError, "value: expected 4 heads as key, got 2"
    yield (
        "mask's shape",
        bad(attn_mask=make(5, 6)),
        ValueError,
        r"attn_mask: .*broadcasts to \(2, 4, 5, 7\), got \(5, 6\)",
    )
    yield "mask's dtype", bad(attn_mask=make(5, 7).int()), TypeError, "attn_mask: expected dtype torch.bool or floating"
    yield (
        "slopes' shape",
        bad(alibi_slopes=make(3)),
        ValueError,
        r"alibi_slopes: expected shape \(4,\) or \(2, 4\), got",
    )
    yield "sinks' shape", bad(sinks=make(2, 4)), ValueError, r"sinks: expected shape \(4,\), got \(2, 4\)"
    yield "negative window", bad(window_left=-1), ValueError, "window: expected left .* got -1"
    yield "softcap", bad(softcap=0.0), ValueError, "softcap: expected None or a positive number, got 0.0"
    yield "dropout", bad(dropout_p=1.5), ValueError, "dropout_p: expected a probability, got 1.5"
    yield "dropout without rng", bad(dropout_p=0.5), ValueError, "rng: expected seed and offset"
    yield "alignment", bad(align="centre"), ValueError, "align: expected one of .*'centre'"


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
    yield Sample("alibi", _varlen(make, [4, 3], [6, 3], heads, alibi_slopes=_slopes(make, 2, 4)))
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
    yield Sample("alibi, value size", _decode(make, [5, 9], 2, 9, (4, 1, 8, 3), alibi_slopes=_slopes(make, 4)))
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


def allowed_pairs(length: int, keys: int, offset: int, left: int | None, right: int | None) -> int:
    """How many (query, key) pairs causality and window allow: what a kernel must compute at the least."""
    pairs = 0
    for position in range(offset, offset + length):
        first = 0 if left is None else max(0, position - left)
        end = keys if right is None else min(keys, position + right + 1)
        pairs += max(0, end - first)
    return pairs


def _bytes(*tensors: Tensor | None) -> int:
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)


def _output_bytes(query: Tensor, value_size: int) -> int:
    rows = math.prod(query.shape[:-1])
    return rows * (value_size * query.element_size() + 4)


def _dense_pairs(call: DenseCall) -> int:
    _, heads, length, keys = math.prod(call.lead), *call.scores_shape[-3:]
    pairs = allowed_pairs(length, keys, call.offset, call.window_left, call.window_right)
    return math.prod(call.lead) * heads * pairs


def dense_cost(*args: Any) -> tuple[float, float]:
    """Two products over the allowed pairs; every tensor moved once."""
    call = DenseCall(*args)
    size, value_size = call.query.shape[-1], call.value.shape[-1]
    moved = _bytes(call.query, call.key, call.value, call.attn_mask) + _output_bytes(call.query, value_size)
    return 2.0 * _dense_pairs(call) * (size + value_size), moved


def dense_backward_cost(dout: Tensor | None, dlse: Tensor | None, *args: Any) -> tuple[float, float]:
    """Scores and the weights' gradient recomputed, and a product for each gradient; every tensor moved once."""
    *forward, out, lse, output_mask = args
    call = DenseCall(*forward)
    size, value_size = call.query.shape[-1], call.value.shape[-1]
    products = size + value_size + size * (output_mask[0] + output_mask[1]) + value_size * output_mask[2]
    inputs = (call.query, call.key, call.value, call.attn_mask)
    gradients = [x for x, wanted in zip(inputs, output_mask, strict=False) if wanted]
    return 2.0 * _dense_pairs(call) * products, _bytes(dout, dlse, *inputs, out, lse, *gradients)


def varlen_cost(*args: Any) -> tuple[float, float]:
    query, key, value, bounds = args[0], args[1], args[2], args[3].tolist()
    pairs, keys = 0, key_lengths(args)
    for start, end, length in zip(bounds, bounds[1:], keys, strict=False):
        pairs += allowed_pairs(end - start, length, length - (end - start), args[14], args[15])
    size, value_size = query.shape[-1], value.shape[-1]
    moved = _bytes(query) + sum(keys) * key.shape[-2] * (size + value_size) * key.element_size()
    return 2.0 * pairs * query.shape[1] * (size + value_size), moved + _output_bytes(query, value_size)


def decode_cost(*args: Any) -> tuple[float, float]:
    query, key, value, lengths, left = args[0], args[1], args[2], args[3].tolist(), args[8]
    tokens, (size, value_size) = query.shape[1], (query.shape[-1], value.shape[-1])
    pairs = sum(allowed_pairs(tokens, n, n - tokens, left, 0) for n in lengths)
    live = sum(n if left is None else min(n, left + tokens) for n in lengths)
    moved = _bytes(query) + live * key.shape[-2] * (size + value_size) * key.element_size()
    return 2.0 * pairs * query.shape[2] * (size + value_size), moved + _output_bytes(query, value_size)

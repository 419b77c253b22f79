"""Inputs for tests and benchmarks of cached attention, in the op's argument order and layout."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

from pykern.ops._spec import Sample
from pykern.ops.attention_core import DecodeCall
from pykern.ops.attention_samples import Bad, random_slopes
from pykern.ops.attention_varlen_samples import int32, paged


def _cached(
    make: Any, lengths: Sequence[int], tokens: int, capacity: int, heads: Sequence[int], **given: Any
) -> tuple[Any, ...]:
    """Arguments for sequences of these lengths and (H, Hkv, E, Ev) heads, in pages where a block_size is given.

    Behind a length stands NaN, or what is given as `behind`.
    """
    count, shared, size, value_size = heads
    batch, block_size, table = len(lengths), given.pop("block_size", 0), None
    behind = given.pop("behind", math.nan)
    caches = []
    for width in (size, value_size):
        if block_size:
            table, cache = paged(make, make(sum(lengths), shared, width, grad=False), lengths, block_size)
        else:
            cache = make(batch, capacity, shared, width, grad=False)
            for i, length in enumerate(lengths):
                cache[i, length:] = behind
        caches.append(cache)
    call = DecodeCall(
        query=make(batch, tokens, count, size, grad=False),
        key_cache=caches[0],
        value_cache=caches[1],
        cache_seqlens=int32(make, list(lengths)),
        block_table=table,
        alibi_slopes=None,
        sinks=None,
        scale=size**-0.5,
        window_left=None,
        softcap=None,
    )
    return tuple(call._replace(**given))


def decode_samples(kind: str, make: Any) -> Iterator[Sample]:
    if kind == "bench":
        yield from _models(make)
    elif kind == "traffic":
        yield from _long(make)
    elif kind == "pairs":
        yield from _pairs(make)
    else:
        yield from decode_features(make)
        yield from _corners(make)
        if kind == "full":
            yield from _grid(make)


def _models(make: Any) -> Iterator[Sample]:
    yield Sample("llama-8b 1x8192, 32/8x128", _cached(make, [8192], 1, 8192, (32, 8, 128, 128)))
    yield Sample("gpt2 1x8192, 12x64", _cached(make, [8192], 1, 8192, (12, 12, 64, 64)))
    ragged = [2048 * (i + 1) // 16 for i in range(16)]
    yield Sample("llama-8b 16 of 128 to 2048, 32/8x128", _cached(make, ragged, 1, 2048, (32, 8, 128, 128), behind=0))
    pages = _cached(make, ragged, 1, 2048, (32, 8, 128, 128), block_size=16)
    yield Sample("the same in pages of 16", pages)
    short = [20 + 7 * i % 45 for i in range(64)]
    yield Sample("nanogpt-cpu 64 of 20 to 64, 4x32", _cached(make, short, 1, 64, (4, 4, 32, 32), behind=0))


def _long(make: Any) -> Iterator[Sample]:
    yield Sample("1x1024, 8/2x64", _cached(make, [1024], 1, 1024, (8, 2, 64, 64)))
    yield Sample("100 to 900, 8/2x64, pages of 16", _cached(make, [900, 100, 500], 1, 0, (8, 2, 64, 64), block_size=16))
    yield Sample("window 256 in 1024, 8/2x64", _cached(make, [1024], 1, 1024, (8, 2, 64, 64), window_left=255))


def decode_features(make: Any) -> Iterator[Sample]:
    """One feature each: the rows of the README's table."""
    heads = (8, 4, 8, 8)
    yield Sample("one token", _cached(make, [5, 1, 19], 1, 20, heads))
    yield Sample("some tokens", _cached(make, [5, 8], 3, 8, heads))
    yield Sample("no shared heads", _cached(make, [5, 19], 2, 20, (8, 8, 8, 8)))
    yield Sample("pages", _cached(make, [5, 11], 2, 0, heads, block_size=4))
    yield Sample("window", _cached(make, [5, 9], 2, 9, heads, window_left=2))
    yield Sample("softcap", _cached(make, [5, 6], 2, 6, heads, softcap=2.0))
    yield Sample("ALiBi", _cached(make, [5, 9], 2, 9, heads, alibi_slopes=random_slopes(make, 2, 8)))
    yield Sample("sinks", _cached(make, [5, 6], 2, 6, heads, sinks=make(8, grad=False)))
    yield Sample("value size", _cached(make, [5, 9], 2, 9, (8, 4, 8, 16)))
    yield Sample("odd head size", _cached(make, [5, 9], 2, 9, (8, 4, 7, 3)))
    yield Sample("head size above 256", _cached(make, [5, 9], 2, 9, (4, 2, 264, 264)))


def _corners(make: Any) -> Iterator[Sample]:
    heads = (4, 2, 16, 16)
    yield Sample("several blocks", _cached(make, [700, 3, 260], 1, 700, heads))
    everything = {"softcap": 4.0, "sinks": make(8, grad=False), "alibi_slopes": random_slopes(make, 8)}
    yield Sample(
        "everything", _cached(make, [300, 45], 4, 0, (8, 2, 8, 16), window_left=90, block_size=16, **everything)
    )
    yield Sample("pages of one", _cached(make, [35, 2], 1, 0, heads, block_size=1))
    yield Sample("sixteen tokens of eight heads", _cached(make, [40, 16], 16, 40, (8, 1, 16, 16)))
    yield Sample("no sequences", _cached(make, [], 1, 4, heads))
    yield Sample("no tokens", _cached(make, [3, 4], 0, 4, heads))
    yield Sample("fewer keys than tokens", _cached(make, [2, 0], 4, 6, heads))
    yield Sample("no cache", _cached(make, [0, 0], 1, 0, heads))
    args = DecodeCall(*_cached(make, [9, 12], 1, 0, heads, block_size=4))
    yield Sample("no pages", tuple(args._replace(key_cache=args.key_cache[:0], value_cache=args.value_cache[:0])))
    args = DecodeCall(*_cached(make, [9, 12], 1, 12, heads))
    # Trained through all the same: by the reference.
    wanted = {name: getattr(args, name).requires_grad_() for name in ("query", "key_cache", "value_cache")}
    yield Sample("differentiable", tuple(args._replace(**wanted, cache_seqlens=int32(make, [12, 9]))))


def _grid(make: Any) -> Iterator[Sample]:
    for size, tokens in itertools.product((32, 40, 59, 64, 96, 111, 128, 192, 256), (1, 4, 16)):
        for sharing, heads in (("MHA", (2, 2)), ("GQA", (8, 2)), ("MQA", (4, 1))):
            sample = _cached(make, [1025, 16, 97], tokens, 0, (*heads, size, size), block_size=32)
            yield Sample(f"head size {size}, {tokens} tokens, {sharing}", sample)


def _pairs(make: Any) -> Iterator[Sample]:
    found: dict[str, dict[str, Any]] = {
        "four tokens": {"tokens": 4},
        "grouped heads": {"key_heads": 4},
        "value size": {"value_size": 48},
        "window": {"window_left": 70},
        "softcap": {"softcap": 2.0},
        "ALiBi": {"alibi_slopes": random_slopes(make, 2, 8) * 0.1},
        "sinks": {"sinks": make(8, grad=False)},
        "pages": {"block_size": 16},
    }
    for one, other in itertools.combinations(found, 2):
        given = {**found[one], **found[other]}
        tokens, shape = given.pop("tokens", 1), (8, given.pop("key_heads", 8), 32, given.pop("value_size", 32))
        yield Sample(f"{one} and {other}", _cached(make, [150, 131], tokens, 160, shape, **given))


def decode_bad(make: Any) -> Bad:
    def bad(**given: Any) -> tuple[Any, ...]:
        return tuple(DecodeCall(*_cached(make, [5, 8], 3, 8, (4, 2, 8, 8)))._replace(**given))

    rank = r"query: expected \(B, L, heads, size\), got \(2, 4, 8\)"
    yield "query's rank", bad(query=make(2, 4, 8)), ValueError, rank
    tokens = "query: expected at most 16 tokens a sequence, got 17"
    yield "too many tokens", bad(query=make(2, 17, 4, 8)), ValueError, tokens
    yield "cache's batch", bad(key_cache=make(3, 8, 2, 8)), ValueError, r"key_cache: expected .*got \(3, 8\)"
    size = "key_cache: expected heads of size 8 .* got 6"
    yield "cache's size", bad(key_cache=make(2, 8, 2, 6)), ValueError, size
    heads = "value_cache: expected 2 heads as key_cache, got 4"
    yield "value's heads", bad(value_cache=make(2, 8, 4, 8)), ValueError, heads
    lengths = r"cache_seqlens: expected shape \(2,\), got \(1,\)"
    yield "lengths", bad(cache_seqlens=int32(make, [5])), ValueError, lengths
    yield "float lengths", bad(cache_seqlens=make(2)), TypeError, "cache_seqlens: expected dtype torch.int32"
    table = r"block_table: expected shape \(2, 'any'\), got \(1, 1\)"
    yield "table", bad(block_table=int32(make, [[0]])), ValueError, table

"""Inputs for tests and benchmarks of dense attention, in the op's order and layout: (…, length, heads, size)."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pykern.ops._spec import Sample
from pykern.ops.attention_core import DenseCall

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


def random_slopes(make: Any, *shape: int) -> Tensor:
    return make(*shape, dtype=torch.float32, grad=False).abs()


def _rng(make: Any) -> Tensor:
    return make(2, dtype=torch.int64, low=0, high=2**62)


_CAUSAL = {"window_right": 0}


def dense_samples(kind: str, make: Any) -> Iterator[Sample]:
    if kind == "bench":
        yield from _models(make)
    elif kind == "traffic":
        yield from _long(make)
    elif kind == "pairs":
        yield from _pairs(make)
    else:
        yield from dense_features(make)
        yield from _corners(make)
        if kind == "full":
            yield from _grid(make)


def _models(make: Any) -> Iterator[Sample]:
    yield Sample("nanogpt-cpu 12x4x64x32", _dense(make, (12, 64, 4, 32), (64, 4), **_CAUSAL))
    gpt2 = (4, 1024, 12, 64)
    yield Sample("gpt2 4x12x1024x64", _dense(make, gpt2, (1024, 12), **_CAUSAL))
    dropout = {"rng": _rng(make), "dropout_p": 0.1, **_CAUSAL}
    yield Sample("gpt2 dropout 1x12x1024x64", _dense(make, (1, 1024, 12, 64), (1024, 12), **dropout))
    yield Sample("t5 bias 1x8x512x64", _dense(make, (1, 512, 8, 64), (512, 8), attn_mask=make(1, 8, 512, 512)))
    yield Sample("llama-8b 1x32/8x1024x128", _dense(make, (1, 1024, 32, 128), (1024, 8), **_CAUSAL))
    yield Sample("gemma softcap 1x8/4x1024x128", _dense(make, (1, 1024, 8, 128), (1024, 4), softcap=50.0, **_CAUSAL))
    window = {"window_left": 255, **_CAUSAL}
    yield Sample("mistral window 256 1x2/1x8192x128", _dense(make, (1, 8192, 2, 128), (8192, 1), **window))


def _long(make: Any) -> Iterator[Sample]:
    yield Sample("full 1x2/1x512x64", _dense(make, (1, 512, 2, 64), (512, 1)))
    yield Sample("causal 1x2/1x512x64", _dense(make, (1, 512, 2, 64), (512, 1), **_CAUSAL))
    yield Sample("window 128 1x2/1x512x64", _dense(make, (1, 512, 2, 64), (512, 1), window_left=127, **_CAUSAL))


def dense_features(make: Any) -> Iterator[Sample]:
    """One feature each: the rows of the README's table.

    A gradient of a few numbers says little beside torch's error, which may happen to be small: hence many heads.
    """
    yield Sample("full", _dense(make, (2, 5, 3, 8), (7, 3)))
    yield Sample("causal", _dense(make, (2, 9, 2, 16), (9, 2), **_CAUSAL))
    yield Sample("causal, bottom right", _dense(make, (1, 3, 2, 8), (7, 2), align="bottom_right", **_CAUSAL))
    yield Sample("grouped heads", _dense(make, (2, 5, 6, 8), (7, 2), **_CAUSAL))
    yield Sample("window", _dense(make, (1, 11, 2, 8), (11, 2), window_left=3, window_right=1))
    yield Sample("softcap", _dense(make, (1, 7, 2, 8), (7, 2), softcap=1.5, **_CAUSAL))
    slopes = random_slopes(make, 2, 2)
    yield Sample("ALiBi", _dense(make, (2, 7, 2, 8), (9, 2), alibi_slopes=slopes, align="bottom_right"))
    learned, sinks = make(16, dtype=torch.float32), make(16, dtype=torch.float32)
    yield Sample("ALiBi, learned slopes", _dense(make, (2, 7, 16, 8), (7, 16), alibi_slopes=learned, **_CAUSAL))
    yield Sample("sinks", _dense(make, (2, 7, 16, 8), (7, 16), sinks=sinks, **_CAUSAL))
    yield Sample("bool mask", _dense(make, (2, 5, 2, 8), (6, 2), attn_mask=make(2, 1, 5, 6, grad=False) > -0.5))
    bias = make(2, 1, 5, 6, grad=False)
    yield Sample("additive mask", _dense(make, (2, 5, 2, 8), (6, 2), attn_mask=bias))
    yield Sample("learned additive mask", _dense(make, (2, 5, 2, 8), (6, 2), attn_mask=make(2, 1, 6)))
    yield Sample("dropout", _dense(make, (2, 17, 4, 8), (19, 4), rng=_rng(make), dropout_p=0.3))
    yield Sample("value size", _dense(make, (1, 5, 2, 8), (6, 2), 16, **_CAUSAL))
    yield Sample("odd head size", _dense(make, (2, 17, 4, 7), (19, 4), 3, **_CAUSAL))
    yield Sample("head size above 256", _dense(make, (4, 33, 2, 264), (33, 1), **_CAUSAL))


def _corners(make: Any) -> Iterator[Sample]:
    everything = {"softcap": 4.0, "sinks": make(4), "alibi_slopes": random_slopes(make, 2, 4)}
    everything |= {"attn_mask": make(4, 1, 11), "window_left": 5, "window_right": 3, "align": "bottom_right"}
    yield Sample("everything", _dense(make, (2, 9, 4, 6), (11, 2), 3, **everything))
    everything |= {"attn_mask": make(8, 1, 50), "window_left": 30, "window_right": 9, "sinks": make(8)}
    everything |= {"rng": _rng(make), "dropout_p": 0.2, "alibi_slopes": make(8, dtype=torch.float32, scale=0.1)}
    yield Sample("everything, several blocks", _dense(make, (1, 75, 8, 8), (50, 4), 16, **everything))
    yield Sample("causal, several blocks", _dense(make, (1, 150, 2, 16), (150, 1), **_CAUSAL))
    band = {"window_left": 70, "window_right": 10, "align": "bottom_right"}
    yield Sample("window, several blocks", _dense(make, (1, 190, 1, 16), (230, 1), softcap=5.0, **band))
    yield Sample("causal, transposed", _dense(make, (2, 9, 2, 16), (9, 2), build=_transposed, **_CAUSAL))
    yield Sample("causal, more queries", _dense(make, (1, 9, 2, 8), (4, 2), **_CAUSAL))
    yield Sample("one key head", _dense(make, (2, 17, 4, 8), (19, 1)))
    yield Sample("window of one", _dense(make, (2, 17, 4, 8), (17, 4), window_left=0, window_right=0))
    yield Sample("rows with nothing", _dense(make, (1, 6, 2, 8), (3, 2), align="bottom_right", **_CAUSAL))
    hidden = make(17, 19, grad=False).masked_fill(make(17, 19, grad=False) > 0, -math.inf)
    yield Sample("frozen mask with -inf", _dense(make, (2, 17, 4, 8), (19, 4), attn_mask=hidden, **_CAUSAL))
    yield Sample("no batch", _dense(make, (17, 4, 8), (17, 4), **_CAUSAL))
    yield Sample("two batches", _dense(make, (2, 3, 4, 2, 8), (5, 2)))
    yield Sample("one element", _dense(make, (1, 1, 1, 1), (1, 1)))
    yield Sample("no keys", _dense(make, (1, 3, 2, 8), (0, 2)))
    yield Sample("no queries", _dense(make, (1, 0, 2, 8), (3, 2)))
    yield Sample("no batch entries", _dense(make, (0, 3, 2, 8), (3, 2)))
    yield Sample("heads of nothing", _dense(make, (1, 3, 2, 0), (4, 2), 5))
    yield Sample("large scores", _dense(make, (2, 17, 4, 8), (17, 4), scale=3.0, **_CAUSAL))


def _grid(make: Any) -> Iterator[Sample]:
    """flash-attention's own grid: head sizes, also odd ones, times lengths, times ways to share key heads."""
    for size, length in itertools.product((32, 40, 59, 64, 96, 111, 128, 192, 256), (1, 97, 128, 1025)):
        for sharing, heads in (("MHA", 2), ("GQA", 2), ("MQA", 1)):
            queries = heads if sharing == "MHA" else 2 * heads
            batch = 128 // length or 1  # so many rows that the errors of one do not decide
            sample = _dense(make, (batch, length, queries, size), (length, heads), **_CAUSAL)
            yield Sample(f"head size {size}, length {length}, {sharing}", sample)


def _pairs(make: Any) -> Iterator[Sample]:
    """Every two features, over several blocks. Slopes and sinks have one number a head: many heads, all of weight."""
    length, keys, heads = 131, 150, 32
    found: dict[str, dict[str, Any]] = {
        "window": {"window_left": 70, "window_right": 9},
        "causal": _CAUSAL,  # behind the window, whose right side it narrows
        "bottom right": {"align": "bottom_right"},
        "grouped heads": {"key_heads": 8},
        "value size": {"value_size": 16},
        "softcap": {"softcap": 2.0},
        "ALiBi": {"alibi_slopes": make(heads, dtype=torch.float32, scale=0.02)},
        "sinks": {"sinks": make(heads, scale=0.3)},
        "bool mask": {"attn_mask": make(length, keys, grad=False) > -0.5},
        "additive mask": {"attn_mask": make(heads, 1, keys)},
        "dropout": {"rng": _rng(make), "dropout_p": 0.2},
    }
    for one, other in itertools.combinations(found, 2):
        if {one, other} != {"bool mask", "additive mask"}:
            given = {**found[one], **found[other]}
            shape = (keys, given.pop("key_heads", heads))
            value_size = given.pop("value_size", 0)
            yield Sample(f"{one} and {other}", _dense(make, (1, length, heads, 8), shape, value_size, **given))


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

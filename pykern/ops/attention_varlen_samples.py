"""Inputs for tests and benchmarks of packed attention, in the op's argument order and layout."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pykern.kernels.attention_calls import VarlenCall
from pykern.ops._spec import Sample
from pykern.ops.attention_samples import Bad, random_slopes

_CAUSAL = {"window_right": 0}


def int32(make: Any, values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=make.device)


def boundaries(make: Any, lengths: Sequence[int]) -> Tensor:
    return int32(make, [0, *itertools.accumulate(lengths)])


def _packed(
    make: Any, queries: Sequence[int], keys: Sequence[int], heads: Sequence[int], **given: Any
) -> tuple[Any, ...]:
    """Arguments for sequences of these lengths and (H, Hkv, E, Ev) heads.

    Of `given`, `padding` rows of NaN follow the last sequence, and a `block_size` puts the keys into pages of it, which
    lie scattered among others that are NaN, as is what a sequence leaves of its last one.
    """
    padding, block_size = given.pop("padding", 0), given.pop("block_size", 0)
    count, shared, size, value_size = heads

    def rows(total: int, *shape: int) -> Tensor:
        live = make(total, *shape)
        return torch.cat([live, live.new_full((padding, *shape), math.nan)]) if padding else live

    call = VarlenCall(
        query=rows(sum(queries), count, size),
        key=rows(sum(keys), shared, size),
        value=rows(sum(keys), shared, value_size),
        cu_seqlens_q=boundaries(make, queries),
        cu_seqlens_k=boundaries(make, keys),
        max_seqlen_q=max(queries, default=0),
        max_seqlen_k=max(keys, default=0),
        alibi_slopes=None,
        sinks=None,
        seqused_k=None,
        block_table=None,
        rng=None,
        dropout_p=0.0,
        scale=size**-0.5,
        window_left=None,
        window_right=None,
        softcap=None,
    )
    if block_size:
        table, key = paged(make, call.key, keys, block_size)
        call = call._replace(key=key, value=paged(make, call.value, keys, block_size)[1], block_table=table)
    return tuple(call._replace(**given))


def paged(make: Any, rows: Tensor, lengths: Sequence[int], block_size: int) -> tuple[Tensor, Tensor]:
    """A block table (B, pages), and packed rows (total, Hkv, E) in pages; every other page is of no sequence, and NaN.

    Pages are handed out from the last one on, and ids beyond a sequence's last page lead nowhere.
    """
    counts = [-(-n // block_size) for n in lengths]
    pages = iter(range(2 * sum(counts) - 1, 0, -2))
    table = [[next(pages) for _ in range(n)] + [2**30] * (max(counts) - n) for n in counts]
    cache = rows.new_full((2 * sum(counts) + 1, block_size, *rows.shape[1:]), math.nan)
    first = 0
    for own, length in zip(table, lengths, strict=True):
        for j, page in enumerate(own[: -(-length // block_size)]):
            piece = rows.detach()[first : first + length][j * block_size : (j + 1) * block_size]
            cache[page, : len(piece)] = piece
        first += length
    return int32(make, table).reshape(len(lengths), -1), cache.requires_grad_(rows.requires_grad)


def varlen_samples(kind: str, make: Any) -> Iterator[Sample]:
    if kind == "bench":
        yield from _models(make)
    elif kind == "traffic":
        yield from _long(make)
    elif kind == "pairs":
        yield from _pairs(make)
    else:
        yield from varlen_features(make)
        yield from _corners(make)
        if kind == "full":
            yield from _grid(make)


def _models(make: Any) -> Iterator[Sample]:
    equal, ragged = [256] * 8, [64, 512, 128, 384, 256, 100, 300, 304]
    yield Sample("gpt2 8x256 equal, 12x64", _packed(make, equal, equal, (12, 12, 64, 64), **_CAUSAL))
    yield Sample("gpt2 8 of 64 to 512, 12x64", _packed(make, ragged, ragged, (12, 12, 64, 64), **_CAUSAL))
    yield Sample("llama-8b 8 of 64 to 512, 32/8x128", _packed(make, ragged, ragged, (32, 8, 128, 128), **_CAUSAL))
    short = [20 + 7 * i % 45 for i in range(64)]
    yield Sample("nanogpt-cpu 64 of 20 to 64, 4x32", _packed(make, short, short, (4, 4, 32, 32), **_CAUSAL))


def _long(make: Any) -> Iterator[Sample]:
    yield Sample("causal 2x256, 2/1x64", _packed(make, [256, 256], [256, 256], (2, 1, 64, 64), **_CAUSAL))
    lengths = [32, 0, 320, 160]
    yield Sample("causal 32 to 320, 2/1x64", _packed(make, lengths, lengths, (2, 1, 64, 64), padding=300, **_CAUSAL))


def varlen_features(make: Any) -> Iterator[Sample]:
    """One feature each: the rows of the README's table. Many heads, so that no gradient has a few numbers only."""
    ragged, heads = [3, 0, 17, 1], (4, 2, 8, 8)
    yield Sample("full", _packed(make, ragged, [5, 7, 11, 0], (4, 4, 8, 8)))
    yield Sample("causal", _packed(make, ragged, ragged, (4, 4, 8, 8), **_CAUSAL))
    yield Sample("more keys than queries", _packed(make, ragged, [6, 2, 21, 9], (4, 4, 8, 8), **_CAUSAL))
    yield Sample("grouped heads", _packed(make, ragged, ragged, heads, **_CAUSAL))
    yield Sample("window", _packed(make, [7, 12], [9, 6], heads, window_left=2, window_right=1))
    yield Sample("softcap", _packed(make, [4, 13], [6, 13], heads, softcap=2.0, **_CAUSAL))
    yield Sample("ALiBi", _packed(make, [4, 13], [6, 13], heads, alibi_slopes=random_slopes(make, 2, 4)))
    many = (16, 8, 8, 8)
    learned, sinks = make(16, dtype=torch.float32), make(16, dtype=torch.float32)
    yield Sample("ALiBi, learned slopes", _packed(make, [4, 13], [6, 13], many, alibi_slopes=learned, **_CAUSAL))
    yield Sample("sinks", _packed(make, [4, 13], [6, 13], many, sinks=sinks, **_CAUSAL))
    dropout = {"rng": make(2, dtype=torch.int64, low=0, high=2**62), "dropout_p": 0.3}
    yield Sample("dropout", _packed(make, [9, 13], [11, 13], heads, **dropout))
    yield Sample("padding of NaN", _packed(make, [2, 9], [5, 9], heads, padding=3))
    yield Sample("seqused_k", _packed(make, [2, 13], [6, 15], heads, seqused_k=int32(make, [4, 14]), **_CAUSAL))
    yield Sample("pages", _packed(make, [2, 13, 0], [6, 19, 3], heads, block_size=4, **_CAUSAL))
    yield Sample("value size", _packed(make, [3, 13], [4, 13], (4, 2, 8, 16), **_CAUSAL))
    yield Sample("odd head size", _packed(make, [3, 13], [4, 13], (4, 2, 7, 3), **_CAUSAL))
    yield Sample("head size above 256", _packed(make, [5, 33], [5, 33], (4, 2, 264, 264), **_CAUSAL))


def _corners(make: Any) -> Iterator[Sample]:
    heads, few = (4, 2, 16, 16), (2, 1, 16, 16)
    yield Sample("several blocks", _packed(make, [1, 35, 0, 130], [1, 35, 0, 130], few, padding=5, **_CAUSAL))
    yield Sample("several blocks, other keys", _packed(make, [1, 35, 40, 9], [70, 80, 9, 4], few, **_CAUSAL))
    everything = {"softcap": 4.0, "sinks": make(8, grad=False), "alibi_slopes": random_slopes(make, 2, 8)}
    everything |= {"window_left": 20, "window_right": 9}
    everything |= {"rng": make(2, dtype=torch.int64, low=0, high=2**62), "dropout_p": 0.2}
    yield Sample("everything", _packed(make, [33, 9], [40, 14], (8, 4, 8, 16), padding=2, **everything))
    everything |= {"rng": None, "dropout_p": 0.0, "seqused_k": int32(make, [35, 14]), "block_size": 16}
    yield Sample("everything, pages", _packed(make, [33, 9], [40, 14], (8, 4, 8, 16), padding=2, **everything))
    yield Sample("pages of one", _packed(make, [17, 2], [35, 2], heads, block_size=1, **_CAUSAL))
    none = int32(make, [0, 0])
    yield Sample("no keys in use", _packed(make, [9, 3], [4, 3], heads, seqused_k=none, sinks=make(4, grad=False)))
    args = VarlenCall(*_packed(make, [40, 9], [40, 9], heads, **_CAUSAL))
    yield Sample("longer than said", tuple(args._replace(max_seqlen_q=33, max_seqlen_k=20)))
    args = VarlenCall(*_packed(make, [9, 3], [4, 3], heads, block_size=4))
    none = {name: getattr(args, name).detach()[:0].requires_grad_() for name in ("key", "value")}
    yield Sample("no pages", tuple(args._replace(**none)))
    yield Sample("no sequences", _packed(make, [], [], heads))
    yield Sample("nothing but padding", _packed(make, [0], [0], heads, padding=40, **_CAUSAL))


def _grid(make: Any) -> Iterator[Sample]:
    """Head sizes times ways to share key heads, over lengths that cross every kind of block boundary."""
    lengths = [1, 97, 128, 33, 0, 200, 64]
    for size in (32, 40, 59, 64, 96, 111, 128, 192, 256):
        for sharing, heads in (("MHA", (2, 2)), ("GQA", (4, 2)), ("MQA", (2, 1))):
            sample = _packed(make, lengths, lengths, (*heads, size, size), padding=5, **_CAUSAL)
            yield Sample(f"head size {size}, {sharing}", sample)
        cached = _packed(make, [1, 5, 97], [130, 5, 400], (4, 2, size, size), block_size=16, **_CAUSAL)
        yield Sample(f"head size {size}, pages", cached)


def _pairs(make: Any) -> Iterator[Sample]:
    """Every two features, over several blocks; many heads, all of weight, because sinks have one number a head."""
    heads = 32
    found: dict[str, dict[str, Any]] = {
        "window": {"window_left": 50, "window_right": 9},
        "causal": _CAUSAL,  # behind the window, whose right side it narrows
        "grouped heads": {"key_heads": 8},
        "value size": {"value_size": 16},
        "softcap": {"softcap": 2.0},
        "ALiBi": {"alibi_slopes": make(heads, dtype=torch.float32, scale=0.02)},
        "sinks": {"sinks": make(heads, scale=0.3)},
        "dropout": {"rng": make(2, dtype=torch.int64, low=0, high=2**62), "dropout_p": 0.2},
        "seqused_k": {"seqused_k": int32(make, [70, 40])},
        "pages": {"block_size": 16},
    }
    for one, other in itertools.combinations(found, 2):
        given = {**found[one], **found[other]}
        shape = (heads, given.pop("key_heads", heads), 8, given.pop("value_size", 8))
        yield Sample(f"{one} and {other}", _packed(make, [66, 41], [80, 41], shape, padding=3, **given))


def varlen_bad(make: Any) -> Bad:
    def bad(**given: Any) -> tuple[Any, ...]:
        return tuple(VarlenCall(*_packed(make, [2, 3], [4, 3], (4, 2, 8, 8)))._replace(**given))

    rank = r"query: expected \(total, heads, size\), got \(1, 5, 4"
    yield "query's rank", bad(query=make(1, 5, 4, 8)), ValueError, rank
    yield "key's rank", bad(key=make(4, 2, 2, 8)), ValueError, r"key: expected \(total, heads, size\)"
    length = r"value: expected \(7,\) in .* as the key's, got \(6,\)"
    yield "value's length", bad(value=make(6, 2, 8)), ValueError, length
    yield "heads", bad(key=make(7, 3, 8), value=make(7, 3, 8)), ValueError, "key: .* divides the query's 4, got 3"
    yield "int64 lengths", bad(cu_seqlens_q=int32(make, [0, 2, 5]).long()), TypeError, "cu_seqlens_q: expected dtype"
    sequences = r"cu_seqlens_k: expected shape \(3,\), got \(2,\)"
    yield "sequences", bad(cu_seqlens_k=int32(make, [0, 7])), ValueError, sequences
    yield "seqused_k", bad(seqused_k=int32(make, [1])), ValueError, r"seqused_k: expected shape \(2,\), got \(1,\)"
    yield "max_seqlen_q", bad(max_seqlen_q=-1), ValueError, "max_seqlen_q: expected at least 0, got -1"
    table = int32(make, [[0], [1]])
    yield "pages of rank 3", bad(block_table=table), ValueError, r"key: expected \(blocks, block_size, heads, size\)"
    slopes = r"alibi_slopes: expected shape \(4,\) or \(2, 4\), got \(3, 4\)"
    yield "slopes", bad(alibi_slopes=make(3, 4)), ValueError, slopes
    yield "dropout without rng", bad(dropout_p=0.5), ValueError, "rng: expected seed and offset"

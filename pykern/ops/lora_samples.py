"""Inputs on which the ops with low-rank adapters are tested and timed."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pykern.ops._spec import Sample
from pykern.ops.quantize_4bit import quantize_4bit
from pykern.ops.weight4bit_samples import bad_weights, format_weights


def _rng(make: Any) -> Tensor:
    return make(2, dtype=torch.int64, low=0, high=2**62)


def _rest(make: Any, n: int, out: int, rank: int) -> tuple[Any, ...]:
    """Adapter, bias and numbers of a plain sample."""
    return make(rank, n, scale=n**-0.5), make(out, rank, scale=rank**-0.5), make(out), None, 2.0, 0.0, None


# Width, rank and rows of the input: square layers, as query projections are.
_LARGE = {
    "bench": [(2048, 16, 16), (2048, 64, 512), (4096, 16, 16), (4096, 64, 16), (4096, 16, 512), (4096, 64, 2048)],
    "traffic": [(512, 16, 4)],
}


def _bare(make: Any, size: int, rank: int) -> tuple[Any, ...]:
    """An adapter without bias, dropout or DoRA."""
    return *_rest(make, size, size, rank)[:2], None, None, 2.0, 0.0, None


def _deep(make: Any) -> tuple[Any, ...]:
    """An fp32 adapter with DoRA for a layer (33, 1056), whose sums are long enough to be divided."""
    wide = make(20, 1056, dtype=torch.float32, scale=1056**-0.5), make(33, 20, dtype=torch.float32)
    return *wide, make(33), make(33, dtype=torch.float32, scale=0.1) + 1, 2.0, 0.0, None


def _variants(make: Any, n: int, out: int) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Every feature once, as the arguments behind the weight."""
    a, b, bias, *_ = _rest(make, n, out, 4)
    frozen = make(out, grad=False)
    yield "no bias", (a, b, None, None, 0.5, 0.0, None)
    yield "dropout", (a, b, bias, None, 2.0, 0.3, _rng(make))
    yield "all dropped", (a, b, bias, None, 2.0, 1.0, _rng(make))
    yield "dora", (a, b, bias, make(out, scale=0.1) + 1, 2.0, 0.0, None)
    yield "dora, dropout", (a, b, bias, make(out, scale=0.1) + 1, 2.0, 0.3, _rng(make))
    yield "rank 1, frozen bias", (make(1, n), make(out, 1), frozen, None, 1.0, 0.0, None)
    wide = make(4, n, dtype=torch.float32), make(out, 4, dtype=torch.float32)
    yield "fp32 adapter", (*wide, frozen, make(out, dtype=torch.float32, scale=0.1) + 1, 1.0, 0.0, None)


def lora_samples(kind: str, make: Any) -> Iterator[Sample]:
    if kind in _LARGE:
        for size, rank, rows in _LARGE[kind]:
            args = (make(rows, size), make(size, size, grad=False), *_bare(make, size, rank))
            yield Sample(f"{size}x{size}, r {rank}, {rows} rows", args)
        return
    yield Sample("trained weight", (make(5, 24), make(16, 24), *_rest(make, 24, 16, 4)))
    yield Sample("frozen weight", (make(2, 5, 33), make(17, 33, grad=False), *_rest(make, 33, 17, 3)))
    yield Sample("frozen input", (make(5, 24, grad=False), make(16, 24, grad=False), *_rest(make, 24, 16, 4)))
    yield Sample("one vector", (make(96), make(64, 96, grad=False), *_rest(make, 96, 64, 32)))
    yield Sample("no tokens", (make(0, 24), make(16, 24), *_rest(make, 24, 16, 4)))
    yield Sample("strided", (make(24, 6).t(), make(24, 16).t(), *_rest(make, 24, 16, 4)))
    yield Sample("rank above the sizes", (make(5, 8), make(9, 8, grad=False), *_rest(make, 8, 9, 32)))
    yield Sample("tiles", (make(70, 160), make(136, 160, grad=False), *_rest(make, 160, 136, 20)))
    a, b, bias, *_ = _rest(make, 104, 72, 24)
    yield Sample("many rows, dropout", (make(300, 104), make(72, 104), a, b, bias, None, 2.0, 0.1, _rng(make)))
    for name, rest in _variants(make, 24, 16):
        yield Sample(name, (make(40, 24), make(16, 24), *rest))
    yield Sample("few rows", (make(40, 104), make(136, 104, grad=False), *_rest(make, 104, 136, 64)))
    yield Sample("few rows, deep", (make(16, 1056), make(33, 1056, grad=False), *_deep(make)))
    if kind == "full":
        yield Sample("rank 512", (make(65, 640), make(768, 640), *_rest(make, 640, 768, 512)))


def lora_samples_4bit(kind: str, make: Any) -> Iterator[Sample]:
    if kind in _LARGE:
        for size, rank, rows in _LARGE[kind]:
            weight = quantize_4bit(make(size, size), double_quant=True)
            args = (make(rows, size), *weight.arguments, *_bare(make, size, rank))
            yield Sample(f"nf4 nested {size}x{size}, r {rank}, {rows} rows", args)
        return
    for name, weight in format_weights(make):
        yield Sample(name, (make(3, 24), *weight.arguments, *_rest(make, 24, 16, 4)))
    weight = quantize_4bit(make(16, 24), blocksize=32)
    for name, rest in _variants(make, 24, 16):
        yield Sample(name, (make(40, 24), *weight.arguments, *rest))
    deep = quantize_4bit(make(33, 1056))
    yield Sample("few rows, deep", (make(16, 1056), *deep.arguments, *_deep(make)))
    groups = quantize_4bit(make(130, 160), quant_type="int4", blocksize=96, symmetric=False)
    yield Sample("few rows, int4", (make(3, 160), *groups.arguments, *_rest(make, 160, 130, 8)))
    weight = quantize_4bit(make(136, 160), double_quant=True)
    yield Sample("few rows", (make(40, 160), *weight.arguments, *_rest(make, 160, 136, 64)))
    yield Sample("tiles", (make(70, 160), *weight.arguments, *_rest(make, 160, 136, 20)))
    a, b, bias, *_ = _rest(make, 160, 136, 24)
    yield Sample("many rows, dropout", (make(300, 160), *weight.arguments, a, b, bias, None, 2.0, 0.1, _rng(make)))


def lora_features(make: Any, out: int, n: int) -> Iterator[tuple[str, Tensor, tuple[Any, ...]]]:
    """Every feature, for the table of what serves it: the input, and the arguments behind the weight."""
    a, b, bias, *_ = _rest(make, n, out, 16)
    x, scale = make(4, n), make(out, scale=0.1) + 1
    yield "one adapter, 4 rows", x, (a, b, bias, None, 2.0, 0.0, None)
    yield "300 rows", make(300, n), (a, b, bias, None, 2.0, 0.0, None)
    yield "dropout", x, (a, b, bias, None, 2.0, 0.1, _rng(make))
    yield "DoRA", x, (a, b, bias, scale, 2.0, 0.0, None)
    yield "DoRA, dropout", x, (a, b, bias, scale, 2.0, 0.1, _rng(make))
    yield "fp32 adapter on 16 bits", x, (a.float(), b.float(), bias, None, 2.0, 0.0, None)


def multi_features(make: Any, out: int, n: int) -> Iterator[tuple[str, Tensor, tuple[Any, ...]]]:
    """As `lora_features`, for an adapter a token."""
    yield "an adapter a token, 4 tokens", make(4, n), _multi_rest(make, 4, n, out, 3, 16)
    yield "300 tokens", make(300, n), _multi_rest(make, 300, n, out, 3, 16)


def dora_norm_samples(kind: str, make: Any) -> Iterator[Sample]:
    if kind in ("bench", "traffic"):
        size = {"bench": 4096, "traffic": 512}[kind]
        yield Sample(f"{size}x{size}, r 16", (make(size, size), make(16, size), make(size, 16), 2.0))
        return
    yield Sample("16x24", (make(16, 24), make(4, 24), make(16, 4), 0.5))
    yield Sample("frozen weight", (make(7, 33, grad=False), make(1, 33), make(7, 1), 2.0))
    yield Sample("fp32 adapter", (make(7, 32), make(2, 32, dtype=torch.float32), make(7, 2, dtype=torch.float32), 2.0))
    yield Sample("no rows", (make(0, 24), make(4, 24), make(0, 4), 1.0))


def bad_lora(make: Any) -> Iterator[tuple[str, tuple[Any, ...], type[Exception], str]]:
    x, w, a, b = make(3, 8), make(6, 8), make(2, 8), make(6, 2)
    yield "input", (make(3, 9), w, a, b, None, None, 1.0, 0.0, None), ValueError, r"input: expected shape \(…, 8\)"
    yield "integers", (x.long(), w, a, b, None, None, 1.0, 0.0, None), TypeError, "input: expected a floating dtype"
    yield "weight", (x, w.double(), a, b, None, None, 1.0, 0.0, None), TypeError, "weight: expected dtype"
    yield "flat weight", (x, w[0], a, b, None, None, 1.0, 0.0, None), ValueError, r"weight: .*\(out, in\), got \(8,\)"
    for name, rest, error, pattern in _bad_adapters(make, x, a, b):
        yield name, (x, w, *rest), error, pattern


def _bad_adapters(make: Any, x: Tensor, a: Tensor, b: Tensor) -> Iterator[tuple[str, tuple[Any, ...], Any, str]]:
    rng = make.tensor([1, 2], dtype=torch.int64)
    yield (
        "lora_a",
        (a[:, :7], b, None, None, 1.0, 0.0, None),
        ValueError,
        r"lora_a: expected shape \(2, 8\), got \(2, 7\)",
    )
    yield (
        "rank 0",
        (a[:0], b[:, :0], None, None, 1.0, 0.0, None),
        ValueError,
        r"lora_a: expected shape \(r, 8\) with r > 0",
    )
    yield "lora_b", (a, b.t(), None, None, 1.0, 0.0, None), ValueError, r"lora_b: expected shape \(6, 2\), got \(2, 6\)"
    yield "dtypes", (a, b.double(), None, None, 1.0, 0.0, None), TypeError, "lora_b: expected dtype"
    yield "bias", (a, b, make(5), None, 1.0, 0.0, None), ValueError, r"bias: expected shape \(6,\), got \(5,\)"
    yield "magnitude", (a, b, None, make(6, 1), 1.0, 0.0, None), ValueError, r"dora_scale: expected shape \(6,\)"
    yield "dropout", (a, b, None, None, 1.0, 1.5, rng), ValueError, "dropout_p: expected a number from 0 to 1, got 1.5"
    yield "rng", (a, b, None, None, 1.0, 0.5, rng[:1]), ValueError, r"rng: expected shape \(2,\), got \(1,\)"


def bad_lora_4bit(make: Any) -> Iterator[tuple[str, tuple[Any, ...], type[Exception], str]]:
    x, a, b = make(3, 64), make(2, 64), make(4, 2)
    for name, weight, error, pattern in bad_weights(make):
        yield name, (x, *weight, a, b, None, None, 1.0, 0.0, None), error, pattern
    weight = quantize_4bit(make(6, 8)).arguments
    for name, rest, error, pattern in _bad_adapters(make, make(3, 8), make(2, 8), make(6, 2)):
        yield name, (make(3, 8), *weight, *rest), error, pattern


def bad_dora_norm(make: Any) -> Iterator[tuple[str, tuple[Any, ...], type[Exception], str]]:
    yield (
        "rank",
        (make(6, 8), make(2, 8), make(6, 3), 1.0),
        ValueError,
        r"lora_b: expected shape \(6, 2\), got \(6, 3\)",
    )


def _multi_rest(make: Any, tokens: int, n: int, out: int, count: int, rank: int) -> tuple[Any, ...]:
    """Adapters, ids from -1 on, bias and factors of a plain sample."""
    ids = make(tokens, dtype=torch.int64, low=-1, high=count)
    adapters = make(count, rank, n, scale=n**-0.5), make(count, out, rank, scale=rank**-0.5)
    return *adapters, ids, make(out), make(count, scale=0.1, grad=False) + 1


_LARGE_MULTI = {"bench": (4096, (16, 512)), "traffic": (512, (4,))}


def _frozen(args: tuple[Tensor, ...]) -> list[Tensor]:
    return [a.detach() for a in args]


def multi_samples(kind: str, make: Any) -> Iterator[Sample]:
    if kind in _LARGE_MULTI:
        size, lengths = _LARGE_MULTI[kind]
        for tokens in lengths:
            rest = _multi_rest(make, tokens, size, size, 8, 16)
            args = (make(tokens, size), make(size, size, grad=False), *rest)
            yield Sample(f"{size}x{size}, 8 adapters of rank 16, {tokens} tokens", args)
        return
    yield Sample("trained weight", (make(21, 24), make(16, 24), *_multi_rest(make, 21, 24, 16, 3, 4)))
    yield Sample("batch of sequences", (make(2, 5, 33), make(17, 33, grad=False), *_multi_rest(make, 10, 33, 17, 2, 3)))
    yield Sample("one token", (make(24), make(16, 24, grad=False), *_multi_rest(make, 1, 24, 16, 2, 4)))
    yield Sample("no tokens", (make(0, 24), make(16, 24), *_multi_rest(make, 0, 24, 16, 2, 4)))
    rest = _multi_rest(make, 64, 24, 16, 16, 4)
    yield Sample("trained scaling", (make(64, 24), make(16, 24), *rest[:-1], make(16)))
    yield Sample("no adapters", (make(3, 24), make(16, 24), *_frozen(_multi_rest(make, 3, 24, 16, 0, 4))))
    a, b, ids, bias, _ = _multi_rest(make, 12, 24, 16, 3, 4)
    outside = make.tensor([0, 7, -1, -9], dtype=torch.int64).repeat_interleave(3)
    yield Sample("ids out of range", (make(12, 24), make(16, 24), a, b, outside, None, make(3, grad=False)))
    wide = a.detach().float().requires_grad_(), b.detach().float().requires_grad_()
    rest = (*wide, ids.int(), bias, make(3, dtype=torch.float32, grad=False))
    yield Sample("fp32 adapters, int32 ids", (make(12, 24), make(16, 24), *rest))
    yield Sample("strided", (make(24, 30).t(), make(24, 16).t(), *_multi_rest(make, 30, 24, 16, 2, 4)))
    yield Sample("tiles", (make(150, 160), make(136, 160, grad=False), *_multi_rest(make, 150, 160, 136, 3, 20)))


def multi_samples_4bit(kind: str, make: Any) -> Iterator[Sample]:
    if kind in _LARGE_MULTI:
        size, lengths = _LARGE_MULTI[kind]
        weight = quantize_4bit(make(size, size), double_quant=True)
        for tokens in lengths:
            args = (make(tokens, size), *weight.arguments, *_multi_rest(make, tokens, size, size, 8, 16))
            yield Sample(f"nf4 nested {size}x{size}, 8 adapters of rank 16, {tokens} tokens", args)
        return
    for name, weight in format_weights(make):
        yield Sample(name, (make(7, 24), *weight.arguments, *_multi_rest(make, 7, 24, 16, 3, 4)))


def _bad_multi(make: Any) -> Iterator[tuple[str, tuple[Any, ...], type[Exception], str]]:
    """Faults in what comes behind a weight (16, 24), for five tokens."""
    a, b, ids, bias, scaling = _multi_rest(make, 5, 24, 16, 3, 4)
    yield (
        "one adapter",
        (a[0], b[0], ids, bias, scaling),
        ValueError,
        r"lora_a: expected shape \(n, r, 24\), got \(4, 24\)",
    )
    yield "rank 0", (a[:, :0], b[..., :0], ids, bias, scaling), ValueError, r"lora_a: .* with r > 0, got \(3, 0, 24\)"
    yield "counts", (a, b[:2], ids, bias, scaling), ValueError, r"lora_b: expected shape \(3, 16, 4\), got \(2, 16, 4\)"
    yield "ids", (a, b, ids[:4], bias, scaling), ValueError, r"adapter_ids: expected shape \(5,\), got \(4,\)"
    yield "float ids", (a, b, ids.float(), bias, scaling), TypeError, "adapter_ids: expected dtype torch.int64"
    yield "scaling", (a, b, ids, bias, scaling[:2]), ValueError, r"scaling: expected shape \(3,\), got \(2,\)"


def bad_multi(make: Any) -> Iterator[tuple[str, tuple[Any, ...], type[Exception], str]]:
    for name, rest, error, pattern in _bad_multi(make):
        yield name, (make(5, 24), make(16, 24), *rest), error, pattern


def bad_multi_4bit(make: Any) -> Iterator[tuple[str, tuple[Any, ...], type[Exception], str]]:
    weight = quantize_4bit(make(16, 24)).arguments
    for name, rest, error, pattern in _bad_multi(make):
        yield name, (make(5, 24), *weight, *rest), error, pattern

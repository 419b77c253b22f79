"""Samples of the ops that quantise to 4 bits, and calls that they must refuse."""

import math
from collections.abc import Iterator
from typing import Any

import torch

from pykern.ops._op import Sample
from pykern.ops._weight4bit import BLOCK_SIZES, TABLES

_NOT_FINITE = [math.nan, math.inf, -math.inf]


def quantize_4bit_samples(kind: str, make: Any) -> Iterator[Sample]:
    if kind == "bench":
        yield Sample("nf4 4096x14336", (make(4096, 14336, grad=False), "nf4", 64))
        return
    if kind == "traffic":
        yield Sample("nf4 256x512", (make(256, 512, grad=False), "nf4", 64))
        return
    for quant_type in TABLES:
        yield Sample(f"{quant_type} 8x128", (make(8, 128, grad=False), quant_type, 64))
        yield Sample(f"{quant_type} straddling", (make(7, 48, grad=False), quant_type, 32))
        yield Sample(f"{quant_type} short block, odd", (make(3, 5, 7, grad=False), quant_type, 64))
        yield Sample(f"{quant_type} empty", (make(0, 7, grad=False), quant_type, 64))
        yield Sample(f"{quant_type} strided", (make(64, 6, grad=False).t(), quant_type, 32))
        yield Sample(f"{quant_type} zeros", (make(2, 40, grad=False) * 0, quant_type, 64))
        table = make.tensor(sorted(TABLES[quant_type]))
        ties = torch.cat([(table[1:] + table[:-1]) / 2, make.tensor([1.0])])
        yield Sample(f"{quant_type} ties", (ties.repeat(4).unflatten(0, (2, -1)), quant_type, 32))
        odd = make(3, 33, grad=False).index_put((make.tensor([0.0, 1.0, 2.0]).long(),) * 2, make.tensor(_NOT_FINITE))
        yield Sample(f"{quant_type} not finite", (odd, quant_type, 32))
    if kind == "full":
        for blocksize in BLOCK_SIZES:
            yield Sample(f"nf4 block {blocksize}", (make(111, 173, grad=False), "nf4", blocksize))


def quantize_int4_samples(kind: str, make: Any) -> Iterator[Sample]:
    if kind == "bench":
        yield Sample("4096x14336 groups of 128", (make(4096, 14336, grad=False), 128, False, torch.bfloat16))
        return
    if kind == "traffic":
        yield Sample("256x512 groups of 128", (make(256, 512, grad=False), 128, False, torch.bfloat16))
        return
    for name, symmetric in (("symmetric", True), ("asymmetric", False)):
        yield Sample(f"{name} 8x128", (make(8, 128, grad=False), 64, symmetric, make.dtype))
        yield Sample(f"{name} short group", (make(5, 47, grad=False) + 1, 32, symmetric, torch.float32))
        yield Sample(f"{name} experts", (make(2, 3, 32, grad=False), 16, symmetric, torch.float16))
        yield Sample(f"{name} zeros", (make(2, 40, grad=False) * 0, 32, symmetric, torch.float32))
        yield Sample(f"{name} odd rows, groups of 7", (make(5, 47, grad=False), 7, symmetric, torch.bfloat16))
        yield Sample(f"{name} empty", (make(0, 32, grad=False), 32, symmetric, torch.float32))


def quantize_absmax_samples(kind: str, make: Any) -> Iterator[Sample]:
    sizes = (917504,) if kind == "bench" else (1, 256, 300, 0) if kind == "smoke" else (1, 256, 300, 0, 65537)
    for size in sizes:
        yield Sample(f"{size} blocks", (make(size, dtype=torch.float32, grad=False).abs(),))


def bad_quantize_4bit(make: Any) -> Iterator[tuple[str, tuple[Any, ...], type[Exception], str]]:
    weight = make(4, 64)
    yield "integers", (weight.long(), "nf4", 64), TypeError, "weight: expected a floating dtype, got torch.int64"
    yield "scalar", (make(), "nf4", 64), ValueError, "weight: expected at least one dimension"
    yield "type", (weight, "nf5", 64), ValueError, "quant_type: expected one of nf4, fp4, got 'nf5'"
    yield "block size", (weight, "nf4", 48), ValueError, "blocksize: expected one of 32, .*, got 48"


def bad_quantize_int4(make: Any) -> Iterator[tuple[str, tuple[Any, ...], type[Exception], str]]:
    yield (
        "block size",
        (make(4, 64), 0, True, torch.float32),
        ValueError,
        "blocksize: expected a positive number, got 0",
    )
    yield "scales", (make(4, 64), 32, True, torch.int8), ValueError, "scale_dtype: expected a floating dtype"


def bad_quantize_absmax(make: Any) -> Iterator[tuple[str, tuple[Any, ...], type[Exception], str]]:
    yield "rank", (make(4, 64, dtype=torch.float32),), ValueError, r"absmax: expected shape \(blocks,\), got \(4, 64\)"

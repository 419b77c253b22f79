"""Samples of the grouped matmul with 4-bit experts, and calls that it must refuse."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pykern.ops._op import Sample
from pykern.ops.quantize_4bit import quantize_4bit
from pykern.ops.weight4bit_samples import bad_weights


def grouped_4bit_samples(kind: str, make: Any) -> Iterator[Sample]:
    def ends(*values: int) -> Tensor:
        return make.tensor([float(v) for v in values]).to(torch.int32)

    none = (None, None, None, None)
    if kind == "bench":
        part = 1 if make.device.type == "cuda" else 8  # of the experts' width, to fit a CPU
        for name, experts, width, size in (("mixtral", 8, 28672, 4096), ("qwen3", 128, 1536, 2048)):
            weight = quantize_4bit(make(experts, width // part, size)).arguments
            for rows in (experts, 32 * experts):
                offs = (torch.arange(1, experts + 1, device=make.device) * (rows // experts)).int()
                yield Sample(f"nf4 {name}/{part} gate_up {rows} rows", (make(rows, size), *weight, offs, *none))
        return
    if kind == "traffic":
        weight = quantize_4bit(make(2, 256, 1024)).arguments
        yield Sample("nf4 experts", (make(4, 1024), *weight, ends(2, 4), *none))
        return
    for name, weight in (
        ("nf4", quantize_4bit(make(3, 16, 64))),
        ("nf4 straddling blocks, nested", quantize_4bit(make(3, 7, 48), blocksize=32, double_quant=True)),
        ("nf4 rows of odd length", quantize_4bit(make(3, 6, 17))),
        ("fp4 nested", quantize_4bit(make(3, 16, 96), quant_type="fp4", blocksize=32, double_quant=True)),
        ("int4", quantize_4bit(make(3, 20, 64), quant_type="int4", blocksize=32, symmetric=False)),
        ("int4 groups of 7", quantize_4bit(make(3, 5, 22), quant_type="int4", blocksize=7)),
    ):
        n = weight.shape[2]
        yield Sample(name, (make(11, n), *weight.arguments, ends(4, 9, 11), *none))
    weight = quantize_4bit(make(5, 33, 96), double_quant=True).arguments
    empty = ends(0, 4, 4, 7, 7)
    yield Sample("empty groups and rows behind", (make(10, 96), *weight, empty, *none))
    yield Sample("every group empty", (make(10, 96), *weight, ends(0, 0, 0, 0, 0), *none))
    yield Sample("one row", (make(1, 96), *weight, ends(0, 0, 0, 1, 1), *none))
    yield Sample("no rows", (make(0, 96), *weight, ends(0, 0, 0, 0, 0), *none))
    yield Sample("bias of each group", (make(10, 96), *weight, empty, make(5, 33), None, None, None))
    yield Sample("one bias", (make(10, 96), *weight, empty, make(33), None, None, None))
    gather = make(10, dtype=torch.int64, low=0, high=4)
    scatter = make(10, grad=False).argsort()
    yield Sample("gather", (make(4, 96), *weight, empty, None, None, gather, None))
    yield Sample("both and bias", (make(4, 96), *weight, empty, make(5, 33), None, gather, scatter))
    yield Sample("rows apart", (make(10, 100)[:, :96], *weight, empty, *none))
    yield Sample("frozen rows", (make(10, 96, grad=False), *weight, empty, make(33), None, None, None))
    if kind == "full":
        weight = quantize_4bit(make(7, 130, 160), double_quant=True).arguments
        offs = ends(0, 129, 130, 258, 500, 500, 517)
        yield Sample("many tiles", (make(517, 160), *weight, offs, *none))
        int4 = quantize_4bit(make(7, 130, 160), quant_type="int4", blocksize=96, symmetric=False).arguments
        yield Sample("many tiles, int4 short groups", (make(517, 160), *int4, offs, *none))


def bad_groups_4bit(make: Any) -> Iterator[tuple[str, tuple[Any, ...], type[Exception], str]]:
    offs, none = make.tensor([2.0, 6.0]).int(), (None, None, None, None)
    for name, weight, error, pattern in bad_weights(make):
        yield name, (make(6, 64), *weight, offs, *none), error, pattern
    matrix, weight = quantize_4bit(make(4, 64)).arguments, quantize_4bit(make(2, 4, 64)).arguments
    a = make(6, 64)
    yield "a matrix", (a, *matrix, offs, *none), ValueError, r"mat_b: expected 4-bit experts .* got \(4, 64\)"
    yield "rank", (a[0], *weight, offs, *none), ValueError, r"mat_a: expected shape \(rows, 64\) .* got \(64,\)"
    yield "inner size", (make(6, 63), *weight, offs, *none), ValueError, r"mat_a: expected shape \(rows, 64\)"
    yield "no offs", (a, *weight, None, *none), ValueError, "offs: expected where a matrix is 2-D, got None"
    yield "length of offs", (a, *weight, offs[:1], *none), ValueError, r"offs: expected shape \(2,\), got \(1,\)"
    yield "bias", (a, *weight, offs, make(2, 5), None, None, None), ValueError, r"bias: expected shape \(2, 4\)"
    yield "integers", (a.long(), *weight, offs, *none), TypeError, "mat_a: expected a floating dtype"

"""Samples of the grouped matmul, and calls that it must refuse."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pykern.ops._op import Sample


def grouped_samples(kind: str, make: Any) -> Iterator[Sample]:
    def ends(*values: int) -> Tensor:
        return make.tensor([float(v) for v in values]).to(torch.int32)

    def even(groups: int, rows: int) -> Tensor:
        return (torch.arange(1, groups + 1, device=make.device) * (rows // groups)).int()

    none = (None, None, None, None)
    if kind == "bench":
        # A CPU gets a part of the experts' width and of the rows.
        part, rows_part = (1, 1) if make.device.type == "cuda" else (16, 8)
        for name, experts, width, size, rows in (("mixtral", 8, 28672, 4096, 4096), ("qwen3", 128, 1536, 2048, 8192)):
            weight = make(experts, width // part, size, scale=0.02).mT
            rows //= rows_part
            yield Sample(f"{name}/{part} gate_up {rows} rows", (make(rows, size), weight, even(experts, rows), *none))
        return
    if kind == "traffic":
        yield Sample("rows", (make(64, 256), make(2, 256, 64), ends(32, 64), *none))
        return
    yield Sample("rows", (make(11, 8), make(3, 8, 16), ends(4, 9, 11), *none))
    yield Sample("rows, transposed weight", (make(11, 8), make(3, 16, 8).mT, ends(4, 9, 11), *none))
    yield Sample("odd sizes", (make(13, 7), make(3, 7, 5), ends(2, 3, 13), *none))
    yield Sample("empty groups and rows behind", (make(10, 6), make(5, 6, 3), ends(0, 4, 4, 7, 7), *none))
    yield Sample("every group empty", (make(4, 6), make(3, 6, 3), ends(0, 0, 0), *none))
    yield Sample("all to the last", (make(9, 6), make(4, 6, 3), ends(0, 0, 0, 9), *none))
    yield Sample("one row", (make(1, 5), make(2, 5, 4), ends(0, 1), *none))
    yield Sample("no rows", (make(0, 5), make(2, 5, 4), ends(0, 0), *none))
    yield Sample("empty sum", (make(3, 0), make(2, 0, 4), ends(1, 3), *none))
    yield Sample("rows apart", (make(10, 3, 8)[:, 1], make(2, 8, 4), ends(6, 10), *none))
    yield Sample("bias of each group", (make(9, 6), make(3, 6, 5), ends(4, 4, 8), make(3, 5), None, None, None))
    yield Sample("one bias", (make(9, 6), make(3, 6, 5), ends(4, 4, 9), make(5), None, None, None))
    gather = make(9, dtype=torch.int64, low=0, high=5)
    yield Sample("gather", (make(5, 6), make(3, 6, 4), ends(4, 4, 8), None, None, gather, None))
    scatter = make(9, grad=False).argsort()
    yield Sample("scatter", (make(9, 6), make(3, 6, 4), ends(4, 4, 8), None, None, None, scatter))
    yield Sample("both and bias", (make(5, 6), make(3, 6, 4), ends(4, 4, 9), make(3, 4), None, gather, scatter))
    yield Sample("summands", (make(6, 11), make(11, 5), ends(4, 4, 9), *none))
    yield Sample("summands, bias", (make(6, 11), make(11, 5), ends(4, 4, 9), make(3, 5), None, None, None))
    yield Sample("columns", (make(3, 6, 4), make(4, 11), ends(4, 4, 9), *none))
    yield Sample("batch", (make(3, 6, 4), make(3, 4, 5), None, *none))
    yield Sample("batch, bias", (make(3, 6, 4), make(3, 4, 5), None, make(3, 5), None, None, None))
    yield Sample("frozen weight", (make(11, 8), make(3, 8, 16, grad=False), ends(4, 9, 11), *none))
    yield Sample("frozen rows", (make(11, 8, grad=False), make(3, 8, 16), ends(4, 9, 11), *none))
    if kind == "full":
        yield Sample("many tiles", (make(517, 96), make(7, 96, 130), ends(0, 129, 130, 258, 500, 500, 517), *none))
        yield Sample("64 groups", (make(300, 40), make(64, 40, 24), even(64, 300), *none))


def bad_groups(make: Any) -> Iterator[tuple[str, tuple[Any, ...], type[Exception], str]]:
    a, b, offs = make(6, 8), make(2, 8, 4), make.tensor([2.0, 6.0]).int()
    none = (None, None, None, None)
    yield "rank", (a[0], b, offs, *none), ValueError, "mat_a: expected 2 or 3 dimensions, got 1"
    yield (
        "inner size",
        (a, make(2, 7, 4), offs, *none),
        ValueError,
        r"mat_b: expected shape \(2, 8, 4\), got \(2, 7, 4\)",
    )
    yield "batch", (make(3, 6, 8), b, None, *none), ValueError, r"mat_b: expected shape \(3, 8, 4\), got \(2, 8, 4\)"
    yield "integers", (a.long(), b, offs, *none), TypeError, "mat_a: expected a floating dtype"
    yield "two dtypes", (a, b.to(torch.float64), offs, *none), TypeError, "mat_b: expected dtype"
    yield "no offs", (a, b, None, *none), ValueError, "offs: expected where a matrix is 2-D, got None"
    yield "offs for a batch", (make(2, 6, 8), b, offs, *none), ValueError, "offs: expected None where both are 3-D"
    yield "scalar offs", (a, b[0], offs[0], *none), ValueError, "offs: expected 1 dimension, got 0"
    yield "length of offs", (a, b, offs[:1], *none), ValueError, r"offs: expected shape \(2,\), got \(1,\)"
    yield "dtype of offs", (a, b, offs.long(), *none), TypeError, "offs: expected dtype torch.int32, got torch.int64"
    yield "bias", (a, b, offs, make(3, 4), None, None, None), ValueError, r"bias: expected shape \(2, 4\)"
    yield "bias of columns", (b, make(4, 6), offs, make(2, 6), None, None, None), ValueError, "bias: expected None for"
    yield "out_dtype", (a, b, offs, None, torch.int32, None, None), TypeError, "out_dtype: expected a floating dtype"
    yield "gather", (a, b, offs, None, None, make(6), None), TypeError, "gather: expected dtype torch.int64"
    long = make(5, dtype=torch.int64, low=0, high=5)
    yield "scatter", (a, b, offs, None, None, None, long), ValueError, r"scatter: expected shape \(6,\), got \(5,\)"
    yield "gather a batch", (make(2, 6, 8), b, None, None, None, long, None), ValueError, "gather: expected None unless"

"""Samples and bad input of the norms, alone and with the residual added."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pykern.ops._spec import Sample


def _inputs(kind: str, make: Any) -> Iterator[tuple[str, Tensor]]:
    """Activations (…, N) for samples: what breaks kernels, and for benchmarks what models run."""
    if kind == "bench":
        yield "gpt2 8x1024x768", make(8, 1024, 768)
        yield "llama-8b 4096x4096", make(4096, 4096)
        yield "short rows 65536x128", make(65536, 128)
        return
    if kind == "traffic":  # rows enough for few processors, so that partial sums weigh what they do on a GPU
        yield "256x1024", make(256, 1024)
        yield "long rows 64x16384", make(64, 16384)
        yield "longer rows 48x40000", make(48, 40000)
        return
    yield "rows 3x17", make(3, 17)
    yield "one row", make(256)
    yield "one element", make(2, 1)
    yield "ragged 2x5x300", make(2, 5, 300)
    yield "no rows", make(0, 8)
    yield "row of nothing", make(4, 0)
    yield "rows apart", make(6, 2, 40)[:, 1]
    yield "elements apart", make(40, 6).t()
    yield "large mean", make(4, 65) + 100
    yield "large and tiny", make(4, 64) * make.tensor([1e4, 1.0, 1e-4, 0.0]).unsqueeze(-1)
    yield "NaN in a row", make(4, 6) + make.tensor([0.0, math.nan, 0.0, 0.0]).unsqueeze(-1)
    if kind == "full":
        yield "thousand rows", make(1023, 96)
        yield "long row", make(3, 70001)
        yield "longest row", make(1, 262144)


def layer_norm_samples(kind: str, make: Any) -> Iterator[Sample]:
    for name, x in _inputs(kind, make):
        n = x.shape[-1]
        yield Sample(name, (x, make(n), make(n), 1e-5))
    if kind in ("smoke", "full"):
        yield Sample("no parameters", (make(5, 33), None, None, 1e-5))
        yield Sample("no bias", (make(5, 33), make(33), None, 1e-3))
        yield Sample("no weight", (make(5, 33), None, make(33), 1e-5))
        yield Sample(
            "fp32 parameters", (make(5, 32), make(32, dtype=torch.float32), make(32, dtype=torch.float32), 1e-5)
        )
        yield Sample("frozen parameters", (make(5, 32), make(32, grad=False), make(32, grad=False), 1e-5))
        yield Sample("frozen input", (make(5, 32, grad=False), make(32), make(32), 1e-5))


def rms_norm_samples(kind: str, make: Any) -> Iterator[Sample]:
    for name, x in _inputs(kind, make):
        yield Sample(name, (x, make(x.shape[-1]), 1e-6, 0.0, False))
    if kind in ("smoke", "full"):
        yield Sample("no weight", (make(5, 33), None, 1e-5, 0.0, False))
        yield Sample("gemma", (make(5, 33), make(33), 1e-6, 1.0, False))
        yield Sample("llama", (make(5, 33), make(33), 1e-6, 0.0, True))
        yield Sample("fp32 weight", (make(5, 32), make(32, dtype=torch.float32), 1e-5, 0.0, False))
        yield Sample("frozen weight", (make(5, 32), make(32, grad=False), 1e-5, 0.0, False))
        yield Sample("frozen input", (make(5, 32, grad=False), make(32), 1e-5, 0.0, False))


def layer_norm_bad(make: Any) -> Iterator[tuple[str, tuple[Any, ...], type[Exception], str]]:
    x = make(4, 8)
    yield "integers", (x.long(), None, None, 1e-5), TypeError, "input: expected a floating dtype, got torch.int64"
    yield "scalar", (make(), None, None, 1e-5), ValueError, "input: expected at least one dimension"
    yield "weight's shape", (x, make(7), None, 1e-5), ValueError, r"weight: expected shape \(8,\), got \(7,\)"
    yield "bias's rank", (x, None, make(1, 8), 1e-5), ValueError, r"bias: expected shape \(8,\), got \(1, 8\)"
    yield "bias's dtype", (x, None, make(8).double(), 1e-5), TypeError, "bias: expected dtype .*got torch.float64"


def rms_norm_bad(make: Any) -> Iterator[tuple[str, tuple[Any, ...], type[Exception], str]]:
    x = make(4, 8)
    yield "integers", (x.long(), None, 1e-5, 0.0, False), TypeError, "input: expected a floating dtype, got torch.int64"
    yield "weight's shape", (x, make(7), 1e-5, 0.0, False), ValueError, r"weight: expected shape \(8,\), got \(7,\)"


def _pairs(kind: str, make: Any) -> Iterator[tuple[str, Tensor, Tensor]]:
    for name, x in _inputs(kind, make):
        yield name, x, make(*x.shape)
    if kind in ("smoke", "full"):
        yield "residual elements apart", make(6, 40), make(40, 6).t()
        yield "frozen residual", make(5, 32), make(5, 32, grad=False)


def add_layer_norm_samples(kind: str, make: Any) -> Iterator[Sample]:
    for name, x, residual in _pairs(kind, make):
        yield Sample(name, (x, residual, make(x.shape[-1]), make(x.shape[-1]), 1e-5))
    if kind in ("smoke", "full"):
        yield Sample("no parameters", (make(5, 33), make(5, 33), None, None, 1e-5))
        yield Sample("frozen parameters", (make(5, 32), make(5, 32), make(32, grad=False), make(32, grad=False), 1e-5))


def add_rms_norm_samples(kind: str, make: Any) -> Iterator[Sample]:
    for name, x, residual in _pairs(kind, make):
        yield Sample(name, (x, residual, make(x.shape[-1]), 1e-6, 0.0, False))
    if kind in ("smoke", "full"):
        yield Sample("no weight", (make(5, 33), make(5, 33), None, 1e-5, 0.0, False))
        yield Sample("gemma", (make(5, 33), make(5, 33), make(33), 1e-6, 1.0, False))
        yield Sample("llama", (make(5, 33), make(5, 33), make(33), 1e-6, 0.0, True))


def add_layer_norm_bad(make: Any) -> Iterator[tuple[str, tuple[Any, ...], type[Exception], str]]:
    x = make(4, 8)
    yield "shape", (x, make(3, 8), None, None, 1e-5), ValueError, r"residual: expected shape \(4, 8\), got \(3, 8\)"
    yield "dtype", (x, x.double(), None, None, 1e-5), TypeError, "residual: expected dtype .* got torch.float64"
    yield "weight", (x, x, make(9), None, 1e-5), ValueError, r"weight: expected shape \(8,\), got \(9,\)"


def add_rms_norm_bad(make: Any) -> Iterator[tuple[str, tuple[Any, ...], type[Exception], str]]:
    x = make(4, 8)
    yield (
        "shape",
        (x, make(3, 8), None, 1e-5, 0.0, False),
        ValueError,
        r"residual: expected shape \(4, 8\), got \(3, 8\)",
    )
    yield "weight", (x, x, make(9), 1e-5, 0.0, False), ValueError, r"weight: expected shape \(8,\), got \(9,\)"

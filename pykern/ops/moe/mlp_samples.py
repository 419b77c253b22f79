"""Inputs of `moe_mlp`: for tests, for benchmarks, and such as it must refuse."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pykern.ops._spec import Sample
from pykern.ops.moe.activations import ACTIVATIONS


def mlp_samples(kind: str, make: Any) -> Iterator[Sample]:
    def layer(tokens: int, top_k: int, experts: int, size: int, width: int, ids: Tensor | None = None) -> list[Any]:
        if ids is None:
            ids = make(tokens, experts, grad=False).argsort(-1)[:, :top_k].contiguous()
        weights = make(tokens, top_k)
        gate_up = make(experts, 2 * width, size, scale=size**-0.5)
        return [make(tokens, size), gate_up, make(experts, size, width, scale=width**-0.5), weights, ids, None, None]

    if kind == "bench":
        if make.device.type == "cuda":
            yield Sample("mixtral 4096 tokens 8x2", (*layer(4096, 2, 8, 4096, 14336), "silu"))
            yield Sample("qwen3 8192 tokens 128x8", (*layer(8192, 8, 128, 2048, 768), "silu"))
        else:
            yield Sample("mixtral/8 512 tokens 8x2", (*layer(512, 2, 8, 512, 1792), "silu"))
            yield Sample("qwen3/4 512 tokens 64x8", (*layer(512, 8, 64, 512, 192), "silu"))
        return
    if kind == "traffic":
        yield Sample("16 tokens 2x2, 128x128", (*layer(16, 2, 2, 128, 128), "silu"))
        return
    yield Sample("small", (*layer(10, 2, 3, 8, 6), "silu"))
    for activation in ACTIVATIONS:
        yield Sample(activation, (*layer(33, 2, 4, 32, 24), activation))
    yield Sample("prime sizes", (*layer(23, 3, 5, 31, 19), "silu"))
    yield Sample("one token", (*layer(1, 7, 11, 32, 24), "silu"))
    yield Sample("no tokens", (*layer(0, 2, 3, 8, 5), "silu"))
    yield Sample("one expert", (*layer(33, 1, 1, 32, 24), "silu"))
    yield Sample("every expert", (*layer(5, 4, 4, 32, 24), "silu"))
    yield Sample("all to one", (*layer(33, 1, 5, 32, 24, make(33, 1, dtype=torch.int64, low=3, high=4)), "silu"))
    yield Sample("dropped slots", (*layer(17, 2, 4, 32, 24, make(17, 2, dtype=torch.int64, low=-1, high=4)), "silu"))
    x, gate_up, down, weights, ids, _, _ = layer(17, 2, 4, 32, 24)
    yield Sample("biases", (x, gate_up, down, weights, ids, make(4, 48), make(4, 32), "gelu"))
    # Their gradient is in fp32 too, but no nearer than the pre-activation, which is kept in the input's dtype.
    single = make(17, 2, dtype=torch.float32, grad=make.dtype == torch.float32)
    yield Sample("fp32 weights", (x, gate_up, down, single, ids, None, None, "silu"))
    transposed = (make(4, 32, 48, scale=0.2).mT, make(4, 24, 32, scale=0.2).mT)
    yield Sample("transposed", (make(32, 17).t(), *transposed, weights, ids.int(), None, None, "silu"))
    frozen = (gate_up.detach(), down.detach())
    yield Sample("frozen experts", (x, *frozen, weights, ids, None, None, "silu"))
    if kind == "full":
        yield Sample("many tiles", (*layer(259, 4, 7, 72, 40), "silu"))
        yield Sample("64 experts", (*layer(130, 8, 61, 24, 16), "silu"))


def bad_mlps(make: Any) -> Iterator[tuple[str, tuple[Any, ...], type[Exception], str]]:
    x, w1, w2, w = make(6, 8), make(3, 10, 8), make(3, 8, 5), make(6, 2)
    ids = make(6, 2, dtype=torch.int64, low=0, high=3)
    none = (None, None, "silu")
    yield "rank", (x[0], w1, w2, w, ids, *none), ValueError, r"input: expected shape \(tokens, H\), got \(8,\)"
    yield "integers", (x.long(), w1, w2, w, ids, *none), TypeError, "input: expected a floating dtype"
    yield "odd gate_up", (x, make(3, 9, 8), w2, w, ids, *none), ValueError, r"gate_up: .* got \(3, 9, 8\)"
    yield "gate_up", (x, make(3, 10, 7), w2, w, ids, *none), ValueError, r"gate_up: expected shape \(3, 10, 8\)"
    yield (
        "down",
        (x, w1, make(3, 5, 8), w, ids, *none),
        ValueError,
        r"down: expected shape \(3, 8, 5\), got \(3, 5, 8\)",
    )
    yield "two dtypes", (x, w1, w2.to(torch.float64), w, ids, *none), TypeError, "down: expected dtype"
    yield "weights", (x, w1, w2, w[:, :1], ids, *none), ValueError, r"weights: expected shape \(6, 2\), got \(6, 1\)"
    yield "ids", (x, w1, w2, w, ids[:5], *none), ValueError, r"expert_ids: expected shape \(6, 2\), got \(5, 2\)"
    yield "float ids", (x, w1, w2, w, make(6, 2), *none), TypeError, "expert_ids: expected dtype int64 or int32"
    yield "bias", (x, w1, w2, w, ids, None, make(3, 5), "silu"), ValueError, r"down_bias: expected shape \(3, 8\)"
    yield "activation", (x, w1, w2, w, ids, None, None, "swish"), ValueError, "activation: .* got 'swish'"

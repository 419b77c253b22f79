"""Inputs of the losses of a router: for tests, for benchmarks, and such as they must refuse."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pykern.ops._spec import Sample


def balance_samples(kind: str, make: Any) -> Iterator[Sample]:
    def ids(tokens: int, top_k: int, experts: int, low: int = 0) -> Tensor:
        return make(tokens, top_k, dtype=torch.int64, low=low, high=experts)

    if kind == "bench":
        yield Sample("mixtral 8192x8 top 2", (make(8192, 8), ids(8192, 2, 8), None, 8, "softmax", 1))
        yield Sample("qwen3 8192x128 top 8", (make(8192, 128), ids(8192, 8, 128), None, 128, "softmax", 1))
        return
    mask = make(9, dtype=torch.int64, low=0, high=2).index_fill(0, torch.tensor([0], device=make.device), 1)
    padded = make(9, dtype=torch.int64, low=0, high=2).index_fill(0, torch.tensor([3, 4, 5], device=make.device), 0)
    padded[0] = 1
    yield Sample("softmax", (make(9, 8), ids(9, 2, 8), None, 8, "softmax", 1))
    yield Sample("sigmoid", (make(9, 8), ids(9, 2, 8), None, 8, "sigmoid", 1))
    yield Sample("masked", (make(9, 8), ids(9, 2, 8), mask, 8, "softmax", 1))
    yield Sample("bool mask, sigmoid", (make(9, 8), ids(9, 2, 8), mask.bool(), 8, "sigmoid", 1))
    yield Sample("three sequences", (make(9, 8), ids(9, 2, 8), None, 8, "softmax", 3))
    yield Sample("masked sequences", (make(9, 8), ids(9, 2, 8), padded, 8, "sigmoid", 3))
    yield Sample("dropped slots", (make(9, 5), ids(9, 3, 5, low=-1), None, 5, "softmax", 1))
    yield Sample("one token", (make(1, 5), ids(1, 2, 5), None, 5, "softmax", 1))
    yield Sample("one expert", (make(4, 1), ids(4, 1, 1), None, 1, "softmax", 1))
    yield Sample("elements apart", (make(8, 9).t(), ids(9, 2, 8).int(), None, 8, "softmax", 1))
    if kind == "full":
        yield Sample("prime", (make(1021, 61), ids(1021, 6, 61), None, 61, "softmax", 1))


def z_samples(kind: str, make: Any) -> Iterator[Sample]:
    if kind == "bench":
        yield Sample("mixtral 8192x8", (make(8192, 8), None))
        yield Sample("deepseek-v3 4096x256", (make(4096, 256), None))
        return
    mask = make(9, dtype=torch.int64, low=0, high=2).index_fill(0, torch.tensor([0], device=make.device), 1)
    yield Sample("plain", (make(9, 8), None))
    yield Sample("masked", (make(9, 8), mask))
    yield Sample("bool mask", (make(9, 8), mask.bool()))
    yield Sample("large", (make(9, 8) * 1e3, None))
    yield Sample("one token", (make(1, 5), None))
    yield Sample("one expert", (make(4, 1), None))
    yield Sample("elements apart", (make(8, 9).t(), None))
    if kind == "full":
        yield Sample("prime", (make(1021, 61), None))


def bad_balances(make: Any) -> Iterator[tuple[str, tuple[Any, ...], type[Exception], str]]:
    x, ids = make(6, 4), make(6, 2, dtype=torch.int64, low=0, high=4)
    yield "rank", (x[0], ids, None, 4, "softmax", 1), ValueError, r"logits: expected shape .* got \(4,\)"
    yield "experts", (x, ids, None, 5, "softmax", 1), ValueError, "num_experts: expected 4 .* got 5"
    yield "ids", (x, ids[:5], None, 4, "softmax", 1), ValueError, r"expert_ids: expected shape \(6, 2\), got \(5, 2\)"
    yield "scalar ids", (x, ids[0, 0], None, 4, "softmax", 1), ValueError, r"expert_ids: expected .* got \(\)"
    yield "score", (x, ids, None, 4, "tanh", 1), ValueError, "score: expected one of softmax, sigmoid, got 'tanh'"
    yield (
        "mask",
        (x, ids, ids[:5, 0], 4, "softmax", 1),
        ValueError,
        r"attention_mask: expected shape \(6,\), got \(5,\)",
    )
    yield "sequences", (x, ids, None, 4, "softmax", 4), ValueError, "num_sequences: expected a divisor of the 6 tokens"
    yield "no sequence", (x, ids, None, 4, "softmax", 0), ValueError, "num_sequences: expected a divisor .* got 0"
    yield "additive mask", (x, ids, x[:, 0], 4, "softmax", 1), TypeError, "attention_mask: expected dtype torch.bool"


def bad_zs(make: Any) -> Iterator[tuple[str, tuple[Any, ...], type[Exception], str]]:
    x = make(6, 4)
    yield "integers", (x.long(), None), TypeError, "logits: expected a floating dtype, got torch.int64"
    yield "no experts", (x[:, :0], None), ValueError, "logits: expected at least one expert"
    yield "additive mask", (x, x[:, 0]), TypeError, "attention_mask: expected dtype torch.bool"

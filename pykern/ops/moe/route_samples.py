"""Samples of the router, and calls that it must refuse."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pykern.ops._op import Sample


def route_samples(kind: str, make: Any) -> Iterator[Sample]:
    def softmax(logits: Tensor, top_k: int, renormalize: bool = True) -> tuple[Any, ...]:
        return logits, None, None, top_k, "softmax", renormalize, 1, 1, "top2", 1.0

    if kind == "bench":
        yield Sample("mixtral 8192x8 top 2", softmax(make(8192, 8), 2))
        yield Sample("qwen3 8192x128 top 8", softmax(make(8192, 128), 8))
        deepseek = (make(256, dtype=torch.float32, grad=False), None, 8, "sigmoid", True, 8, 4, "top2", 2.5)
        yield Sample("deepseek-v3 4096x256 top 8", (make(4096, 256), *deepseek))
        return
    yield Sample("mixtral", softmax(make(9, 8), 2))
    yield Sample("not renormalized", softmax(make(7, 5), 3, False))
    yield Sample("one expert", softmax(make(4, 1), 1))
    yield Sample("every expert", softmax(make(9, 7), 7))
    yield Sample("one token", softmax(make(1, 61), 8))
    yield Sample("no tokens", softmax(make(0, 8), 2))
    yield Sample("elements apart", softmax(make(8, 10).t(), 2))
    yield Sample("large and tiny", softmax(make(6, 8) * make.tensor([1e3, 1.0, 1e-3, 1.0, 30.0, 0.0]).unsqueeze(-1), 2))
    yield Sample("ties", softmax(make(5, 6) * make.tensor([0.0, 0.0, 1.0, 1.0, 0.0, 0.0]), 3, False))
    bias = make(16, dtype=torch.float32, grad=False)
    yield Sample("softmax with bias", (make(9, 16), bias, None, 4, "softmax", True, 1, 1, "top2", 1.0))
    yield Sample("sigmoid", (make(9, 8), None, None, 2, "sigmoid", False, 1, 1, "top2", 1.0))
    yield Sample("sigmoid far below", (make(9, 8) - 300, None, None, 2, "sigmoid", True, 1, 1, "top2", 1.0))
    yield Sample("deepseek-v3", (make(9, 16), bias, None, 4, "sigmoid", True, 4, 2, "top2", 2.5))
    yield Sample("deepseek-v2", (make(9, 16), None, None, 3, "softmax", False, 4, 3, "max", 16.0))
    yield Sample("groups of one", (make(9, 6), None, None, 2, "sigmoid", True, 6, 3, "top2", 1.0))
    replay = make(9, 3, dtype=torch.int64, low=0, high=16)
    yield Sample("replay", (make(9, 16), None, replay, 3, "softmax", True, 1, 1, "top2", 1.0))
    dropped = make(9, 4, dtype=torch.int64, low=-1, high=8)
    yield Sample("replay with dropped", (make(9, 8), None, dropped, 4, "sigmoid", True, 1, 1, "top2", 1.0))
    if kind == "full":
        yield Sample("32 of 1024", softmax(make(67, 1024), 32))
        yield Sample("prime", softmax(make(1021, 61), 6))


def bad_routes(make: Any) -> Iterator[tuple[str, tuple[Any, ...], type[Exception], str]]:
    x, rest = make(4, 8), (True, 1, 1, "top2", 1.0)
    yield "integers", (x.long(), None, None, 2, "softmax", *rest), TypeError, "logits: expected a floating dtype"
    yield "rank", (x[0], None, None, 2, "softmax", *rest), ValueError, r"logits: expected shape .* got \(8,\)"
    yield "top_k above", (x, None, None, 9, "softmax", *rest), ValueError, "top_k: expected 1 to 8 .* got 9"
    yield "top_k below", (x, None, None, 0, "softmax", *rest), ValueError, "top_k: expected 1 to 8 .* got 0"
    yield "score", (x, None, None, 2, "relu", *rest), ValueError, "score: expected one of softmax, sigmoid, got 'relu'"
    yield (
        "groups",
        (x, None, None, 2, "sigmoid", True, 3, 1, "top2", 1.0),
        ValueError,
        "num_groups: .* divisor .* got 3",
    )
    yield "top_groups", (x, None, None, 2, "sigmoid", True, 4, 5, "max", 1.0), ValueError, "top_groups: .* got 5"
    yield (
        "few groups",
        (x, None, None, 3, "sigmoid", True, 4, 1, "max", 1.0),
        ValueError,
        "top_k: .* 2 experts .* got 3",
    )
    yield "group_score", (x, None, None, 2, "sigmoid", True, 4, 2, "sum", 1.0), ValueError, "group_score: .* got 'sum'"
    yield "bias", (x, make(7), None, 2, "softmax", *rest), ValueError, r"selection_bias: expected shape \(8,\)"
    ids = make(4, 3, dtype=torch.int64, low=0, high=8)
    yield "replay's shape", (x, None, ids, 2, "softmax", *rest), ValueError, r"expert_ids: expected shape \(4, 2\)"
    yield "replay's dtype", (x, None, make(4, 2), 2, "softmax", *rest), TypeError, "expert_ids: expected dtype"


def route_features(make: Any) -> Iterator[Sample]:
    """One call of each kind of router, for the table of what serves it."""

    def route(
        top_k: int = 8, experts: int = 64, bias: bool = False, replay: bool = False, **changes: Any
    ) -> tuple[Any, ...]:
        options = {"score": "softmax", "renormalize": True, "groups": 1, "top": 1, "group_score": "top2", "scale": 1.0}
        added = make(experts, dtype=torch.float32, grad=False) if bias else None
        ids = make(5, top_k, dtype=torch.int64, low=-1, high=experts) if replay else None
        return make(5, experts), added, ids, top_k, *{**options, **changes}.values()

    yield Sample("softmax, then top-k, renormalised (Mixtral, Qwen3)", route())
    yield Sample("softmax, then top-k as it is (OLMoE)", route(renormalize=False))
    yield Sample("softmax and a selection bias", route(bias=True))
    yield Sample("sigmoid", route(score="sigmoid"))
    yield Sample("sigmoid and a selection bias", route(score="sigmoid", bias=True))
    yield Sample("groups by the two best (DeepSeek-V3)", route(score="sigmoid", bias=True, groups=8, top=4, scale=2.5))
    yield Sample("groups by the best (DeepSeek-V2)", route(renormalize=False, groups=8, top=3, group_score="max"))
    yield Sample("a recorded choice, dropped slots", route(replay=True))
    yield Sample("top 32 of 1024 experts", route(32, 1024))

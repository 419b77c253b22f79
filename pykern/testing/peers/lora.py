"""PEFT's layers, with the tensors that the op is called with in place of parameters of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from pykern.testing.peers.weight4bit import Prepared, bnb_layer, nothing


def linear(module: Any) -> Prepared:
    def prepare(input: Tensor, weight: Tensor, *rest: Any) -> Callable[..., Any]:
        bias = rest[2]
        base = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
        _put(base, "weight", weight)
        if bias is not None:
            _put(base, "bias", bias.to(weight.dtype))
        layer = _adapted(module, module.tuners.lora.Linear, base, *rest)
        if layer is None:
            return nothing

        def call(input: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, *_: Any) -> Tensor:
            _put(layer.lora_A["default"], "weight", lora_a)
            _put(layer.lora_B["default"], "weight", lora_b)
            return layer(input)

        return call

    return Prepared(prepare)


def linear_4bit(module: Any) -> Prepared:
    """On a layer of bitsandbytes, as it is in training."""

    def prepare(input: Tensor, *rest: Any) -> Callable[..., Any]:
        import bitsandbytes

        base = bnb_layer(bitsandbytes, rest[:9], rest[11], input.dtype)
        layer = None if base is None else _adapted(module, module.tuners.lora.Linear4bit, base, *rest[9:])
        if layer is None:
            return nothing

        def call(input: Tensor, *rest: Any) -> Tensor:
            _put(layer.lora_A["default"], "weight", rest[9])
            _put(layer.lora_B["default"], "weight", rest[10])
            return layer(input)

        return call

    return Prepared(prepare)


def _adapted(
    module: Any,
    kind: Any,
    base: nn.Module,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    dora_scale: Tensor | None,
    scaling: float,
    dropout_p: float,
    rng: Tensor | None,
) -> nn.Module | None:
    """PEFT's layer, or None for a call that it computes otherwise: DoRA's norm, another dropout mask."""
    if dora_scale is not None or rng is not None:
        return None
    rank = lora_a.shape[0]
    return kind(base, "default", config=module.LoraConfig(r=rank), r=rank, lora_alpha=scaling * rank)


def _put(layer: nn.Module, name: str, tensor: Tensor) -> None:
    """The tensor itself, so that gradients reach it; a parameter would be a leaf of its own."""
    layer._parameters.pop(name, None)
    object.__setattr__(layer, name, tensor)

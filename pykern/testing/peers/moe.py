"""The experts of transformers' Mixtral, with the tensors that `moe_mlp` is called with as their weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from pykern.testing.peers.weight4bit import Prepared, nothing

_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"}


def experts(implementation: str) -> Callable[[Any], Prepared]:
    """ "eager", the loop over experts, or "grouped_mm", on `F.grouped_mm`."""

    def make(module: Any) -> Prepared:
        def prepare(input: Tensor, gate_up: Tensor, down: Tensor, *rest: Any) -> Callable[..., Any]:
            *_, gate_up_bias, down_bias, activation = rest
            rows = [size * input.element_size() for size in (*gate_up.shape[1:], down.shape[2])]
            packed = all(size % 16 == 0 for size in rows)  # F.grouped_mm takes no others
            if gate_up_bias is not None or down_bias is not None or not (packed or implementation == "eager"):
                return nothing
            layer = _layer(module, len(gate_up), activation, implementation)

            def call(
                input: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, expert_ids: Tensor, *_: Any
            ) -> Tensor:
                layer.gate_up_proj, layer.down_proj = gate_up, down
                return layer(input, expert_ids, weights)

            return call

        return Prepared(prepare)

    return make


def _layer(module: Any, num_experts: int, activation: str, implementation: str) -> Any:
    """A layer of that many experts with no weights yet."""
    config = module.MixtralConfig(
        hidden_size=1, intermediate_size=1, num_local_experts=num_experts, hidden_act=_ACTIVATIONS[activation]
    )
    config._experts_implementation = implementation
    layer = module.MixtralExperts(config)
    del layer.gate_up_proj, layer.down_proj
    return layer

"""Experts that are quantised or have adapters: what their weights read as, without ever making it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import pykern
from pykern.nn.expert_mlp import expert_mlp
from pykern.nn.lora_model import adapter_parameters, adapters
from pykern.nn.moe import Experts
from pykern.ops import moe_mlp

TOKENS, TOP_K, SIZE, WIDTH, EXPERTS = 19, 2, 32, 24, 5
NAMES = ["gate_up_proj", "down_proj"]


def adapted(layer: torch.nn.Module) -> torch.nn.Module:
    pykern.add_lora(layer, [], target_parameters=NAMES, r=3, alpha=5)
    for _, adapter in adapters(layer):
        torch.nn.init.normal_(adapter.lora_B.weight, std=0.3)
    return layer


def quantised(layer: torch.nn.Module) -> torch.nn.Module:
    return pykern.quantize_model(layer, blocksize=32)


CHANGES: dict[str, Callable[[torch.nn.Module], torch.nn.Module]] = {
    "quantised": quantised,
    "adapted": adapted,
    "both": lambda layer: adapted(quantised(layer)),
}


def layer(change: str, dtype: torch.dtype = torch.float32) -> Experts:
    torch.manual_seed(0)
    return CHANGES[change](torch.nn.Sequential(Experts(SIZE, WIDTH, EXPERTS, dtype=dtype)))[0]


def call(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Input, weights and ids; two slots are dropped, with weights that nobody may look at."""
    weights, ids = torch.rand(TOKENS, TOP_K), torch.randint(EXPERTS, (TOKENS, TOP_K))
    ids[3, 1], ids[7, 0] = -1, EXPERTS
    weights[3, 1] = weights[7, 0] = float("nan")
    return torch.randn(TOKENS, SIZE, dtype=dtype).requires_grad_(), weights.to(dtype).requires_grad_(), ids


@pytest.mark.parametrize("change", CHANGES)
def test_the_same_as_with_what_the_weights_read_as(change: str) -> None:
    one = layer(change)
    x, weights, ids = call()
    leaves = [x, weights, *(p for _, adapter in adapters(one) for p in adapter_parameters(adapter).values())]
    assert len(leaves) == (2 if change == "quantised" else 6)
    y = one(x, ids, weights)
    expected = moe_mlp(x, one.gate_up_proj, one.down_proj, weights, ids)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    grad = torch.randn_like(y)
    found = torch.autograd.grad(y, leaves, grad)
    assert all(gradient.any() for gradient in found)
    torch.testing.assert_close(found, torch.autograd.grad(expected, leaves, grad), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_as_large_as_the_experts_is_kept(change: str) -> None:
    one = layer(change)
    known = {t.untyped_storage().data_ptr() for t in (*one.parameters(), *one.buffers())}
    kept: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            kept.append(tensor.numel())
        return tensor

    x, weights, ids = call()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        one(x, ids, weights)
    assert kept and max(kept) < EXPERTS * SIZE * WIDTH


def test_bf16_under_autocast() -> None:
    one = layer("adapted")
    x, weights, ids = call()
    with torch.autocast("cpu", torch.bfloat16):
        y = one(x, ids, weights)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), one(x, ids, weights), rtol=0.05, atol=0.05)


def test_parametrizations_of_others_are_read() -> None:
    one = layer("adapted")

    class Twice(torch.nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    torch.nn.utils.parametrize.register_parametrization(one, "down_proj", Twice())
    x, weights, ids = call()
    y = expert_mlp(one, *NAMES, x, weights, ids)
    torch.testing.assert_close(y, moe_mlp(x, one.gate_up_proj, one.down_proj, weights, ids), rtol=1e-4, atol=1e-5)

"""Small models of every kind, for the tests of the transformer and of generation."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pykern.model import Transformer, TransformerConfig

TINY = TransformerConfig(vocab_size=17, context_length=24, num_layers=2, num_heads=4, width=32)
LLAMA = replace(TINY, positions="rotary", norm="rmsnorm", mlp="swiglu", bias=False, tie_embeddings=False)
FLAVOURS = {
    "gpt2": TINY,
    "nanogpt": replace(TINY, bias=False),
    "sinusoidal": replace(TINY, positions="sinusoidal"),
    "llama": LLAMA,
    "mistral": replace(LLAMA, num_kv_heads=2, sliding_window=5),
    "multi-query": replace(LLAMA, num_kv_heads=1),
    "mixtral": replace(LLAMA, num_kv_heads=2, mlp="moe", num_experts=4, experts_per_token=2),
}
flavours = pytest.mark.parametrize("config", FLAVOURS.values(), ids=FLAVOURS)


def build(config: TransformerConfig, seed: int = 0) -> Transformer:
    """A model whose every parameter matters: nanoGPT's initialisation leaves biases and norms trivial."""
    torch.manual_seed(seed)
    model = Transformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def tokens_for(config: TransformerConfig, *shape: int, seed: int = 1) -> Tensor:
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()

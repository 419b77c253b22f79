"""Named configurations."""

from collections.abc import Callable
from functools import partial

from pykern.model.config import TransformerConfig

_MISTRAL = {"positions": "rotary", "norm": "rmsnorm", "bias": False, "tie_embeddings": False}

# Each is a factory: PRESETS["nanogpt-cpu"](vocab_size=65, context_length=128). The first three are nanoGPT's settings;
# the last two keep the architecture of Mistral 7B and Mixtral 8x7B at a size that a laptop trains.
PRESETS: dict[str, Callable[..., TransformerConfig]] = {
    "nanogpt-cpu": partial(
        TransformerConfig, num_layers=4, num_heads=4, width=128, context_length=64, vocab_size=65, bias=False
    ),
    "nanogpt": partial(
        TransformerConfig, num_layers=12, num_heads=12, width=768, context_length=1024, vocab_size=50304, bias=False
    ),
    "nanogpt-char": partial(
        TransformerConfig,
        num_layers=6,
        num_heads=6,
        width=384,
        context_length=256,
        vocab_size=65,
        bias=False,
        dropout=0.2,
    ),
    "mistral-tiny": partial(
        TransformerConfig,
        num_layers=6,
        num_heads=8,
        num_kv_heads=2,
        width=256,
        context_length=256,
        vocab_size=4096,
        mlp="swiglu",
        sliding_window=128,
        **_MISTRAL,
    ),
    "mixtral-tiny": partial(
        TransformerConfig,
        num_layers=4,
        num_heads=8,
        num_kv_heads=2,
        width=256,
        ffn_width=384,
        context_length=256,
        vocab_size=4096,
        mlp="moe",
        num_experts=8,
        experts_per_token=2,
        balance_coefficient=0.2,  # on batches of hundreds of tokens; a fifth of it leaves experts idle after warm-up
        **_MISTRAL,
    ),
}

"""The two halves of a block: self-attention, and the three kinds of feed-forward layer."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pykern.ops as ops
from pykern.model.config import TransformerConfig
from pykern.model.positions import rotate
from pykern.model.sequences import Sequences
from pykern.nn.expert_mlp import expert_mlp


class SelfAttention(nn.Module):
    """Causal multi-head attention, with fewer key and value heads and a sliding window where the config says so."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads = [config.num_heads, config.kv_heads, config.kv_heads]
        self.head_width = config.head_width
        self.dropout = config.dropout
        self.window = None if config.sliding_window is None else (config.sliding_window - 1, 0)
        self.qkv = nn.Linear(config.width, sum(self.heads) * config.head_width, bias=config.bias)
        self.output = nn.Linear(config.width, config.width, bias=config.bias)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None, sequences: Sequences) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_width))  # (…, H + 2 Hkv, E)
        query, key, value = qkv.split(self.heads, dim=-2)
        if rotation is not None:
            query, key = rotate(query, *rotation), rotate(key, *rotation)
        dropout_p = self.dropout if self.training else 0.0
        out = sequences.attend(query, key, value, layer=self.layer, window=self.window, dropout_p=dropout_p)
        return self.output(out.flatten(-2))


class GeluMlp(nn.Module):
    """down(gelu(up(x)))"""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.width, config.hidden_width, bias=config.bias)
        self.down = nn.Linear(config.hidden_width, config.width, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class SwigluMlp(nn.Module):
    """down(silu(gate(x)) * up(x)) (arXiv 2002.05202), gate and up in one matrix"""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.width, 2 * config.hidden_width, bias=config.bias)
        self.down = nn.Linear(config.hidden_width, config.width, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class MoeMlp(nn.Module):
    """Every token through the `experts_per_token` SwiGLU experts that its router scores highest, as in Mixtral."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.router = nn.Linear(config.width, config.num_experts, bias=False)
        self.gate_up = nn.Parameter(torch.empty(config.num_experts, 2 * config.hidden_width, config.width))
        self.down = nn.Parameter(torch.empty(config.num_experts, config.width, config.hidden_width))
        self.routing: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)  # (tokens, width)
        logits = self.router(tokens)
        weights, expert_ids = ops.moe_route(logits, self.config.experts_per_token)
        self.routing = logits, expert_ids
        return expert_mlp(self, "gate_up", "down", tokens, weights, expert_ids).view_as(x)

    def auxiliary_loss(self) -> Tensor:
        """Load-balancing and z-loss of the last forward pass, weighted as the config says."""
        if self.routing is None:
            raise RuntimeError("auxiliary_loss() was called before a forward pass")
        logits, expert_ids = self.routing
        balance = ops.moe_load_balancing_loss(logits, expert_ids, self.config.num_experts)
        return self.config.balance_coefficient * balance + self.config.router_z_coefficient * ops.moe_z_loss(logits)

    @torch.no_grad()
    def load(self) -> Tensor:
        """(num_experts,) fp32: the slots of each expert over the mean, in the last forward pass."""
        if self.routing is None:
            raise RuntimeError("load() was called before a forward pass")
        return ops.moe_load(self.routing[1], self.config.num_experts).fractions * self.config.num_experts

    def __getstate__(self) -> dict[str, Any]:
        # The routing hangs on the autograd graph, which copy.deepcopy refuses.
        return {**self.__dict__, "routing": None}


MLPS: dict[str, type[nn.Module]] = {"gelu": GeluMlp, "swiglu": SwigluMlp, "moe": MoeMlp}

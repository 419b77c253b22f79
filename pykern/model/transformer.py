"""A decoder-only transformer on pykern's ops: pre-norm blocks around one residual stream."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pykern.model.cache import KVCache
from pykern.model.config import TransformerConfig
from pykern.model.layers import MLPS, MoeMlp, SelfAttention
from pykern.model.positions import rotation, sinusoidal
from pykern.model.sequences import Packed, Rectangle, Sequences
from pykern.nn import LayerNorm, RMSNorm


def _make_norm(config: TransformerConfig) -> LayerNorm | RMSNorm:
    if config.norm == "rmsnorm":
        return RMSNorm(config.width, eps=config.norm_eps)
    return LayerNorm(config.width, eps=config.norm_eps, bias=config.bias)


def _add_and_norm(stream: Tensor, update: Tensor | None, norm: LayerNorm | RMSNorm) -> tuple[Tensor, Tensor]:
    """The norm of `stream + update`, and that sum, in one pass over memory; the sum keeps the stream's dtype."""
    # Under autocast the stream is fp32 and updates are not: adding up in 16 bits would lose what small ones add.
    return (norm(stream), stream) if update is None else norm.add(update.to(stream.dtype), stream)


class Block(nn.Module):
    """Attention and MLP, each behind a norm and added to the residual stream.

    Takes and returns (stream, update): the MLP's output is not added here but by the norm that follows, which reads
    the sum anyway.
    """

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = _make_norm(config)
        self.attention = SelfAttention(config, layer)
        self.mlp_norm = _make_norm(config)
        self.mlp = MLPS[config.mlp](config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        stream: Tensor,
        update: Tensor | None,
        angles: tuple[Tensor, Tensor] | None,
        sequences: Sequences,
    ) -> tuple[Tensor, Tensor]:
        normed, stream = _add_and_norm(stream, update, self.attention_norm)
        update = self.dropout(self.attention(normed, angles, sequences))
        normed, stream = _add_and_norm(stream, update, self.mlp_norm)
        return stream, self.dropout(self.mlp(normed))


class Transformer(nn.Module):
    """The model that a `TransformerConfig` describes, initialised as GPT-2 was, from torch's global generator.

    Weights of any floating dtype, with or without autocast; traces under `torch.compile(fullgraph=True)`.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        learned = config.positions == "learned"
        self.position_embedding = nn.Embedding(config.context_length, config.width) if learned else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = _make_norm(config)
        # No module shares the embedding's weight: a state dict then holds each tensor once.
        self.head = None if config.tie_embeddings else nn.Linear(config.width, config.vocab_size, bias=False)
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        # As in GPT-2, what each block adds to the residual stream is scaled down, so that the variance of the stream
        # does not grow with depth.
        std = self.config.init_std
        residual = std / math.sqrt(2 * self.config.num_layers)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif "norm" not in name:
                adds_to_stream = any(part in name for part in ("attention.output", "mlp.down"))
                parameter.normal_(std=residual if adds_to_stream else std)

    def forward(
        self,
        tokens: Tensor,
        *,
        packed: Packed | None = None,
        cache: KVCache | None = None,
        targets: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, T, vocab_size) of the token after each of `tokens`, int64 (B, T); (total, vocab_size) of packed.

        Args:
            tokens: ids below vocab_size.
            packed: `tokens` is (total,): these sequences end to end, none of which sees another.
            cache: holds what came before `tokens` in each sequence, and is extended by them.
            targets: int64 in the shape of `tokens`, -1 where nothing is to be predicted. The mean cross-entropy in
                fp32, a scalar, is returned instead of the logits.

        Raises:
            ValueError: a sequence, with what the cache has of it, does not fit into the context.
        """
        hidden = self.hidden(tokens, packed=packed, cache=cache)
        if targets is None:
            return self.logits(hidden)
        return F.cross_entropy(self.logits(hidden).flatten(0, -2).float(), targets.flatten(), ignore_index=-1)

    def hidden(self, tokens: Tensor, *, packed: Packed | None = None, cache: KVCache | None = None) -> Tensor:
        """The normed residual stream (…, width) that `logits` projects; arguments as for `forward`."""
        sequences = self._sequences(tokens, packed, cache)
        positions = sequences.positions
        stream = self.embedding(tokens)  # (…, width)
        angles = None
        if self.position_embedding is not None:
            stream = stream + self.position_embedding(positions)
        elif self.config.positions == "sinusoidal":
            # Scaled as in Attention Is All You Need, section 3.4: the sinusoids would drown embeddings of std 0.02.
            stream = stream * math.sqrt(self.config.width)
            stream = stream + sinusoidal(positions, self.config.width).to(stream.dtype)
        else:
            angles = rotation(positions, self.config.head_width, self.config.rope_base)
        stream, update = self.dropout(stream), None
        for block in self.blocks:
            stream, update = block(stream, update, angles, sequences)
        return _add_and_norm(stream, update, self.norm)[0]

    def logits(self, hidden: Tensor, *, fp32: bool = False) -> Tensor:
        """(…, width) -> (…, vocab_size). With fp32, also under autocast: 16-bit logits are off by tenths of a nat."""
        if self.head is not None and type(self.head) is not nn.Linear:  # with an adapter: its weight is not all of it
            with torch.autocast(hidden.device.type, enabled=not fp32 and torch.is_autocast_enabled(hidden.device.type)):
                return self.head(hidden.float() if fp32 else hidden)
        weight = self.embedding.weight if self.head is None else self.head.weight
        if not fp32:
            return F.linear(hidden, weight)
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.float(), weight.float())

    def get_output_embeddings(self) -> nn.Module | None:
        """The output layer, by the name that transformers' models have for it; adapters leave it alone."""
        return self.head

    def _sequences(self, tokens: Tensor, packed: Packed | None, cache: KVCache | None) -> Sequences:
        shape = tuple(tokens.shape)
        if packed is None and len(shape) != 2:
            raise ValueError(f"tokens has shape {shape}, expected (batch, length)")
        if packed is not None and shape != tuple(packed.positions.shape):
            raise ValueError(f"tokens has shape {shape}, expected {tuple(packed.positions.shape)} of what is packed")
        if cache is not None:
            return cache.append(tokens, packed)
        end = shape[1] if packed is None else packed.max_seqlen
        if end > self.config.context_length:
            raise ValueError(
                f"tokens reach position {end}, beyond the model's context_length {self.config.context_length}"
            )
        return Rectangle(torch.arange(shape[1], device=tokens.device)) if packed is None else packed

    def auxiliary_loss(self) -> Tensor:
        """What the experts add to the loss, of the last forward pass: a scalar, 0 without experts."""
        losses = [block.mlp.auxiliary_loss() for block in self.blocks if isinstance(block.mlp, MoeMlp)]
        return torch.stack(losses).mean() if losses else self.embedding.weight.new_zeros(())

    def expert_load(self) -> Tensor | None:
        """(layers, num_experts) fp32: slots of each expert over its layer's mean, of the last forward pass, if any."""
        loads = [block.mlp.load() for block in self.blocks if isinstance(block.mlp, MoeMlp)]
        return torch.stack(loads) if loads else None

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self) -> float:
        """Floating-point operations a token, forward and backward, as PaLM counts them (arXiv 2204.02311, appendix B).

        Six a weight that multiplies the token, and 12 a layer, position in sight and feature for the two products of
        attention. A causal mask is not deducted, so that figures compare with those of others; weights of experts that
        the token does not visit are.
        """
        config = self.config
        weights = sum(p.numel() for name, p in self.named_parameters() if "embedding" not in name)
        if self.head is None:
            weights += self.embedding.weight.numel()
        if config.mlp == "moe":
            idle = 1 - config.experts_per_token / config.num_experts
            weights -= idle * sum(b.mlp.gate_up.numel() + b.mlp.down.numel() for b in self.blocks)
        seen = min(config.context_length, config.sliding_window or config.context_length)
        return 6.0 * weights + 12.0 * config.num_layers * config.width * seen

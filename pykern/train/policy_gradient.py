"""The gradient of one GRPO step, added up over micro-batches: the model meets the pure functions of `grpo_loss`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pykern.model import Transformer
from pykern.train.grpo_config import GRPOConfig
from pykern.train.grpo_loss import (
    clipped_objective,
    kl_to_reference,
    loss_denominator,
    reduce_loss,
    token_entropy,
    token_log_probs,
)
from pykern.train.rollout import Rollout, completion_logits


def autocast(model: Transformer, precision: str) -> torch.autocast:
    """The autocast context of `precision`, float32 or bfloat16, on the model's device."""
    return torch.autocast(model.embedding.weight.device.type, torch.bfloat16, enabled=precision == "bfloat16")


@torch.no_grad()
def frozen_log_probs(model: Transformer, rollout: Rollout, config: GRPOConfig) -> Tensor:
    """(M,) fp32 log-probabilities of the completions' tokens, without a gradient."""
    with autocast(model, config.precision):
        logits = completion_logits(model, rollout)
    return token_log_probs(logits, rollout.completions, config.temperature)


def accumulate_gradient(
    model: Transformer,
    pieces: Sequence[Rollout],
    advantages: Tensor,
    config: GRPOConfig,
    *,
    old: Sequence[Tensor] | None = None,
    reference: Sequence[Tensor] | None = None,
) -> dict[str, float | None]:
    """Adds the gradient of the loss over all `pieces` to the parameters' `.grad`, one piece in memory at a time.

    Args:
        pieces: micro-batches; how the completions are spread over them does not change the gradient.
        advantages: (completions,) fp32 on the CPU, in the order of the pieces.
        old: log-probabilities of the policy that sampled, (M,) a piece. None: those of `model` itself.
        reference: those of the reference policy, for the KL term.

    Returns:
        loss, entropy and KL a token, and the share of tokens whose ratio is outside the clip.
    """
    lengths = torch.cat([piece.lengths for piece in pieces])
    denominator = loss_denominator(config.reduction, lengths, config.max_completion_length)
    total = sum(len(piece.tokens) for piece in pieces)
    sums = torch.zeros(4, dtype=torch.float64, device=pieces[0].tokens.device)
    for i, piece in enumerate(pieces):
        with autocast(model, config.precision):
            logits = completion_logits(model, piece)
        log_probs = token_log_probs(logits, piece.completions, config.temperature)
        before = log_probs.detach() if old is None else old[i]
        own, advantages = advantages[: len(piece.lengths)], advantages[len(piece.lengths) :]
        losses = clipped_objective(
            log_probs,
            before,
            own.repeat_interleave(piece.lengths).to(log_probs.device),
            eps_low=config.eps_low,
            eps_high=config.eps_high,
            delta=config.delta,
        )
        kl = torch.zeros_like(losses) if reference is None else kl_to_reference(log_probs, reference[i])
        loss = reduce_loss(losses + config.kl_coefficient * kl, piece.lengths, config.reduction, denominator)
        (loss + len(piece.tokens) / total * model.auxiliary_loss()).backward()
        with torch.no_grad():
            ratio = (log_probs - before).exp()
            clipped = (ratio < 1 - config.eps_low) | (ratio > 1 + config.eps_high)
            sums[0] += loss
            sums[1:] += torch.stack([token_entropy(logits, config.temperature), kl, clipped.float()]).sum(dim=1)
    loss, entropy, kl, clipped = (sums / sums.new_tensor([1.0] + 3 * [lengths.sum()])).tolist()
    return {"loss": loss, "entropy": entropy, "kl": None if reference is None else kl, "clip_fraction": clipped}

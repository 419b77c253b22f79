"""The mathematics of GRPO: pure functions of tensors, none of which knows a model or a batch.

GRPO is from DeepSeekMath (arXiv 2402.03300), `dr_grpo` from Dr. GRPO (arXiv 2503.20783), `dapo` and the two clipping
bounds from DAPO (arXiv 2503.14476), `delta` from INTELLECT-2 (arXiv 2505.07291), and the k3 estimator of the
KL divergence from Schulman, http://joschu.net/blog/kl-approx.html.

Below, N is the number of completions and M that of all their tokens, end-of-sequence included, which lie end to end.

The loss of an on-policy step is zero in value whenever the advantages of a group sum to zero: its gradient is not.
Watch the reward and the gradient's norm.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Reduction = Literal["grpo", "dr_grpo", "dapo"]
ScaleRewards = Literal["group", "batch", "none"]

# exp(20) is 5e8: beyond this a token carries no information, and a few nats more overflow fp32.
_MAX_LOG_RATIO = 20.0


def group_advantages(rewards: Tensor, scale_rewards: ScaleRewards = "group") -> Tensor:
    """How much better each completion is than the others of its prompt.

    Args:
        rewards: (prompts, group size); NaN where no reward could be given.
        scale_rewards: divide by the standard deviation (n − 1 in the denominator) of the "group" or of the whole
            "batch", plus 1e-4, or by nothing.

    Returns:
        (prompts, group size) fp32. 0 for NaN rewards and for groups of equal rewards.
    """
    rewards = rewards.double()
    known = rewards.isfinite()
    mean = rewards.nanmean(dim=1, keepdim=True)
    centred = torch.where(known, rewards - mean, 0.0)
    # The mean of equal numbers need not equal them to the last bit, and Adam makes a step of the least of gradients.
    highest = rewards.masked_fill(~known, -torch.inf).amax(dim=1, keepdim=True)
    lowest = rewards.masked_fill(~known, torch.inf).amin(dim=1, keepdim=True)
    centred = torch.where(highest > lowest, centred, 0.0)
    if scale_rewards == "group":
        count = known.sum(dim=1, keepdim=True)
        variance = centred.square().sum(dim=1, keepdim=True) / (count - 1).clamp(min=1)
        centred = centred / (variance.sqrt() + 1e-4)
    elif scale_rewards == "batch":
        values = rewards[known]
        centred = centred / ((values.std() if values.numel() > 1 else 0.0) + 1e-4)
    elif scale_rewards != "none":
        raise ValueError(f"scale_rewards is {scale_rewards!r}, expected 'group', 'batch' or 'none'")
    return centred.float()


def token_log_probs(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of each of `tokens` (…) under logits (…, V) divided by the temperature: (…), fp32.

    The temperature is the sampler's, here as there: the policy that is trained is the one that was sampled.
    """
    logits = logits.float() / temperature
    return logits.gather(-1, tokens[..., None])[..., 0] - logits.logsumexp(-1)


def token_entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy in nats of the next token, logits (…, V) -> (…), fp32."""
    log_probs = (logits.float() / temperature).log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1)


def clipped_objective(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    *,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    delta: float | None = None,
) -> Tensor:
    """The loss of each token, (M,): −min(min(ρ, delta)·A, clip(ρ, 1 − eps_low, 1 + eps_high)·A).

    Args:
        log_probs: (M,), of the policy that is trained.
        old_log_probs: (M,), of the policy that sampled. No gradient flows into it; `log_probs.detach()` gives ρ = 1
            and the plain policy gradient.
        advantages: (M,), of the completion that a token belongs to.
        delta: bounds ρ from above where A < 0 and the clip does not hold; None does not.
    """
    ratio = _bounded(log_probs - old_log_probs.detach()).exp()
    bounded = ratio if delta is None else ratio.clamp(max=delta)
    return -torch.minimum(bounded * advantages, ratio.clamp(1 - eps_low, 1 + eps_high) * advantages)


def kl_to_reference(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    """k3, an unbiased estimate of KL(policy ‖ reference) that is never negative: e^d − d − 1, d = reference − policy.

    Its gradient is not that of the KL divergence (it is the forward one's, to first order), as in every GRPO.
    """
    difference = _bounded(reference_log_probs.detach() - log_probs)
    return difference.exp() - difference - 1


def loss_denominator(reduction: Reduction, lengths: Tensor, max_completion_length: int) -> float:
    """What `reduce_loss` divides by, for the step's completions all together: lengths (N,) count their tokens."""
    if reduction == "grpo":
        return float(lengths.numel())
    if reduction == "dr_grpo":
        return float(lengths.numel() * max_completion_length)
    if reduction == "dapo":
        return float(max(int(lengths.sum()), 1))
    raise ValueError(f"reduction is {reduction!r}, expected 'grpo', 'dr_grpo' or 'dapo'")


def reduce_loss(token_losses: Tensor, lengths: Tensor, reduction: Reduction, denominator: float) -> Tensor:
    """One number from the losses ℓ (M,) of completions with so many tokens each, lengths (N,) on the CPU.

        grpo     Σ_i (Σ_t ℓ / length_i) / denominator      a completion counts once, however long it is
        dr_grpo  Σ_i Σ_t ℓ / denominator                   a token counts the same in every batch
        dapo     Σ_i Σ_t ℓ / denominator                   a token counts the same within the batch

    The denominator is that of the whole optimiser step, so the losses of its micro-batches add up to the loss of the
    step, and so do their gradients, however the step is split.
    """
    if reduction == "grpo":
        token_losses = token_losses / lengths.repeat_interleave(lengths).to(token_losses.device)
    return token_losses.sum() / denominator


def _bounded(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)

"""The formulae of GRPO against numbers worked out by hand."""

import math

import pytest
import torch

from pykern.train.grpo_loss import (
    clipped_objective,
    group_advantages,
    kl_to_reference,
    loss_denominator,
    reduce_loss,
    token_entropy,
    token_log_probs,
)

NAN = math.nan


def close(value: float) -> object:
    return pytest.approx(value, rel=1e-5)


# Advantages


def test_advantages_divide_by_the_unbiased_deviation_of_the_group() -> None:
    rewards = torch.tensor([[1.0, 0, 0, 0], [2.0, 4, 6, 8]])
    expected = [[0.75 / (0.5 + 1e-4), *3 * [-0.25 / (0.5 + 1e-4)]]]
    std = math.sqrt(20 / 3)
    expected.append([-3 / (std + 1e-4), -1 / (std + 1e-4), 1 / (std + 1e-4), 3 / (std + 1e-4)])
    assert torch.allclose(group_advantages(rewards, "group"), torch.tensor(expected), rtol=1e-6)


def test_advantages_by_batch_and_without_scale() -> None:
    rewards = torch.tensor([[0.0, 1], [4.0, 7]])
    centred = torch.tensor([[-0.5, 0.5], [-1.5, 1.5]])
    assert torch.equal(group_advantages(rewards, "none"), centred)
    assert torch.allclose(group_advantages(rewards, "batch"), centred / (math.sqrt(10) + 1e-4), rtol=1e-6)
    with pytest.raises(ValueError, match="scale_rewards is 'std'"):
        group_advantages(rewards, "std")


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("equal", [[0.1] * 7, [1e-8] * 3, [0.7], [NAN, NAN], [0.3, NAN, 0.3]])
def test_a_group_without_differences_has_no_advantage(scale: str, equal: list[float]) -> None:
    assert not group_advantages(torch.tensor([equal], dtype=torch.float64), scale).any()


def test_a_missing_reward_takes_no_part() -> None:
    found = group_advantages(torch.tensor([[1.0, NAN, 0, 0], [NAN, NAN, NAN, 5]]), "group")
    std = math.sqrt((4 / 9 + 2 / 9) / 2 / 1)
    expected = torch.tensor([[2 / 3, 0, -1 / 3, -1 / 3]]) / (std + 1e-4)
    assert torch.allclose(found[:1], expected, rtol=1e-5)
    assert not found[1].any()


# The loss a token


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.1, 2.0, -2.2, -2.2),  # inside the clip: −ρA, and d/ds = −ρA
        (1.5, 2.0, -2.6, 0.0),  # better and already likelier: held at 1 + eps_high
        (0.5, 2.0, -1.0, -1.0),  # better but less likely: full gradient
        (0.5, -2.0, 1.8, 0.0),  # worse and already less likely: held at 1 − eps_low
        (1.5, -2.0, 3.0, 3.0),  # worse but likelier: full gradient
        (9.0, -2.0, 8.0, 0.0),  # … up to delta = 4
    ],
)
def test_the_objective_is_clipped_on_one_side(ratio: float, advantage: float, loss: float, slope: float) -> None:
    log_probs = torch.tensor([math.log(ratio)], requires_grad=True)
    found = clipped_objective(
        log_probs, torch.zeros(1), torch.tensor([advantage]), eps_low=0.1, eps_high=0.3, delta=4.0
    )
    found.backward()
    assert found.item() == close(loss) and log_probs.grad.item() == close(slope)


def test_an_on_policy_loss_is_zero_and_its_gradient_is_not() -> None:
    log_probs = torch.tensor([-1.0, -2.0], requires_grad=True)
    loss = clipped_objective(log_probs, log_probs, torch.tensor([1.0, -1.0])).mean()
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(log_probs.grad, torch.tensor([-0.5, 0.5]))  # through the new policy alone


def test_k3_averages_to_the_divergence_and_is_never_negative() -> None:
    generator = torch.Generator().manual_seed(0)
    policy, reference = torch.randn(2, 50, generator=generator, dtype=torch.float64).log_softmax(-1)
    found = kl_to_reference(policy, reference)
    divergence = (policy.exp() * (policy - reference)).sum()
    assert (policy.exp() * found).sum().item() == pytest.approx(divergence.item(), rel=1e-12)
    assert (found >= 0).all() and not kl_to_reference(policy, policy).any()


def test_far_apart_policies_stay_finite() -> None:
    log_probs = torch.tensor([-200.0, -1e-6], requires_grad=True)
    other = torch.tensor([-1e-6, -200.0])
    loss = clipped_objective(log_probs, other, torch.tensor([-1.0])) + kl_to_reference(log_probs, other)
    loss.sum().backward()
    assert loss.isfinite().all() and log_probs.grad.isfinite().all()


def test_log_probs_are_those_of_the_tempered_policy_in_fp32() -> None:
    logits = (8 * torch.randn(3, 1000, generator=torch.Generator().manual_seed(0))).bfloat16()
    tokens = torch.tensor([0, 500, 999])
    exact = (logits.double() / 0.7).log_softmax(-1)
    found = token_log_probs(logits, tokens, 0.7)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), exact[torch.arange(3), tokens], rtol=1e-6)
    entropy = -(exact.exp() * exact).sum(-1)
    assert torch.allclose(token_entropy(logits, 0.7).double(), entropy, rtol=1e-4)


# Reductions

LOSSES = torch.tensor([1.0, 2, 3, 5])
LENGTHS = torch.tensor([3, 1])


@pytest.mark.parametrize(("reduction", "expected"), [("grpo", 3.5), ("dr_grpo", 11 / 16), ("dapo", 11 / 4)])
def test_reductions_by_hand(reduction: str, expected: float) -> None:
    denominator = loss_denominator(reduction, LENGTHS, max_completion_length=8)
    assert reduce_loss(LOSSES, LENGTHS, reduction, denominator).item() == close(expected)
    with pytest.raises(ValueError, match="reduction is 'mean'"):
        loss_denominator("mean", LENGTHS, 8)


def test_only_grpo_gives_a_token_of_a_long_completion_less_weight() -> None:
    for reduction, same in (("grpo", False), ("dr_grpo", True), ("dapo", True)):
        losses = torch.ones(4, requires_grad=True)
        reduce_loss(losses, LENGTHS, reduction, loss_denominator(reduction, LENGTHS, 8)).backward()
        assert (losses.grad[0] == losses.grad[3]).item() == same

"""GRPO: its formulae against numbers worked out by hand, its gradient against autograd on the definition, its traps."""

import json
import math
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pykern.model import Transformer, TransformerConfig
from pykern.train import grpo as grpo_module
from pykern.train.checkpoint import load_model, save_checkpoint
from pykern.train.config import to_dict
from pykern.train.errors import UserError
from pykern.train.grpo import GRPOConfig, Trainer, grpo, started_config
from pykern.train.grpo_loss import (
    clipped_objective,
    group_advantages,
    kl_to_reference,
    loss_denominator,
    reduce_loss,
    token_entropy,
    token_log_probs,
)
from pykern.train.policy_gradient import accumulate_gradient, frozen_log_probs
from pykern.train.rewards import REWARDS
from pykern.train.rollout import Rollout, completion_lengths, completion_logits, sample_rollouts
from pykern.train.run import read_log
from pykern.train.tasks import REWARD_BUCKETS, TEST_BUCKETS, TEXT_BUCKETS, Problem, Task, additions, load_task
from pykern.train.tokenizer import CharTokenizer

NAN = math.nan
TOKENIZER = CharTokenizer("abcdef=\n")
EOS = TOKENIZER.encode("\n")[0]


def close(value: float) -> object:
    return pytest.approx(value, rel=1e-5)


def tiny_model(seed: int = 0, spread: float = 0.3, **changes: object) -> Transformer:
    torch.manual_seed(seed)
    config = TransformerConfig(
        vocab_size=8, context_length=16, num_layers=1, num_heads=2, width=16, bias=False, positions="rotary"
    )
    model = Transformer(replace(config, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(spread * torch.randn_like(parameter))
    return model.eval()


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
    log_probs = torch.tensor([[math.log(ratio)]], requires_grad=True)
    found = clipped_objective(
        log_probs, torch.zeros(1, 1), torch.tensor([advantage]), eps_low=0.1, eps_high=0.3, delta=4.0
    )
    found.backward()
    assert found.item() == close(loss) and log_probs.grad.item() == close(slope)


def test_an_on_policy_loss_is_zero_and_its_gradient_is_not() -> None:
    log_probs = torch.tensor([[-1.0], [-2.0]], requires_grad=True)
    loss = clipped_objective(log_probs, log_probs, torch.tensor([1.0, -1.0])).mean()
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(log_probs.grad, torch.tensor([[-0.5], [0.5]]))  # through the new policy alone


def test_k3_averages_to_the_divergence_and_is_never_negative() -> None:
    generator = torch.Generator().manual_seed(0)
    policy, reference = torch.randn(2, 50, generator=generator, dtype=torch.float64).log_softmax(-1)
    found = kl_to_reference(policy, reference)
    divergence = (policy.exp() * (policy - reference)).sum()
    assert (policy.exp() * found).sum().item() == pytest.approx(divergence.item(), rel=1e-12)
    assert (found >= 0).all() and not kl_to_reference(policy, policy).any()


def test_far_apart_policies_stay_finite() -> None:
    log_probs = torch.tensor([[-200.0, -1e-6]], requires_grad=True)
    other = torch.tensor([[-1e-6, -200.0]])
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

LOSSES = torch.tensor([[1.0, 2, 3, NAN], [5.0, NAN, NAN, NAN]])
MASK = torch.tensor([[True, True, True, False], [True, False, False, False]])


@pytest.mark.parametrize(("reduction", "expected"), [("grpo", 3.5), ("dr_grpo", 11 / 16), ("dapo", 11 / 4)])
def test_reductions_by_hand(reduction: str, expected: float) -> None:
    denominator = loss_denominator(reduction, MASK.sum(1), max_completion_length=8)
    assert reduce_loss(LOSSES, MASK, reduction, denominator).item() == close(expected)
    with pytest.raises(ValueError, match="reduction is 'mean'"):
        loss_denominator("mean", MASK.sum(1), 8)


def test_only_grpo_gives_a_token_of_a_long_completion_less_weight() -> None:
    for reduction, same in (("grpo", False), ("dr_grpo", True), ("dapo", True)):
        losses = torch.ones(2, 4, requires_grad=True)
        reduce_loss(losses, MASK, reduction, loss_denominator(reduction, MASK.sum(1), 8)).backward()
        assert (losses.grad[0, 0] == losses.grad[1, 0]).item() == same
        assert not losses.grad[~MASK].any()


# Rollouts


def test_completions_end_with_their_first_end_token() -> None:
    completions = torch.tensor([[3, EOS, 3, EOS], [EOS, EOS, EOS, EOS], [1, 2, 3, 4], [1, 2, 3, EOS]])
    lengths, ended = completion_lengths(completions, EOS)
    assert lengths.tolist() == [2, 1, 4, 4] and ended.tolist() == [True, True, False, True]
    rollout = Rollout(completions, 0, lengths, ended, torch.arange(4))
    assert rollout.mask.sum(1).tolist() == [2, 1, 4, 4]  # the end token is trained on, what follows is not
    assert rollout.completion_ids() == [[3], [], [1, 2, 3, 4], [1, 2, 3]]
    assert completion_lengths(completions, None)[0].tolist() == [4] * 4


def test_prompts_are_grouped_by_length_and_samples_know_their_place() -> None:
    prompts = [[1, 2, 3], [4], [5, 6, 1], [2]]
    rollouts = sample_rollouts(tiny_model(), prompts, 3, 5, temperature=1.0, eos=EOS, seed=0)
    assert [rollout.prompt_length for rollout in rollouts] == [1, 3]
    seen = {}
    for rollout in rollouts:
        for sample, row in zip(rollout.samples.tolist(), rollout.tokens.tolist(), strict=True):
            assert row[: rollout.prompt_length] == prompts[sample // 3]
            seen[sample] = row
    assert sorted(seen) == list(range(12))
    assert len({tuple(row) for row in seen.values()}) > 8  # a group is not one completion repeated


def test_splitting_keeps_rows_and_drops_unused_columns() -> None:
    rollout = sample_rollouts(tiny_model(), [[1, 2]] * 8, 2, 6, temperature=1.0, eos=EOS, seed=1)[0]
    assert len(set(rollout.lengths.tolist())) > 1
    pieces = list(rollout.split(3))
    assert [len(piece.tokens) for piece in pieces] == [3, 3, 3, 3, 3, 1]
    assert all(piece.completions.shape[1] == piece.lengths.max() for piece in pieces)
    assert sum((piece.completion_ids() for piece in pieces), []) == rollout.completion_ids()


def test_a_completion_is_judged_alike_whatever_fills_it_up() -> None:
    model = tiny_model()
    rollout = sample_rollouts(model, [[1, 2]] * 6, 1, 8, temperature=1.0, eos=EOS, seed=1)[0]
    log_probs = token_log_probs(completion_logits(model, rollout), rollout.completions)
    for i, length in enumerate(rollout.lengths.tolist()):
        alone = rollout.tokens[i : i + 1, : 2 + length]
        row = Rollout(alone, 2, rollout.lengths[i : i + 1], rollout.ended[i : i + 1], rollout.samples[i : i + 1])
        expected = token_log_probs(completion_logits(model, row), row.completions)[0]
        assert torch.allclose(log_probs[i, :length], expected, rtol=1e-4)


@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_the_policy_in_the_loss_is_the_policy_that_sampled(temperature: float) -> None:
    model, count = tiny_model(spread=0.15), 4000
    rollout = sample_rollouts(model, [[1, 2]], count, 2, temperature=temperature, eos=None, seed=3)[0]
    log_probs = token_log_probs(completion_logits(model, rollout), rollout.completions, temperature).sum(1)
    pairs = rollout.completions[:, 0] * 8 + rollout.completions[:, 1]
    common = 0
    for pair in pairs.unique().tolist():
        found, expected = (pairs == pair).double().mean(), log_probs[pairs == pair].double().exp().mean()
        if expected > 0.02:
            common += 1
            assert abs(found - expected) < 4 * (expected * (1 - expected) / count).sqrt()
    assert common >= 5


# The gradient


def sampled(model: Transformer) -> tuple[list[Rollout], Tensor]:
    prompts = [[1, 2, 3], [4], [5, 6, 1], [2]]
    rollouts = sample_rollouts(model, prompts, 4, 7, temperature=1.3, eos=EOS, seed=0)
    advantages = torch.randn(16, generator=torch.Generator().manual_seed(0))
    return rollouts, advantages


def gradients(model: Transformer, rollouts: list[Rollout], rows: int, advantages: Tensor, config: GRPOConfig) -> Tensor:
    """The flat gradient over micro-batches of `rows`, against an old and a reference policy."""
    old, reference = tiny_model(spread=0.32), tiny_model(spread=0.25)
    pieces = [piece for rollout in rollouts for piece in rollout.split(rows)]
    model.zero_grad()
    accumulate_gradient(
        model,
        pieces,
        advantages,
        config,
        old=[frozen_log_probs(old, piece, config) for piece in pieces],
        reference=[frozen_log_probs(reference, piece, config) for piece in pieces],
    )
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def definition(model: Transformer, rollouts: list[Rollout], advantages: Tensor, config: GRPOConfig) -> Tensor:
    """The same gradient from the definition: a completion at a time, each alone, in one graph."""

    def log_probs(policy: Transformer, row: Tensor, start: int) -> Tensor:
        every = (policy(row[None, :-1])[0] / config.temperature).log_softmax(-1)
        return every[start - 1 :].gather(1, row[start:, None])[:, 0]

    old, reference = tiny_model(spread=0.32), tiny_model(spread=0.25)
    sums, lengths = [], []
    for rollout in rollouts:
        for row, length, sample in zip(rollout.tokens, rollout.lengths.tolist(), rollout.samples, strict=True):
            row, a = row[: rollout.prompt_length + length], advantages[sample]
            s = log_probs(model, row, rollout.prompt_length)
            with torch.no_grad():
                o, r = (log_probs(policy, row, rollout.prompt_length) for policy in (old, reference))
            ratio = torch.exp(s - o)
            surrogate = torch.min(ratio * a, ratio.clamp(1 - config.eps_low, 1 + config.eps_high) * a)
            sums.append((config.kl_coefficient * (torch.exp(r - s) - (r - s) - 1) - surrogate).sum())
            lengths.append(length)
    total, count = torch.stack(sums), torch.tensor(lengths)
    loss = {
        "grpo": (total / count).mean(),
        "dr_grpo": total.sum() / (len(lengths) * config.max_completion_length),
        "dapo": total.sum() / count.sum(),
    }[config.reduction]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


@pytest.mark.parametrize("reduction", ["grpo", "dr_grpo", "dapo"])
def test_the_gradient_is_that_of_the_definition_however_the_batch_is_split(reduction: str) -> None:
    model = tiny_model()
    config = GRPOConfig(reduction=reduction, kl_coefficient=0.3, temperature=1.3, max_completion_length=7, eps_low=0.1)
    rollouts, advantages = sampled(model)
    assert len(set(torch.cat([rollout.lengths for rollout in rollouts]).tolist())) > 2
    expected = definition(model, rollouts, advantages, config)
    for rows in (1, 3, 16):
        found = gradients(model, rollouts, rows, advantages, config)
        assert (found - expected).norm() < 1e-5 * expected.norm(), rows


def test_the_figures_of_a_gradient_do_not_depend_on_the_split_either() -> None:
    model, config = tiny_model(), GRPOConfig(max_completion_length=7)
    rollouts, advantages = sampled(model)
    reference = tiny_model(spread=0.25)

    def figures(rows: int) -> dict[str, float]:
        pieces = [piece for rollout in rollouts for piece in rollout.split(rows)]
        frozen = [frozen_log_probs(reference, piece, config) for piece in pieces]
        return accumulate_gradient(model, pieces, advantages, config, reference=frozen)

    one, many = figures(16), figures(3)
    assert one.keys() == {"loss", "entropy", "kl", "clip_fraction"}
    assert one == pytest.approx(many, rel=1e-5)
    assert one["kl"] > 0 and 0 < one["entropy"] < math.log(8) and one["clip_fraction"] == 0


def test_bfloat16_autocast_keeps_the_loss_in_fp32() -> None:
    model = tiny_model()
    rollouts, advantages = sampled(model)
    exact, rounded = (GRPOConfig(precision=p, max_completion_length=7) for p in ("float32", "bfloat16"))
    a, b = (gradients(model, rollouts, 16, advantages, config) for config in (exact, rounded))
    assert 0 < (a - b).norm() < 0.1 * a.norm()
    assert frozen_log_probs(model, rollouts[0], rounded).dtype == torch.float32


# The trainer


def policy_run(folder: Path, seed: int = 0) -> Path:
    """A run folder as pretraining leaves it, of an untrained model."""
    model = tiny_model(seed, spread=0.0)
    save_checkpoint(folder, 1, model, None)
    (folder / "config.json").write_text(json.dumps({"model": to_dict(model.config)}), encoding="utf-8")
    TOKENIZER.save(folder)
    return folder


def task_file(folder: Path) -> Path:
    """Say the letter again: "a=" wants "a"."""
    path = folder / "task.jsonl"
    rows = [{"prompt": prompt + letter + "=", "answer": letter} for letter in "abcdef" for prompt in ("", "f", "ab")]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.fixture
def config(tmp_path: Path) -> GRPOConfig:
    return GRPOConfig(
        source=policy_run(tmp_path / "policy"),
        out=tmp_path / "run",
        task=str(task_file(tmp_path)),
        steps=4,
        prompts_per_step=5,
        group_size=32,
        max_completion_length=3,
        learning_rate=3e-3,
        device="cpu",
        eval_interval=2,
        checkpoint_interval=2,
    )


def trainer(config: GRPOConfig, task: Task | None = None) -> Trainer:
    model, tokenizer, _ = load_model(config.source)
    return Trainer(config, model, tokenizer, task or load_task(config.task))


def test_a_run_leaves_a_log_and_a_checkpoint_that_generate_can_load(config: GRPOConfig) -> None:
    summary = grpo(config)
    rows = read_log(config.out)
    assert [row["step"] for row in rows] == ["0", "1", "2", "3", "4"]
    assert float(rows[0]["test_pass_rate"]) == summary["pass_at_1_before"]
    assert float(rows[4]["test_pass_rate"]) == summary["pass_at_1"]
    for row in rows[1:]:
        assert float(row["entropy"]) > 0 and row["kl"] == ""
        assert 1 <= float(row["completion_length"]) <= 3 and float(row["pass_rate"]) == float(row["reward"])
    assert any(float(row["reward"]) > 0 and float(row["grad_norm"]) > 0 for row in rows[1:])
    assert (config.out / "reward.png").stat().st_size > 0
    model, tokenizer, _ = load_model(config.out)
    before, _, _ = load_model(config.source)
    assert tokenizer.decode([0]) == TOKENIZER.decode([0])
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    with pytest.raises(UserError, match="holds a run already"):
        grpo(config)


def test_rewards_are_climbed(config: GRPOConfig) -> None:
    task = Task([Problem("a=", "b"), Problem("c=", "b")], [Problem("e=", "b")])
    learner = trainer(replace(config, group_size=32, eval_samples=256), task)
    before = learner.evaluate(None)
    for _ in range(40):
        learner.update()
    assert before < 0.15 and learner.evaluate(None) > 0.5


def test_a_resumed_run_takes_the_same_steps(config: GRPOConfig) -> None:
    grpo(config)
    halfway = replace(config, out=config.out.with_name("halfway"))
    grpo(replace(halfway, steps=2))
    assert started_config(halfway.out) == replace(halfway, steps=2)
    grpo(halfway, resume=True)
    whole, resumed = load_model(config.out)[0], load_model(halfway.out)[0]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    timeless = [[(k, v) for k, v in row.items() if k != "tokens_per_s"] for row in read_log(config.out)]
    assert timeless == [[(k, v) for k, v in row.items() if k != "tokens_per_s"] for row in read_log(halfway.out)]
    with pytest.raises(UserError, match="seed cannot change"):
        grpo(replace(halfway, seed=1), resume=True)


def test_ctrl_c_saves_at_the_end_of_the_step(config: GRPOConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    update = Trainer.update

    def update_and_interrupt(self: Trainer) -> dict:
        if self.step == 0:
            signal.raise_signal(signal.SIGINT)
        return update(self)

    monkeypatch.setattr(Trainer, "update", update_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        grpo(config)
    assert [path.name for path in (config.out / "checkpoints").iterdir()] == ["step-00000001"]
    load_model(config.out)


def test_two_updates_share_one_rollout_and_its_log_probs(config: GRPOConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Tensor | None] = []
    original = grpo_module.accumulate_gradient

    def spy(model: Transformer, pieces: list[Rollout], *args: object, old: list[Tensor] | None, **kwargs: object):
        given.append(None if old is None else torch.cat([o.flatten() for o in old]))
        current = torch.cat([frozen_log_probs(model, piece, config).flatten() for piece in pieces])
        given.append(current)
        return original(model, pieces, *args, old=old, **kwargs)

    monkeypatch.setattr(grpo_module, "accumulate_gradient", spy)
    assert trainer(config).update()["clip_fraction"] == 0
    assert given[0] is None  # on policy: ρ = 1 by construction
    given.clear()
    figures = trainer(replace(config, updates_per_rollout=3, learning_rate=0.3)).update()
    first, policies = given[0], given[1::2]
    assert all(torch.equal(old, first) for old in given[0::2]) and not first.requires_grad
    assert torch.allclose(first, policies[0], rtol=1e-6) and not torch.allclose(first, policies[2], rtol=1e-2)
    assert figures["clip_fraction"] > 0


def test_the_reference_stays_and_the_divergence_from_it_grows(config: GRPOConfig) -> None:
    learner = trainer(replace(config, kl_coefficient=0.05, group_size=32))
    frozen = [parameter.clone() for parameter in learner.reference.parameters()]
    divergences = [learner.update()["kl"] for _ in range(6)]
    assert abs(divergences[0]) < 1e-6 < divergences[-1]
    assert all(torch.equal(a, b) for a, b in zip(frozen, learner.reference.parameters(), strict=True))
    assert not any(parameter.requires_grad for parameter in learner.reference.parameters())
    assert all(parameter.requires_grad for parameter in learner.model.parameters())
    assert not learner.model.training  # dropout off, as when sampling


def test_tokens_are_never_made_from_text_again(config: GRPOConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = trainer(config)
    encoded: list[str] = []
    original: Callable[[str], list[int]] = learner.tokenizer.encode

    def encode(text: str) -> list[int]:
        encoded.append(text)
        return original(text)

    monkeypatch.setattr(learner.tokenizer, "encode", encode)
    learner.update()
    assert encoded and set(encoded) <= {problem.prompt for problem in learner.task.train}


def test_every_problem_comes_once_an_epoch(config: GRPOConfig) -> None:
    learner = trainer(config)
    count = len(learner.task.train)
    seen = []
    for learner.step in range(1, 2 * count + 1):
        seen += learner._problems()
    for epoch in range(5):
        assert len(set(seen[epoch * count : (epoch + 1) * count])) == count
    assert seen[:count] != seen[count : 2 * count]


def test_the_learning_rate_warms_up_and_falls(config: GRPOConfig) -> None:
    settings = replace(config, steps=8, warmup_steps=2, learning_rate=3e-3, min_learning_rate=1e-3)
    falling = trainer(settings)
    rates = [falling.update()["lr"] for _ in range(8)]
    assert rates[:3] == pytest.approx([1e-3, 2e-3, 3e-3])
    assert rates[2:] == sorted(rates[2:], reverse=True) and 1e-3 < rates[-1] < 1.3e-3
    constant = trainer(replace(settings, warmup_steps=0, min_learning_rate=None))
    assert [constant.update()["lr"] for _ in range(3)] == [3e-3] * 3


def test_a_reward_of_none_is_no_reward(config: GRPOConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REWARDS, "exact_match", lambda prompt, completion, answer: None)
    figures = trainer(config).update()
    assert math.isnan(figures["reward"]) and figures["grad_norm"] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": None}, "--from is needed"),
        ({"out": None}, "--out is needed"),
        ({"eos": "ab"}, "eos is 'ab', which is 2 tokens"),
        ({"eos": "z"}, "'z' is not among the 8 characters"),
        ({"max_completion_length": 13}, "the longest prompt has 4 tokens, with max_completion_length 17 in all"),
        ({"task": "subtraction"}, "the task 'subtraction' is neither 'addition' nor a readable file"),
        ({"task": "addition"}, "is not among the 8 characters"),
        ({"source": Path("/nowhere")}, "there is no run folder"),
    ],
)
def test_what_the_user_can_put_right_is_said_in_a_line(config: GRPOConfig, change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        grpo(replace(config, **change))
    assert not (config.out / "checkpoints").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"group_size": 0},
        {"temperature": 0.0},
        {"learning_rate": NAN},
        {"eps_low": 1.0},
        {"delta": 1.1},
        {"kl_coefficient": -1.0},
        {"min_learning_rate": 1.0},
        {"threads": 0},
    ],
)
def test_a_config_names_the_field_that_does_not_fit(change: dict) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(change))} is "):
        GRPOConfig(**change)


# Tasks and rewards


def test_a_sum_and_its_mirror_fall_into_one_part() -> None:
    parts = [list(additions(part)) for part in (TEST_BUCKETS, REWARD_BUCKETS, TEXT_BUCKETS)]
    keys = [{frozenset(p.prompt.rstrip("=").split("+")) for p in part} for part in parts]
    assert sum(map(len, parts)) == 90 * 90 and all(not a & b for a, b in zip(keys, keys[1:] + keys[:1], strict=True))
    assert [len(part) for part in parts] == pytest.approx([810, 2430, 4860], rel=0.1)
    assert all(eval(p.prompt.rstrip("=")) == int(p.answer) for part in parts for p in part)
    # A hold-out must not be readable from the digits: each last digit occurs as often in the test as elsewhere.
    for digit in "0123456789":
        assert sum(p.answer[-1] == digit for p in parts[0]) / len(parts[0]) == pytest.approx(0.1, abs=0.04)


@pytest.mark.parametrize(
    "line", ["[]", "{", '{"prompt": "a"}', '{"prompt": 1, "answer": "b"}', '{"prompt": "", "answer": "b"}']
)
def test_a_bad_task_file_is_reported_with_its_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "task.jsonl"
    path.write_text('{"prompt": "a", "answer": "b"}\n\n' + line + "\n", encoding="utf-8")
    with pytest.raises(UserError, match="task.jsonl:3"):
        load_task(str(path))


def test_a_task_file_is_split_into_two_parts(tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl"
    rows = [json.dumps({"prompt": f"{i}?", "answer": str(i)}) for i in range(300)]
    path.write_text("\n".join(rows + rows[:9]), encoding="utf-8")  # a problem given twice counts once
    task = load_task(str(path))
    assert len(task.train) + len(task.test) == 300 and not set(task.train) & set(task.test)
    assert len(task.test) == pytest.approx(30, abs=15)
    path.write_text(rows[0], encoding="utf-8")
    with pytest.raises(UserError, match="too few"):
        load_task(str(path))


@pytest.mark.parametrize(
    ("name", "completion", "reward"),
    [
        ("exact_match", "12", 1.0),
        ("exact_match", " 12\n", 1.0),
        ("exact_match", "123", 0.0),
        ("exact_match", "", 0.0),
        ("number_format", "-7", 1.0),
        ("number_format", "7a", 0.0),
        ("format_and_match", "12", 1.1),
        ("format_and_match", "13", 0.1),
        ("format_and_match", "x", 0.0),
    ],
)
def test_rewards(name: str, completion: str, reward: float) -> None:
    assert REWARDS[name]("5+7=", completion, "12") == reward

"""GRPO: its gradient against autograd on the definition, its rollouts, its trainer and their traps."""

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
from pykern.train import rollout as rollout_module
from pykern.train.checkpoint import load_model, save_checkpoint
from pykern.train.config import to_dict
from pykern.train.errors import UserError
from pykern.train.grpo import GRPOConfig, Trainer, grpo, started_config
from pykern.train.grpo_loss import token_log_probs
from pykern.train.policy_gradient import accumulate_gradient, frozen_log_probs
from pykern.train.rewards import REWARDS
from pykern.train.rollout import Rollout, completion_logits, sample_rollouts
from pykern.train.run import read_log
from pykern.train.tasks import REWARD_BUCKETS, TEST_BUCKETS, TEXT_BUCKETS, Problem, Task, additions, load_task
from pykern.train.tokenizer import CharTokenizer

NAN = math.nan
TOKENIZER = CharTokenizer("abcdef=\n")
EOS = TOKENIZER.encode("\n")[0]


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


# Rollouts


PROMPTS = [[1, 2, 3], [4], [5, 6, 1, 2], [2]]


def rows_of(rollout: Rollout) -> list[Tensor]:
    return list(rollout.tokens.split((rollout.prompt_lengths + rollout.lengths).tolist()))


def test_all_prompts_are_sampled_at_once_whatever_their_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, original = [], rollout_module.generate

    def spy(*args: object, **kwargs: object) -> object:
        calls.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(rollout_module, "generate", spy)
    rollout = sample_rollouts(tiny_model(), PROMPTS, 3, 5, temperature=1.0, eos=EOS, seed=0)
    assert len(calls) == 1
    assert rollout.prompt_lengths.tolist() == [3, 3, 3, 1, 1, 1, 4, 4, 4, 1, 1, 1]
    rows = rows_of(rollout)
    for i, row in enumerate(rows):
        assert row[: rollout.prompt_lengths[i]].tolist() == PROMPTS[i // 3]
    assert len({tuple(row.tolist()) for row in rows}) > 8  # a group is not one completion repeated


def test_completions_end_with_their_first_end_token() -> None:
    rollout = sample_rollouts(tiny_model(), PROMPTS, 8, 5, temperature=1.0, eos=EOS, seed=0)
    assert set(rollout.ended.tolist()) == {True, False} and len(set(rollout.lengths.tolist())) > 2
    every = []
    starts = rollout.prompt_lengths.tolist()
    for i, (row, start, ids) in enumerate(zip(rows_of(rollout), starts, rollout.completion_ids(), strict=True)):
        new = row[start:].tolist()
        every += new
        assert len(new) == rollout.lengths[i] and EOS not in ids
        assert new == ([*ids, EOS] if rollout.ended[i] else ids) and (rollout.ended[i] or len(ids) == 5)
    assert rollout.completions.tolist() == every
    endless = sample_rollouts(tiny_model(), PROMPTS, 8, 5, temperature=1.0, eos=None, seed=0)
    assert not endless.ended.any() and set(endless.lengths.tolist()) == {5}


def test_splitting_keeps_completions() -> None:
    rollout = sample_rollouts(tiny_model(), PROMPTS, 4, 6, temperature=1.0, eos=EOS, seed=1)
    pieces = list(rollout.split(3))
    assert [len(piece.lengths) for piece in pieces] == [3, 3, 3, 3, 3, 1]
    assert sum((piece.completion_ids() for piece in pieces), []) == rollout.completion_ids()
    assert torch.equal(torch.cat([piece.tokens for piece in pieces]), rollout.tokens)
    assert torch.equal(torch.cat([piece.completions for piece in pieces]), rollout.completions)


@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_the_policy_in_the_loss_is_the_policy_that_sampled(temperature: float) -> None:
    model, count = tiny_model(spread=0.15), 4000
    rollout = sample_rollouts(model, [[1, 2]], count, 2, temperature=temperature, eos=None, seed=3)
    log_probs = token_log_probs(completion_logits(model, rollout), rollout.completions, temperature).view(-1, 2).sum(1)
    first, second = rollout.completions.view(-1, 2).T
    pairs = first * 8 + second
    common = 0
    for pair in pairs.unique().tolist():
        found, expected = (pairs == pair).double().mean(), log_probs[pairs == pair].double().exp().mean()
        if expected > 0.02:
            common += 1
            assert abs(found - expected) < 4 * (expected * (1 - expected) / count).sqrt()
    assert common >= 5


# The gradient


def sampled(model: Transformer) -> tuple[Rollout, Tensor]:
    rollout = sample_rollouts(model, PROMPTS, 4, 7, temperature=1.3, eos=EOS, seed=0)
    assert len(set(rollout.lengths.tolist())) > 2
    return rollout, torch.randn(16, generator=torch.Generator().manual_seed(0))


def gradients(model: Transformer, rollout: Rollout, rows: int, advantages: Tensor, config: GRPOConfig) -> Tensor:
    """The flat gradient over micro-batches of `rows`, against an old and a reference policy."""
    old, reference = tiny_model(spread=0.32), tiny_model(spread=0.25)
    pieces = list(rollout.split(rows))
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


def alone(policy: Transformer, rollout: Rollout, temperature: float) -> list[Tensor]:
    """The log-probabilities of each completion's tokens, each sequence in a batch of its own."""
    found = []
    for row, start in zip(rows_of(rollout), rollout.prompt_lengths.tolist(), strict=True):
        every = (policy(row[None, :-1])[0] / temperature).log_softmax(-1)
        found.append(every[start - 1 :].gather(1, row[start:, None])[:, 0])
    return found


def padded(policy: Transformer, rollout: Rollout, temperature: float) -> list[Tensor]:
    """The same, all sequences filled up to the longest."""
    rows = rows_of(rollout)
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    every = (policy(tokens[:, :-1]) / temperature).log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
    starts = rollout.prompt_lengths.tolist()
    return [line[start - 1 : len(row) - 1] for line, row, start in zip(every, rows, starts, strict=True)]


def definition(
    model: Transformer, rollout: Rollout, advantages: Tensor, config: GRPOConfig, log_probs: Callable
) -> Tensor:
    """The same gradient from the definition: a completion at a time, in one graph."""
    new = log_probs(model, rollout, config.temperature)
    with torch.no_grad():
        old = log_probs(tiny_model(spread=0.32), rollout, config.temperature)
        reference = log_probs(tiny_model(spread=0.25), rollout, config.temperature)
    sums = []
    for s, o, r, a in zip(new, old, reference, advantages, strict=True):
        ratio = torch.exp(s - o)
        surrogate = torch.min(ratio * a, ratio.clamp(1 - config.eps_low, 1 + config.eps_high) * a)
        sums.append((config.kl_coefficient * (torch.exp(r - s) - (r - s) - 1) - surrogate).sum())
    total, count = torch.stack(sums), rollout.lengths
    loss = {
        "grpo": (total / count).mean(),
        "dr_grpo": total.sum() / (len(count) * config.max_completion_length),
        "dapo": total.sum() / count.sum(),
    }[config.reduction]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


@pytest.mark.parametrize("reduction", ["grpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("log_probs", [alone, padded])
def test_the_gradient_is_that_of_the_definition_however_the_batch_is_split(reduction: str, log_probs: Callable) -> None:
    model = tiny_model()
    config = GRPOConfig(reduction=reduction, kl_coefficient=0.3, temperature=1.3, max_completion_length=7, eps_low=0.1)
    rollout, advantages = sampled(model)
    expected = definition(model, rollout, advantages, config, log_probs)
    for rows in (1, 3, 16):
        found = gradients(model, rollout, rows, advantages, config)
        assert (found - expected).norm() < 1e-5 * expected.norm(), rows


def test_log_probs_without_padding_are_those_with_it() -> None:
    model, config = tiny_model(), GRPOConfig(temperature=1.3)
    rollout, _ = sampled(model)
    found = frozen_log_probs(model, rollout, config)
    assert len(found) == rollout.lengths.sum()
    for several in (alone, padded):
        assert torch.allclose(found, torch.cat(several(model, rollout, 1.3)), rtol=1e-4)


def test_the_figures_of_a_gradient_do_not_depend_on_the_split_either() -> None:
    model, config = tiny_model(), GRPOConfig(max_completion_length=7)
    rollout, advantages = sampled(model)
    reference = tiny_model(spread=0.25)

    def figures(rows: int) -> dict[str, float]:
        pieces = list(rollout.split(rows))
        frozen = [frozen_log_probs(reference, piece, config) for piece in pieces]
        return accumulate_gradient(model, pieces, advantages, config, reference=frozen)

    one, many = figures(16), figures(3)
    assert one.keys() == {"loss", "entropy", "kl", "clip_fraction"}
    assert one == pytest.approx(many, rel=1e-5)
    assert one["kl"] > 0 and 0 < one["entropy"] < math.log(8) and one["clip_fraction"] == 0


def test_bfloat16_autocast_keeps_the_loss_in_fp32() -> None:
    model = tiny_model()
    rollout, advantages = sampled(model)
    exact, rounded = (GRPOConfig(precision=p, max_completion_length=7) for p in ("float32", "bfloat16"))
    a, b = (gradients(model, rollout, 16, advantages, config) for config in (exact, rounded))
    assert 0 < (a - b).norm() < 0.1 * a.norm()
    assert frozen_log_probs(model, rollout, rounded).dtype == torch.float32


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

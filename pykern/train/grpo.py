"""GRPO: sample groups of completions, reward them, and raise the odds of those better than their group.

As in pretraining, a checkpoint holds all that the next step depends on. Every draw comes from a seed made of the run's
seed and the step, so a resumed run takes the steps that it would have taken.

Dropout stays off: it would make the policy in the loss another one than the policy that was sampled.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pykern.model import Transformer
from pykern.train import checkpoint
from pykern.train.config import from_dict, read_config, to_dict
from pykern.train.errors import UserError
from pykern.train.grpo_config import GRPOConfig
from pykern.train.grpo_loss import group_advantages
from pykern.train.interrupt import Interrupt
from pykern.train.lora import adapt, without_adapters
from pykern.train.policy_gradient import accumulate_gradient, autocast, frozen_log_probs
from pykern.train.pretrain import choose_device
from pykern.train.rewards import REWARDS, exact_match
from pykern.train.rollout import Rollout, sample_rollouts
from pykern.train.run import CONFIG, Run
from pykern.train.schedule import warmup_cosine
from pykern.train.tasks import Problem, Task, load_task
from pykern.train.tokenizer import BPETokenizer, CharTokenizer

COLUMNS = (
    "reward",
    "pass_rate",
    "test_pass_rate",
    "loss",
    "grad_norm",
    "entropy",
    "kl",
    "clip_fraction",
    "completion_length",
    "lr",
    "tokens_per_s",
)
_EVAL_ROWS = 2048  # completions sampled at once for pass@1: the width at which one CPU core stops gaining
FIXED = ("source", "task", "reward", "eos", "lora", "seed")  # what a resumed run cannot change


def grpo(config: GRPOConfig, resume: bool = False) -> dict[str, Any]:
    """Train the policy of the run `config.source` in the folder `config.out`, from the start or on from its newest
    checkpoint.

    Returns the figures of summary.json: step, pass_at_1_before, pass_at_1 (both over all held-out problems), seconds.

    UserError for what the user can put right; KeyboardInterrupt after Ctrl-C, once the run is saved.
    """
    if config.out is None:
        raise UserError("--out is needed: the folder to put the run in")
    if config.source is None:
        raise UserError("--from is needed: the run whose checkpoint is the policy to begin with")
    if resume:
        _require_same(config)
    else:
        Run.require_unused(config.out)
    model, tokenizer, _ = checkpoint.load_model(config.out if resume else config.source)
    if not resume:
        model = adapt(without_adapters(model), config.lora, config.seed)
    trainer = Trainer(config, model, tokenizer, load_task(config.task))
    settings = {**to_dict(config), "model": to_dict(model.config)}
    if resume:
        trainer.restore(checkpoint.latest_checkpoint(config.out))
        run = Run.resume(config.out, settings, COLUMNS, trainer.step)
    else:
        run = Run.create(config.out, settings, COLUMNS)
        tokenizer.save(config.out)
    with run, Interrupt() as interrupt:
        return trainer.train(run, interrupt)


def started_config(folder: Path) -> GRPOConfig:
    """The settings with which the run in `folder` was started."""
    path = Path(folder, CONFIG)
    data = {name: value for name, value in read_config(path).items() if name != "model"}
    return from_dict(GRPOConfig, data, str(path))


def _require_same(config: GRPOConfig) -> None:
    started = started_config(config.out)
    for name in FIXED:
        if getattr(config, name) != getattr(started, name):
            raise UserError(f"{name} cannot change when a run is resumed: {config.out} was started with another")


class Trainer:
    """Policy, optimiser and position of one GRPO run."""

    def __init__(
        self, config: GRPOConfig, model: Transformer, tokenizer: CharTokenizer | BPETokenizer, task: Task
    ) -> None:
        self.config, self.tokenizer, self.task = config, tokenizer, task
        self.device = choose_device(config.device)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.model = model.to(self.device).eval()
        self.eos = end_token(tokenizer, config.eos)
        self.reward = REWARDS[config.reward]
        self.reference = _reference(config.source, self.device) if config.kl_coefficient else None
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trained,
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.step, self.seconds, self.pass_at_1_before = 0, 0.0, math.nan
        self._require_context()

    def restore(self, source: Path) -> None:
        """Put optimiser and position where the checkpoint `source` was taken; the policy is loaded already."""
        _, state = checkpoint.load_checkpoint(source)
        try:
            settings = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": settings})
            self.step, self.seconds = state["step"], state["seconds"]
            self.pass_at_1_before = state["pass_at_1_before"]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{source} does not fit this run: it is not a checkpoint of GRPO ({error})") from None

    def train(self, run: Run, interrupt: Interrupt) -> dict[str, Any]:
        """Take the steps that are left, and put the figures of the whole run into summary.json."""
        config = self.config
        run.track(config.steps, self.step)
        if self.step == 0:
            self.pass_at_1_before = self.evaluate(None)
            run.log(0, test_pass_rate=self.pass_at_1_before)
            run.say(f"step 0/{config.steps}  held-out pass@1 {self.pass_at_1_before:.3f}")
        pass_at_1 = None
        while self.step < config.steps and not interrupt.requested:
            figures = self.update()
            last = self.step == config.steps
            pass_at_1 = None
            if last or self.step % config.eval_interval == 0:
                pass_at_1 = self.evaluate(None if last else config.eval_problems)
            run.log(self.step, test_pass_rate=pass_at_1, **figures)
            if pass_at_1 is not None:
                shown = "  ".join(f"{name} {figures[name]:.3f}" for name in ("reward", "entropy", "grad_norm"))
                run.say(f"step {self.step}/{config.steps}  {shown}  held-out pass@1 {pass_at_1:.3f}")
            if last or self.step % config.checkpoint_interval == 0 or interrupt.requested:
                self.save(run)
        if interrupt.requested:
            run.say(f"interrupted at step {self.step}; go on with: pykern grpo --resume {run.folder}")
            raise KeyboardInterrupt
        return self._finish(run, self.evaluate(None) if pass_at_1 is None else pass_at_1)

    def update(self) -> dict[str, float | None]:
        """One batch of completions and the optimiser steps on it; returns what is logged of it."""
        config, start = self.config, time.perf_counter()
        self.step += 1
        lr = warmup_cosine(
            self.step,
            peak=config.learning_rate,
            floor=config.learning_rate if config.min_learning_rate is None else config.min_learning_rate,
            warmup_steps=config.warmup_steps,
            decay_steps=config.steps,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        problems = self._problems()
        rollout = self._sample(problems, config.group_size)
        rewards, passed = self._judge(problems, rollout)
        figures = self._optimise(rollout, group_advantages(rewards, config.scale_rewards))
        took = time.perf_counter() - start
        self.seconds += took
        lengths = rollout.lengths.double()
        return {
            "reward": rewards.nanmean().item(),
            "pass_rate": passed.mean().item(),
            **figures,
            "completion_length": lengths.mean().item(),
            "lr": lr,
            "tokens_per_s": lengths.sum().item() / took,
        }

    def _problems(self) -> list[Problem]:
        """The step's problems: every problem once an epoch, in an order drawn for each."""
        problems, count = self.task.train, self.config.prompts_per_step
        chosen: list[Problem] = []
        position = (self.step - 1) * count
        while len(chosen) < count:
            epoch, offset = divmod(position + len(chosen), len(problems))
            order = random.Random(f"{self.config.seed}/epoch {epoch}").sample(range(len(problems)), len(problems))
            chosen += [problems[i] for i in order[offset : offset + count - len(chosen)]]
        return chosen

    def _sample(self, problems: Sequence[Problem], group_size: int, purpose: str = "step") -> Rollout:
        with autocast(self.model, self.config.precision):
            return sample_rollouts(
                self.model,
                [self.tokenizer.encode(problem.prompt) for problem in problems],
                group_size,
                self.config.max_completion_length,
                temperature=self.config.temperature,
                eos=self.eos,
                seed=random.Random(f"{self.config.seed}/{purpose} {self.step}").getrandbits(48),
            )

    def _judge(self, problems: Sequence[Problem], rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Rewards, NaN for None, and whether each completion is the answer: two fp64 (problems, group size)."""
        completions = [self.tokenizer.decode(ids) for ids in rollout.completion_ids()]
        size = len(completions) // len(problems)
        rewards, passed = [], []
        for i, text in enumerate(completions):
            problem = problems[i // size]
            reward = self.reward(problem.prompt, text, problem.answer)
            rewards.append(math.nan if reward is None else reward)
            passed.append(exact_match(problem.prompt, text, problem.answer))
        return tuple(torch.tensor(x, dtype=torch.float64).view(-1, size) for x in (rewards, passed))

    def _optimise(self, rollout: Rollout, advantages: Tensor) -> dict[str, float | None]:
        """`updates_per_rollout` steps of the optimiser on the same completions; returns the last one's figures."""
        config, advantages = self.config, advantages.flatten()
        pieces = list(rollout.split(config.micro_batch_size))
        old = reference = None
        if config.updates_per_rollout > 1:  # a single update's own log-probabilities are those of the sampler
            old = [frozen_log_probs(self.model, piece, config) for piece in pieces]
        if self.reference is not None:
            reference = [frozen_log_probs(self.reference, piece, config) for piece in pieces]
        for _ in range(config.updates_per_rollout):
            figures = accumulate_gradient(self.model, pieces, advantages, config, old=old, reference=reference)
            norm = torch.nn.utils.clip_grad_norm_(self.trained, config.grad_clip or math.inf).item()
            if not math.isfinite(norm):
                raise self._diverged(f"the norm of the gradient is {norm}")
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return {**figures, "grad_norm": norm}

    def evaluate(self, limit: int | None) -> float:
        """pass@1 on `limit` held-out problems, None: all of them. The share of sampled completions that are right."""
        problems = self.task.test[:limit]
        samples, passed, size = self.config.eval_samples, 0.0, max(1, _EVAL_ROWS // self.config.eval_samples)
        for i in range(0, len(problems), size):
            part = problems[i : i + size]
            rollout = self._sample(part, samples, purpose=f"test {i}")
            passed += self._judge(part, rollout)[1].sum().item()
        return passed / (len(problems) * samples)

    def save(self, run: Run) -> None:
        """A checkpoint of this moment; UserError when the last update ruined the weights."""
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            raise self._diverged("a weight is not finite")
        extra = {"seconds": self.seconds, "pass_at_1_before": self.pass_at_1_before}
        run.save(self.step, self.model, self.optimizer.state_dict(), extra, keep=self.config.keep_checkpoints)

    def _finish(self, run: Run, pass_at_1: float) -> dict[str, Any]:
        summary = {
            "step": self.step,
            "pass_at_1_before": self.pass_at_1_before,
            "pass_at_1": pass_at_1,
            "seconds": self.seconds,
        }
        (run.folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        plot = run.plot(["pass_rate", "test_pass_rate"], "reward.png")
        run.say(f"held-out pass@1 {self.pass_at_1_before:.3f} -> {pass_at_1:.3f}; curve: {plot}")
        return summary

    def _require_context(self) -> None:
        prompts = {problem.prompt for problem in self.task.train + self.task.test}
        longest = max(len(self.tokenizer.encode(prompt)) for prompt in prompts)
        needed, context = longest + self.config.max_completion_length, self.model.config.context_length
        if needed > context:
            raise UserError(
                f"the longest prompt has {longest} tokens, with max_completion_length {needed} in all: longer than "
                f"the model's context_length {context}"
            )

    def _diverged(self, what: str) -> UserError:
        good = checkpoint.checkpoints(self.config.out)
        kept = f"the last good checkpoint is {good[-1]}" if good else "there is no checkpoint yet"
        return UserError(f"{what} at step {self.step}: {kept}; lower the learning rate")


def end_token(tokenizer: CharTokenizer | BPETokenizer, text: str | None) -> int | None:
    """The id of the token that ends a completion; UserError when `text` is not one token."""
    if text is None:
        return tokenizer.end_of_text
    ids = tokenizer.encode(text)
    if len(ids) != 1:
        raise UserError(f"eos is {text!r}, which is {len(ids)} tokens in this vocabulary, expected 1")
    return ids[0]


def _reference(source: Path, device: torch.device) -> Transformer:
    return without_adapters(checkpoint.load_model(source)[0]).to(device).requires_grad_(False)

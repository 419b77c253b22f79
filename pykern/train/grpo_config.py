"""The settings of GRPO."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pykern.train.grpo_loss import Reduction, ScaleRewards
from pykern.train.lora import LoraOptions
from pykern.train.tasks import ADDITION


@dataclass(kw_only=True)
class GRPOConfig:
    """From which policy, on what problems, and how. Raises ValueError naming the field that does not fit."""

    source: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """The run whose newest checkpoint is the policy to begin with."""
    out: Path | None = None
    """The run folder to make."""
    task: str = ADDITION
    """`addition`, or a file of JSON lines {"prompt": …, "answer": …}."""
    reward: Literal["exact_match", "number_format", "format_and_match"] = "exact_match"
    eos: str | None = "\n"
    """The text of the one token that ends a completion. None: the tokenizer's own end-of-text token."""
    lora: LoraOptions = field(default_factory=LoraOptions)
    """Adapters to train in place of the weights."""
    seed: int = 1337
    steps: int = 200
    prompts_per_step: int = 32
    group_size: int = 16
    """Completions of each prompt."""
    max_completion_length: int = 8
    temperature: float = 1.0
    """Of the sampler, and of the policy in the loss."""
    learning_rate: float = 2e-4
    min_learning_rate: float | None = None
    """Where half a cosine takes the learning rate by the last step. None: it stays."""
    warmup_steps: int = 0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.99
    grad_clip: float = 1.0
    """Largest norm of the gradient; 0 does not clip."""
    updates_per_rollout: int = 1
    """Optimiser steps on each batch of completions."""
    micro_batch_size: int = 512
    """Completions in one forward pass; it changes memory and nothing else."""
    reduction: Reduction = "dr_grpo"
    scale_rewards: ScaleRewards = "none"
    eps_low: float = 0.2
    eps_high: float = 0.2
    delta: float | None = None
    """Upper bound of the ratio where the clip does not hold it (advantage below 0). None: unbounded."""
    kl_coefficient: float = 0.0
    """Weight of the KL divergence to the policy of `--from`; 0 does without its forward pass."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 is autocast: weights, logits and log-probabilities stay in float32."""
    device: str = "auto"
    threads: int | None = None
    """CPU threads. None: torch's choice."""
    eval_interval: int = 50
    """Steps between two measurements of pass@1 on the held-out problems; the last step's takes all of them."""
    eval_problems: int = 256
    eval_samples: int = 4
    """Completions of each problem."""
    checkpoint_interval: int = 50
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        sizes = ("steps", "prompts_per_step", "group_size", "max_completion_length", "updates_per_rollout")
        intervals = ("eval_interval", "eval_problems", "eval_samples", "checkpoint_interval", "keep_checkpoints")
        for name in (*sizes, *intervals, "micro_batch_size", *(["threads"] if self.threads is not None else [])):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a positive integer")
        for name in ("learning_rate", "warmup_steps", "weight_decay", "grad_clip", "eps_high", "kl_coefficient"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}, expected a finite number of 0 or more")
        for name in ("beta1", "beta2", "eps_low"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a number in [0, 1)")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}, expected a finite number above 0")
        if self.min_learning_rate is not None and not 0 <= self.min_learning_rate <= self.learning_rate:
            raise ValueError(f"min_learning_rate is {self.min_learning_rate}, expected 0 to {self.learning_rate}")
        if self.delta is not None and self.delta < 1 + self.eps_high:
            raise ValueError(f"delta is {self.delta}, expected at least 1 + eps_high = {1 + self.eps_high}")

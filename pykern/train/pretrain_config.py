"""The settings of pretraining, and the presets that fill them in."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pykern.model import PRESETS, TransformerConfig
from pykern.train.errors import UserError
from pykern.train.lora import LoraOptions

FROM_TOKENIZER = 1
"""A `model.vocab_size` of 1, with which nothing could be learnt, stands for the tokenizer's own size."""


@dataclass(kw_only=True)
class PretrainConfig:
    """What is learnt, from what, and how. Raises ValueError naming the field that does not fit."""

    data: str = ""
    """A text file, a folder of them, `stdlib` (the sources of Python's own library), a name for the datasets library,
    or a folder of tokens that another run has prepared (RUN/data)."""
    source: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """A run whose newest checkpoint is the model to begin with. The model and the tokenizer are then that run's."""
    out: Path | None = None
    """The run folder to make."""
    tokenizer: Literal["char", "bpe"] = "char"
    bpe_vocab_size: int = 4096
    model: TransformerConfig = field(default_factory=lambda: PRESETS["nanogpt-cpu"](vocab_size=FROM_TOKENIZER))
    """The model; a vocab_size of 1 becomes the tokenizer's."""
    lora: LoraOptions = field(default_factory=LoraOptions)
    """Adapters to train in place of the weights; with --from."""
    context_length: int | None = None
    """Tokens in a training window. None: as many as the model takes."""
    documents: bool = False
    """A window is cut where the end-of-text token ends a document: tokens attend inside their own document only, and
    positions count from its start. Needs a tokenizer with such a token (bpe)."""
    seed: int = 1337
    steps: int = 2000
    batch_size: int = 12
    """Windows in a batch."""
    accumulation: int = 1
    """Batches whose gradients are averaged for one step."""
    learning_rate: float = 1e-3
    min_learning_rate: float = 1e-4
    warmup_steps: int = 100
    decay_steps: int | None = None
    """The step at which the cosine has come down to min_learning_rate. None: the last."""
    weight_decay: float = 0.1
    """Decoupled from the gradient, and on matrices only: norms and biases do not decay."""
    beta1: float = 0.9
    beta2: float = 0.99
    grad_clip: float = 1.0
    """Largest norm of the gradient; 0 does not clip."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 is autocast: the weights stay in float32."""
    device: str = "auto"
    threads: int | None = None
    """CPU threads. None: torch's choice."""
    compile: bool = False
    """Run the model through torch.compile."""
    eval_interval: int = 250
    """Steps between two validation losses; the last step's is over the whole validation split."""
    eval_windows: int = 240
    """Windows that each validation loss but the last is over, evenly spread, the same ones each time."""
    checkpoint_interval: int = 500
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        positive = ("steps", "batch_size", "accumulation", "eval_interval", "eval_windows", "checkpoint_interval")
        optional = ("context_length", "decay_steps", "threads")
        for name in (*positive, "keep_checkpoints", *(n for n in optional if getattr(self, n) is not None)):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a positive integer")
        for name in ("learning_rate", "min_learning_rate", "warmup_steps", "weight_decay", "grad_clip"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}, expected a finite number of 0 or more")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a number in [0, 1)")

    @property
    def window(self) -> int:
        """Tokens in a context window; UserError when the model cannot take that many."""
        if self.context_length is None:
            return self.model.context_length
        if self.context_length > self.model.context_length:
            raise UserError(
                f"context_length is {self.context_length}, longer than the model's {self.model.context_length}: "
                "shorten it, or set model.context_length as well"
            )
        return self.context_length


def preset(name: str) -> PretrainConfig:
    """The settings of `name`: the model of that name and a recipe to train it, nanoGPT's for nanoGPT's models."""
    if name not in PRESETS:
        raise UserError(f"there is no preset {name!r}; there are {', '.join(PRESETS)}")
    recipes = {
        "nanogpt": {
            "tokenizer": "bpe",
            "bpe_vocab_size": 50257,
            "steps": 600_000,
            "accumulation": 40,
            "learning_rate": 6e-4,
            "min_learning_rate": 6e-5,
            "warmup_steps": 2000,
            "beta2": 0.95,
            "precision": "bfloat16",
            "eval_interval": 2000,
            "eval_windows": 2400,
            "checkpoint_interval": 2000,
        },
        "nanogpt-char": {"steps": 5000, "batch_size": 64, "eval_windows": 1280},
        "mistral-tiny": {"tokenizer": "bpe", "batch_size": 16},
        "mixtral-tiny": {"tokenizer": "bpe", "batch_size": 16},
    }
    model = PRESETS[name](vocab_size=FROM_TOKENIZER)
    return dataclasses.replace(PretrainConfig(model=model), **recipes.get(name, {}))

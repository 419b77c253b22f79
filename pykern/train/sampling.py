"""`pykern generate`: text from the model of a run."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from pykern.model import generate as continue_prompts
from pykern.train.checkpoint import load_model
from pykern.train.errors import UserError, first_line
from pykern.train.pretrain import choose_device
from pykern.train.tokenizer import BPETokenizer, CharTokenizer


@dataclass(kw_only=True)
class GenerateConfig:
    """Continue a prompt with the model of a run."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run folder."""
    prompt: str | None = None
    """None: a line break, or the first entry of a vocabulary that has none."""
    max_new_tokens: int = 200
    """May go beyond the model's context: each time it is full, the later half of it is what goes on."""
    samples: int = 1
    temperature: float = 0.8
    """0 takes the likeliest token each time."""
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    device: str = "auto"


def generate(config: GenerateConfig) -> list[str]:
    """Print and return `config.samples` continuations, the prompt included."""
    model, tokenizer, shape = load_model(config.run)
    prompt = _line_break(tokenizer) if config.prompt is None else tokenizer.encode(config.prompt)
    if not prompt:
        raise UserError("the prompt is empty")
    if len(prompt) >= shape.context_length:
        raise UserError(
            f"the prompt has {len(prompt)} tokens and the model's context {shape.context_length}: "
            f"at most {shape.context_length - 1} leave room for an answer"
        )
    if config.max_new_tokens < 0 or config.samples < 1:
        raise UserError("max_new_tokens must be 0 or more, and samples 1 or more")
    device = choose_device(config.device)
    model.to(device)
    tokens = torch.tensor([prompt] * config.samples, device=device)
    end = len(prompt) + config.max_new_tokens
    seed = torch.seed() if config.seed is None else config.seed
    while tokens.shape[1] < end:
        kept = tokens[:, -(shape.context_length // 2) :] if tokens.shape[1] >= shape.context_length else tokens
        count = min(end - tokens.shape[1], shape.context_length - kept.shape[1])
        try:
            # The seed moves on with the text, or each window would repeat the draws of the one before it.
            longer = continue_prompts(
                model,
                kept,
                count,
                temperature=config.temperature,
                top_k=config.top_k,
                top_p=config.top_p,
                seed=(seed + tokens.shape[1] - len(prompt)) % (1 << 63),
            )
        except ValueError as error:
            raise UserError(first_line(error)) from None
        tokens = torch.cat([tokens, longer[:, kept.shape[1] :]], dim=1)
    # Padded rows of a vocabulary have no text; they were never trained towards and are hardly ever drawn.
    texts = [tokenizer.decode([i for i in row if i < tokenizer.vocab_size]) for row in tokens.tolist()]
    for i, text in enumerate(texts):
        if i:
            print("-" * 40)
        sys.stdout.write(text + "\n")
    return texts


def _line_break(tokenizer: CharTokenizer | BPETokenizer) -> list[int]:
    try:
        return tokenizer.encode("\n")
    except UserError:
        return [0]

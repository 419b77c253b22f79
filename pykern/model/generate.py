"""Sampling from a model."""

import math

import torch
from torch import Tensor

from pykern.model.cache import KVCache
from pykern.model.transformer import Transformer


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    eos: int | None = None,
) -> Tensor:
    """Continues each prompt, with a key-value cache; the model's train or eval mode is as before afterwards.

    Args:
        prompts: int64 (B, T) with T ≥ 1. All prompts of a call have one length: group prompts by length and call once
            for each, as GRPO does.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: sample among the k likeliest tokens.
        top_p: sample among the fewest likeliest tokens whose probabilities reach this sum (nucleus sampling,
            arXiv 1904.09751), after top_k.
        seed: of the draws; None uses torch's global generator.
        eos: a sequence ends with this token, which is kept; what follows it is filled with it.

    Returns:
        int64 (B, T + n): prompts and continuations; n is max_new_tokens, or less when every sequence has ended.

    Raises:
        ValueError: an argument out of range, or T + max_new_tokens beyond the model's context_length.
    """
    _check(model, prompts, max_new_tokens, temperature, top_k, top_p, eos)
    batch, length = prompts.shape
    generator = None if seed is None else torch.Generator(prompts.device).manual_seed(seed)
    tokens = torch.cat([prompts, prompts.new_empty(batch, max_new_tokens)], dim=1)
    finished = torch.zeros(batch, dtype=torch.bool, device=prompts.device)
    cache = KVCache(model.config.num_layers, length + max_new_tokens)
    was_training = model.training
    model.eval()
    try:
        for end in range(length, length + max_new_tokens):
            hidden = model.hidden(tokens[:, cache.length : end], cache=cache)
            choice = sample(model.logits(hidden[:, -1], fp32=True), temperature, top_k, top_p, generator)
            if eos is not None:
                choice = torch.where(finished, eos, choice)
                finished |= choice == eos
            tokens[:, end] = choice
            if eos is not None and finished.all():
                return tokens[:, : end + 1]
    finally:
        model.train(was_training)
    return tokens


def sample(
    logits: Tensor,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One token id a row of logits (B, V): int64 (B,); arguments as for `generate`."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p is not None and top_p < 1:
        ranked, order = logits.softmax(-1).sort(descending=True)
        # A token stays while those before it have not reached top_p, so the likeliest always stays.
        cut = ranked.cumsum(-1) - ranked >= top_p
        logits = logits.masked_fill(torch.zeros_like(cut).scatter(-1, order, cut), -math.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def _check(
    model: Transformer,
    prompts: Tensor,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    eos: int | None,
) -> None:
    context, vocab_size = model.config.context_length, model.config.vocab_size
    if prompts.dim() != 2 or prompts.shape[1] == 0 or prompts.dtype != torch.int64:
        raise ValueError(
            f"prompts is {prompts.dtype} {tuple(prompts.shape)}, expected int64 (batch, length) with at least one token"
        )
    if max_new_tokens < 0 or prompts.shape[1] + max_new_tokens > context:
        raise ValueError(
            f"max_new_tokens is {max_new_tokens}, expected 0 to {context - prompts.shape[1]}: prompts have "
            f"{prompts.shape[1]} tokens and the model's context_length is {context}"
        )
    if prompts.numel() and not 0 <= int(prompts.min()) <= int(prompts.max()) < vocab_size:
        raise ValueError(f"prompts holds ids {prompts.min()} to {prompts.max()}, expected 0 to {vocab_size - 1}")
    if not temperature >= 0 or math.isinf(temperature):
        raise ValueError(f"temperature is {temperature}, expected a finite number of 0 or more")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}, expected 1 or more")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}, expected a number in (0, 1]")
    if eos is not None and not 0 <= eos < vocab_size:
        raise ValueError(f"eos is {eos}, expected a token id from 0 to {vocab_size - 1}")

"""Sampling from a model."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pykern.model.cache import KVCache
from pykern.model.sequences import Packed
from pykern.model.transformer import Transformer


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: Tensor | Sequence[Tensor | Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    eos: int | None = None,
    batch_invariant: bool = False,
) -> Tensor | list[Tensor]:
    """Continues each prompt, with a key-value cache; the model's train or eval mode is as before afterwards.

    A sequence that has ended leaves the batch: no more work is done for it, and its pages of the cache serve others.

    Args:
        prompts: int64 (B, T) with T ≥ 1, or B prompts of any lengths ≥ 1, each a list of token ids or int64 (T,).
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: sample among the k likeliest tokens.
        top_p: sample among the fewest likeliest tokens whose probabilities reach this sum (nucleus sampling,
            arXiv 1904.09751), after top_k.
        seed: of the draws; None uses torch's global generator.
        eos: a sequence ends with this token, which is kept.
        batch_invariant: attention gives a token the same bits whatever else is in the batch, and the bits that it gets
            in training on packed sequences; slower where there are few sequences and many keys. It holds for attention
            only: torch's matrix products may round differently in a batch of another size.

    Returns:
        For prompts (B, T), int64 (B, T + n): prompts and continuations, filled with eos behind the end of each; n is
        max_new_tokens, or less when every sequence has ended. For a list, B int64 tensors: each prompt with its
        continuation and no filling.

    Raises:
        ValueError: an argument out of range, or prompt and max_new_tokens beyond the model's context_length.
    """
    _check(model, max_new_tokens, temperature, top_k, top_p, eos)
    given, lengths = _end_to_end(prompts, model, max_new_tokens)
    batch, device = len(lengths), given.device
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    longest = prompts.shape[1] if isinstance(prompts, Tensor) else max(lengths.tolist(), default=0)
    place = torch.arange(longest + max_new_tokens)
    tokens = given.new_full((batch, len(place)), 0 if eos is None else eos)
    tokens[(place < lengths[:, None]).to(device)] = given
    ends, alive = lengths.clone(), torch.arange(batch)  # on the CPU: which sequences go on, and where they are
    cache = KVCache(model.config, batch, batch_invariant=batch_invariant)
    piece, packed = given, Packed.of(lengths, device)
    was_training = model.training
    model.eval()
    try:
        for _ in range(max_new_tokens):
            hidden = model.hidden(piece, packed=packed, cache=cache)
            hidden = hidden[:, -1] if packed is None else hidden[packed.cu_seqlens[1:].long() - 1]
            rows, uniform = alive.to(device), None
            if temperature > 0:
                # A number for those that have ended too: what a sequence draws does not depend on others' ends.
                uniform = torch.rand(batch, generator=generator, dtype=torch.float64, device=device)[rows]
            choice = sample(model.logits(hidden, fp32=True), uniform, temperature, top_k, top_p)
            tokens[rows, ends[alive].to(device)] = choice
            ends[alive] += 1
            if eos is not None:
                going = (choice != eos).cpu()
                if not going.all():
                    alive, choice = alive[going], choice[going.to(device)]
                    if len(alive) == 0:
                        break
                    cache.keep(going)
            piece, packed = choice[:, None], None
    finally:
        model.train(was_training)
    if isinstance(prompts, Tensor):
        return tokens[:, : max(ends.tolist(), default=longest)]
    return list(tokens[(place < ends[:, None]).to(device)].split(ends.tolist()))


def sample(
    logits: Tensor, uniform: Tensor | None, temperature: float, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """One token id a row of logits (B, V): int64 (B,). The rest as for `generate`.

    The token is where the sum of the probabilities, from token 0 on, passes the row's number in `uniform`, fp64 (B,)
    in [0, 1): one draw where torch.multinomial makes V. None will do at temperature 0.
    """
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
    # In fp64, or the sum over a large vocabulary would lose the unlikely tokens.
    reached = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    choice = torch.searchsorted(reached, uniform[:, None] * reached[:, -1:], right=True)[:, 0]
    return choice.clamp(max=logits.shape[-1] - 1)  # rounding may bring the product up to the sum


def _end_to_end(
    prompts: Tensor | Sequence[Tensor | Sequence[int]], model: Transformer, max_new_tokens: int
) -> tuple[Tensor, Tensor]:
    """The prompts' tokens (total,), and their lengths (B,) on the CPU."""
    wanted = "with at least one token"
    if isinstance(prompts, Tensor):
        if prompts.dim() != 2 or prompts.shape[1] == 0 or prompts.dtype != torch.int64:
            got = f"{prompts.dtype} {tuple(prompts.shape)}"
            raise ValueError(f"prompts is {got}, expected int64 (batch, length) {wanted}")
        lengths, given = torch.full((len(prompts),), prompts.shape[1]), prompts.flatten()
    else:
        rows = [torch.as_tensor(prompt) for prompt in prompts]
        for i, row in enumerate(rows):
            if row.dim() != 1 or row.numel() == 0 or row.dtype != torch.int64:
                got = f"{row.dtype} {tuple(row.shape)}"
                raise ValueError(f"prompts[{i}] is {got}, expected int64 (length,) {wanted}")
        lengths = torch.tensor([row.numel() for row in rows], dtype=torch.int64)
        device = model.embedding.weight.device
        given = torch.cat(rows).to(device) if rows else torch.empty(0, dtype=torch.int64, device=device)
    context, vocab_size = model.config.context_length, model.config.vocab_size
    longest = max(lengths.tolist(), default=0)
    if longest + max_new_tokens > context:
        raise ValueError(
            f"max_new_tokens is {max_new_tokens}, expected 0 to {context - longest}: the longest prompt has {longest} "
            f"tokens and the model's context_length is {context}"
        )
    if given.numel() and not 0 <= int(given.min()) <= int(given.max()) < vocab_size:
        raise ValueError(f"prompts holds ids {given.min()} to {given.max()}, expected 0 to {vocab_size - 1}")
    return given, lengths


def _check(
    model: Transformer,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    eos: int | None,
) -> None:
    vocab_size = model.config.vocab_size
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, expected 0 or more")
    if not temperature >= 0 or math.isinf(temperature):
        raise ValueError(f"temperature is {temperature}, expected a finite number of 0 or more")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}, expected 1 or more")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}, expected a number in (0, 1]")
    if eos is not None and not 0 <= eos < vocab_size:
        raise ValueError(f"eos is {eos}, expected a token id from 0 to {vocab_size - 1}")

"""Completions sampled from a policy, and what the policy thinks of them.

Tokens stay tokens: text is made of them for the reward and never made tokens again. Prompts and completions of any
lengths lie end to end, without padding. The end-of-sequence token belongs to the completion.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pykern.model import Packed, Transformer, generate
from pykern.model.sequences import ragged


@dataclass(frozen=True)
class Rollout:
    """N completions, each behind its prompt; M below is the number of all completions' tokens."""

    tokens: Tensor
    """(total,) int64: prompt, completion, prompt, completion, …"""
    prompt_lengths: Tensor
    """(N,) int64, on the CPU as all but the tokens."""
    lengths: Tensor
    """(N,) int64: tokens of each completion, its end-of-sequence token included."""
    ended: Tensor
    """(N,) bool: whether a completion came to its end-of-sequence token."""

    @cached_property
    def completions(self) -> Tensor:
        """(M,) tokens of the completions."""
        total = self.prompt_lengths + self.lengths
        return self.tokens[_rows(total, self.prompt_lengths, total, self.tokens.device)]

    @cached_property
    def inputs(self) -> tuple[Tensor, Packed]:
        """What the policy reads: all tokens but the last of each completion, which predicts nothing."""
        total = self.prompt_lengths + self.lengths
        rows = _rows(total, torch.zeros_like(total), total - 1, self.tokens.device)
        return self.tokens[rows], Packed.of(total - 1, self.tokens.device)

    @cached_property
    def sources(self) -> Tensor:
        """(M,) rows of the inputs from which the policy drew the completions' tokens."""
        inputs = self.prompt_lengths + self.lengths - 1
        return _rows(inputs, self.prompt_lengths - 1, inputs, self.tokens.device)

    def completion_ids(self) -> list[list[int]]:
        """The tokens that a reward judges: those of each completion, without its end-of-sequence token."""
        rows = self.completions.cpu().split(self.lengths.tolist())
        return [row.tolist()[:-1] if ended else row.tolist() for row, ended in zip(rows, self.ended, strict=True)]

    def split(self, count: int) -> Iterator[Rollout]:
        """Pieces of at most `count` completions."""
        sizes = [int(part.sum()) for part in (self.prompt_lengths + self.lengths).split(count)]
        rows = [x.split(count) for x in (self.prompt_lengths, self.lengths, self.ended)]
        return (Rollout(*piece) for piece in zip(self.tokens.split(sizes), *rows, strict=True))


def _rows(lengths: Tensor, first: Tensor, end: Tensor, device: torch.device) -> Tensor:
    """Of sequences of these lengths that lie end to end, the rows whose place in theirs is from `first` to `end`."""
    sequence, place = ragged(lengths)
    inside = (place >= first[sequence]) & (place < end[sequence])
    return inside.nonzero()[:, 0].to(device, non_blocking=True)


def sample_rollouts(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    group_size: int,
    max_completion_length: int,
    *,
    temperature: float,
    eos: int | None,
    seed: int,
) -> Rollout:
    """`group_size` completions of each prompt (token ids), those of a prompt one behind the other."""
    rows = [row for row in map(torch.tensor, prompts) for _ in range(group_size)]
    found = generate(model, rows, max_completion_length, temperature=temperature, seed=seed, eos=eos)
    tokens = torch.cat(found)
    total, prompt_lengths = (torch.tensor([row.numel() for row in several]) for several in (found, rows))
    last = tokens[(total.cumsum(0) - 1).to(tokens.device)].cpu()
    return Rollout(tokens, prompt_lengths, total - prompt_lengths, last == (-1 if eos is None else eos))


def completion_logits(model: Transformer, rollout: Rollout) -> Tensor:
    """(M, V) fp32 logits from which the policy drew each token of the completions."""
    tokens, packed = rollout.inputs
    hidden = model.hidden(tokens, packed=packed)
    return model.logits(hidden.index_select(0, rollout.sources), fp32=True)

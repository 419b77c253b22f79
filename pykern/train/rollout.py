"""Completions sampled from a policy, and what the policy thinks of them.

Tokens stay tokens: text is made of them for the reward and never made tokens again. A completion is masked by its
length, counted when it was sampled; no token id is padding, and the end-of-sequence token belongs to the completion.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pykern.model import Transformer, generate


@dataclass(frozen=True)
class Rollout:
    """Completions of prompts of one length, `group` in a row for each prompt."""

    tokens: Tensor
    """(N, P + C) int64: prompt, then completion, then filling."""
    prompt_length: int
    lengths: Tensor
    """(N,) int64: tokens of each completion, its end-of-sequence token included."""
    ended: Tensor
    """(N,) bool: whether a completion came to its end-of-sequence token."""
    samples: Tensor
    """(N,) int64: prompt · group size + place in the group, the prompt counted among all those sampled together."""

    @property
    def completions(self) -> Tensor:
        return self.tokens[:, self.prompt_length :]

    @property
    def mask(self) -> Tensor:
        """(N, C) bool"""
        return torch.arange(self.completions.shape[1], device=self.tokens.device) < self.lengths[:, None]

    def completion_ids(self) -> list[list[int]]:
        """The tokens that a reward judges: those of each completion, without its end-of-sequence token."""
        counts = (self.lengths - self.ended.long()).tolist()
        return [row[:count] for row, count in zip(self.completions.tolist(), counts, strict=True)]

    def split(self, rows: int) -> Iterator[Rollout]:
        """Pieces of at most `rows` rows, with columns that none of them uses cut off."""
        for i in range(0, len(self.tokens), rows):
            lengths = self.lengths[i : i + rows]
            end = self.prompt_length + int(lengths.max())
            part = slice(i, i + rows)
            yield Rollout(self.tokens[part, :end], self.prompt_length, lengths, self.ended[part], self.samples[part])


def sample_rollouts(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    group_size: int,
    max_completion_length: int,
    *,
    temperature: float,
    eos: int | None,
    seed: int,
) -> list[Rollout]:
    """`group_size` completions of each prompt (token ids): one Rollout for each length of prompt."""
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        by_length[len(prompt)].append(index)
    device = model.embedding.weight.device
    rollouts = []
    for length, indices in sorted(by_length.items()):
        rows = torch.tensor([prompts[i] for i in indices], device=device).repeat_interleave(group_size, dim=0)
        tokens = generate(model, rows, max_completion_length, temperature=temperature, seed=seed + length, eos=eos)
        lengths, ended = completion_lengths(tokens[:, length:], eos)
        first = torch.tensor(indices, device=device) * group_size
        samples = (first[:, None] + torch.arange(group_size, device=device)).flatten()
        rollouts.append(Rollout(tokens, length, lengths, ended, samples))
    return rollouts


def completion_lengths(completions: Tensor, eos: int | None) -> tuple[Tensor, Tensor]:
    """(N, C) tokens -> (N,) tokens up to and with the first end-of-sequence token, and whether there is one."""
    is_end = torch.zeros_like(completions, dtype=torch.bool) if eos is None else completions == eos
    before = is_end.cumsum(dim=1) == 0
    ended = is_end.any(dim=1)
    return before.sum(dim=1) + ended, ended


def completion_logits(model: Transformer, rollout: Rollout) -> Tensor:
    """(N, C, V) fp32 logits from which the policy drew each token of the completions."""
    hidden = model.hidden(rollout.tokens[:, :-1])  # the last token predicts nothing
    return model.logits(hidden[:, rollout.prompt_length - 1 :], fp32=True)

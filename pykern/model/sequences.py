"""How the tokens of a batch form sequences: what a layer needs to know of it to attend, made once for all layers.

There are three kinds: `Rectangle`, `Packed`, and `cache.Cached`, which goes on from a cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

import pykern.ops as ops

Window = tuple[int, int] | None


class Sequences(Protocol):
    positions: Tensor
    """int64, of each token in its sequence; it broadcasts against the tokens."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, layer: int, window: Window, dropout_p: float
    ) -> Tensor:
        """Causal attention on (tokens' shape, heads, E)."""


@dataclass(frozen=True)
class Rectangle:
    """Tokens (B, T): sequences of one length."""

    positions: Tensor
    """(T,) int64"""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, layer: int, window: Window, dropout_p: float
    ) -> Tensor:
        out = ops.attention(
            query.transpose(1, 2),  # (B, H, T, E)
            key.transpose(1, 2),
            value.transpose(1, 2),
            dropout_p=dropout_p,
            is_causal=True,
            enable_gqa=query.shape[2] != key.shape[2],
            window=window,
        )
        return out.transpose(1, 2)


@dataclass(frozen=True)
class Packed:
    """Tokens (total,): sequences of any lengths, end to end. No token sees another sequence; positions restart."""

    lengths: Tensor
    """(B,) int64 on the CPU"""
    cu_seqlens: Tensor
    """(B + 1,) int32, where each sequence begins, and the end of the last"""
    max_seqlen: int
    positions: Tensor
    """(total,) int64"""

    @classmethod
    def of(cls, lengths: Tensor | Sequence[int], device: torch.device | str | None = None) -> Packed:
        """Sequences of these lengths, which the host knows: no device is asked."""
        lengths = torch.as_tensor(lengths, dtype=torch.int64, device="cpu")
        boundaries = F.pad(lengths.cumsum(0), (1, 0)).int()
        positions = ragged(lengths)[1]
        longest = int(lengths.max()) if len(lengths) else 0
        return cls(lengths, boundaries.to(device, non_blocking=True), longest, positions.to(device, non_blocking=True))

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, layer: int, window: Window, dropout_p: float
    ) -> Tensor:
        return ops.attention_varlen(
            query,
            key,
            value,
            self.cu_seqlens,
            self.cu_seqlens,
            self.max_seqlen,
            self.max_seqlen,
            dropout_p=dropout_p,
            is_causal=True,
            window=window,
        )


def ragged(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Of sequences that lie end to end, the sequence of each item and its place there: two int64 (total,)."""
    sequence = torch.repeat_interleave(lengths)
    return sequence, torch.arange(len(sequence)) - (lengths.cumsum(0) - lengths)[sequence]

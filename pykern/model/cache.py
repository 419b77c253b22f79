"""The key-value cache of incremental decoding, in pages."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import pykern.ops as ops
from pykern.model.config import TransformerConfig
from pykern.model.sequences import Packed, Window, ragged
from pykern.ops.attention_decode import MAX_LENGTH


class KVCache:
    """What the layers of a model know of the tokens before; pass it to the model with each new piece of them.

    Each layer keeps keys and values in pages (blocks, block_size, kv heads, E). Sequence b has its positions from
    p · block_size on in page `block_table[b, p]`, the same for all layers. Pages are added when sequences need them:
    exactly as many, or half of those there are if that is more, so that little is copied as it grows. dtype
    (autocast's, where active) and device are those of the first keys.

    Args:
        config: the model's.
        batch: number of sequences.
        block_size: positions in a page.
        batch_invariant: attend by `attention_decode(…, batch_invariant=True)`.
    """

    def __init__(
        self, config: TransformerConfig, batch: int, *, block_size: int = 16, batch_invariant: bool = False
    ) -> None:
        self.block_size, self.batch_invariant = block_size, batch_invariant
        self.context_length = config.context_length
        self.blocks = 0
        self.lengths = torch.zeros(batch, dtype=torch.int64)
        """(B,) on the CPU: the host knows every length, so none is ever read back."""
        self._held = torch.zeros(batch, dtype=torch.int64)  # pages of each sequence
        self._free = torch.empty(0, dtype=torch.int64)
        self._table = torch.empty(batch, 0, dtype=torch.int64)
        self.block_table = self._table.int()  # on the device
        self._layers: list[tuple[Tensor | None, Tensor | None]] = [(None, None)] * config.num_layers

    def append(self, tokens: Tensor, packed: Packed | None = None) -> Cached:
        """Makes room for (B, T) tokens or packed ones, and counts them in; their keys are `Cached.attend`'s to write.

        Raises:
            ValueError: not the cache's number of sequences, or a sequence grows beyond the context.
        """
        batch, size, device, fresh = len(self.lengths), self.block_size, tokens.device, self.blocks == 0
        if (given := len(tokens if packed is None else packed.lengths)) != batch:
            raise ValueError(f"tokens has {given} sequences, and the cache {batch}")
        start, end = self.lengths, self.lengths + (tokens.shape[1] if packed is None else packed.lengths)
        longest = int(end.max()) if batch else 0
        if longest > self.context_length:
            raise ValueError(
                f"tokens reach position {longest}, beyond the model's context_length {self.context_length}"
            )
        self._reserve((end + (size - 1)) // size, device)
        self.lengths = end
        if packed is None:
            positions = start[:, None] + torch.arange(tokens.shape[1])
            pages = self._table.gather(1, positions // size)
            if fresh or tokens.shape[1] > MAX_LENGTH:
                packed = Packed.of([tokens.shape[1]] * batch, device)
        else:
            sequence, place = ragged(packed.lengths)
            positions = start[sequence] + place
            pages = self._table[sequence, positions // size]
        return Cached(
            cache=self,
            positions=positions.to(device, non_blocking=True),
            rows=(pages * size + positions % size).flatten().to(device, non_blocking=True),
            lengths=end.int().to(device, non_blocking=True),
            longest=longest,
            queries=packed,
            fresh=fresh,
        )

    def keep(self, going: Tensor) -> None:
        """Drops the sequences that are False in `going`, bool (B,) on the CPU; others will use their pages."""
        freed = self._table[~going][ragged(self._held[~going])]
        self._free = torch.cat([self._free, freed])
        self._table, self._held, self.lengths = self._table[going], self._held[going], self.lengths[going]
        self.block_table = self._table.int().to(self.block_table.device, non_blocking=True)

    def _reserve(self, needed: Tensor, device: torch.device) -> None:
        """Sees to it that the sequences hold so many pages, (B,)."""
        if torch.equal(needed, self._held):
            return
        sequence, place = ragged(needed - self._held)
        if (lacking := len(sequence) - len(self._free)) > 0:
            added = max(lacking, self.blocks // 2)
            self._free = torch.cat([self._free, torch.arange(self.blocks, self.blocks + added)])
            self.blocks += added
        self._table = F.pad(self._table, (0, max(0, int(needed.max()) - self._table.shape[1])))
        self._table[sequence, self._held[sequence] + place] = self._free[: len(sequence)]
        self._free, self._held = self._free[len(sequence) :], needed
        self.block_table = self._table.int().to(device, non_blocking=True)

    def write(self, layer: int, key: Tensor, value: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Puts keys and values (…, kv heads, E) into these rows of the pages; returns all pages of the layer."""
        keys, values = self._layers[layer]
        self._layers[layer] = self._written(keys, key, rows), self._written(values, value, rows)
        return self._layers[layer]

    def _written(self, pages: Tensor | None, x: Tensor, rows: Tensor) -> Tensor:
        if pages is None or pages.shape[0] < self.blocks:
            larger = x.new_empty(self.blocks, self.block_size, *x.shape[-2:])
            if pages is not None:
                larger[: pages.shape[0]] = pages
            pages = larger
        pages.flatten(0, 1).index_copy_(0, rows, x.flatten(0, -3))
        return pages


@dataclass(frozen=True)
class Cached:
    """Tokens, (B, T) or packed, that come after what a cache holds. For inference: attention drops no weights."""

    cache: KVCache
    positions: Tensor
    """int64, in the shape of the tokens"""
    rows: Tensor
    """(tokens,) int64, where each token's keys belong in the pages"""
    lengths: Tensor
    """(B,) int32, keys of each sequence, these tokens' included"""
    longest: int
    queries: Packed | None
    """None for a few tokens, (B, T), that attention_decode takes."""
    fresh: bool
    """Whether the cache was empty before."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, layer: int, window: Window, dropout_p: float
    ) -> Tensor:
        pages = self.cache.write(layer, key, value, self.rows)
        if self.queries is None:
            return ops.attention_decode(
                query,
                *pages,
                self.lengths,
                block_table=self.cache.block_table,
                window=window,
                batch_invariant=self.cache.batch_invariant,
            )
        packed = [x.flatten(0, -3) for x in (query, key, value)]
        if self.fresh:
            out = self.queries.attend(*packed, layer=layer, window=window, dropout_p=0.0)
        else:
            out = ops.attention_varlen(
                packed[0],
                *pages,
                self.queries.cu_seqlens,
                self.queries.cu_seqlens,  # not read: the lengths say how many keys there are
                self.queries.max_seqlen,
                self.longest,
                is_causal=True,
                window=window,
                seqused_k=self.lengths,
                block_table=self.cache.block_table,
            )
        return out.view(query.shape)

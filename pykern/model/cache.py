"""The key-value cache of incremental decoding."""

import torch
from torch import Tensor


class LayerCache:
    """Keys and values of one layer, (B, capacity, kv heads, head width), allocated by the first `append`."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Adds (B, T, kv heads, head width); the first call fixes B, dtype (autocast's, where active) and device."""
        if self.keys is None:
            self.keys = keys.new_empty(keys.shape[0], self.capacity, *keys.shape[2:])
            self.values = values.new_empty(values.shape[0], self.capacity, *values.shape[2:])
        end = self.length + keys.shape[1]
        self.keys[:, self.length : end] = keys
        self.values[:, self.length : end] = values
        self.length = end

    def lengths(self) -> Tensor:
        """(B,) int32: keys present in each sequence."""
        return torch.full(self.keys.shape[:1], self.length, dtype=torch.int32, device=self.keys.device)


class KVCache:
    """One `LayerCache` a layer: `KVCache(num_layers, capacity)`, passed to the model with each new piece of tokens."""

    def __init__(self, num_layers: int, capacity: int) -> None:
        self.capacity = capacity
        self.layers = [LayerCache(capacity) for _ in range(num_layers)]

    @property
    def length(self) -> int:
        return self.layers[-1].length

"""Philox4x32-10, the counter-based generator behind every dropout here.

Salmon, Moraes, Dror, Shaw: Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011, doi:10.1145/2063384.2063405.

An element is dropped or kept by its own logical place, so every backend and every recomputation drops the same ones,
whatever the tiling, the strides or the number of threads. One call of the generator decides four neighbours in a row.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Ten rounds on int64 tensors that hold 32-bit words; they broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The 64-bit product wraps to a negative int64 but its bits are right; the mask undoes the sign extension.
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((second >> 32) & _LOW) ^ c1 ^ k0,
            second & _LOW,
            ((first >> 32) & _LOW) ^ c3 ^ k1,
            first & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def draw_rng(device: torch.device) -> Tensor:
    """Seed and offset for one call, from torch's default generator of the device: reproducible under manual_seed."""
    return torch.randint(torch.iinfo(torch.int64).max, (2,), dtype=torch.int64, device=device)


def keep_mask(rng: Tensor, row: Tensor, columns: int, p: float) -> Tensor:
    """Which elements survive dropout with probability p.

    Element `column` of a row is decided by word `column` % 4 of counter `row` · ⌈columns / 4⌉ + `column` // 4: it is
    kept where that word is at least p · 2³².

    Args:
        rng: (2,) int64, the seed (the key, low word first) and the offset (the counter's upper two words, low first).
        row: int64, any shape: each row's logical index.
        columns: how many elements a row has.
        p: probability of being dropped.

    Returns:
        bool, (*row.shape, columns).
    """
    seed, offset = rng[0], rng[1]
    groups = (columns + 3) // 4
    index = row.unsqueeze(-1) * groups + torch.arange(groups, device=row.device)
    counter = (index & _LOW, (index >> 32) & _LOW, offset & _LOW, (offset >> 32) & _LOW)
    words = torch.stack(philox(counter, (seed & _LOW, (seed >> 32) & _LOW)), -1)
    return words.flatten(-2)[..., :columns] >= int(p * 2**32)


def row_index(shape: Sequence[int], device: torch.device) -> Tensor:
    """The row-major index of every row of a tensor of that shape, its last dimension left out."""
    count = 1
    for size in shape[:-1]:
        count = count * size
    return torch.arange(count, device=device).reshape(shape[:-1])

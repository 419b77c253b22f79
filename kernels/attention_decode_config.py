"""How decode attention is cut: the tiles of attention_decode.py on each device, and the parts of a sequence's keys."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch


@dataclass(frozen=True)
class Config:
    """For heads of up to `size` elements and up to `rows` rows a tile: its keys, and how deep they are prefetched."""

    size: int
    rows: int
    keys: int
    warps: int
    stages: int = 3


# The first that fits is taken, or with too many rows the last of that size: no registers spill. In 16 bits a stage of
# few rows is 32 KiB of keys and values, so that two programs share a multiprocessor, and one loads while the other
# computes. More rows leave registers for half as many keys.
_CONFIGS = {
    "16 bits": [
        *(Config(64, 32, 128, 4), Config(64, 128, 64, 8)),
        *(Config(128, 32, 64, 4), Config(128, 64, 32, 8)),
        *(Config(256, 16, 32, 4), Config(256, 32, 16, 4)),
    ],
    # Warp groups of sm_90 read queries and keys from shared memory, which leaves registers for more rows.
    "16 bits, warp groups": [
        *(Config(64, 32, 128, 4), Config(64, 128, 64, 8)),
        *(Config(128, 32, 64, 4), Config(128, 128, 32, 8)),
        *(Config(256, 16, 32, 4), Config(256, 64, 16, 8)),
    ],
    "32 bits": [Config(256, 16, 32, 4), Config(256, 32, 32, 8)],
    # Accesses of less than 16 bytes: one address each.
    "narrow": [Config(256, 16, 16, 8)],
}
INTERPRETED = Config(256, 32, 16, 1)  # small, so that short tests cross several blocks and parts
# Without tensor cores a product takes its operands in registers: so much of the head size at a time.
FP32_PART = 32
# A part has at least so many keys: for fewer, launching and adding up cost more than is gained.
LEAST_KEYS = 256
PROGRAMS = 2  # on a multiprocessor at once
COMBINED = 16  # parts that are added at once


def decode_config(size: int, rows: int, dtype: torch.dtype, wide: bool, device: torch.device) -> Config:
    """`rows`: tokens times query heads of a key head; `wide`: the cache is read 16 bytes at a time."""
    if device.type == "cpu":
        return INTERPRETED
    if not wide:
        kind = "narrow"
    elif dtype == torch.float32:
        kind = "32 bits"
    else:
        kind = "16 bits, warp groups" if _properties(device).major == 9 else "16 bits"
    limit = min(config.size for config in _CONFIGS[kind] if size <= config.size)
    fitting = [config for config in _CONFIGS[kind] if config.size == limit]
    return next((config for config in fitting if rows <= config.rows), fitting[-1])


def split_count(programs: int, keys: int, device: torch.device) -> int:
    """Into how many parts to divide up to `keys` keys, where each part takes so many programs.

    All of them run at once: one that had to wait for another's end would double the time.
    """
    if device.type == "cpu":
        return max(1, min(3, keys // INTERPRETED.keys))
    return max(1, min(_properties(device).multi_processor_count * PROGRAMS // programs, keys // LEAST_KEYS))


@lru_cache
def _properties(device: torch.device) -> Any:
    return torch.cuda.get_device_properties(device)

"""How products with a 4-bit weight are cut: their tiles by number of rows, and the parts of the summed dimension."""

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch


@dataclass(frozen=True)
class Config:
    """A tile is `rows` of the input or gradient by `columns` of the result; `depth` of them are summed at a time."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def blocks(self) -> dict[str, int]:
        sizes = {"BLOCK_M": self.rows, "BLOCK_N": self.columns, "BLOCK_K": self.depth}
        return {**sizes, "num_warps": self.warps, "num_stages": self.stages}


# Up to how many rows decoding and multiplying are one kernel. Estimated for an H200, in clocks of a multiprocessor for
# an element of the weight: a tile of 128 rows decodes it in 0.06 (7.4 instructions on 128 lanes) and multiplies it in
# 0.06, at worst one after the other. Decoded apart it moves 2.5 bytes and 2 more at 21 a clock, which takes 0.2, and
# torch multiplies in 0.08 for 128 rows. So two tiles are better fused; four may not be.
FUSED_ROWS = 256
# Few rows are bound by decoding: narrow tiles, many of which share a multiprocessor.
_TILES = [Config(16, 64, 64, 4, 4), Config(32, 64, 64, 4, 4), Config(64, 128, 64, 8, 3), Config(128, 128, 64, 8, 3)]
# Without tensor cores a product takes its operands in registers.
_TILES_FP32 = [Config(16, 64, 32, 4, 2), Config(64, 64, 32, 8, 2)]
_INTERPRETED = Config(16, 32, 32, 1, 1)  # small, so that short tests cross several tiles
LEAST = 16  # that tensor cores multiply at a time
WARPS = 16  # on a multiprocessor at once


def linear_config(
    rows: int, blocksize: int, aligned: bool, gradient: bool, dtype: torch.dtype, device: torch.device
) -> Config:
    """`aligned`: no block straddles rows of the weight, so that tiles no longer than a block have one scale a row.

    Rows of the weight lie along the summed dimension, for the gradient along the result's columns.
    """
    if device.type == "cpu":
        config = _INTERPRETED
    else:
        tiles = _TILES_FP32 if dtype == torch.float32 else _TILES
        # A scale for each byte takes the registers of a larger tile.
        most, depth = (128, 64) if aligned else (32, 32)
        config = next((tile for tile in tiles if rows <= tile.rows or tile.rows >= most), tiles[-1])
        config = replace(config, depth=min(config.depth, depth))
    along = "columns" if gradient else "depth"
    return replace(config, **{along: math.gcd(getattr(config, along), blocksize)}) if aligned else config


def split_count(config: Config, rows: int, tiles: int, steps: int, device: torch.device) -> int:
    """Into how many parts to divide `steps` of the summed dimension, where each part takes `tiles` programs.

    One round of programs. A step reads 32 bytes for a column of the result, a part writes and reads 8 for each of its
    rows: these stay in the second-level cache, where they may be twice as many.
    """
    if device.type == "cpu":
        return max(1, min(3, steps // 2))
    return max(1, min(processors(device) * (WARPS // config.warps) // tiles, steps // max(4, rows // 8)))


@lru_cache
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count

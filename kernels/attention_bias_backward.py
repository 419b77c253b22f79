"""Softmax attention, backward: the gradient of an additive mask, summed over whatever dimensions it broadcasts along.

A program owns a tile of the mask and walks over everything that reads it: the batch entries and heads that share it,
and blocks of queries or keys where it has one element for all of them. It computes the tile's scores again and keeps
the sum in registers, so the memory needed is the mask's own, and sums have a fixed order. Where the mask has few tiles
its readers are split among several programs, whose sums are added up afterwards.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from pykern.kernels.attention_dscores import BACKWARD_SIZES, load_lse, load_row, tile_dscores, tile_weights
from pykern.kernels.attention_scores import kept, load_slope, visible_range
from pykern.kernels.attention_tiles import Config, Operands, choose, in_elements, load_tile, of_head
from torch import Tensor

# About two for each multiprocessor of a large GPU. Not asked of the device: every one sums up in the same order.
PROGRAMS = 256

# For `choose`. Per head size (queries, keys, warps, stages).
_BIAS = {
    "fp32": {256: Config(16, 16, 8, 1)},
    "features": {64: Config(64, 32, 8, 1), 128: Config(64, 16, 8, 1), 256: Config(32, 16, 8, 1)},
    "features, descriptors": {256: Config(64, 32, 4, 1, descriptors=True)},
}


@triton.jit(
    do_not_specialize=[
        *BACKWARD_SIZES,
        *("owners", "owner_step", "sharers", "sharer_step", "mask_heads", "mask_size", "splits"),
    ]
)
def _bias_kernel(
    query,  # (B, H, L, E), as a pointer with strides or as a descriptor with None for strides; so are the next three
    key,  # (B, Hkv, S, E)
    value,  # (B, Hkv, S, EV)
    dout,  # (B, H, L, EV), or None
    mask,  # (B, H, L, S); its strides are None along a dimension that it has not
    slopes,  # (B, H), or None
    rng,  # (2,), None without dropout
    lse,  # (B, H, L)
    delta,  # (B, H, L)
    factor,  # (B, H, L), or None: see attention_delta.py
    dmask,  # (splits, owners, mask_heads, 1 or L, 1 or S)
    owners,  # batch entries that the mask has
    owner_step,  # how far they are apart in the batch
    sharers,  # batch entries that share one of them
    sharer_step,
    mask_heads,
    mask_size,
    splits,
    heads,
    group,
    queries,
    keys,
    offset,
    left,
    right,
    scale,
    softcap,
    threshold,
    survival,
    q_batch,
    q_row,
    q_head,
    k_batch,
    k_row,
    k_head,
    v_batch,
    v_row,
    v_head,
    o_batch,
    o_row,
    o_head,
    mask_batch,
    mask_head,
    mask_query,
    mask_key,
    slope_batch,
    slope_head,
    UNIT: tl.constexpr,
    E: tl.constexpr,
    EV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_EV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    index = tl.program_id(0)
    split = index % splits
    index //= splits
    first, first_key = 0, 0
    if mask_key is not None:
        first_key = index % tl.cdiv(keys, BLOCK_N) * BLOCK_N
        index //= tl.cdiv(keys, BLOCK_N)
    if mask_query is not None:
        first = index % tl.cdiv(queries, BLOCK_M) * BLOCK_M
        index //= tl.cdiv(queries, BLOCK_M)
    owned = index  # of owners · mask_heads
    owner, owned_head = index // mask_heads, index % mask_heads

    # The blocks that read the tile: all of the keys where the mask has one element for them, and so for the queries.
    key_start, key_end = first_key, first_key + BLOCK_N
    start, end = first, first + BLOCK_M
    if mask_query is not None:
        seen, full, full_end, seen_end = visible_range(
            first, tl.minimum(first + BLOCK_M, queries) - 1, offset, left, right, keys, BLOCK_N
        )
        if mask_key is None:
            key_start, key_end = seen, seen_end
        elif (first_key < seen) | (first_key >= seen_end):
            key_end = key_start
    elif mask_key is not None:
        last = tl.minimum(first_key + BLOCK_N, keys) - 1
        start, full, full_end, end = visible_range(first_key, last, -offset, right, left, queries, BLOCK_M)
    else:
        key_end = tl.cdiv(keys, BLOCK_N) * BLOCK_N
        end = tl.cdiv(queries, BLOCK_M) * BLOCK_M
    key_blocks = (key_end - key_start) // BLOCK_N
    blocks = (end - start) // BLOCK_M
    sharing_heads = heads // mask_heads

    PRECISE: tl.constexpr = factor is not None
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # Where long sequences share one element, readers times tiles are more than 32 bits count: two numbers walk on.
    tiles = tl.maximum(key_blocks * blocks, 1)
    tile, reader = split % tiles, split // tiles
    turns = tl.cdiv(sharing_heads.to(tl.int64) * sharers * key_blocks * blocks - split, splits)
    for _ in tl.range(0, turns):
        at_key = key_start + tile % key_blocks * BLOCK_N
        at = start + tile // key_blocks * BLOCK_M
        head = owned_head + reader % sharing_heads
        batch = owner * owner_step + reader // sharing_heads * sharer_step
        key_head = head // group
        place = batch.to(tl.int64) * heads + head
        row = at + tl.arange(0, BLOCK_M)  # (M,)
        column = at_key + tl.arange(0, BLOCK_N)[None, :]  # (1, N)
        q = of_head(query, batch, head, q_batch, q_head, UNIT)
        q = load_tile(q, batch, head, at, queries, in_elements(q_row, UNIT), 0, E, BLOCK_M, BLOCK_E)
        k = of_head(key, batch, key_head, k_batch, k_head, UNIT)
        k = load_tile(k, batch, key_head, at_key, keys, in_elements(k_row, UNIT), 0, E, BLOCK_N, BLOCK_E)
        weigh = None
        if factor is not None:
            weigh = load_row(factor + place * queries, row, queries)[:, None]
        weights, slack = tile_weights(
            tl.dot(q, k.T, input_precision=PRECISION),
            row[:, None],
            column,
            load_lse(lse + place * queries, row, queries)[:, None],
            weigh,
            (row < queries)[:, None],
            column < keys,
            keys,
            offset,
            left,
            right,
            scale,
            softcap,
            load_slope(slopes, batch, head, slope_batch, slope_head, not PRECISE),
            of_head(mask, batch, head, mask_batch, mask_head, 1),
            mask_query,
            mask_key,
            True,
            PRECISE,
        )
        keep = None
        if rng is not None:
            keep = kept(rng, place * queries + row[:, None], at_key, keys, threshold, BLOCK_N)
        dweights = None
        if dout is not None:
            do = of_head(dout, batch, head, o_batch, o_head, UNIT)
            do = load_tile(do, batch, head, at, queries, in_elements(o_row, UNIT), 0, EV, BLOCK_M, BLOCK_EV)
            v = of_head(value, batch, key_head, v_batch, v_head, UNIT)
            v = load_tile(v, batch, key_head, at_key, keys, in_elements(v_row, UNIT), 0, EV, BLOCK_N, BLOCK_EV)
            dweights = tl.dot(do, v.T, input_precision=PRECISION)
        shift = load_row(delta + place * queries, row, queries)[:, None]
        total += tile_dscores(weights, dweights, shift, keep, survival)
        tile += splits % tiles
        reader += splits // tiles + tl.where(tile >= tiles, 1, 0)
        tile -= tl.where(tile >= tiles, tiles, 0)

    row, column = first + tl.arange(0, BLOCK_M)[:, None], first_key + tl.arange(0, BLOCK_N)[None, :]
    rows, columns = queries, keys
    if mask_query is None:
        total = tl.sum(total, 0, keep_dims=True)
        row, rows = tl.zeros((1, 1), tl.int32), 1
    if mask_key is None:
        total = tl.sum(total, 1, keep_dims=True)
        column, columns = tl.zeros((1, 1), tl.int32), 1
    dmask += split.to(tl.int64) * mask_size + (owned.to(tl.int64) * rows + row) * columns + column
    tl.store(dmask, total.to(dmask.dtype.element_ty), mask=(row < rows) & (column < columns))


def _owners(mask: Sequence[int], lead: Sequence[int]) -> tuple[int, int, int, int] | None:
    """Batch entries of the mask, their step in the whole batch, entries that share one of them, and their step.

    None where broadcast and other dimensions take turns more than once: no two steps lead through these.
    """
    runs: list[list[int]] = []  # neighbouring dimensions that are alike, as (size, whether the mask has it)
    for m, size in zip(mask, lead, strict=True):
        if size > 1 and runs and runs[-1][1] == (m > 1):
            runs[-1][0] *= size
        elif size > 1:
            runs.append([size, m > 1])
    if len(runs) > 2:
        return None
    owners = math.prod(size for size, own in runs if own)
    sharers = math.prod(size for size, own in runs if not own)
    return (owners, sharers, sharers, 1) if runs and runs[0][1] else (owners, 1, sharers, owners)


def _bias_config(operands: Operands, dropout: bool) -> Config:
    return choose(_BIAS, Config(16, 32, 1, 1), operands, True, dropout)


def bias_gradient(dmask: Tensor, lead: Sequence[int], common: dict[str, Any], operands: Operands) -> None:
    """Writes dmask, (…, h, l, s) with any dimension 1; `common` are the arguments that the backward's kernels share."""
    shape = (*[1] * (len(lead) + 3 - dmask.dim()), *dmask.shape)
    steps = _owners(shape[:-3], lead)
    if steps is None:
        whole = dmask.new_empty((*lead, *shape[-3:]), dtype=torch.float32)
        bias_gradient(whole, lead, common, operands)
        dmask.copy_(whole.sum_to_size(shape).view(dmask.shape))
        return
    config = _bias_config(operands, common["rng"] is not None)
    owners, _, sharers, _ = steps
    mask_heads, rows, columns = shape[-3:]
    query_blocks = triton.cdiv(common["queries"], config.queries)
    key_blocks = triton.cdiv(common["keys"], config.keys)
    tiles = owners * mask_heads * (query_blocks if rows > 1 else 1) * (key_blocks if columns > 1 else 1)
    turns = common["lse"].shape[:2].numel() * query_blocks * key_blocks // tiles
    splits = min(max(PROGRAMS // tiles, 1), turns)
    target = dmask if splits == 1 else dmask.new_empty((splits, *dmask.shape), dtype=torch.float32)
    _bias_kernel[(tiles * splits,)](
        dmask=target,
        owners=owners,
        owner_step=steps[1],
        sharers=sharers,
        sharer_step=steps[3],
        mask_heads=mask_heads,
        mask_size=dmask.numel(),
        splits=splits,
        **common,
        **operands.arguments(config),
    )
    if splits > 1:
        dmask.copy_(target.sum(0))

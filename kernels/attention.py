"""Softmax attention, forward; the backward is attention_backward.py. They share attention_scores.py.

A program takes a block of queries of one head and walks over the keys that its queries see, block by block. Each row
keeps the largest score so far, the sum of its weights relative to that, and the output they give; when a larger score
comes, sum and output are rescaled (online softmax: Milakov and Gimelshein, arXiv:1805.02867). So every key and value is
read once for a block of queries, and scores never leave the registers.

Blocks of keys that every query of the block sees run a loop without any comparison; those on the edges of the band or
of the tensor run another. Both are the same lines, compiled twice. Blocks that no query sees are never visited.

Packed sequences, attention_varlen.py, run the same kernel with a grid for the longest: a program looks up where its
sequence lies, and leaves where it has no queries. Keys in pages are then looked up row by row.

What a tile is, its size on each device, and what is compiled in: attention_tiles.py.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from pykern.kernels.attention_scores import (
    LN2,
    LOG2E,
    Band,
    base2_scores,
    dropout_rows,
    is_allowed,
    kept,
    load_bias,
    load_permitted,
    load_slope,
    score_arguments,
    visible_range,
)
from pykern.kernels.attention_sequences import clear_outside, load_keys, packed_keys, query_block, statistics_line
from pykern.kernels.attention_tiles import (
    SIZES,
    Config,
    Operands,
    choose,
    in_elements,
    load_tile,
    of_head,
    own_rows,
    store_rows,
)
from pykern.kernels.norm import on
from torch import Tensor

# For `choose`. Per head size (queries, keys, warps, stages).
_FORWARD = {
    "fp32": {64: Config(64, 16, 8, 3), 256: Config(32, 16, 4, 3)},
    "plain": {64: Config(128, 64, 8, 3), 128: Config(128, 32, 8, 3), 256: Config(64, 32, 8, 3)},
    "small": {64: Config(128, 64, 8, 3), 128: Config(128, 32, 8, 3), 256: Config(64, 16, 8, 3)},
    # Each row of keys has an address of its own.
    "packed, pages": {
        32: Config(64, 64, 4, 3),
        64: Config(128, 64, 8, 3),
        128: Config(64, 32, 8, 3),
        256: Config(64, 16, 8, 3),
    },
    "packed, fp32": {32: Config(64, 32, 8, 3), 64: Config(64, 16, 8, 3), 256: Config(32, 16, 4, 3)},
    "packed, plain": {
        64: Config(128, 64, 8, 3),
        120: Config(64, 32, 8, 3),  # less than a tile's columns: a comparison each
        128: Config(128, 32, 8, 3),
        256: Config(64, 32, 8, 3),
    },
    # Two warp groups of 64 queries each, whose accumulators fill the registers.
    "plain, descriptors": {
        64: Config(128, 128, 8, 3, descriptors=True),
        128: Config(128, 128, 8, 2, descriptors=True),
        256: Config(128, 64, 8, 2, descriptors=True),
    },
    # The same where a score is more than a product: there is room for half as many keys.
    "features, descriptors": {
        128: Config(128, 64, 8, 3, descriptors=True),
        256: Config(128, 32, 8, 2, descriptors=True),
    },
}
# Without tensor cores a product takes its operands in registers: so much of the head size at a time.
FP32_PART = 16


def forward_config(operands: Operands, features: bool) -> Config:
    return choose(_FORWARD, Config(32, 16, 1, 1), operands, features)


@triton.jit(do_not_specialize=SIZES)
def _forward_kernel(
    query,  # (B, H, L, E), as a pointer with strides or as a descriptor with None for strides; so are key and value
    key,  # (B, Hkv, S, E)
    value,  # (B, Hkv, S, EV)
    mask,  # (B, H, L, S) bool or additive, or None; its strides are None along a dimension that it has not
    slopes,  # (B, H), or None
    sinks,  # (H,), or None
    rng,  # (2,), None without dropout
    out,  # (B, L, H, OUT)
    lse,  # (B, H, L), or (H, total)
    heads,
    group,  # query heads that share a key head
    queries,
    keys,
    offset,  # key position of query 0
    left,  # how many keys before its position a query sees; None: all
    right,
    scale,  # as base2_scores takes it, and so is softcap
    softcap,
    threshold,
    survival,  # what kept weights are multiplied by
    q_batch,
    q_row,
    q_head,
    k_batch,
    k_row,
    k_head,
    v_batch,
    v_row,
    v_head,
    mask_batch,
    mask_head,
    mask_query,
    mask_key,
    slope_batch,
    slope_head,
    UNIT: tl.constexpr,  # strides of query, key and value are counted in so many elements
    E: tl.constexpr,
    EV: tl.constexpr,
    OUT: tl.constexpr,  # of EV, those that are not filling
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_EV: tl.constexpr,
    PART: tl.constexpr,  # of E, in one product
    PRECISION: tl.constexpr,
    cu_queries=None,  # (B + 1,), for packed sequences alone as are the following; `queries`, `keys` are then the most
    cu_keys=None,
    used=None,  # (B,), how many of the keys are there
    table=None,  # (B, pages), with key and value (blocks, Hkv, PAGE, …)
    query_rows=None,  # rows of all sequences
    key_rows=None,  # the same, or blocks
    pages=None,
    columns=None,  # of a row of dropout
    PAGE: tl.constexpr = 1,
):
    turns = tl.cdiv(queries, BLOCK_M)
    batch, head, origin, queries, first = query_block(cu_queries, query_rows, queries, heads, BLOCK_M)
    origin = None if cu_queries is None else origin
    key_head = head // group
    line = statistics_line(batch, head, heads, queries, origin, query_rows)
    key_origin = None
    if cu_queries is None:
        columns = keys
    else:
        end = origin + queries
        clear_outside(out, lse, cu_queries, batch, head, heads, end, query_rows, turns, OUT, BLOCK_M, BLOCK_EV)
        if first < 0:
            return
        key_origin, keys = packed_keys(cu_keys, used, table, batch, key_rows, keys)
        offset = keys - queries

    q_row = in_elements(q_row, UNIT)
    k_row = in_elements(k_row, UNIT)
    v_row = in_elements(v_row, UNIT)
    query = of_head(query, batch, head, q_batch, q_head, UNIT)
    key = of_head(key, batch, key_head, k_batch if table is None else 0, k_head, UNIT)
    value = of_head(value, batch, key_head, v_batch if table is None else 0, v_head, UNIT)
    mask = of_head(mask, batch, head, mask_batch, mask_head, 1)
    slope = load_slope(slopes, batch, head, slope_batch, slope_head, True)
    PLAIN: tl.constexpr = softcap is None and slopes is None and mask is None

    row = first + tl.arange(0, BLOCK_M)[:, None]  # (M, 1)
    live = row < queries
    if PART == BLOCK_E:
        q = load_tile(query, batch, head, first, queries, q_row, 0, E, BLOCK_M, BLOCK_E, origin)

    top = tl.full((BLOCK_M, 1), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M, 1), tl.float32)
    if sinks is not None:
        top = tl.zeros((BLOCK_M, 1), tl.float32) + tl.load(sinks + head).to(tl.float32) * LOG2E
        total += 1.0
    result = tl.zeros((BLOCK_M, BLOCK_EV), tl.float32)

    last = tl.minimum(first + BLOCK_M, queries) - 1
    start, full_start, full_end, end = visible_range(first, last, offset, left, right, keys, BLOCK_N)
    full = full_end - full_start
    for EDGE in tl.static_range(2):
        begin = start if EDGE else full_start
        stop = end - full if EDGE else full_end
        for step in tl.range(begin, stop, BLOCK_N):
            at = step
            if EDGE:
                at += tl.where(step < full_start, 0, full)
            column = at + tl.arange(0, BLOCK_N)[None, :]  # (1, N)
            existing = keys if EDGE else None
            if PART == BLOCK_E:
                k = load_keys(
                    key,
                    table,
                    batch,
                    key_head,
                    at,
                    existing,
                    k_batch,
                    k_row,
                    0,
                    pages,
                    key_rows,
                    key_origin,
                    UNIT,
                    E,
                    BLOCK_N,
                    BLOCK_E,
                    PAGE,
                )
                products = tl.dot(q, k.T, input_precision=PRECISION)  # (M, N)
            else:
                products = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                for part in range(0, E, PART):
                    q = load_tile(query, batch, head, first, queries, q_row, part, E, BLOCK_M, PART, origin)
                    k = load_keys(
                        key,
                        table,
                        batch,
                        key_head,
                        at,
                        existing,
                        k_batch,
                        k_row,
                        part,
                        pages,
                        key_rows,
                        key_origin,
                        UNIT,
                        E,
                        BLOCK_N,
                        PART,
                        PAGE,
                    )
                    products = tl.dot(q, k.T, products, input_precision=PRECISION)
            inside = column < keys if EDGE else None
            bias = load_bias(mask, row, column, mask_query, mask_key, live, inside)
            permitted = load_permitted(mask, row, column, mask_query, mask_key, live, inside)
            scores, _ = base2_scores(products, row, column, offset, scale, softcap, slope, bias, PRECISE=True)
            if EDGE:
                scores = tl.where(is_allowed(row, column, offset, left, right, keys), scores, float("-inf"))
            if permitted is not None:
                scores = tl.where(permitted, scores, float("-inf"))

            if PLAIN and not EDGE:
                # Scores are then needed for the exponent alone, where the scale is part of the subtraction.
                best = tl.max(products, 1, keep_dims=True) * scale
            else:
                best = tl.max(scores, 1, keep_dims=True)
            best = tl.maximum(top, best)
            shift = tl.where(best == float("-inf"), 0.0, best)  # nothing allowed so far: no -inf - -inf
            weights = tl.exp2(scores - shift)
            fading = tl.exp2(top - shift)
            total = total * fading + tl.sum(weights, 1, keep_dims=True)
            if rng is not None:
                keep = kept(rng, dropout_rows(row, line, origin, head, heads), at, columns, threshold, BLOCK_N)
                weights = tl.where(keep, weights, 0.0)
            v = load_keys(
                value,
                table,
                batch,
                key_head,
                at,
                existing,
                v_batch,
                v_row,
                0,
                pages,
                key_rows,
                key_origin,
                UNIT,
                EV,
                BLOCK_N,
                BLOCK_EV,
                PAGE,
            )
            v = own_rows(v, at, existing, v_row, key_origin)
            result = tl.dot(weights.to(v.dtype), v, result * fading, input_precision=PRECISION)
            top = best

    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    tl.store(lse + line + row, tl.where(empty, float("-inf"), tl.fma(top, LN2, tl.log(total))), mask=live)
    result *= survival / total
    store_rows(out, result, batch, head, first, queries, heads, OUT, BLOCK_M, BLOCK_EV, origin)


def run_forward(
    out: Tensor,
    lse: Tensor,
    sinks: Tensor | None,
    operands: Operands,
    scores: dict[str, Any],
    batch: int,
    **packed: Any,
) -> None:
    """Launches on operands that are not empty; `scores` as `score_arguments` gives them, `packed` for sequences."""
    features = any(scores[name] is not None for name in ("softcap", "slopes", "mask", "rng"))
    config = forward_config(operands, features)
    tiles = operands.arguments(config)
    with on(out.device):
        _forward_kernel[(batch * scores["heads"] * triton.cdiv(scores["queries"], config.queries),)](
            sinks=None if sinks is None else sinks.contiguous(),
            out=out,
            lse=lse,
            **scores,
            **tiles,
            **packed,
            OUT=out.shape[-1],
            PART=FP32_PART if out.dtype == torch.float32 else tiles["BLOCK_E"],
        )


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    rng: Tensor | None,
    dropout_p: float,
    scale: float,
    enable_gqa: bool,
    window_left: int | None,
    window_right: int | None,
    softcap: float | None,
    align: str,
) -> tuple[Tensor, Tensor]:
    """The op's own signature; shapes, types and meaning are documented with it in pykern/ops."""
    lead, (queries, heads), (keys, key_heads) = query.shape[:-3], query.shape[-3:-1], key.shape[-3:-1]
    out = query.new_empty((*query.shape[:-1], value.shape[-1]))
    lse = query.new_empty((*lead, heads, queries), dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse
    if scale < 0:  # the largest score is found among the products
        query, scale = -query, -scale
    operands = Operands(query, key, value)
    band = Band.of(queries, keys, window_left, window_right, align)
    shape = heads, key_heads, queries, keys
    scores = score_arguments(shape, band, scale, softcap, alibi_slopes, rng, dropout_p, attn_mask, lead)
    run_forward(out, lse, sinks, operands, scores, lse.numel() // (heads * queries))
    return out, lse

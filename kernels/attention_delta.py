"""Softmax attention, backward: what the other kernels need to know of each row.

That is delta, the mean of the gradients of a row's weights, which is what normalisation takes away from each of them.
There are two ways to it. It is out · dout, a read of both. But out is rounded, and where a row sees few keys, or a
gradient is wanted in more digits than out has, that error shows. So there delta is summed up from the weights and
their gradients, at two more products of tiles, and the weights' sum with it: lse is rounded too, and dividing by the
sum makes good for it.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from pykern.kernels.attention_dscores import BACKWARD_SIZES, load_lse, survivors, tile_weights
from pykern.kernels.attention_scores import LOG2E, dropout_rows, kept, load_slope, visible_range
from pykern.kernels.attention_sequences import packed_keys, query_block, statistics_line
from pykern.kernels.attention_tiles import (
    block_size,
    in_elements,
    load_tile,
    of_head,
    own_columns,
    strides_in_units,
)
from torch import Tensor


@triton.jit(do_not_specialize=["o_batch", "o_row", "o_head", "queries", "heads"])
def _delta_kernel(
    dout,  # (B, L, H, EV) by its strides
    out,  # (B, L, H, EV)
    dlse,  # (B, H, L) or None
    delta,  # (B, H, L)
    o_batch,
    o_row,
    o_head,
    queries,
    heads,
    UNIT: tl.constexpr,
    EV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_EV: tl.constexpr,
):
    blocks = tl.cdiv(queries, BLOCK_M)
    place = tl.program_id(0) // blocks
    batch, head = place // heads, place % heads
    first = tl.program_id(0) % blocks * BLOCK_M
    gradient = of_head(dout, batch, head, o_batch, o_head, UNIT)
    gradient = load_tile(gradient, batch, head, first, queries, in_elements(o_row, UNIT), 0, EV, BLOCK_M, BLOCK_EV)
    values = out + (batch.to(tl.int64) * queries * heads + head) * EV
    values = load_tile(values, batch, head, first, queries, in_elements(heads, EV), 0, EV, BLOCK_M, BLOCK_EV)
    total = tl.sum(gradient.to(tl.float32) * values.to(tl.float32), 1)
    row = first + tl.arange(0, BLOCK_M)
    index = place.to(tl.int64) * queries + row
    if dlse is not None:
        total -= tl.load(dlse + index, mask=row < queries, other=0.0)
    tl.store(delta + index, total, mask=row < queries)


@triton.jit(do_not_specialize=BACKWARD_SIZES)
def _statistics_kernel(
    query,  # (B, H, L, E), as a pointer with strides or as a descriptor with None for strides; so are the next three
    key,  # (B, Hkv, S, E)
    value,  # (B, Hkv, S, EV)
    dout,  # (B, H, L, EV), or None
    mask,  # (B, H, L, S) bool or additive, or None; its strides are None along a dimension that it has not
    slopes,  # (B, H), or None
    sinks,  # (H,), or None
    rng,  # (2,), None without dropout
    lse,  # (B, H, L), or (H, total) as are the next three
    dlse,  # (B, H, L), or None
    delta,  # (B, H, L), or None
    factor,  # (B, H, L): what weights from lse are multiplied by
    heads,
    group,  # query heads that share a key head
    queries,
    keys,
    offset,  # key position of query 0
    left,  # how many keys before its position a query sees; None: all
    right,
    scale,  # as base2_scores takes it but for log2 e, and so is softcap
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
    o_batch,
    o_row,
    o_head,
    mask_batch,
    mask_head,
    mask_query,
    mask_key,
    slope_batch,
    slope_head,
    UNIT: tl.constexpr,  # strides of query, key, value and dout are counted in so many elements
    E: tl.constexpr,
    EV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_EV: tl.constexpr,
    PRECISION: tl.constexpr,
    cu_queries=None,  # (B + 1,), for packed sequences alone as are the following; `queries`, `keys` are then the most
    cu_keys=None,
    used=None,  # (B,), how many of the keys are there
    query_rows=None,  # rows of all sequences
    key_rows=None,
    columns=None,  # of a row of dropout
):
    batch, head, origin, queries, first = query_block(cu_queries, query_rows, queries, heads, BLOCK_M)
    origin = None if cu_queries is None else origin
    key_head = head // group
    line = statistics_line(batch, head, heads, queries, origin, query_rows)
    key_origin = None
    if cu_queries is None:
        columns = keys
    else:
        key_origin, keys = packed_keys(cu_keys, used, None, batch, key_rows, keys)
        offset = keys - queries
        if first < 0:
            return
    k_row = in_elements(k_row, UNIT)
    v_row = in_elements(v_row, UNIT)

    query = of_head(query, batch, head, q_batch, q_head, UNIT)
    q_row = in_elements(q_row, UNIT)
    o_row = in_elements(o_row, UNIT)
    # Without tensor cores a product takes its operands in registers, which cannot keep them from block to block.
    RELOAD: tl.constexpr = q_row is not None and query.dtype.element_ty == tl.float32
    if not RELOAD:
        q = load_tile(query, batch, head, first, queries, q_row, 0, E, BLOCK_M, BLOCK_E, origin)
    if delta is not None and dout is not None:
        dout = of_head(dout, batch, head, o_batch, o_head, UNIT)
        if not RELOAD:
            do = load_tile(dout, batch, head, first, queries, o_row, 0, EV, BLOCK_M, BLOCK_EV, origin)
    key = of_head(key, batch, key_head, k_batch, k_head, UNIT)
    value = of_head(value, batch, key_head, v_batch, v_head, UNIT)
    mask = of_head(mask, batch, head, mask_batch, mask_head, 1)
    slope = load_slope(slopes, batch, head, slope_batch, slope_head, False)
    row = first + tl.arange(0, BLOCK_M)  # (M,)
    norm = load_lse(lse + line, row, queries)
    mean = tl.zeros((BLOCK_M,), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    only = tl.full((BLOCK_M,), float("inf"), tl.float32)  # the gradient of the one weight so far; NaN of several
    if sinks is not None:
        only = tl.full((BLOCK_M,), float("nan"), tl.float32)
        total += tl.exp2((tl.load(sinks + head).to(tl.float32) - norm) * LOG2E)

    last = tl.minimum(first + BLOCK_M, queries) - 1
    start, full_start, full_end, end = visible_range(first, last, offset, left, right, keys, BLOCK_N)
    full = full_end - full_start
    for EDGE in tl.static_range(2):
        begin, stop = (start, end - full) if EDGE else (full_start, full_end)
        for step in tl.range(begin, stop, BLOCK_N, disable_licm=RELOAD):
            at = step
            if EDGE:
                at += tl.where(step < full_start, 0, full)
            existing = keys if EDGE else None
            column = at + tl.arange(0, BLOCK_N)[None, :]  # (1, N)
            if RELOAD:
                q = load_tile(query, batch, head, first, queries, q_row, 0, E, BLOCK_M, BLOCK_E, origin)
            k = load_tile(key, batch, key_head, at, existing, k_row, 0, E, BLOCK_N, BLOCK_E, key_origin)
            weights, slack = tile_weights(
                tl.dot(q, k.T, input_precision=PRECISION),  # (M, N)
                row[:, None],
                column,
                norm[:, None],
                None,
                (row < queries)[:, None],
                column < keys if EDGE else None,
                keys,
                offset,
                left,
                right,
                scale,
                softcap,
                slope,
                mask,
                mask_query,
                mask_key,
                EDGE,
                True,
            )
            total += tl.sum(weights, 1)
            if delta is not None and dout is not None:
                keep = None
                if rng is not None:
                    counted = dropout_rows(row[:, None], line, origin, head, heads)
                    keep = kept(rng, counted, at, columns, threshold, BLOCK_N)
                if RELOAD:
                    do = load_tile(dout, batch, head, first, queries, o_row, 0, EV, BLOCK_M, BLOCK_EV, origin)
                v = load_tile(value, batch, key_head, at, existing, v_row, 0, EV, BLOCK_N, BLOCK_EV, key_origin)
                dweights = tl.dot(do, v.T, input_precision=PRECISION)
                dweights = own_columns(dweights, column, existing, v_row, key_origin)
                dweights = survivors(dweights, keep, survival)
                mean += tl.sum(weights * dweights, 1)
                seen = tl.sum((weights > 0.0).to(tl.int32), 1)
                alone = tl.sum(tl.where(weights > 0.0, dweights, 0.0), 1)  # exact, if one is seen
                fresh = (only == float("inf")) & (seen == 1)
                only = tl.where(seen == 0, only, tl.where(fresh, alone, float("nan")))

    total = 1.0 / tl.where(total == 0.0, 1.0, total)
    live = row < queries
    if delta is not None:
        mean *= total
        mean = tl.where(tl.abs(only) < float("inf"), only, mean)  # without rounding, where there is nothing to weigh
        if dlse is not None:
            mean -= tl.load(dlse + line + row, mask=live, other=0.0)
        tl.store(delta + line + row, mean, mask=live)
    tl.store(factor + line + row, total, mask=live)


def delta_of_output(dout: Tensor | None, dlse: Tensor | None, out: Tensor) -> Tensor:
    """(B, H, L): each row's dout · out, less the gradient of its lse."""
    if dout is None:
        return -dlse
    batch, queries, heads, value_size = out.shape
    delta = out.new_empty(batch, heads, queries, dtype=torch.float32)
    unit, strides = strides_in_units(dout)
    columns = block_size(value_size)
    rows = 4096 // columns
    grid = (batch * heads * triton.cdiv(queries, rows),)
    _delta_kernel[grid](dout, out, dlse, delta, *strides, queries, heads, unit, value_size, rows, columns)
    return delta


def exact_statistics(
    grid: tuple[int],
    sinks: Tensor | None,
    dlse: Tensor | None,
    wants_delta: bool,
    common: dict[str, Any],
    tiles: dict[str, Any],
) -> tuple[Tensor | None, Tensor]:
    """delta as above, and by what weights are multiplied that come from lse, both (B, H, L).

    common, tiles: the arguments that the backward's kernels share, and `Operands.arguments`.
    """
    lse = common["lse"]
    delta = torch.empty_like(lse) if wants_delta else None
    factor = torch.empty_like(lse)
    _statistics_kernel[grid](sinks=sinks, dlse=dlse, delta=delta, factor=factor, **common, **tiles)
    return delta, factor

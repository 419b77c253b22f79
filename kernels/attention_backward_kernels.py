"""Softmax attention, backward: the kernels of dK and dV, and of dQ; see attention_backward.py.

In the first of them tiles of scores have keys along the rows: as they leave one product they are the left operand of
the next, and stay in registers. Queries that do not exist have an lse of infinity there, and so weights of zero.

Packed sequences run with a grid for the longest, as in the forward, and zeros are written to rows that are in none.
"""

import triton
import triton.language as tl
from pykern.kernels.attention_dscores import BACKWARD_SIZES, load_lse, load_row, survivors, tile_dscores, tile_weights
from pykern.kernels.attention_scores import dropout_rows, kept, load_slope, visible_range
from pykern.kernels.attention_sequences import clear_outside, packed_keys, packed_rows, query_block, statistics_line
from pykern.kernels.attention_tiles import in_elements, load_tile, of_head, own_columns, own_rows, store_rows


@triton.jit(do_not_specialize=BACKWARD_SIZES)
def dkdv_kernel(
    query,  # (B, H, L, E), as a pointer with strides or as a descriptor with None for strides; so are the next three
    key,  # (B, Hkv, S, E)
    value,  # (B, Hkv, S, EV)
    dout,  # (B, H, L, EV), or None
    mask,  # (B, H, L, S) bool or additive, or None; its strides are None along a dimension that it has not
    slopes,  # (B, H), or None
    rng,  # (2,), None without dropout
    lse,  # (B, H, L), or (H, total) as are the next two
    delta,  # (B, H, L), None where nothing but dvalue is wanted
    factor,  # (B, H, L), or None: see attention_delta.py
    dkey,  # (B, S, Hkv, E), or None
    dvalue,  # (B, S, Hkv, EV), or None
    heads,
    group,  # query heads that share a key head
    queries,
    keys,
    offset,  # key position of query 0
    left,  # how many keys before its position a query sees; None: all
    right,
    scale,  # as base2_scores takes it, and so is softcap
    softcap,
    dscale,  # the scores' own
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
    SIZE: tl.constexpr,  # of a head; E and EV are those of what is loaded, where zeros may follow
    VALUE_SIZE: tl.constexpr,
    cu_queries=None,  # (B + 1,), for packed sequences alone as are the following; `queries`, `keys` are then the most
    cu_keys=None,
    used=None,  # (B,), how many of the keys are there
    query_rows=None,  # rows of all sequences
    key_rows=None,
    columns=None,  # of a row of dropout
):
    # The first keys of a causal head are seen by the most queries: they come first, and the short ones fill the end.
    blocks = tl.cdiv(keys, BLOCK_N)
    first = tl.program_id(0) % blocks * BLOCK_N
    shared = heads // group
    key_head = tl.program_id(0) // blocks % shared
    batch = tl.program_id(0) // blocks // shared
    origin, key_origin = None, None
    if cu_queries is None:
        columns = keys
    else:
        key_origin, keys = packed_keys(cu_keys, used, None, batch, key_rows, keys)
        end = key_origin + keys
        if dkey is not None:
            clear_outside(dkey, None, cu_keys, batch, key_head, shared, end, key_rows, blocks, SIZE, BLOCK_N, BLOCK_E)
        if dvalue is not None:
            clear_outside(
                dvalue, None, cu_keys, batch, key_head, shared, end, key_rows, blocks, VALUE_SIZE, BLOCK_N, BLOCK_EV
            )
        if first >= keys:
            return
        origin, queries = packed_rows(cu_queries, batch, query_rows, queries)
        offset = keys - queries
    q_row = in_elements(q_row, UNIT)
    o_row = in_elements(o_row, UNIT)

    key = of_head(key, batch, key_head, k_batch, k_head, UNIT)
    k_row = in_elements(k_row, UNIT)
    v_row = in_elements(v_row, UNIT)
    # Without tensor cores a product takes its operands in registers, which cannot keep them from block to block.
    RELOAD: tl.constexpr = k_row is not None and key.dtype.element_ty == tl.float32
    if not RELOAD:
        k = load_tile(key, batch, key_head, first, keys, k_row, 0, E, BLOCK_N, BLOCK_E, key_origin)
    PRECISE: tl.constexpr = factor is not None
    value = of_head(value, batch, key_head, v_batch, v_head, UNIT)
    if dkey is not None and dout is not None and not RELOAD:
        v = load_tile(value, batch, key_head, first, keys, v_row, 0, EV, BLOCK_N, BLOCK_EV, key_origin)
    column = first + tl.arange(0, BLOCK_N)[:, None]  # (N, 1)
    dk = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_EV), tl.float32)

    last = tl.minimum(first + BLOCK_N, keys) - 1
    start, full_start, full_end, end = visible_range(first, last, -offset, right, left, queries, BLOCK_M)
    full = full_end - full_start
    for EDGE in tl.static_range(2):
        begin = start if EDGE else full_start
        count = ((end - full if EDGE else full_end) - begin) // BLOCK_M
        # One loop over all heads: accumulators that pass from loop to loop cost registers.
        for turn in tl.range(group * count, disable_licm=RELOAD):
            at = begin + turn % count * BLOCK_M
            if EDGE:
                at += tl.where(at < full_start, 0, full)
            head = key_head * group + turn // count
            line = statistics_line(batch, head, heads, queries, origin, query_rows)
            q_start = of_head(query, batch, head, q_batch, q_head, UNIT)
            do_start = of_head(dout, batch, head, o_batch, o_head, UNIT)
            slope = load_slope(slopes, batch, head, slope_batch, slope_head, not PRECISE)
            existing = queries if EDGE else None
            row = at + tl.arange(0, BLOCK_M)  # (M,)
            q = load_tile(q_start, batch, head, at, existing, q_row, 0, E, BLOCK_M, BLOCK_E, origin)
            if dkey is not None:
                q = own_rows(q, at, existing, q_row, origin)
            if RELOAD:
                k = load_tile(key, batch, key_head, first, keys, k_row, 0, E, BLOCK_N, BLOCK_E, key_origin)
            products = tl.dot(k, q.T, input_precision=PRECISION)  # (N, M)
            if dkey is None:
                products = own_columns(products, row[None, :], existing, q_row, origin)
            weigh = None
            if factor is not None:
                weigh = load_row(factor + line, row, queries)[None, :]
            weights, slack = tile_weights(
                products,
                row[None, :],
                column,
                load_lse(lse + line, row, queries)[None, :],
                weigh,
                (row < queries)[None, :] if EDGE else None,
                column < keys,
                keys,
                offset,
                left,
                right,
                scale,
                softcap,
                slope,
                of_head(mask, batch, head, mask_batch, mask_head, 1),
                mask_query,
                mask_key,
                EDGE,
                PRECISE,
            )
            keep = None
            if rng is not None:
                counted = dropout_rows(row[:, None], line, origin, head, heads)
                keep = kept(rng, counted, first, columns, threshold, BLOCK_N).T
            dweights = None
            if dout is not None:
                do = load_tile(do_start, batch, head, at, existing, o_row, 0, EV, BLOCK_M, BLOCK_EV, origin)
                if dvalue is not None:
                    do = own_rows(do, at, existing, o_row, origin)
                    left_of = survivors(weights, keep, survival).to(do.dtype)
                    dv = tl.dot(left_of, do, dv, input_precision=PRECISION)
                if dkey is not None:
                    if RELOAD:
                        v = load_tile(value, batch, key_head, first, keys, v_row, 0, EV, BLOCK_N, BLOCK_EV, key_origin)
                    dweights = tl.dot(v, do.T, input_precision=PRECISION)
                    if dvalue is None:
                        dweights = own_columns(dweights, row[None, :], existing, o_row, origin)
            if dkey is not None:
                shift = load_row(delta + line, row, queries)
                dscores = tile_dscores(weights, dweights, shift[None, :], keep, survival)
                dscores *= slack
                dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision=PRECISION)

    if dkey is not None:
        store_rows(dkey, dk * dscale, batch, key_head, first, keys, shared, SIZE, BLOCK_N, BLOCK_E, key_origin)
    if dvalue is not None:
        store_rows(dvalue, dv, batch, key_head, first, keys, shared, VALUE_SIZE, BLOCK_N, BLOCK_EV, key_origin)


@triton.jit(do_not_specialize=BACKWARD_SIZES)
def dq_kernel(
    query,
    key,
    value,
    dout,
    mask,
    slopes,
    rng,
    lse,
    delta,
    factor,
    dquery,  # (B, L, H, E), or None
    dslopes,  # (B, H, L), or None: each row's share of its head's slope's gradient; packed (B, H, blocks), each block's
    heads,
    group,
    queries,
    keys,
    offset,
    left,
    right,
    scale,
    softcap,
    dscale,
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
    SIZE: tl.constexpr,
    cu_queries=None,
    cu_keys=None,
    used=None,
    query_rows=None,
    key_rows=None,
    columns=None,
):
    # Arguments as above.
    turns = tl.cdiv(queries, BLOCK_M)
    batch, head, origin, queries, first = query_block(cu_queries, query_rows, queries, heads, BLOCK_M)
    origin = None if cu_queries is None else origin
    key_head = head // group
    line = statistics_line(batch, head, heads, queries, origin, query_rows)
    key_origin = None
    if cu_queries is None:
        columns = keys
    else:
        if dquery is not None:
            end = origin + queries
            clear_outside(dquery, None, cu_queries, batch, head, heads, end, query_rows, turns, SIZE, BLOCK_M, BLOCK_E)
        if first < 0:
            return
        key_origin, keys = packed_keys(cu_keys, used, None, batch, key_rows, keys)
        offset = keys - queries
    k_row = in_elements(k_row, UNIT)
    v_row = in_elements(v_row, UNIT)

    query = of_head(query, batch, head, q_batch, q_head, UNIT)
    q_row = in_elements(q_row, UNIT)
    o_row = in_elements(o_row, UNIT)
    RELOAD: tl.constexpr = q_row is not None and query.dtype.element_ty == tl.float32
    if not RELOAD:
        q = load_tile(query, batch, head, first, queries, q_row, 0, E, BLOCK_M, BLOCK_E, origin)
    if dout is not None:
        dout = of_head(dout, batch, head, o_batch, o_head, UNIT)
        if not RELOAD:
            do = load_tile(dout, batch, head, first, queries, o_row, 0, EV, BLOCK_M, BLOCK_EV, origin)
    key = of_head(key, batch, key_head, k_batch, k_head, UNIT)
    value = of_head(value, batch, key_head, v_batch, v_head, UNIT)
    mask = of_head(mask, batch, head, mask_batch, mask_head, 1)
    PRECISE: tl.constexpr = factor is not None
    slope = load_slope(slopes, batch, head, slope_batch, slope_head, not PRECISE)
    row = first + tl.arange(0, BLOCK_M)  # (M,)
    norm = load_lse(lse + line, row, queries)[:, None]
    weigh = None
    if factor is not None:
        weigh = load_row(factor + line, row, queries)[:, None]
    shift = load_row(delta + line, row, queries)[:, None]
    dq = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    dslope = tl.zeros((BLOCK_M,), tl.float32)

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
            k = own_rows(k, at, existing, k_row, key_origin)
            products = tl.dot(q, k.T, input_precision=PRECISION)  # (M, N)
            weights, slack = tile_weights(
                products,
                row[:, None],
                column,
                norm,
                weigh,
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
                PRECISE,
            )
            keep = None
            if rng is not None:
                counted = dropout_rows(row[:, None], line, origin, head, heads)
                keep = kept(rng, counted, at, columns, threshold, BLOCK_N)
            dweights = None
            if dout is not None:
                if RELOAD:
                    do = load_tile(dout, batch, head, first, queries, o_row, 0, EV, BLOCK_M, BLOCK_EV, origin)
                v = load_tile(value, batch, key_head, at, existing, v_row, 0, EV, BLOCK_N, BLOCK_EV, key_origin)
                dweights = tl.dot(do, v.T, input_precision=PRECISION)
                dweights = own_columns(dweights, column, existing, v_row, key_origin)
            dscores = tile_dscores(weights, dweights, shift, keep, survival)
            if dslopes is not None:
                dslope -= tl.sum(dscores * tl.abs(row[:, None] + offset - column).to(tl.float32), 1)
            if dquery is not None:
                dscores *= slack
                dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision=PRECISION)

    if dquery is not None:
        store_rows(dquery, dq * dscale, batch, head, first, queries, heads, SIZE, BLOCK_M, BLOCK_E, origin)
    if dslopes is not None:
        if cu_queries is None:
            tl.store(dslopes + line + row, dslope, mask=row < queries)
        else:
            tl.store(dslopes + tl.program_id(0), tl.sum(tl.where(row < queries, dslope, 0.0)))

"""Softmax attention of a few new tokens against a cache of keys and values, contiguous or in pages.

It is bound by reading the cache, so what counts is that every key and value is read once and that the whole device
reads. The tokens of a sequence and the query heads that share a key head are the rows of one tile. Where sequences and
key heads are too few to fill the device, the keys of a sequence are divided among programs (flash-decoding, as in Dao
et al., 2023); each leaves its own sums, which a second kernel adds in a fixed order. Rows that do not fit into one tile
are several, and then keys are read once for each.

What is divided, evenly, is the blocks of keys that a sequence has and its tokens see, whatever the cache has room for:
lengths are read on the device. Into how many parts depends on shapes alone.

A cache is never copied. Where its rows do not allow accesses of 16 bytes they are narrower, and tiles small enough that
the many addresses fit into registers.
"""

import math

import torch
import triton
import triton.language as tl
from pykern.kernels.attention_decode_config import COMBINED, FP32_PART, decode_config, split_count
from pykern.kernels.attention_scores import (
    LN2,
    LOG2E,
    base2_scores,
    fold_slopes,
    is_allowed,
    load_slope,
    visible_range,
)
from pykern.kernels.attention_sequences import cache_rows, present_keys
from pykern.kernels.attention_tiles import (
    aligned,
    block_size,
    dot_precision,
    fold,
    in_elements,
    of_head,
    strides_in_units,
)
from pykern.kernels.norm import on
from torch import Tensor

# What the kernels are not compiled anew for.
_SIZES = [
    *("heads", "group", "tokens", "capacity", "pages", "blocks", "splits", "left", "slope_batch", "slope_head"),
    *(f"{tensor}_{axis}" for tensor in "qkv" for axis in ("batch", "row", "head", "column")),
]


@triton.jit
def _seen_blocks(keys, tokens, left, BLOCK_N: tl.constexpr):
    """Where the first block begins that has a key which some token sees, and how many blocks there are."""
    start, _, _, end = visible_range(0, tokens - 1, keys - tokens, left, None, keys, BLOCK_N)
    return start, (end - start) // BLOCK_N


@triton.jit
def _load_rows(start, live, part, step, SIZE: tl.constexpr, COLUMNS: tl.constexpr):
    """(R, COLUMNS) from column `part` on, zeros beyond SIZE and in rows that are not live.

    Args:
        start, live: (R, 1), where rows begin, and which there are.
        step: from one element of a row to the next; None where they are side by side.
    """
    column = part + tl.arange(0, COLUMNS)[None, :]
    inside = live
    if SIZE < COLUMNS or SIZE % COLUMNS != 0:
        inside &= column < SIZE
    if step is not None:
        column = column * tl.cast(step, tl.int64)
    return tl.load(start + column, mask=inside, other=0.0)


@triton.jit
def _risen(top, largest):
    """The largest score so far, what to subtract from scores, and the factor for sums that were relative to `top`."""
    best = tl.maximum(top, largest)
    shift = tl.where(best == float("-inf"), 0.0, best)  # nothing allowed so far: no -inf - -inf
    return best, shift, tl.exp2(top - shift)


@triton.jit
def _normalised(sums, top, total):
    """The output and the log-sum-exp, from sums of weights exp2(score - top): 0 and -inf of nothing."""
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    return sums / total, tl.where(empty, float("-inf"), tl.fma(top, LN2, tl.log(total)))


@triton.jit(do_not_specialize=_SIZES)
def _decode_kernel(
    query,  # (B, L, H, E)
    key,  # (B, S, Hkv, E), or with a table (blocks, PAGE, Hkv, E)
    value,  # likewise, of EV
    lengths,  # (B,)
    table,  # (B, pages), or None
    slopes,  # (B, H), or None
    sinks,  # (H,), or None
    out,  # (B, L, H, EV)
    lse,  # (B, H, L)
    sums,  # (B, L, H, splits, EV) what each part adds up, in fp32; None, so are tops and totals, for one part
    tops,  # (B, L, H, splits) its largest score
    totals,  # (B, L, H, splits) the sum of its weights
    heads,
    group,  # query heads that share a key head
    tokens,
    capacity,
    pages,
    blocks,
    splits,
    left,  # how many keys before its position a token sees; None: all
    scale,  # as base2_scores takes it, and so is softcap
    softcap,
    q_batch,
    q_row,
    q_head,
    k_batch,
    k_row,
    k_head,
    v_batch,
    v_row,
    v_head,
    k_column,
    v_column,
    slope_batch,
    slope_head,
    UNIT: tl.constexpr,  # strides, but for those of columns, are counted in so many elements
    PAGE: tl.constexpr,
    E: tl.constexpr,
    EV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_EV: tl.constexpr,
    PART: tl.constexpr,  # of E, in one product
    PRECISION: tl.constexpr,
):
    # Programs that read the same keys, or neighbours of them, come one after another.
    tiles = tl.cdiv(tokens * group, BLOCK_M)
    tile = tl.program_id(0) % tiles
    task = tl.program_id(0) // tiles
    key_head = task % (heads // group)
    task = task // (heads // group)
    split = task % splits
    batch = task // splits

    keys = present_keys(lengths, batch, capacity)
    start, seen = _seen_blocks(keys, tokens, left, BLOCK_N)
    share = seen // splits
    start += (split * share + tl.minimum(split, seen % splits)) * BLOCK_N
    share += (split < seen % splits).to(tl.int32)
    if sums is not None and share == 0:
        return

    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]  # (M, 1)
    token, head = row // group, key_head * group + row % group
    live = token < tokens
    offset = keys - tokens  # key position of token 0
    oldest = 0  # that any token sees; what is before may be gone from the cache
    if left is not None:
        oldest = tl.maximum(offset - left, 0)
    slope = load_slope(slopes, batch, head, slope_batch, slope_head, True)

    query = of_head(query, batch, head, q_batch, q_head, UNIT) + token.to(tl.int64) * in_elements(q_row, UNIT)
    key = of_head(key, batch, key_head, 0, k_head, UNIT)
    value = of_head(value, batch, key_head, 0, v_head, UNIT)
    k_batch, k_row = in_elements(k_batch, UNIT), in_elements(k_row, UNIT)
    v_batch, v_row = in_elements(v_batch, UNIT), in_elements(v_row, UNIT)
    if PART == BLOCK_E:
        q = _load_rows(query, live, 0, None, E, BLOCK_E)

    top = tl.full((BLOCK_M, 1), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M, 1), tl.float32)
    if sinks is not None and sums is None:
        top = tl.load(sinks + head).to(tl.float32) * LOG2E
        total += 1.0
    result = tl.zeros((BLOCK_M, BLOCK_EV), tl.float32)
    for at in tl.range(start, start + share * BLOCK_N, BLOCK_N):
        column = at + tl.arange(0, BLOCK_N)
        existing = (column >= oldest) & (column < keys)
        entry, place = cache_rows(table, batch, column, existing, pages, blocks, PAGE)
        place = place.to(tl.int64)
        k_start = (key + (entry * k_batch + place * k_row))[:, None]  # (N, 1)
        v_start = (value + (entry * v_batch + place * v_row))[:, None]
        column, existing = column[None, :], existing[:, None]
        if PART == BLOCK_E:
            k = _load_rows(k_start, existing, 0, k_column, E, BLOCK_E)
            products = tl.dot(q, k.T, input_precision=PRECISION)  # (M, N)
        else:
            products = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for part in range(0, E, PART):
                q = _load_rows(query, live, part, None, E, PART)
                k = _load_rows(k_start, existing, part, k_column, E, PART)
                products = tl.dot(q, k.T, products, input_precision=PRECISION)
        scores, _ = base2_scores(products, token, column, offset, scale, softcap, slope, None, PRECISE=True)
        allowed = is_allowed(token, column, offset, left, 0, keys)
        scores = tl.where(allowed, scores, float("-inf"))
        top, shift, fading = _risen(top, tl.max(scores, 1, keep_dims=True))
        weights = tl.exp2(scores - shift)
        total = total * fading + tl.sum(weights, 1, keep_dims=True)
        v = _load_rows(v_start, existing, 0, v_column, EV, BLOCK_EV)
        result = tl.dot(weights.to(v.dtype), v, result * fading, input_precision=PRECISION)

    column = tl.arange(0, BLOCK_EV)[None, :]
    inside = live & (column < EV)
    place = (batch.to(tl.int64) * tokens + token) * heads + head
    if sums is None:
        result, top = _normalised(result, top, total)
        tl.store(out + place * EV + column, result.to(out.dtype.element_ty), mask=inside)
        tl.store(lse + (batch.to(tl.int64) * heads + head) * tokens + token, top, mask=live)
    else:
        place = place * splits + split
        tl.store(sums + place * EV + column, result, mask=inside)
        tl.store(tops + place, top, mask=live)
        tl.store(totals + place, total, mask=live)


@triton.jit(do_not_specialize=_SIZES)
def _combine_kernel(
    sums,
    tops,
    totals,
    lengths,
    sinks,
    out,
    lse,
    heads,
    tokens,
    capacity,
    splits,
    left,
    EV: tl.constexpr,
    BLOCK_N: tl.constexpr,  # of the kernel that left the parts
    BLOCK_S: tl.constexpr,
    BLOCK_EV: tl.constexpr,
):
    """The parts of one token and head, in their order; those without a block have written nothing."""
    place = tl.program_id(0).to(tl.int64)
    head = place % heads
    token = place // heads % tokens
    batch = place // heads // tokens
    keys = present_keys(lengths, batch, capacity)
    _, seen = _seen_blocks(keys, tokens, left, BLOCK_N)
    used = tl.minimum(seen, splits)

    column = tl.arange(0, BLOCK_EV)[None, :]
    top = tl.full((1, 1), float("-inf"), tl.float32)
    total = tl.zeros((1, 1), tl.float32)
    if sinks is not None:
        top = tl.zeros((1, 1), tl.float32) + tl.load(sinks + head).to(tl.float32) * LOG2E
        total += 1.0
    result = tl.zeros((1, BLOCK_EV), tl.float32)
    for first in range(0, used, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S)[:, None]  # (S, 1)
        live = split < used
        split += place * splits
        part_top = tl.load(tops + split, mask=live, other=float("-inf"))
        part_total = tl.load(totals + split, mask=live, other=0.0)
        part = tl.load(sums + split * EV + column, mask=live & (column < EV), other=0.0)
        top, shift, fading = _risen(top, tl.max(part_top, 0, keep_dims=True))
        weights = tl.exp2(part_top - shift)
        total = total * fading + tl.sum(weights * part_total, 0, keep_dims=True)
        result = result * fading + tl.sum(weights * part, 0, keep_dims=True)
    result, top = _normalised(result, top, total)
    tl.store(out + place * EV + column, result.to(out.dtype.element_ty), mask=column < EV)
    tl.store(lse + (batch * heads + head) * tokens + token + tl.zeros((1, 1), tl.int32), top)


def _column_step(cache: Tensor) -> int | None:
    return None if cache.shape[-1] <= 1 or cache.stride(-1) == 1 else cache.stride(-1)


def _is_wide(unit: int, *caches: Tensor) -> bool:
    """Whether rows of these caches, whose strides are multiples of `unit`, are read 16 bytes at a time."""
    whole = 16 // caches[0].element_size()
    return all(
        math.gcd(unit, x.shape[-1]) == whole and x.data_ptr() % 16 == 0 and _column_step(x) is None for x in caches
    )


def attention_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    window_left: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """The op's own signature; shapes, types and meaning are documented with it in pykern/ops."""
    batch, tokens, heads, size = query.shape
    blocks, page, key_heads, value_size = value_cache.shape
    device, group = query.device, heads // max(key_heads, 1)
    out = query.new_empty((batch, tokens, heads, value_size))
    lse = query.new_empty((batch, heads, tokens), dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse
    pages = 0 if block_table is None else block_table.shape[1]
    capacity = page if block_table is None else page * pages * (blocks > 0)
    left = None if window_left is not None and window_left >= capacity - 1 else window_left
    query = aligned(fold(query))
    unit, strides = strides_in_units(query, key_cache, value_cache)

    wide = _is_wide(unit, key_cache, value_cache)
    config = decode_config(max(size, value_size), tokens * group, query.dtype, wide, device)
    rows = min(block_size(tokens * group), config.rows)
    programs = batch * key_heads * triton.cdiv(tokens * group, rows)
    splits = split_count(programs, capacity if left is None else min(capacity, left + tokens), device)
    parts = [None, None, None]
    if splits > 1:
        shape = (batch, tokens, heads, splits)
        parts = [query.new_empty(x, dtype=torch.float32) for x in ((*shape, value_size), shape, shape)]

    slopes, *slope_strides = fold_slopes(alibi_slopes, heads)
    shared = dict(
        zip(("sums", "tops", "totals"), parts, strict=True),
        lengths=cache_seqlens.contiguous(),
        sinks=None if sinks is None else sinks.contiguous(),
        out=out,
        lse=lse,
        heads=heads,
        tokens=tokens,
        capacity=capacity,
        splits=splits,
        left=left,
        EV=value_size,
        BLOCK_N=config.keys,
        BLOCK_EV=block_size(value_size),
    )
    names = [f"{tensor}_{axis}" for tensor in "qkv" for axis in ("batch", "row", "head")]
    columns = block_size(size)
    with on(device):
        _decode_kernel[(programs * splits,)](
            query=query,
            key=key_cache,
            value=value_cache,
            table=None if block_table is None else block_table.contiguous(),
            slopes=slopes,
            group=group,
            pages=pages,
            blocks=blocks,
            scale=scale * LOG2E.value if softcap is None else scale / softcap,
            softcap=None if softcap is None else softcap * LOG2E.value,
            **dict(zip(names, strides, strict=True)),
            k_column=_column_step(key_cache),
            v_column=_column_step(value_cache),
            **dict(zip(("slope_batch", "slope_head"), slope_strides, strict=True)),
            **shared,
            UNIT=unit,
            PAGE=max(page, 1) if block_table is not None else 1,
            E=size,
            BLOCK_M=rows,
            BLOCK_E=columns,
            PART=min(FP32_PART, columns) if query.dtype == torch.float32 else columns,
            PRECISION=dot_precision(query.dtype),
            num_warps=config.warps,
            # Where a page's number has to be there first, half of the stages fetch numbers.
            num_stages=config.stages if block_table is None else 2 * config.stages - 1,
        )
        if splits > 1:
            _combine_kernel[(lse.numel(),)](**shared, BLOCK_S=COMBINED, num_warps=4)
    return out, lse

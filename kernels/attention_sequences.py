"""Where a sequence of packed or cached attention lies: its rows among the packed ones, its keys, their pages.

What the tensors say is read on the device, so no length is known to the host. Every value that leads to an address is
clamped: wrong boundaries, lengths or pages give wrong numbers, but no access outside of a tensor.
"""

import triton
import triton.language as tl
from pykern.kernels.attention_tiles import load_tile, store_rows


@triton.jit
def boundary(boundaries, index, total):
    return tl.minimum(tl.maximum(tl.load(boundaries + index), 0), total)


@triton.jit
def packed_rows(boundaries, sequence, total, longest):
    """First row of a sequence and its number of rows, at most `longest`, inside 0…total."""
    first = boundary(boundaries, sequence, total)
    end = boundary(boundaries, sequence + 1, total)
    return first, tl.minimum(tl.maximum(end - first, 0), longest)


@triton.jit
def present_keys(lengths, sequence, longest):
    """How many keys a cached sequence has, in 0…longest."""
    return tl.minimum(tl.maximum(tl.load(lengths + sequence), 0), longest)


@triton.jit
def packed_keys(boundaries, used, table, sequence, total, longest):
    """First row of a sequence's keys and their number; of pages, whose rows the table gives, the first is 0.

    Args:
        used: (B,), how many of the keys are there, or None for all.
        table: None unless keys lie in pages, whose lengths are `used`, or else the differences of the boundaries.
        longest: of pages no more than a table has room for.
    """
    first = 0
    if table is None:
        first, keys = packed_rows(boundaries, sequence, total, longest)
        if used is not None:
            keys = present_keys(used, sequence, keys)
    elif used is not None:
        keys = present_keys(used, sequence, longest)
    else:
        keys = tl.load(boundaries + sequence + 1).to(tl.int64) - tl.load(boundaries + sequence)
        keys = tl.minimum(tl.maximum(keys, 0), longest).to(tl.int32)
    return first, keys


@triton.jit
def cache_rows(table, sequence, position, live, pages, blocks, PAGE: tl.constexpr):
    """Of keys at these positions of a sequence, the entry of the cache (int64) and the row in that entry.

    An entry is a page of PAGE rows; without a table, all that the cache has of the sequence.

    Args:
        table: (B, pages) side by side, or None.
        position: int32, any shape.
        live: which positions exist, in that shape, None for all; the table is not read for others.
        blocks: number of pages, at least 1.
    """
    entry, row = sequence, position
    if table is not None:
        page = table + sequence.to(tl.int64) * pages + position // PAGE
        entry = tl.load(page) if live is None else tl.load(page, mask=live, other=0)
        entry = tl.minimum(tl.maximum(entry, 0), blocks - 1)
        row = position % PAGE
    return entry.to(tl.int64), row


@triton.jit
def load_keys(
    source,
    table,
    batch,
    head,
    first,
    keys,
    page_stride,
    row_stride,
    part,
    pages,
    blocks,
    origin,
    UNIT: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PAGE: tl.constexpr,
):
    """As `load_tile`; with a table the rows come one by one from pages, which are page_stride · UNIT apart."""
    if table is None:
        tile = load_tile(source, batch, head, first, keys, row_stride, part, SIZE, ROWS, COLUMNS, origin)
    else:
        position = first + tl.arange(0, ROWS)[:, None]
        column = part + tl.arange(0, COLUMNS)[None, :]
        live = None if keys is None else position < keys
        inside = True if keys is None else live
        if SIZE < COLUMNS or SIZE % COLUMNS != 0:
            inside &= column < SIZE
        page, row = cache_rows(table, batch, position, live, pages, blocks, PAGE)
        rows = source + (page * page_stride * UNIT + row.to(tl.int64) * row_stride)
        tile = tl.load(rows + column, mask=inside, other=0.0)
    return tile


@triton.jit
def query_block(cu_queries, total, queries, heads, BLOCK: tl.constexpr):
    """This program's batch entry or sequence, head, first packed row, number of queries, and its first query.

    The last queries of a causal head see the most keys: they come first, and the short ones fill the end. With
    cu_queries, `queries` is the most that a sequence has, and the first query is negative where nothing is left to do.
    """
    blocks = tl.cdiv(queries, BLOCK)
    turn = tl.program_id(0) % blocks
    head = tl.program_id(0) // blocks % heads
    batch = tl.program_id(0) // blocks // heads
    origin = 0
    if cu_queries is not None:
        origin, queries = packed_rows(cu_queries, batch, total, queries)
        blocks = tl.cdiv(queries, BLOCK)
    return batch, head, origin, queries, (blocks - 1 - turn) * BLOCK


@triton.jit
def statistics_line(batch, head, heads, queries, origin, total):
    """Where a head's, or a sequence's, rows begin in (B, H, L), or with an origin in (H, total)."""
    return (batch.to(tl.int64) * heads + head) * queries if origin is None else head.to(tl.int64) * total + origin


@triton.jit
def clear_outside(
    tensor,
    lse,
    boundaries,
    sequence,
    head,
    heads,
    end,
    total,
    turns,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Zeros in this program's share of the rows that are in no sequence or cut off: all programs together write all.

    Args:
        tensor: (total, heads, SIZE); ROWS and COLUMNS are a tile's.
        lse: None, or (heads, total), which gets -inf.
        end: of the sequence's rows that are not cut off.
        turns: programs of a sequence and head, which are neighbours.
    """
    turn = tl.program_id(0) % turns
    sequences = tl.num_programs(0) // turns // heads
    nothing = tl.zeros((ROWS, COLUMNS), tl.float32)
    for PART in tl.static_range(3):  # before all sequences, behind all, behind the end of this one
        start, stop = 0, total
        share, shares = (sequence * turns + turn).to(tl.int64), sequences * turns
        if PART == 0:
            stop = boundary(boundaries, 0, total)
        elif PART == 1:
            start = boundary(boundaries, sequences, total)
        else:
            start, stop = end, boundary(boundaries, sequence + 1, total)
            share, shares = turn.to(tl.int64), turns
        for at in tl.range(start + share * ROWS, stop, tl.cast(shares, tl.int64) * ROWS):
            store_rows(tensor, nothing, share, head, at, stop, heads, SIZE, ROWS, COLUMNS, 0)
            if lse is not None:
                row = at + tl.arange(0, ROWS)
                infinite = tl.full((ROWS,), float("-inf"), tl.float32)
                tl.store(lse + head.to(tl.int64) * total + row, infinite, mask=row < stop)

"""What a call of the three attention ops costs at the least, and how much more its kernels may move."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from pykern.kernels.attention_calls import VarlenCall
from pykern.ops.attention_core import DecodeCall, DenseCall
from pykern.ops.attention_torch import key_lengths


def allowed_pairs(length: int, keys: int, offset: int, left: int | None, right: int | None) -> int:
    """How many (query, key) pairs causality and window allow: what a kernel must compute at the least."""
    pairs = 0
    for position in range(offset, offset + length):
        first = 0 if left is None else max(0, position - left)
        end = keys if right is None else min(keys, position + right + 1)
        pairs += max(0, end - first)
    return pairs


def _bytes(*tensors: Tensor | None) -> int:
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)


def _output_bytes(query: Tensor, value_size: int) -> int:
    rows = math.prod(query.shape[:-1])
    return rows * (value_size * query.element_size() + 4)


def _dense_pairs(call: DenseCall) -> int:
    _, heads, length, keys = math.prod(call.lead), *call.scores_shape[-3:]
    pairs = allowed_pairs(length, keys, call.offset, call.window_left, call.window_right)
    return math.prod(call.lead) * heads * pairs


def dense_cost(*args: Any) -> tuple[float, float]:
    """Two products over the allowed pairs; every tensor moved once."""
    call = DenseCall(*args)
    size, value_size = call.query.shape[-1], call.value.shape[-1]
    moved = _bytes(call.query, call.key, call.value, call.attn_mask) + _output_bytes(call.query, value_size)
    return 2.0 * _dense_pairs(call) * (size + value_size), moved


def dense_backward_cost(dout: Tensor | None, dlse: Tensor | None, *args: Any) -> tuple[float, float]:
    """Scores and the weights' gradient recomputed, and a product for each gradient; every tensor moved once."""
    *forward, out, lse, output_mask = args
    call = DenseCall(*forward)
    size, value_size = call.query.shape[-1], call.value.shape[-1]
    products = size + value_size + size * (output_mask[0] + output_mask[1]) + value_size * output_mask[2]
    inputs = (call.query, call.key, call.value, call.attn_mask)
    gradients = [x for x, wanted in zip(inputs, output_mask, strict=False) if wanted]
    return 2.0 * _dense_pairs(call) * products, _bytes(dout, dlse, *inputs, out, lse, *gradients)


def _boundary_bytes(call: VarlenCall) -> int:
    """What says where sequences lie."""
    return _bytes(call.cu_seqlens_q, call.cu_seqlens_k, call.seqused_k, call.block_table)


def _varlen_pairs(args: Sequence[Any]) -> int:
    call = VarlenCall(*args)
    window = (call.window_left, call.window_right)
    return call.query.shape[1] * sum(allowed_pairs(n, keys, keys - n, *window) for n, keys in _lengths(args))


def _present_bytes(x: Tensor, keys: int) -> int:
    """Of rows (…, heads, size), those of some sequence."""
    return keys * x.shape[-2] * x.shape[-1] * x.element_size()


def varlen_cost(*args: Any) -> tuple[float, float]:
    """Two products over the allowed pairs; what is in a sequence moved once."""
    call, keys = VarlenCall(*args), sum(key_lengths(args))
    size, value_size = call.query.shape[-1], call.value.shape[-1]
    moved = _boundary_bytes(call) + _present_bytes(call.query, int(call.cu_seqlens_q[-1]))
    moved += _present_bytes(call.key, keys) + _present_bytes(call.value, keys)
    return 2.0 * _varlen_pairs(args) * (size + value_size), moved + _output_bytes(call.query, value_size)


def varlen_backward_cost(dout: Tensor | None, dlse: Tensor | None, *args: Any) -> tuple[float, float]:
    """As dense attention's, over the allowed pairs."""
    *forward, out, lse, output_mask = args
    call, keys = VarlenCall(*forward), sum(key_lengths(forward))
    size, value_size = call.query.shape[-1], call.value.shape[-1]
    products = size + value_size + size * (output_mask[0] + output_mask[1]) + value_size * output_mask[2]
    moved = _boundary_bytes(call) + _bytes(dout, dlse, call.query, out, lse)
    moved += _present_bytes(call.key, keys) + _present_bytes(call.value, keys)
    inputs = (call.query, call.key, call.value)
    moved += _bytes(*(x for x, wanted in zip(inputs, output_mask, strict=False) if wanted))
    return 2.0 * _varlen_pairs(forward) * products, moved


def decode_cost(*args: Any) -> tuple[float, float]:
    """Two products over the allowed pairs; of the cache, what some token sees moved once."""
    call = DecodeCall(*args)
    lengths, left = call.cache_seqlens.tolist(), call.window_left
    tokens, (size, value_size) = call.query.shape[1], (call.query.shape[-1], call.value_cache.shape[-1])
    pairs = sum(allowed_pairs(tokens, n, n - tokens, left, 0) for n in lengths)
    live = sum(n if left is None else min(n, left + tokens) for n in lengths)
    moved = _bytes(call.query) + _present_bytes(call.key_cache, live) + _present_bytes(call.value_cache, live)
    return 2.0 * pairs * call.query.shape[2] * (size + value_size), moved + _output_bytes(call.query, value_size)


# On a CPU and for small heads: how many rows a program or block of threads owns, and how many it visits at a time.
_TILES = {"triton": (32, 16), "cuda": (128, 64)}


def dense_traffic(backend: str, *args: Any) -> float:
    """A query moves once; a key and a value once for each tile of queries, of each head, that sees them."""
    call = DenseCall(*args)
    cost = dense_cost(*args)[1]
    return (cost - _bytes(call.key, call.value) + _heads(call) * _keys_visited(backend, call) * _pair(call)) / cost


def dense_backward_traffic(backend: str, dout: Tensor | None, dlse: Tensor | None, *args: Any) -> float:
    """Two numbers a row are made of dout and out; then tiles of keys visit rows, and tiles of queries visit keys."""
    *forward, out, lse, output_mask = args
    call = DenseCall(*forward)
    rows, pair = 8 * lse.numel(), _pair(call)
    moved = _bytes(dout, out, lse, dlse) + rows
    if output_mask[1] or output_mask[2]:
        visited = _queries_visited(backend, call)
        moved += 2 * _bytes(call.key, call.value) + _heads(call) * visited * (pair + 8)
    if output_mask[0]:
        moved += 2 * _bytes(call.query) + _bytes(dout) + rows + _heads(call) * _keys_visited(backend, call) * pair
    return moved / dense_backward_cost(dout, dlse, *args)[1]


def varlen_traffic(backend: str, *args: Any) -> float:
    """As dense attention's, sequence by sequence; boundaries are read twice."""
    call, cost, keys = VarlenCall(*args), varlen_cost(*args)[1], sum(key_lengths(args))
    visited = _boundary_bytes(call) + _packed_keys_visited(backend, args) * call.query.shape[1] * _pair(call)
    return (cost - _present_bytes(call.key, keys) - _present_bytes(call.value, keys) + visited) / cost


def varlen_backward_traffic(backend: str, dout: Tensor | None, dlse: Tensor | None, *args: Any) -> float:
    """As dense attention's, sequence by sequence; each of three kernels reads boundaries twice."""
    *forward, out, lse, output_mask = args
    call, keys = VarlenCall(*forward), sum(key_lengths(forward))
    rows, pair, heads = 8 * lse.numel(), _pair(call), call.query.shape[1]
    moved = 6 * _boundary_bytes(call) + _bytes(dout, out, lse, dlse) + rows
    if output_mask[1] or output_mask[2]:
        moved += _bytes(call.key, call.value) + _present_bytes(call.key, keys) + _present_bytes(call.value, keys)
        moved += heads * _packed_queries_visited(backend, forward) * (pair + 8)
    if output_mask[0]:
        moved += 2 * _bytes(call.query) + _bytes(dout) + rows
        moved += heads * _packed_keys_visited(backend, forward) * pair
    return moved / varlen_backward_cost(dout, dlse, *args)[1]


def _packed_keys_visited(backend: str, args: Sequence[Any]) -> int:
    call = VarlenCall(*args)
    window = (call.window_left, call.window_right)
    return sum(_visited(*_TILES[backend], n, keys, keys - n, *window) for n, keys in _lengths(args))


def _packed_queries_visited(backend: str, args: Sequence[Any]) -> int:
    call = VarlenCall(*args)
    window = (call.window_right, call.window_left)
    return sum(_visited(*_TILES[backend], keys, n, n - keys, *window) for n, keys in _lengths(args))


def _lengths(args: Sequence[Any]) -> Iterator[tuple[int, int]]:
    """Queries and keys of each sequence."""
    bounds = VarlenCall(*args).cu_seqlens_q.tolist()
    return zip((end - start for start, end in zip(bounds, bounds[1:], strict=False)), key_lengths(args), strict=True)


def _pair(call: DenseCall | VarlenCall) -> int:
    """Bytes of a key and its value, and of a query and its dout."""
    return (call.query.shape[-1] + call.value.shape[-1]) * call.query.element_size()


def _heads(call: DenseCall) -> int:
    return math.prod(call.lead) * call.query.shape[-2]


def _keys_visited(backend: str, call: DenseCall) -> int:
    length, keys = call.scores_shape[-2:]
    return _visited(*_TILES[backend], length, keys, call.offset, call.window_left, call.window_right)


def _queries_visited(backend: str, call: DenseCall) -> int:
    length, keys = call.scores_shape[-2:]
    return _visited(*_TILES[backend], keys, length, -call.offset, call.window_right, call.window_left)


def _visited(tile: int, step: int, rows: int, columns: int, offset: int, left: int | None, right: int | None) -> int:
    """How many columns the tiles of rows visit, in whole steps, summed over the tiles."""
    total = 0
    for first in range(0, rows, tile):
        last = min(first + tile, rows) - 1
        start = 0 if left is None else max(0, first + offset - left) // step * step
        end = columns if right is None else min(columns, last + offset + right + 1)
        total += max(0, -(-end // step) * step - start)
    return total


# On a CPU: into how many parts the keys of a sequence are split at the most.
_SPLITS = {"triton": 3, "cuda": 3}


def decode_traffic(backend: str, *args: Any) -> float:
    """Keys and values once, within two hundredths; beside them page numbers, and partial results, written and read."""
    call, cost = DecodeCall(*args), decode_cost(*args)[1]
    partial = 2 * 4 * math.prod(call.query.shape[:-1]) * (call.value_cache.shape[-1] + 2)
    return 1.02 + (_SPLITS[backend] * partial + _bytes(call.block_table)) / cost

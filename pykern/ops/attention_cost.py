"""What a call of the three attention ops costs at the least: flops of matrix products, bytes moved."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pykern.ops.attention_core import DenseCall, VarlenCall
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


def _varlen_pairs(args: Sequence[Any]) -> int:
    call, pairs = VarlenCall(*args), 0
    bounds = call.cu_seqlens_q.tolist()
    for start, end, length in zip(bounds, bounds[1:], key_lengths(args), strict=False):
        pairs += allowed_pairs(end - start, length, length - (end - start), call.window_left, call.window_right)
    return pairs * call.query.shape[1]


def _present_bytes(x: Tensor, keys: int) -> int:
    """Of keys or values (…, Hkv, size), those that some query may see."""
    return keys * x.shape[-2] * x.shape[-1] * x.element_size()


def varlen_cost(*args: Any) -> tuple[float, float]:
    """Two products over the allowed pairs; what is in a sequence moved once."""
    call, keys = VarlenCall(*args), sum(key_lengths(args))
    size, value_size = call.query.shape[-1], call.value.shape[-1]
    moved = _bytes(call.query) + _present_bytes(call.key, keys) + _present_bytes(call.value, keys)
    return 2.0 * _varlen_pairs(args) * (size + value_size), moved + _output_bytes(call.query, value_size)


def varlen_backward_cost(dout: Tensor | None, dlse: Tensor | None, *args: Any) -> tuple[float, float]:
    """As dense attention's, over the allowed pairs."""
    *forward, out, lse, output_mask = args
    call, keys = VarlenCall(*forward), sum(key_lengths(forward))
    size, value_size = call.query.shape[-1], call.value.shape[-1]
    products = size + value_size + size * (output_mask[0] + output_mask[1]) + value_size * output_mask[2]
    moved = _bytes(dout, dlse, call.query, out, lse) + _present_bytes(call.key, keys) + _present_bytes(call.value, keys)
    inputs = (call.query, call.key, call.value)
    moved += _bytes(*(x for x, wanted in zip(inputs, output_mask, strict=False) if wanted))
    return 2.0 * _varlen_pairs(forward) * products, moved


def decode_cost(*args: Any) -> tuple[float, float]:
    query, key, value, lengths, left = args[0], args[1], args[2], args[3].tolist(), args[8]
    tokens, (size, value_size) = query.shape[1], (query.shape[-1], value.shape[-1])
    pairs = sum(allowed_pairs(tokens, n, n - tokens, left, 0) for n in lengths)
    live = sum(n if left is None else min(n, left + tokens) for n in lengths)
    moved = _bytes(query) + live * key.shape[-2] * (size + value_size) * key.element_size()
    return 2.0 * pairs * query.shape[2] * (size + value_size), moved + _output_bytes(query, value_size)


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


def _pair(call: DenseCall) -> int:
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

"""The checks on the arguments of dense, packed and cached attention: each error names the argument."""

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pykern.ops.attention_core import DenseCall, statistic_dtype

_ALIGNMENTS = ("top_left", "bottom_right")


def _is_plain(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, alibi_slopes: Tensor | None, *rest: Any
) -> bool:
    """Whether nothing can be wrong: most calls, spared the detailed questions, which cost as much as a small call."""
    shape, keys, dtype, device = query.shape, key.shape, query.dtype, query.device
    return (
        attn_mask is None
        and alibi_slopes is None
        and rest == (None, None, 0.0, rest[3], rest[4], None, rest[6], None, "top_left")
        and rest[6] in (None, 0)
        and len(shape) >= 3
        and keys == value.shape
        and shape[:-3] == keys[:-3]
        and shape[-2:] == keys[-2:]
        and key.dtype == dtype == value.dtype
        and key.device == device == value.device
        and dtype.is_floating_point
    )


def check_dense(*args: Any) -> None:
    if _is_plain(*args):
        return
    call = DenseCall(*args)
    query, key, value, lead = call.query, call.key, call.value, call.lead
    for name, x in (("query", query), ("key", key), ("value", value)):
        _check_dimensions(name, x, query)
    require(
        value.shape[-3] == key.shape[-3],
        lambda: f"value: expected length {key.shape[-3]} as the key's, got {value.shape[-3]}",
    )
    check_heads(query, key, value, call.enable_gqa, "" if call.enable_gqa else " (a divisor needs enable_gqa=True)")
    check_scoring(
        query,
        lead,
        call.alibi_slopes,
        call.sinks,
        call.window_left,
        call.window_right,
        call.softcap,
        call.rng,
        call.dropout_p,
    )
    require(call.align in _ALIGNMENTS, lambda: f"align: expected one of {_ALIGNMENTS}, got {call.align!r}")
    if call.attn_mask is not None:
        _check_mask(call.attn_mask, call)


def _check_dimensions(name: str, x: Tensor, query: Tensor) -> None:
    require(
        x.dim() >= 3 and x.dim() == query.dim(),
        lambda: f"{name}: expected at least 3 dimensions (…, heads, length, size), as many as query, got {x.dim()}",
    )
    lead = query.shape[:-3]
    require(
        x.shape[:-3] == lead,
        lambda: f"{name}: expected leading dimensions {tuple(lead)} as query, got {tuple(x.shape[:-3])}",
    )


def _check_mask(mask: Tensor, call: DenseCall) -> None:
    require(
        mask.dtype == torch.bool or mask.is_floating_point(),
        lambda: f"attn_mask: expected dtype torch.bool or floating, got {mask.dtype}",
        TypeError,
    )
    scores = call.scores_shape
    tail = scores[max(len(scores) - mask.dim(), 0) :]
    require(
        mask.dim() == len(tail) and all(m in (1, s) for m, s in zip(mask.shape, tail, strict=True)),
        lambda: f"attn_mask: expected a shape that broadcasts to {tuple(scores)}, got {tuple(mask.shape)}",
    )
    check_device("attn_mask", mask, call.query)


def check_dense_backward(dout: Tensor | None, dlse: Tensor | None, *args: Any) -> None:
    *forward, out, lse, _output_mask = args
    check_dense(*forward)
    call = DenseCall(*forward)
    for name, x in (("dout", dout), ("out", out)):
        check_like(name, x, (*call.query.shape[:-1], call.value.shape[-1]), call.query, call.query.dtype)
    for name, x in (("dlse", dlse), ("lse", lse)):
        check_like(name, x, call.scores_shape[:-1], call.query, statistic_dtype(call.query))


def window_bounds(window: Sequence[int | None] | None, is_causal: bool) -> tuple[int | None, int | None]:
    """Left and right of `window`, both checked; causal is no key to the right."""
    if window is None:
        return None, 0 if is_causal else None
    if len(window) != 2:
        raise ValueError(f"window: expected a pair (left, right), got {window!r}")
    left, right = window
    if (left is not None and left < 0) or (right is not None and right < 0):
        raise ValueError(f"window: expected left and right to be None or at least 0, got {window!r}")
    return left, 0 if is_causal else right


def require(condition: Any, message: Callable[[], str], error: type[Exception] = ValueError) -> None:
    """torch._check, which a symbolic size needs, but not its microsecond where the condition is plainly met."""
    if condition is not True:
        (torch._check_type if error is TypeError else torch._check_value)(condition, message)


def check_heads(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grouped: bool,
    hint: str = "",
    names: tuple[str, str] = ("key", "value"),
) -> None:
    """Tensors (…, length, heads, size): dtypes, devices, sizes and heads; lengths are the caller's."""
    require(query.is_floating_point(), lambda: f"query: expected a floating dtype, got {query.dtype}", TypeError)
    for name, x in zip(names, (key, value), strict=True):
        _check_kin(name, x, query)
    require(
        key.shape[-1] == query.shape[-1],
        lambda: f"{names[0]}: expected heads of size {query.shape[-1]} as the query's, got {key.shape[-1]}",
    )
    require(
        value.shape[-2] == key.shape[-2],
        lambda: f"{names[1]}: expected {key.shape[-2]} heads as {names[0]}, got {value.shape[-2]}",
    )
    heads, shared = query.shape[-2], key.shape[-2]
    require(
        heads == shared or (grouped and shared > 0 and heads % shared == 0),
        lambda: (
            f"{names[0]}: expected {'a number of heads that divides' if grouped else 'as many heads as'} the "
            f"query's {heads}{hint}, got {shared}"
        ),
    )


def _check_kin(name: str, x: Tensor, query: Tensor) -> None:
    require(x.dtype == query.dtype, lambda: f"{name}: expected dtype {query.dtype} as query, got {x.dtype}", TypeError)
    check_device(name, x, query)


def check_device(name: str, x: Tensor, query: Tensor) -> None:
    require(x.device == query.device, lambda: f"{name}: expected device {query.device} as query, got {x.device}")


def check_scoring(
    query: Tensor,
    lead: Sequence[int],
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    window_left: int | None,
    window_right: int | None,
    softcap: float | None,
    rng: Tensor | None = None,
    dropout_p: float = 0.0,
) -> None:
    """The arguments that shape the scores; query is (…, heads, size), `lead` the batch dimensions of the slopes."""
    _check_limit("left", window_left)
    _check_limit("right", window_right)
    require(
        softcap is None or 0 < softcap < math.inf,
        lambda: f"softcap: expected None or a positive number, got {softcap}",
    )
    heads = query.shape[-2]
    _check_per_head("alibi_slopes", alibi_slopes, [(heads,), (*lead, heads)] if len(lead) > 0 else [(heads,)], query)
    _check_per_head("sinks", sinks, [(heads,)], query)
    require(0 <= dropout_p <= 1, lambda: f"dropout_p: expected a probability, got {dropout_p}")
    require(
        dropout_p == 0 or rng is not None, lambda: f"rng: expected seed and offset for dropout_p={dropout_p}, got None"
    )
    if rng is not None:
        check_integers("rng", rng, query, (2,), torch.int64)


def _check_limit(side: str, limit: int | None) -> None:
    require(limit is None or limit >= 0, lambda: f"window: expected {side} to be None or at least 0, got {limit}")


def _check_per_head(name: str, x: Tensor | None, shapes: Sequence[tuple[int, ...]], query: Tensor) -> None:
    if x is None:
        return
    require(x.is_floating_point(), lambda: f"{name}: expected a floating dtype, got {x.dtype}", TypeError)
    require(
        tuple(x.shape) in shapes,
        lambda: f"{name}: expected shape {' or '.join(map(str, shapes))}, got {tuple(x.shape)}",
    )
    check_device(name, x, query)


def check_like(name: str, x: Tensor | None, shape: Sequence[int], query: Tensor, dtype: torch.dtype) -> None:
    """An output, or the gradient of one, handed back."""
    if x is not None:
        require(x.shape == torch.Size(shape), lambda: f"{name}: expected shape {tuple(shape)}, got {tuple(x.shape)}")
        require(x.dtype == dtype, lambda: f"{name}: expected dtype {dtype}, got {x.dtype}", TypeError)
        check_device(name, x, query)


def check_integers(name: str, x: Tensor, query: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.int32) -> None:
    """An integer argument; a size of -1 accepts any."""
    require(x.dtype == dtype, lambda: f"{name}: expected dtype {dtype}, got {x.dtype}", TypeError)
    require(
        x.dim() == len(shape) and all(want in (-1, got) for want, got in zip(shape, x.shape, strict=True)),
        lambda: f"{name}: expected shape {tuple('any' if s == -1 else s for s in shape)}, got {tuple(x.shape)}",
    )
    check_device(name, x, query)


def checks_on_host(x: Tensor) -> bool:
    """Whether PYKERN_CHECKS=1 asks for values to be looked at, and there are values: not while tracing."""
    if torch.compiler.is_compiling() or os.environ.get("PYKERN_CHECKS") != "1":
        return False
    return torch._guards.detect_fake_mode([x]) is None and x.device.type != "meta"


def check_lengths(name: str, lengths: Sequence[int], limits: Sequence[int]) -> None:
    """Values read back from the device."""
    for i, (length, limit) in enumerate(zip(lengths, limits, strict=True)):
        if not 0 <= length <= limit:
            raise ValueError(f"{name}: expected 0 to {limit} keys in sequence {i}, got {length}")


def check_pages(block_table: Sequence[Sequence[int]], lengths: Sequence[int], cache: Tensor) -> None:
    """Values read back from the device; what lies behind a sequence's length in the table is never used."""
    blocks, block_size = cache.shape[:2]
    for i, (pages, length) in enumerate(zip(block_table, lengths, strict=True)):
        needed = -(-length // block_size) if block_size > 0 else 0
        if length > len(pages) * block_size:
            raise ValueError(
                f"block_table: expected {needed} pages for the {length} keys of sequence {i}, got {len(pages)}"
            )
        for page in pages[:needed]:
            if not 0 <= page < blocks:
                raise ValueError(f"block_table: expected block ids from 0 to {blocks - 1}, got {page} in sequence {i}")

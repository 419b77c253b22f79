"""Packed attention: sequences of any lengths laid end to end, keys contiguous or in pages."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pykern.ops._philox import draw_rng, keep_mask
from pykern.ops._spec import define
from pykern.ops.attention_checks import (
    check_heads,
    check_integers,
    check_lengths,
    check_pages,
    check_scoring,
    checks_on_host,
    require,
    window_bounds,
)
from pykern.ops.attention_core import (
    Scoring,
    attend,
    default_scale,
    key_padding,
    statistic_dtype,
    take_pages,
    take_rows,
)
from pykern.ops.attention_cost import varlen_cost
from pykern.ops.attention_packed_samples import varlen_bad, varlen_samples
from pykern.ops.attention_torch import torch_varlen


class VarlenCall(NamedTuple):
    """The arguments of the op, in its order."""

    query: Tensor
    key: Tensor
    value: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    seqused_k: Tensor | None
    block_table: Tensor | None
    rng: Tensor | None
    dropout_p: float
    scale: float
    window_left: int | None
    window_right: int | None
    softcap: float | None


def _segments(boundaries: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """First row and length of each sequence, inside 0…total whatever the boundaries say."""
    boundaries = boundaries.long().clamp(0, total)
    return boundaries[:-1], (boundaries[1:] - boundaries[:-1]).clamp(min=0)


def attention_varlen_reference(*args: Any) -> tuple[Tensor, Tensor]:
    """Pads on the device, attends, and packs again: nothing is read back and no loop depends on a length."""
    call = VarlenCall(*args)
    query, (total, heads, _size) = call.query, call.query.shape
    start, length = _segments(call.cu_seqlens_q, total)
    length = length.clamp(max=call.max_seqlen_q)
    row = start.unsqueeze(-1) + torch.arange(call.max_seqlen_q, device=query.device)
    padded = take_rows(query, row, key_padding(length, call.max_seqlen_q))
    key, value, keys_length = _padded_keys(call)
    keep = None
    if call.dropout_p > 0:
        head = torch.arange(heads, device=query.device).unsqueeze(-1)
        keep = keep_mask(call.rng, row.unsqueeze(1) * heads + head, call.max_seqlen_k, call.dropout_p)
    offset = (keys_length - length)[:, None, None, None]
    out, lse = attend(
        *(x.transpose(1, 2) for x in (padded, key, value)),
        Scoring(call.scale, offset, call.window_left, call.window_right, call.softcap, call.dropout_p),
        present=key_padding(keys_length, key.shape[1])[:, None, None, :],
        slopes=call.alibi_slopes,
        sinks=call.sinks,
        keep=keep,
    )
    index, inside = _packed_index(call, start, length)
    out = take_rows(out.transpose(1, 2).flatten(0, 1), index, inside)
    lse = take_rows(lse.transpose(1, 2).flatten(0, 1), index, inside, -math.inf)
    return out.to(query.dtype), lse.transpose(0, 1)


def _padded_keys(call: VarlenCall) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values (B, longest, Hkv, E), zeros beyond each sequence's length, and the lengths."""
    used, longest = call.seqused_k, call.max_seqlen_k
    if call.block_table is not None:
        longest = min(longest, call.block_table.shape[1] * call.key.shape[1])
        boundaries = call.cu_seqlens_k.long()
        length = (boundaries[1:] - boundaries[:-1] if used is None else used.long()).clamp(0, longest)
        return *(take_pages(x, call.block_table, length, longest) for x in (call.key, call.value)), length
    start, length = _segments(call.cu_seqlens_k, call.key.shape[0])
    length = length.clamp(max=longest)
    if used is not None:
        length = torch.minimum(length, used.long().clamp(min=0))
    row = start.unsqueeze(-1) + torch.arange(longest, device=call.key.device)
    inside = key_padding(length, longest)
    return take_rows(call.key, row, inside), take_rows(call.value, row, inside), length


def _packed_index(call: VarlenCall, start: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """Of every packed row, its row among the padded ones and whether it is in any sequence."""
    row = torch.arange(call.query.shape[0], device=call.query.device)
    batch = start.shape[0]
    if batch == 0:
        return row, torch.zeros_like(row, dtype=torch.bool)
    ends = call.cu_seqlens_q[1:].long().contiguous()
    sequence = torch.searchsorted(ends, row, right=True).clamp(max=batch - 1)
    position = row - start[sequence]
    return sequence * call.max_seqlen_q + position, (position >= 0) & (position < length[sequence])


def _check(*args: Any) -> None:
    call = VarlenCall(*args)
    query = call.query
    require(query.dim() == 3, lambda: f"query: expected (total, heads, size), got {tuple(query.shape)}")
    _check_keys("key", call.key, call)
    _check_keys("value", call.value, call)
    check_heads(query, call.key, call.value, grouped=True)
    boundaries = call.cu_seqlens_q
    require(
        boundaries.dim() == 1 and boundaries.shape[0] >= 1,
        lambda: f"cu_seqlens_q: expected shape (sequences + 1,), got {tuple(boundaries.shape)}",
    )
    batch = boundaries.shape[0] - 1
    check_integers("cu_seqlens_q", boundaries, query, (batch + 1,))
    check_integers("cu_seqlens_k", call.cu_seqlens_k, query, (batch + 1,))
    _check_longest("max_seqlen_q", call.max_seqlen_q)
    _check_longest("max_seqlen_k", call.max_seqlen_k)
    if call.seqused_k is not None:
        check_integers("seqused_k", call.seqused_k, query, (batch,))
    if call.block_table is not None:
        check_integers("block_table", call.block_table, query, (batch, -1))
    check_scoring(
        query,
        (batch,),
        call.alibi_slopes,
        call.sinks,
        call.window_left,
        call.window_right,
        call.softcap,
        call.rng,
        call.dropout_p,
    )


def _check_keys(name: str, x: Tensor, call: VarlenCall) -> None:
    rank, layout = (
        (4, "(blocks, block_size, heads, size)") if call.block_table is not None else (3, "(total, heads, size)")
    )
    require(x.dim() == rank, lambda: f"{name}: expected {layout}, got {tuple(x.shape)}")
    got, wanted = tuple(x.shape[: rank - 2]), tuple(call.key.shape[: rank - 2])
    require(got == wanted, lambda: f"{name}: expected {wanted} in {layout} as the key's, got {got}")


def _check_longest(name: str, longest: int) -> None:
    require(longest >= 0, lambda: f"{name}: expected at least 0, got {longest}")


def _check_boundaries(name: str, boundaries: list[int], total: int | None, longest: int) -> None:
    if not boundaries or boundaries[0] != 0:
        raise ValueError(f"{name}: expected to start at 0, got {boundaries[:1]}")
    for i, (start, end) in enumerate(zip(boundaries, boundaries[1:], strict=False)):
        if end < start:
            raise ValueError(f"{name}: expected not to decrease, got {start} before {end} at sequence {i}")
        if end - start > longest:
            raise ValueError(
                f"max_seqlen_{name[-1]}: expected at least {end - start}, sequence {i}'s length, got {longest}"
            )
    if total is not None and boundaries[-1] > total:
        raise ValueError(f"{name}: expected at most {total} rows, got {boundaries[-1]}")


def _check_values(call: VarlenCall) -> None:
    """What only the device knows, under PYKERN_CHECKS=1."""
    paged, used = call.block_table is not None, call.seqused_k
    boundaries = call.cu_seqlens_k.tolist()
    _check_boundaries("cu_seqlens_q", call.cu_seqlens_q.tolist(), call.query.shape[0], call.max_seqlen_q)
    if used is None or not paged:
        _check_boundaries("cu_seqlens_k", boundaries, None if paged else call.key.shape[0], call.max_seqlen_k)
    lengths = [end - start for start, end in zip(boundaries, boundaries[1:], strict=False)]
    if used is not None:
        check_lengths("seqused_k", used.tolist(), [call.max_seqlen_k] * len(lengths) if paged else lengths)
        lengths = used.tolist()
    if paged:
        check_pages(call.block_table.tolist(), lengths, call.key)


_attention_varlen = define(
    "pykern::attention_varlen(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q, Tensor cu_seqlens_k,"
    " SymInt max_seqlen_q, SymInt max_seqlen_k, Tensor? alibi_slopes, Tensor? sinks, Tensor? seqused_k,"
    " Tensor? block_table, Tensor? rng, float dropout_p, float scale, int? window_left, int? window_right,"
    " float? softcap, *, str? backend=None) -> (Tensor out, Tensor lse)",
    reference=attention_varlen_reference,
    check=_check,
    fake=lambda query, key, value, *_: (
        query.new_empty((*query.shape[:-1], value.shape[-1])),
        query.new_empty((query.shape[1], query.shape[0]), dtype=statistic_dtype(query)),
    ),
    autocast=dict.fromkeys(("query", "key", "value"), "lower"),
    samples=varlen_samples,
    bad=varlen_bad,
    cost=varlen_cost,
    peers={"torch": torch_varlen},
)


@_attention_varlen.public
def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    window: Sequence[int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention inside each of B sequences that lie end to end; bottom-right aligned, as in flash-attention.

    Rows of query beyond cu_seqlens_q[-1] are padding: they and keys that belong to no sequence are never read, outputs
    there are zeros (lse -inf) and gradients zero. Values that lead outside the tensors are clamped on the device;
    PYKERN_CHECKS=1 raises for them, which synchronises.

    Args:
        query: (total_q, H, E), fp32, fp16, bf16 or fp64 (by the reference), any strides.
        key, value: (total_k, Hkv, E) and (total_k, Hkv, Ev), Hkv a divisor of H; with block_table pages
            (blocks, block_size, Hkv, E) and (blocks, block_size, Hkv, Ev).
        cu_seqlens_q, cu_seqlens_k: (B + 1,) int32, cumulative lengths from 0; for pages only the differences of
            cu_seqlens_k count.
        max_seqlen_q, max_seqlen_k: bounds of the lengths; longer sequences are cut.
        dropout_p, is_causal, scale, window, softcap, sinks: as in `attention`.
        alibi_slopes: (H,) or (B, H).
        seqused_k: (B,) int32, how many keys of each sequence are present; for pages in place of cu_seqlens_k.
        block_table: (B, max_blocks) int32, the pages of each sequence in order.
        return_lse: also return the log-sum-exp of the scores.

    Returns:
        (total_q, H, Ev) in the query's dtype, with return_lse followed by (H, total_q) in fp32 (fp64 for fp64).

    Raises:
        ValueError, TypeError: a shape, dtype, device or number does not fit; the message names the argument.
    """
    left, right = window_bounds(window, is_causal)
    call = VarlenCall(
        query,
        key,
        value,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        alibi_slopes,
        sinks,
        seqused_k,
        block_table,
        draw_rng(query.device) if dropout_p > 0 else None,
        dropout_p,
        default_scale(query, scale),
        left,
        right,
        softcap,
    )
    if checks_on_host(query):
        _check(*call)
        _check_values(call)
    out, lse = _attention_varlen(*call)
    return (out, lse) if return_lse else out

"""Packed attention: sequences of any lengths laid end to end, keys contiguous or in pages."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pykern.kernels.attention_calls import VarlenCall
from pykern.ops._philox import draw_rng, keep_mask
from pykern.ops._spec import define, define_backward
from pykern.ops.attention_checks import checks_on_host, window_bounds
from pykern.ops.attention_core import (
    Scoring,
    attend,
    default_scale,
    key_padding,
    room_in_pages,
    statistic_dtype,
    take_pages,
    take_rows,
)
from pykern.ops.attention_cost import varlen_backward_cost, varlen_backward_traffic, varlen_cost, varlen_traffic
from pykern.ops.attention_packed_backends import VARLEN, VARLEN_BACKWARD, VARLEN_BACKWARD_LACKS, VARLEN_LACKS
from pykern.ops.attention_torch import torch_varlen
from pykern.ops.attention_varlen_checks import check_varlen, check_varlen_backward, check_varlen_values
from pykern.ops.attention_varlen_samples import varlen_bad, varlen_samples


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
        keep = keep[..., : key.shape[1]]  # a table may have room for fewer keys
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
        longest = min(longest, room_in_pages(call.key, call.block_table))
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


_attention_varlen_backward = define_backward(
    "pykern::attention_varlen_backward(Tensor? dout, Tensor? dlse, Tensor query, Tensor key, Tensor value,"
    " Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, Tensor? alibi_slopes,"
    " Tensor? sinks, Tensor? seqused_k, Tensor? block_table, Tensor? rng, float dropout_p, float scale,"
    " int? window_left, int? window_right, float? softcap, Tensor out, Tensor lse, bool[5] output_mask, *,"
    " str? backend=None) -> (Tensor dquery, Tensor dkey, Tensor dvalue, Tensor dalibi_slopes, Tensor dsinks)",
    check=check_varlen_backward,
    backends=VARLEN_BACKWARD,
    supports=VARLEN_BACKWARD_LACKS,
    cost=varlen_backward_cost,
    traffic=varlen_backward_traffic,
)

_attention_varlen = define(
    "pykern::attention_varlen(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q, Tensor cu_seqlens_k,"
    " SymInt max_seqlen_q, SymInt max_seqlen_k, Tensor? alibi_slopes, Tensor? sinks, Tensor? seqused_k,"
    " Tensor? block_table, Tensor? rng, float dropout_p, float scale, int? window_left, int? window_right,"
    " float? softcap, *, str? backend=None) -> (Tensor out, Tensor lse)",
    reference=attention_varlen_reference,
    check=check_varlen,
    fake=lambda query, key, value, *_: (
        query.new_empty((*query.shape[:-1], value.shape[-1])),
        query.new_empty((query.shape[1], query.shape[0]), dtype=statistic_dtype(query)),
    ),
    backends=VARLEN,
    supports=VARLEN_LACKS,
    backward=_attention_varlen_backward,
    autocast=dict.fromkeys(("query", "key", "value"), "lower"),
    samples=varlen_samples,
    bad=varlen_bad,
    cost=varlen_cost,
    traffic=varlen_traffic,
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
        check_varlen(*call)
        check_varlen_values(call)
    out, lse = _attention_varlen(*call)
    return (out, lse) if return_lse else out

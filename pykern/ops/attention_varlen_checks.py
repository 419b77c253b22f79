"""The checks on the arguments of packed attention: each error names the argument."""

from typing import Any

from torch import Tensor

from pykern.kernels.attention_calls import VarlenCall
from pykern.ops.attention_checks import (
    check_heads,
    check_integers,
    check_lengths,
    check_like,
    check_pages,
    check_scoring,
    require,
)
from pykern.ops.attention_core import statistic_dtype


def check_varlen(*args: Any) -> None:
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


def check_varlen_values(call: VarlenCall) -> None:
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


def check_varlen_backward(dout: Tensor | None, dlse: Tensor | None, *args: Any) -> None:
    *forward, out, lse, _output_mask = args
    check_varlen(*forward)
    call = VarlenCall(*forward)
    total, heads, _size = call.query.shape
    for name, x in (("dout", dout), ("out", out)):
        check_like(name, x, (total, heads, call.value.shape[-1]), call.query, call.query.dtype)
    for name, x in (("dlse", dlse), ("lse", lse)):
        check_like(name, x, (heads, total), call.query, statistic_dtype(call.query))

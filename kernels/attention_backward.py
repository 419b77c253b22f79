"""Softmax attention, backward: the gradients of query, key and value, of ALiBi's slopes and of sinks.

Three kernels. The first takes from each row what the others need of it, see attention_delta.py. The second gives a
program a block of keys: it walks over the queries that see it, of every head that shares it, and keeps dK and dV in
registers. The third gives a program a block of queries and walks over its keys for dQ. Scores are computed twice, but
nothing is added to memory that another program adds to: the same inputs give the same bits, and dQ needs no copy in
fp32. The additive mask's gradient has a kernel of its own, in attention_bias_backward.py. Packed sequences run the
same kernels from attention_varlen.py.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
from pykern.kernels.attention_backward_kernels import dkdv_kernel, dq_kernel
from pykern.kernels.attention_bias_backward import bias_gradient
from pykern.kernels.attention_delta import delta_of_output, exact_statistics
from pykern.kernels.attention_scores import LOG2E, Band, score_arguments
from pykern.kernels.attention_tiles import Config, Operands, choose, dot_precision
from pykern.kernels.norm import on
from torch import Tensor

# For `choose`. Per head size (queries, keys, warps, stages).
_DKDV = {
    "fp32": {64: Config(16, 32, 8, 1), 256: Config(16, 16, 8, 1)},
    "plain": {
        32: Config(64, 128, 8, 2),
        56: Config(32, 64, 8, 2),  # less than a tile's columns: a comparison each
        64: Config(64, 128, 8, 2),
        128: Config(64, 64, 8, 2),
        256: Config(32, 32, 8, 2),
    },
    "packed, fp32": {
        32: Config(16, 16, 8, 1),
        64: Config(16, 32, 8, 1),
        128: Config(16, 16, 4, 2),
        256: Config(16, 16, 8, 1),
    },
    "packed, plain": {
        32: Config(64, 128, 8, 2),
        56: Config(32, 64, 8, 2),
        128: Config(64, 64, 8, 2),
        256: Config(32, 32, 8, 2),
    },
    "features": {256: Config(32, 32, 8, 2)},
    "plain, descriptors": {
        64: Config(64, 128, 8, 2, descriptors=True),
        104: Config(32, 128, 8, 2, descriptors=True),
        120: Config(32, 128, 8, 2, descriptors=True, apart=True),  # stores of odd sizes need registers
        128: Config(32, 128, 8, 2, descriptors=True),
        256: Config(32, 128, 8, 2, descriptors=True, apart=True),
    },
    "features, descriptors": {
        64: Config(32, 128, 8, 2, descriptors=True, apart=True),
        256: Config(16, 128, 8, 2, descriptors=True, apart=True),
    },
}
_DQ = {
    "packed, fp32": {64: Config(32, 32, 8, 1), 256: Config(16, 16, 8, 1)},
    "fp32": {64: Config(32, 32, 8, 1), 128: Config(16, 16, 16, 1), 256: Config(16, 16, 8, 1)},
    "plain": {
        64: Config(128, 64, 8, 2),
        120: Config(64, 32, 8, 2),  # less than a tile's columns: a comparison each
        128: Config(128, 32, 8, 2),
        248: Config(32, 32, 4, 2),
        256: Config(64, 32, 8, 2),
    },
    "features": {
        64: Config(64, 32, 8, 2),
        128: Config(32, 32, 8, 2),
        248: Config(32, 32, 4, 2),
        256: Config(32, 32, 8, 2),
    },
    "plain, descriptors": {
        128: Config(128, 64, 8, 2, descriptors=True),
        256: Config(128, 32, 8, 2, descriptors=True),
    },
    "features, descriptors": {
        64: Config(128, 32, 8, 2, descriptors=True),
        256: Config(128, 16, 8, 2, descriptors=True),
    },
}
# With so many keys in a row, the error of delta from the rounded output is a small part of that of a rounded weight.
FEW_KEYS = 64


def _dkdv_config(*kind: Any) -> Config:
    return choose(_DKDV, Config(16, 32, 1, 1), *kind)


def _dq_config(*kind: Any) -> Config:
    return choose(_DQ, Config(32, 16, 1, 1), *kind)


def _most_keys(band: Band, keys: int) -> int:
    """That a query can see."""
    if band.left is None or band.right is None:
        return keys
    return min(keys, band.left + band.right + 1)


def is_exact(gradients: Sequence[Tensor | None], query: Tensor, band: Band, keys: int) -> bool:
    """Whether delta out of the rounded output would show. A sink's gradient, the last one, is made of nothing else."""
    if keys == 0:
        return False
    if query.dtype == torch.float32:
        return dot_precision(query.dtype) == "ieee"
    finer = any(x is not None and x.dtype.itemsize > query.dtype.itemsize for x in gradients)
    return finer or gradients[-1] is not None or _most_keys(band, keys) <= FEW_KEYS


def _dsinks(sinks: Tensor, lse: Tensor, delta: Tensor, factor: Tensor | None) -> Tensor:
    """(H,): a sink has a weight, which nothing is multiplied by: its gradient is the weight times zero less delta."""
    weights = torch.exp(sinks.double().unsqueeze(-1) - lse)
    if factor is not None:
        weights *= factor
    # Rows that see nothing may be in no sequence, where nobody wrote the rest.
    return -torch.where(lse == -math.inf, 0.0, weights * delta).sum((0, 2))


def run_backward(
    gradients: Sequence[Tensor | None],
    dlse: Tensor | None,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor,
    operands: Operands,
    scores: dict[str, Any],
    dscale: float,
    batch: int,
    exact: bool,
    lead: tuple[int, ...] = (),
    **packed: Any,
) -> None:
    """Writes the gradients of query, key, value, mask, slopes and sinks: contiguous ones, or None for each.

    Args:
        dlse, lse: (B, H, L), not empty and contiguous, B = 1 for packed sequences, and so in `out`, (B, L, H, EV).
        operands: with dout.
        scores: as `score_arguments` gives them, of base 1 if exact.
        dscale: the scores' own.
        batch: batch entries or sequences.
        lead: the batch dimensions.
        packed: the kernels' arguments about sequences.
    """
    dquery, dkey, dvalue, dmask, dslopes, dsinks = gradients
    heads, queries, keys, dout = scores["heads"], scores["queries"], scores["keys"], operands.tensors["dout"]
    common = scores | packed | {"lse": lse}
    with on(out.device):
        if dout is None and dvalue is not None:
            dvalue.zero_()
            dvalue = None
        wants_delta = any(x is not None for x in (dquery, dkey, dmask, dslopes, dsinks))
        delta = factor = None
        dropout = scores["rng"] is not None
        features = exact or dropout or any(scores[name] is not None for name in ("softcap", "slopes", "mask"))
        kind = operands, features, dropout
        config = _dq_config(*kind)
        grid = (batch * heads * triton.cdiv(queries, config.queries),)
        if exact and (wants_delta or dvalue is not None):
            sinks = None if sinks is None else sinks.contiguous()
            delta, factor = exact_statistics(grid, sinks, dlse, wants_delta, common, operands.arguments(config))
        elif wants_delta:
            delta = delta_of_output(dout, dlse, out)
        if dsinks is not None:
            dsinks.copy_(_dsinks(sinks, lse, delta, factor))
        if keys == 0:
            for x in (dquery, dkey, dvalue, dmask, dslopes):
                if x is not None:
                    x.zero_()
            return
        common |= {"delta": delta, "factor": factor}
        sizes = {"SIZE": operands.whole_size, "VALUE_SIZE": out.shape[-1]}
        if dkey is not None or dvalue is not None:
            key_config = _dkdv_config(*kind)
            key_grid = (batch * (heads // scores["group"]) * triton.cdiv(keys, key_config.keys),)
            tiles = operands.arguments(key_config)
            wanted = [(dkey, None), (None, dvalue)] if key_config.apart else [(dkey, dvalue)]
            for dk, dv in wanted:
                if dk is not None or dv is not None:
                    dkdv_kernel[key_grid](dkey=dk, dvalue=dv, dscale=dscale, **sizes, **common, **tiles)
        if dquery is not None or dslopes is not None:
            shares = None
            if dslopes is not None:
                shares = lse.new_zeros(batch, heads, grid[0] // (batch * heads)) if packed else torch.empty_like(lse)
            tiles = operands.arguments(config)
            dq_kernel[grid](dquery=dquery, dslopes=shares, dscale=dscale, SIZE=sizes["SIZE"], **common, **tiles)
            if dslopes is not None:
                by_head = shares.sum((0, 2)) if dslopes.dim() == 1 else shares.sum(2)
                dslopes.copy_(by_head.view(dslopes.shape))
        if dmask is not None:
            bias_gradient(dmask, lead, common, operands)


def attention_backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    rng: Tensor | None,
    dropout_p: float,
    scale: float,
    enable_gqa: bool,
    window_left: int | None,
    window_right: int | None,
    softcap: float | None,
    align: str,
    out: Tensor,
    lse: Tensor,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The op's own signature; shapes, types and meaning are documented with it in pykern/ops."""
    lead, (queries, heads), (keys, key_heads) = query.shape[:-3], query.shape[-3:-1], key.shape[-3:-1]
    gradients = [
        torch.empty_like(x, memory_format=torch.contiguous_format) if wanted else None
        for x, wanted in zip((query, key, value, attn_mask, alibi_slopes, sinks), output_mask, strict=True)
    ]
    if lse.numel() == 0:
        return tuple(None if x is None else x.zero_() for x in gradients)
    batch = lse.numel() // (heads * queries)
    lse, dlse = (None if x is None else x.reshape(batch, heads, queries).contiguous() for x in (lse, dlse))
    out = out.reshape(batch, queries, heads, -1).contiguous()
    band = Band.of(queries, keys, window_left, window_right, align)
    exact = is_exact(gradients, query, band, keys)
    base = 1.0 if exact else LOG2E.value
    shape = heads, key_heads, queries, keys
    scores = score_arguments(shape, band, scale, softcap, alibi_slopes, rng, dropout_p, attn_mask, lead, base)
    operands = Operands(query, key, value, dout=dout)
    run_backward(gradients, dlse, sinks, out, lse, operands, scores, scale, batch, exact, lead)
    return tuple(gradients)

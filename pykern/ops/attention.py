"""Dense softmax attention with every mask: causal, window, boolean, additive, ALiBi, softcap, sinks, dropout.

The op works on (…, length, heads, size), the order in which projections write and read, so that outputs and gradients
are contiguous there; the public function has torch's (…, heads, length, size) and only transposes views.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pykern.ops._philox import draw_rng, keep_mask, row_index
from pykern.ops._spec import define, define_backward
from pykern.ops.attention_core import (
    DenseCall,
    Scoring,
    attend,
    check_device,
    check_heads,
    check_like,
    check_scoring,
    default_scale,
    require,
    statistic_dtype,
    window_bounds,
)
from pykern.ops.attention_samples import dense_backward_cost, dense_bad, dense_cost, dense_samples
from pykern.ops.attention_torch import flash, flash_backward, flash_lacks, torch_attention

_ALIGNMENTS = ("top_left", "bottom_right")


def attention_reference(*args: Any) -> tuple[Tensor, Tensor]:
    call = DenseCall(*args)
    keep = None
    if call.dropout_p > 0:
        keep = keep_mask(
            call.rng, row_index(call.scores_shape, call.query.device), call.scores_shape[-1], call.dropout_p
        )
    out, lse = attend(
        *(x.transpose(-3, -2) for x in (call.query, call.key, call.value)),
        Scoring(call.scale, call.offset, call.window_left, call.window_right, call.softcap, call.dropout_p),
        mask=call.attn_mask,
        slopes=call.alibi_slopes,
        sinks=call.sinks,
        keep=keep,
    )
    return out.transpose(-3, -2).to(call.query.dtype), lse


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


def _check(*args: Any) -> None:
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


def _check_backward(dout: Tensor | None, dlse: Tensor | None, *args: Any) -> None:
    *forward, out, lse, _output_mask = args
    _check(*forward)
    call = DenseCall(*forward)
    for name, x in (("dout", dout), ("out", out)):
        check_like(name, x, (*call.query.shape[:-1], call.value.shape[-1]), call.query, call.query.dtype)
    for name, x in (("dlse", dlse), ("lse", lse)):
        check_like(name, x, call.scores_shape[:-1], call.query, statistic_dtype(call.query))


def _fake(*args: Any) -> tuple[Tensor, Tensor]:
    call = DenseCall(*args)
    lse = call.query.new_empty(call.scores_shape[:-1], dtype=statistic_dtype(call.query))
    return call.query.new_empty((*call.query.shape[:-1], call.value.shape[-1])), lse


_attention_backward = define_backward(
    "pykern::attention_backward(Tensor? dout, Tensor? dlse, Tensor query, Tensor key, Tensor value, Tensor? attn_mask,"
    " Tensor? alibi_slopes, Tensor? sinks, Tensor? rng, float dropout_p, float scale, bool enable_gqa,"
    " int? window_left, int? window_right, float? softcap, str align, Tensor out, Tensor lse, bool[6] output_mask, *,"
    " str? backend=None)"
    " -> (Tensor dquery, Tensor dkey, Tensor dvalue, Tensor dattn_mask, Tensor dalibi_slopes, Tensor dsinks)",
    check=_check_backward,
    backends={"cpu": flash_backward},
    supports={"cpu": lambda dout, dlse, *args: flash_lacks(*args[:-3])},
    cost=dense_backward_cost,
)

_attention = define(
    "pykern::attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? alibi_slopes, Tensor? sinks,"
    " Tensor? rng, float dropout_p, float scale, bool enable_gqa, int? window_left, int? window_right, float? softcap,"
    " str align, *, str? backend=None) -> (Tensor out, Tensor lse)",
    reference=attention_reference,
    check=_check,
    fake=_fake,
    backends={"cpu": flash},
    supports={"cpu": flash_lacks},
    backward=_attention_backward,
    autocast=dict.fromkeys(("query", "key", "value", "attn_mask"), "lower"),
    samples=dense_samples,
    bad=dense_bad,
    cost=dense_cost,
    peers={"torch": torch_attention},
)


@_attention.public
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window: Sequence[int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    align: str = "top_left",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention, a drop-in for `F.scaled_dot_product_attention` with more kinds of mask.

    A score is query · key · scale, then softcap · tanh(· / softcap), then -slope · |distance|, then the additive mask.
    Causality, window and mask compose: all must allow a key. A row in which nothing is allowed gives zeros, with zero
    gradients. Differentiable any number of times, also in forward mode, through the reference.

    Args:
        query: (…, H, L, E), fp32, fp16, bf16 or fp64 (by the reference), any strides; (L, E) is one head.
        key, value: (…, Hkv, S, E) and (…, Hkv, S, Ev), in the query's dtype and with its leading dimensions.
        attn_mask: bool (True is allowed) or additive, broadcasts to (…, H, L, S); an additive one gets a gradient.
        dropout_p: probability of dropping a weight; drawn by torch's default generator, then decided element by element
            of (…, H, L, S), so that every backend drops the same.
        is_causal: no key after the query's position.
        scale: 1/√E by default.
        enable_gqa: allows Hkv to be a divisor of H; consecutive query heads share a key head.
        window: (left, right), keys from position - left to position + right; None is unlimited.
        softcap: a positive bound on the scores.
        alibi_slopes: (H,) or (…, H), fp32 at best.
        sinks: (H,), a logit a head that joins the denominator.
        align: query i is at key position i ("top_left", torch) or i + S - L ("bottom_right", flash-attention).
        return_lse: also return the log-sum-exp of the scores.

    Returns:
        (…, H, L, Ev) in the query's dtype, stored (…, L, H, Ev) so that the model's next reshape copies nothing; with
        return_lse followed by the natural logarithm of the denominator, (…, H, L) in fp32 (fp64 for fp64), sinks
        included, -inf where nothing is allowed and there is no sink.

    Raises:
        ValueError, TypeError: a shape, dtype, device or number does not fit; the message names the argument.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() < 2 or x.dim() != query.dim():
            raise ValueError(
                f"{name}: expected dimensions (…, heads, length, size) or (length, size), as many as query,"
                f" got {tuple(x.shape)}"
            )
    single = query.dim() == 2
    if single:
        query, key, value = query.unsqueeze(-2), key.unsqueeze(-2), value.unsqueeze(-2)
    else:
        query, key, value = query.transpose(-3, -2), key.transpose(-3, -2), value.transpose(-3, -2)
    left, right = window_bounds(window, is_causal)
    out, lse = _attention(
        query,
        key,
        value,
        attn_mask,
        alibi_slopes,
        sinks,
        draw_rng(query.device) if dropout_p > 0 else None,
        dropout_p,
        default_scale(query, scale),
        enable_gqa,
        left,
        right,
        softcap,
        align,
    )
    out = out.squeeze(-2) if single else out.transpose(-3, -2)
    if return_lse:
        return out, lse.squeeze(-2) if single else lse
    return out

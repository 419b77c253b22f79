"""Dense softmax attention with every mask: causal, window, boolean, additive, ALiBi, softcap, sinks, dropout.

The op works on (…, length, heads, size), the order in which projections write and read, so that outputs and gradients
are contiguous there; the public function has torch's (…, heads, length, size) and only transposes views.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pykern.ops._philox import draw_rng, keep_mask, row_index
from pykern.ops._spec import define, define_backward
from pykern.ops.attention_backends import BACKENDS, BACKWARD, BACKWARD_LACKS, LACKS
from pykern.ops.attention_checks import (
    check_dense,
    check_dense_backward,
    window_bounds,
)
from pykern.ops.attention_core import (
    DenseCall,
    Scoring,
    attend,
    default_scale,
    statistic_dtype,
)
from pykern.ops.attention_cost import dense_backward_cost, dense_backward_traffic, dense_cost, dense_traffic
from pykern.ops.attention_samples import dense_bad, dense_samples
from pykern.ops.attention_torch import torch_attention


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
    check=check_dense_backward,
    backends=BACKWARD,
    supports=BACKWARD_LACKS,
    cost=dense_backward_cost,
    traffic=dense_backward_traffic,
)

_attention = define(
    "pykern::attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? alibi_slopes, Tensor? sinks,"
    " Tensor? rng, float dropout_p, float scale, bool enable_gqa, int? window_left, int? window_right, float? softcap,"
    " str align, *, str? backend=None) -> (Tensor out, Tensor lse)",
    reference=attention_reference,
    check=check_dense,
    fake=_fake,
    backends=BACKENDS,
    supports=LACKS,
    backward=_attention_backward,
    autocast=dict.fromkeys(("query", "key", "value", "attn_mask"), "lower"),
    samples=dense_samples,
    bad=dense_bad,
    cost=dense_cost,
    traffic=dense_traffic,
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

"""The router: which experts a token goes to, and with which weights.

Softmax and top-k: Shazeer et al., arXiv:1701.06538, and Mixtral, arXiv:2401.04088. Sigmoid scores, the selection bias
(Wang et al., arXiv:2408.15664) and groups of experts: DeepSeek-V3, arXiv:2412.19437. Replay: arXiv:2510.11370.
"""

from typing import Any

import torch
from torch import Tensor

from pykern.ops._spec import define, define_backward
from pykern.ops.moe._backends import ROUTE, ROUTE_BACKWARD, ROUTE_BACKWARD_LACKS, ROUTE_LACKS
from pykern.ops.moe._common import (
    FLOAT_DTYPES,
    ID_DTYPES,
    SCORES,
    check_choice,
    check_id_values,
    check_logits,
    is_expert,
    normalized_sigmoid,
    wide_dtype,
)
from pykern.ops.moe.route_samples import bad_routes, route_samples
from pykern.ops.norm import check_like


def select_experts(
    logits: Tensor,
    selection_bias: Tensor | None,
    top_k: int,
    score: str,
    num_groups: int,
    top_groups: int,
    group_score: str,
) -> Tensor:
    """The ids of the best experts, best first, ties to the lower id; a NaN counts as the largest value."""
    choice = logits.detach().to(wide_dtype(logits.dtype))
    if selection_bias is not None or num_groups > 1:
        choice = choice.softmax(-1) if score == "softmax" else choice.sigmoid()
    # Otherwise the scores would order the experts as the logits do, but for ties where they saturate or round.
    if selection_bias is not None:
        choice = choice + selection_bias.detach()
    if num_groups > 1:
        groups = choice.unflatten(-1, (num_groups, -1))
        size = groups.shape[-1]
        best = groups.amax(-1) if group_score == "max" else groups.topk(min(2, size)).values.sum(-1)
        chosen = best.sort(dim=-1, descending=True, stable=True).indices[..., :top_groups]
        masked = torch.ones_like(best, dtype=torch.bool).scatter(-1, chosen, False)
        choice = groups.masked_fill(masked.unsqueeze(-1), -torch.inf).flatten(-2)
    order = choice.sort(dim=-1, descending=True, stable=True).indices
    return order[..., :top_k].clone(memory_format=torch.contiguous_format)


def route_weights(logits: Tensor, expert_ids: Tensor, score: str, renormalize: bool, scale: float) -> Tensor:
    """The weights of experts already chosen, 0 for an id that is no expert, NaN for a token with a NaN."""
    wide = logits.to(wide_dtype(logits.dtype))
    kept = is_expert(expert_ids, logits.shape[-1])
    index = expert_ids.long().clamp(0, logits.shape[-1] - 1)
    if renormalize:
        # The normaliser over all experts cancels; without it nothing underflows when poor experts are replayed.
        chosen = wide.gather(-1, index).masked_fill(~kept, -torch.inf)
        weights = chosen.softmax(-1) if score == "softmax" else normalized_sigmoid(chosen)
    else:
        weights = (wide.softmax(-1) if score == "softmax" else wide.sigmoid()).gather(-1, index)
    weights = weights.masked_fill(~kept, 0.0) * scale
    return weights.masked_fill(wide.isnan().any(-1, keepdim=True), torch.nan)


def moe_route_reference(
    logits: Tensor,
    selection_bias: Tensor | None,
    replay_ids: Tensor | None,
    top_k: int,
    score: str,
    renormalize: bool,
    num_groups: int,
    top_groups: int,
    group_score: str,
    scale: float,
) -> tuple[Tensor, Tensor]:
    if replay_ids is None:
        ids = select_experts(logits, selection_bias, top_k, score, num_groups, top_groups, group_score)
    else:
        ids = replay_ids.long()
    return route_weights(logits, ids, score, renormalize, scale), ids


def _check(
    logits: Tensor,
    selection_bias: Tensor | None,
    replay_ids: Tensor | None,
    top_k: int,
    score: str,
    renormalize: bool,
    num_groups: int,
    top_groups: int,
    group_score: str,
    scale: float,
) -> None:
    check_logits(logits)
    check_choice("score", score, SCORES)
    check_choice("group_score", group_score, ("top2", "max"))
    tokens, experts = logits.shape
    torch._check_value(1 <= top_k <= experts, lambda: f"top_k: expected 1 to {experts} (the experts), got {top_k}")
    torch._check_value(
        num_groups >= 1 and experts % num_groups == 0,
        lambda: f"num_groups: expected a divisor of the {experts} experts, got {num_groups}",
    )
    torch._check_value(
        1 <= top_groups <= num_groups, lambda: f"top_groups: expected 1 to {num_groups} (num_groups), got {top_groups}"
    )
    available = top_groups * (experts // num_groups)
    torch._check_value(
        top_k <= available,
        lambda: f"top_k: expected at most the {available} experts of {top_groups} of {num_groups} groups, got {top_k}",
    )
    check_like("selection_bias", selection_bias, logits, (experts,), FLOAT_DTYPES)
    check_like("expert_ids", replay_ids, logits, (tokens, top_k), ID_DTYPES)


def _check_backward(
    dweights: Tensor | None,
    logits: Tensor,
    expert_ids: Tensor,
    score: str,
    renormalize: bool,
    scale: float,
    output_mask: list[bool],
) -> None:
    check_logits(logits)
    check_choice("score", score, SCORES)
    check_like("expert_ids", expert_ids, logits, (logits.shape[0], expert_ids.shape[-1]), ID_DTYPES)
    check_like("dweights", dweights, logits, expert_ids.shape, (wide_dtype(logits.dtype),))


def _fake(logits: Tensor, selection_bias: Tensor | None, replay_ids: Tensor | None, top_k: int, *_: Any) -> Any:
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=wide_dtype(logits.dtype)), logits.new_empty(shape, dtype=torch.int64)


def _torch(
    logits: Tensor,
    selection_bias: Tensor | None,
    replay_ids: Tensor | None,
    top_k: int,
    score: str,
    renormalize: bool,
    num_groups: int,
    top_groups: int,
    group_score: str,
    scale: float,
) -> Tensor:
    """A router as models write it in torch: scores of all experts, top-k, gather, quotient."""
    scores = logits.float() if logits.dtype != torch.float64 else logits
    scores = scores.softmax(-1) if score == "softmax" else scores.sigmoid()
    if replay_ids is None:
        choice = scores if selection_bias is None else scores + selection_bias
        if num_groups > 1:
            groups = choice.unflatten(-1, (num_groups, -1))
            best = groups.amax(-1) if group_score == "max" else groups.topk(min(2, groups.shape[-1])).values.sum(-1)
            mask = torch.zeros_like(best).scatter(-1, best.topk(top_groups).indices, 1.0)
            choice = groups.masked_fill(mask.unsqueeze(-1) == 0, -torch.inf).flatten(-2)
        ids = choice.topk(top_k).indices
    else:
        ids = replay_ids.long()
    kept = ids >= 0
    weights = torch.where(kept, scores.gather(-1, ids.clamp(min=0)), 0.0)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights * scale


def _cost(logits: Tensor, selection_bias: Tensor | None, replay_ids: Tensor | None, top_k: int, *_: Any) -> Any:
    """Logits, bias and recorded ids read once, weights and ids written once; a handful of flops a logit."""
    read = sum(t.numel() * t.element_size() for t in (logits, selection_bias, replay_ids) if t is not None)
    return 8.0 * logits.numel(), read + 12.0 * logits.shape[0] * top_k


_moe_route_backward = define_backward(
    "pykern::moe_route_backward(Tensor? dweights, Tensor logits, Tensor expert_ids, str score, bool renormalize,"
    " float scale, bool[1] output_mask, *, str? backend=None) -> (Tensor dlogits)",
    primal=route_weights,
    wrt=("logits",),
    check=_check_backward,
    backends=ROUTE_BACKWARD,
    supports=ROUTE_BACKWARD_LACKS,
    cost=lambda dweights, logits, expert_ids, *_: (
        8.0 * logits.numel(),
        2.0 * logits.numel() * logits.element_size() + 12.0 * expert_ids.numel(),
    ),
)

_moe_route = define(
    "pykern::moe_route(Tensor logits, Tensor? selection_bias, Tensor? replay_ids, int top_k, str score,"
    " bool renormalize, int num_groups, int top_groups, str group_score, float scale, *, str? backend=None)"
    " -> (Tensor weights, Tensor expert_ids)",
    reference=moe_route_reference,
    check=_check,
    fake=_fake,
    backward=_moe_route_backward,
    autocast={"logits": torch.float32},
    backends=ROUTE,
    supports=ROUTE_LACKS,
    samples=route_samples,
    bad=bad_routes,
    cost=_cost,
    peers={"torch": _torch},
    # On few tokens, equally good formulae of a quotient differ by more than a factor of two; measured over eight seeds.
    tolerance=4.0,
)


@_moe_route.public
def moe_route(
    logits: Tensor,
    top_k: int,
    *,
    score: str = "softmax",
    renormalize: bool = True,
    selection_bias: Tensor | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
    group_score: str = "top2",
    scale: float = 1.0,
    expert_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The `top_k` experts of every token and their weights. Scores are computed in fp32 (fp64 for fp64).

    With a bias or groups the choice is made on the scores, otherwise on the logits, which order the experts alike and
    exactly. A token whose logits hold a NaN gets valid, distinct ids and NaN weights. With `top_k=1` and `renormalize`
    the weight is the constant `scale`, and the router learns nothing through it.

    Args:
        logits: (tokens, experts), any floating dtype and strides.
        top_k: how many experts a token gets.
        score: "softmax" over all experts, or "sigmoid" of each.
        renormalize: divides the chosen scores by their sum (softmax: the softmax of the chosen logits).
        selection_bias: (experts,), added to the scores for the choice only; it never enters the weights and gets no
            gradient (aux-free load balancing).
        num_groups, top_groups: the experts form `num_groups` equal groups in a row, and only those of the best
            `top_groups` can be chosen; the others' scores count as −inf.
        group_score: a group is worth the sum of its two best scores ("top2") or the best one ("max"), bias included.
        scale: multiplies the weights.
        expert_ids: (tokens, top_k) int64 or int32, a recorded choice: the weights are computed for it and it is
            returned as it is. An id that is no expert (−1) gets weight 0 and no part in the renormalisation.

    Returns:
        weights (tokens, top_k) in fp32 (fp64 for fp64 logits) and expert_ids (tokens, top_k) int64, best first, ties
        to the lower id.

    Raises:
        ValueError, TypeError: a shape, dtype, device or option does not fit; the message names the argument.
    """
    if expert_ids is not None and logits.dim():
        check_id_values(expert_ids, logits.shape[-1])
    weights, ids = _moe_route(
        logits, selection_bias, expert_ids, top_k, score, renormalize, num_groups, top_groups, group_score, scale
    )
    return weights, ids if expert_ids is None else expert_ids

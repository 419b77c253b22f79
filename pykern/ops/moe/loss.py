"""What keeps a router healthy: the load-balancing loss and the z-loss.

Load balancing: Switch Transformers, Fedus et al., arXiv:2101.03961, in the scaling of transformers'
`load_balancing_loss_func`; per sequence: DeepSeek-V3, arXiv:2412.19437, equation 17. Z-loss: ST-MoE, Zoph et al.,
arXiv:2202.08906.
"""

from typing import Any

import torch
from torch import Tensor

from pykern.ops._spec import define
from pykern.ops.moe._common import (
    ID_DTYPES,
    SCORES,
    check_choice,
    check_id_values,
    check_ids,
    check_logits,
    normalized_sigmoid,
    wide_dtype,
)
from pykern.ops.moe.load import expert_counts
from pykern.ops.moe.loss_samples import bad_balances, bad_zs, balance_samples, z_samples
from pykern.ops.norm import check_like

_MASK_DTYPES = (torch.bool, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _unmasked(logits: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Logits in the dtype computed in and zeroed where masked, and which tokens count, as a column."""
    wide = logits.to(wide_dtype(logits.dtype))
    if attention_mask is None:
        kept = torch.ones_like(logits[:, :1], dtype=torch.bool)
    else:
        kept = (attention_mask != 0).unsqueeze(1)
    # A padded token's logits can be anything, NaN too, and must reach neither the loss nor a gradient.
    return wide.where(kept, 0.0), kept


def moe_load_balancing_loss_reference(
    logits: Tensor,
    expert_ids: Tensor,
    attention_mask: Tensor | None,
    num_experts: int,
    score: str,
    num_sequences: int,
) -> Tensor:
    wide, kept = _unmasked(logits, attention_mask)
    probabilities = wide.softmax(-1) if score == "softmax" else normalized_sigmoid(wide)
    in_sequence = (num_sequences, logits.shape[0] // num_sequences)
    count = kept.unflatten(0, in_sequence).sum(1)  # (sequences, 1)
    mean = probabilities.where(kept, 0.0).unflatten(0, in_sequence).sum(1) / count.clamp(min=1)
    chosen = expert_ids.where(kept, -1).unflatten(0, in_sequence).flatten(1)
    load = expert_counts(chosen, num_experts).to(wide.dtype) / count.clamp(min=1)
    # A sequence of nothing but padding adds nothing, and is not counted either.
    return num_experts * (load * mean).sum() / count.count_nonzero().clamp(min=1)


def moe_z_loss_reference(logits: Tensor, attention_mask: Tensor | None) -> Tensor:
    wide, kept = _unmasked(logits, attention_mask)
    return wide.logsumexp(-1, keepdim=True).square().where(kept, 0.0).sum() / kept.sum().clamp(min=1)


def _check_loss(logits: Tensor, attention_mask: Tensor | None) -> None:
    check_logits(logits)
    torch._check_value(logits.shape[1] > 0, lambda: "logits: expected at least one expert, got none")
    check_like("attention_mask", attention_mask, logits, logits.shape[:1], _MASK_DTYPES)


def _check_balance(
    logits: Tensor,
    expert_ids: Tensor,
    attention_mask: Tensor | None,
    num_experts: int,
    score: str,
    num_sequences: int,
) -> None:
    _check_loss(logits, attention_mask)
    check_choice("score", score, SCORES)
    torch._check_value(
        logits.shape[1] == num_experts,
        lambda: f"num_experts: expected {logits.shape[1]} as the logits have columns, got {num_experts}",
    )
    torch._check_value(
        num_sequences > 0 and logits.shape[0] % num_sequences == 0,
        lambda: f"num_sequences: expected a divisor of the {logits.shape[0]} tokens, got {num_sequences}",
    )
    check_ids(expert_ids)
    check_like("expert_ids", expert_ids, logits, (logits.shape[0], expert_ids.shape[1]), ID_DTYPES)


def _scalar(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty((), dtype=wide_dtype(logits.dtype))


def _torch_balance(
    logits: Tensor,
    expert_ids: Tensor,
    attention_mask: Tensor | None,
    num_experts: int,
    score: str,
    num_sequences: int,
) -> Tensor:
    scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)
    mask = torch.ones_like(logits[:, 0]) if attention_mask is None else (attention_mask != 0).to(logits.dtype)
    chosen = torch.nn.functional.one_hot(expert_ids.long() + 1, num_experts + 1)[..., 1:].to(logits.dtype)
    shape = (num_sequences, -1)
    total = mask.unflatten(0, shape).sum(1, keepdim=True)
    load = (chosen.sum(1) * mask[:, None]).unflatten(0, shape).sum(1) / total.clamp(min=1)
    mean = (scores * mask[:, None]).unflatten(0, shape).sum(1) / total.clamp(min=1)
    return num_experts * (load * mean).sum() / (total > 0).sum()


def _torch_z(logits: Tensor, attention_mask: Tensor | None) -> Tensor:
    z = logits.logsumexp(-1).square()
    return z.mean() if attention_mask is None else z[attention_mask != 0].mean()


_moe_load_balancing_loss = define(
    "pykern::moe_load_balancing_loss(Tensor logits, Tensor expert_ids, Tensor? attention_mask, int num_experts,"
    " str score, int num_sequences, *, str? backend=None) -> (Tensor loss)",
    reference=moe_load_balancing_loss_reference,
    check=_check_balance,
    fake=_scalar,
    autocast={"logits": torch.float32},
    samples=balance_samples,
    bad=bad_balances,
    cost=lambda logits, expert_ids, *_: (
        6.0 * logits.numel(),
        float(logits.numel() * logits.element_size() + expert_ids.numel() * expert_ids.element_size()),
    ),
    peers={"torch": _torch_balance},
    tolerance=6.0,  # one number, on which torch may by chance err hardly at all
)

_moe_z_loss = define(
    "pykern::moe_z_loss(Tensor logits, Tensor? attention_mask, *, str? backend=None) -> (Tensor loss)",
    reference=moe_z_loss_reference,
    check=_check_loss,
    fake=_scalar,
    autocast={"logits": torch.float32},
    samples=z_samples,
    bad=bad_zs,
    cost=lambda logits, attention_mask: (4.0 * logits.numel(), float(logits.numel() * logits.element_size())),
    peers={"torch": _torch_z},
    tolerance=6.0,
)


def _flat(attention_mask: Tensor | None) -> Tensor | None:
    return None if attention_mask is None else attention_mask.reshape(-1)


@_moe_load_balancing_loss.public
def moe_load_balancing_loss(
    logits: Tensor,
    expert_ids: Tensor,
    num_experts: int,
    *,
    score: str = "softmax",
    attention_mask: Tensor | None = None,
    num_sequences: int = 1,
) -> Tensor:
    """num_experts · Σₑ (slots sent to e / tokens) · (mean probability of e): top_k when balanced, more when not.

    The gradient flows through the probabilities. Without a token that counts the loss is 0. With several sequences it
    is the mean over them of that quantity of each, which is top_k times DeepSeek-V3's sequence-wise loss; sequences of
    nothing but padding have no part in the mean.

    Args:
        logits: (tokens, num_experts), of one layer or of several in a row.
        expert_ids: (tokens, top_k) int64 or int32, as `moe_route` gives them; −1 is not counted, nor is any other id
            that is no expert (with PYKERN_CHECKS=1 such an id raises).
        num_experts: the columns of `logits`.
        score: probabilities are the softmax, or the sigmoids divided by their sum, as the router's score is.
        attention_mask: tokens' worth of bool or integers in any shape, 0 for padding, which does not count.
        num_sequences: the tokens are that many sequences of one length, padding included, one after the other.

    Returns:
        A scalar in fp32 (fp64 for fp64).

    Raises:
        ValueError, TypeError: a shape, dtype, device or option does not fit; the message names the argument.
    """
    check_id_values(expert_ids, num_experts)
    return _moe_load_balancing_loss(logits, expert_ids, _flat(attention_mask), num_experts, score, num_sequences)


@_moe_z_loss.public
def moe_z_loss(logits: Tensor, *, attention_mask: Tensor | None = None) -> Tensor:
    """The mean of logsumexp(logits)² over the tokens, which keeps a router's logits small.

    Args:
        logits: (tokens, experts).
        attention_mask: tokens' worth of bool or integers in any shape, 0 for padding, which does not count.

    Returns:
        A scalar in fp32 (fp64 for fp64); 0 without a token that counts.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit; the message names the argument.
    """
    return _moe_z_loss(logits, _flat(attention_mask))

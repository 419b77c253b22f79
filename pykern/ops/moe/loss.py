"""What keeps a router healthy: the load-balancing loss and the z-loss.

Load balancing: Switch Transformers, Fedus et al., arXiv:2101.03961, in the scaling of transformers'
`load_balancing_loss_func`. Z-loss: ST-MoE, Zoph et al., arXiv:2202.08906.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pykern.ops._spec import Sample, define
from pykern.ops.moe._common import (
    ID_DTYPES,
    SCORES,
    check_choice,
    check_id_values,
    check_logits,
    is_expert,
    normalized_sigmoid,
    wide_dtype,
)
from pykern.ops.norm import check_like

_MASK_DTYPES = (torch.bool, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _unmasked(logits: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Logits in the dtype computed in and zeroed where masked, which tokens count as a column, and how many."""
    wide = logits.to(wide_dtype(logits.dtype))
    if attention_mask is None:
        kept = torch.ones_like(logits[:, :1], dtype=torch.bool)
    else:
        kept = (attention_mask != 0).unsqueeze(1)
    # A padded token's logits can be anything, NaN too, and must reach neither the loss nor a gradient.
    return wide.where(kept, 0.0), kept, kept.sum().clamp(min=1)


def moe_load_balancing_loss_reference(
    logits: Tensor, expert_ids: Tensor, attention_mask: Tensor | None, num_experts: int, score: str
) -> Tensor:
    wide, kept, count = _unmasked(logits, attention_mask)
    probabilities = wide.softmax(-1) if score == "softmax" else normalized_sigmoid(wide)
    probability = probabilities.where(kept, 0.0).sum(0) / count
    slots = torch.where(kept & is_expert(expert_ids, num_experts), expert_ids.long(), num_experts).flatten()
    # Counted in integers, so that no order of summation can matter.
    load = slots.new_zeros(num_experts + 1).scatter_add(0, slots, torch.ones_like(slots))[:num_experts]
    return num_experts * (load.to(wide.dtype) / count * probability).sum()


def moe_z_loss_reference(logits: Tensor, attention_mask: Tensor | None) -> Tensor:
    wide, kept, count = _unmasked(logits, attention_mask)
    return wide.logsumexp(-1, keepdim=True).square().where(kept, 0.0).sum() / count


def _check_loss(logits: Tensor, attention_mask: Tensor | None) -> None:
    check_logits(logits)
    torch._check_value(logits.shape[1] > 0, lambda: "logits: expected at least one expert, got none")
    check_like("attention_mask", attention_mask, logits, logits.shape[:1], _MASK_DTYPES)


def _check_balance(
    logits: Tensor, expert_ids: Tensor, attention_mask: Tensor | None, num_experts: int, score: str
) -> None:
    _check_loss(logits, attention_mask)
    check_choice("score", score, SCORES)
    torch._check_value(
        logits.shape[1] == num_experts,
        lambda: f"num_experts: expected {logits.shape[1]} as the logits have columns, got {num_experts}",
    )
    check_like("expert_ids", expert_ids, logits, (logits.shape[0], expert_ids.shape[-1]), ID_DTYPES)


def _scalar(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty((), dtype=wide_dtype(logits.dtype))


def _torch_balance(
    logits: Tensor, expert_ids: Tensor, attention_mask: Tensor | None, num_experts: int, score: str
) -> Tensor:
    scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)
    mask = torch.ones_like(logits[:, 0]) if attention_mask is None else (attention_mask != 0).to(logits.dtype)
    chosen = torch.nn.functional.one_hot(expert_ids.long() + 1, num_experts + 1)[..., 1:].to(logits.dtype)
    load = (chosen * mask[:, None, None]).sum(0) / mask.sum()
    return num_experts * (load * (scores * mask[:, None]).sum(0) / mask.sum()).sum()


def _torch_z(logits: Tensor, attention_mask: Tensor | None) -> Tensor:
    z = logits.logsumexp(-1).square()
    return z.mean() if attention_mask is None else z[attention_mask != 0].mean()


def _balance_samples(kind: str, make: Any) -> Iterator[Sample]:
    def ids(tokens: int, top_k: int, experts: int, low: int = 0) -> Tensor:
        return make(tokens, top_k, dtype=torch.int64, low=low, high=experts)

    if kind == "bench":
        yield Sample("mixtral 8192x8 top 2", (make(8192, 8), ids(8192, 2, 8), None, 8, "softmax"))
        yield Sample("qwen3 8192x128 top 8", (make(8192, 128), ids(8192, 8, 128), None, 128, "softmax"))
        return
    mask = make(9, dtype=torch.int64, low=0, high=2).index_fill(0, torch.tensor([0], device=make.device), 1)
    yield Sample("softmax", (make(9, 8), ids(9, 2, 8), None, 8, "softmax"))
    yield Sample("sigmoid", (make(9, 8), ids(9, 2, 8), None, 8, "sigmoid"))
    yield Sample("masked", (make(9, 8), ids(9, 2, 8), mask, 8, "softmax"))
    yield Sample("bool mask, sigmoid", (make(9, 8), ids(9, 2, 8), mask.bool(), 8, "sigmoid"))
    yield Sample("dropped slots", (make(9, 5), ids(9, 3, 5, low=-1), None, 5, "softmax"))
    yield Sample("one token", (make(1, 5), ids(1, 2, 5), None, 5, "softmax"))
    yield Sample("one expert", (make(4, 1), ids(4, 1, 1), None, 1, "softmax"))
    yield Sample("elements apart", (make(8, 9).t(), ids(9, 2, 8).int(), None, 8, "softmax"))
    if kind == "full":
        yield Sample("prime", (make(1021, 61), ids(1021, 6, 61), None, 61, "softmax"))


def _z_samples(kind: str, make: Any) -> Iterator[Sample]:
    if kind == "bench":
        yield Sample("mixtral 8192x8", (make(8192, 8), None))
        yield Sample("deepseek-v3 4096x256", (make(4096, 256), None))
        return
    mask = make(9, dtype=torch.int64, low=0, high=2).index_fill(0, torch.tensor([0], device=make.device), 1)
    yield Sample("plain", (make(9, 8), None))
    yield Sample("masked", (make(9, 8), mask))
    yield Sample("bool mask", (make(9, 8), mask.bool()))
    yield Sample("large", (make(9, 8) * 1e3, None))
    yield Sample("one token", (make(1, 5), None))
    yield Sample("one expert", (make(4, 1), None))
    yield Sample("elements apart", (make(8, 9).t(), None))
    if kind == "full":
        yield Sample("prime", (make(1021, 61), None))


def _balance_bad(make: Any) -> Iterator[tuple[str, tuple[Any, ...], type[Exception], str]]:
    x, ids = make(6, 4), make(6, 2, dtype=torch.int64, low=0, high=4)
    yield "rank", (x[0], ids, None, 4, "softmax"), ValueError, r"logits: expected shape .* got \(4,\)"
    yield "experts", (x, ids, None, 5, "softmax"), ValueError, "num_experts: expected 4 .* got 5"
    yield "ids", (x, ids[:5], None, 4, "softmax"), ValueError, r"expert_ids: expected shape \(6, 2\), got \(5, 2\)"
    yield "score", (x, ids, None, 4, "tanh"), ValueError, "score: expected one of softmax, sigmoid, got 'tanh'"
    yield "mask", (x, ids, ids[:5, 0], 4, "softmax"), ValueError, r"attention_mask: expected shape \(6,\), got \(5,\)"
    yield "additive mask", (x, ids, x[:, 0], 4, "softmax"), TypeError, "attention_mask: expected dtype torch.bool"


def _z_bad(make: Any) -> Iterator[tuple[str, tuple[Any, ...], type[Exception], str]]:
    x = make(6, 4)
    yield "integers", (x.long(), None), TypeError, "logits: expected a floating dtype, got torch.int64"
    yield "no experts", (x[:, :0], None), ValueError, "logits: expected at least one expert"
    yield "additive mask", (x, x[:, 0]), TypeError, "attention_mask: expected dtype torch.bool"


_moe_load_balancing_loss = define(
    "pykern::moe_load_balancing_loss(Tensor logits, Tensor expert_ids, Tensor? attention_mask, int num_experts,"
    " str score, *, str? backend=None) -> (Tensor loss)",
    reference=moe_load_balancing_loss_reference,
    check=_check_balance,
    fake=_scalar,
    autocast={"logits": torch.float32},
    samples=_balance_samples,
    bad=_balance_bad,
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
    samples=_z_samples,
    bad=_z_bad,
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
) -> Tensor:
    """num_experts · Σₑ (slots sent to e / tokens) · (mean probability of e): top_k when balanced, more when not.

    The gradient flows through the probabilities. Without a token that counts the loss is 0.

    Args:
        logits: (tokens, num_experts), of one layer or of several in a row.
        expert_ids: (tokens, top_k) int64 or int32, as `moe_route` gives them; −1 is not counted, nor is any other id
            that is no expert (with PYKERN_CHECKS=1 such an id raises).
        num_experts: the columns of `logits`.
        score: probabilities are the softmax, or the sigmoids divided by their sum, as the router's score is.
        attention_mask: tokens' worth of bool or integers in any shape, 0 for padding, which does not count.

    Returns:
        A scalar in fp32 (fp64 for fp64).

    Raises:
        ValueError, TypeError: a shape, dtype, device or option does not fit; the message names the argument.
    """
    check_id_values(expert_ids, num_experts)
    return _moe_load_balancing_loss(logits, expert_ids, _flat(attention_mask), num_experts, score)


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

"""Which kernel serves which call of the mixture-of-experts ops: the first of its device whose reason is None."""

from typing import Any

import torch
from torch import Tensor

from pykern.ops._backends import Kernel, native, triton

MOST_EXPERTS = 1024
MOST_CHOSEN = 32


def _route_lacks(logits: Tensor, bias: Tensor | None, replay_ids: Tensor | None, top_k: int, *_: Any) -> str | None:
    experts = logits.shape[-1]
    if logits.dtype == torch.float64:
        return "computes fp32, fp16 and bf16, not torch.float64"
    if bias is not None and bias.dtype == torch.float64:
        return "takes a selection_bias of up to 32 bits, not torch.float64"
    if experts > MOST_EXPERTS or top_k > MOST_CHOSEN:
        return f"takes up to {MOST_EXPERTS} experts and the top {MOST_CHOSEN}, not {experts} and {top_k}"
    return None


def _route_backward_lacks(dweights: Tensor | None, logits: Tensor, expert_ids: Tensor, *_: Any) -> str | None:
    return _route_lacks(logits, None, None, expert_ids.shape[-1])


def _sort_lacks(expert_ids: Tensor, num_experts: int) -> str | None:
    return None if num_experts <= MOST_EXPERTS else f"takes up to {MOST_EXPERTS} experts, not {num_experts}"


ROUTE: dict[str, Kernel] = {"triton": triton("moe_route", "moe_route"), "cpu": native("cpu", "moe_route")}
ROUTE_LACKS = dict.fromkeys(("triton", "cpu"), _route_lacks)
ROUTE_BACKWARD: dict[str, Kernel] = {
    "triton": triton("moe_route", "moe_route_backward"),
    "cpu": native("cpu", "moe_route_backward"),
}
ROUTE_BACKWARD_LACKS = dict.fromkeys(("triton", "cpu"), _route_backward_lacks)
SORT: dict[str, Kernel] = {"triton": triton("moe_sort", "moe_sort"), "cpu": native("cpu", "moe_sort")}
SORT_LACKS = dict.fromkeys(("triton", "cpu"), _sort_lacks)

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


def mlp_lacks(input: Tensor, *args: Any) -> str | None:
    """Why the kernels that sort and multiply by themselves do not serve these arguments of `moe_mlp`."""
    gate_up, _, weights, _, *biases, _ = args
    for tensor in (input, weights, *biases):
        if tensor is not None and tensor.dtype == torch.float64:
            return "computes fp32, fp16 and bf16, not torch.float64"
    return None if len(gate_up) <= MOST_EXPERTS else f"takes up to {MOST_EXPERTS} experts, not {len(gate_up)}"


def mlp_backward_lacks(doutput: Tensor | None, *args: Any) -> str | None:
    return "no gradient to start from" if doutput is None else mlp_lacks(*args[:8])


ROUTE: dict[str, Kernel] = {
    "cuda": native("cuda", "moe_route"),
    "triton": triton("moe_route", "moe_route"),
    "cpu": native("cpu", "moe_route"),
}
ROUTE_LACKS = dict.fromkeys(ROUTE, _route_lacks)
ROUTE_BACKWARD: dict[str, Kernel] = {
    "cuda": native("cuda", "moe_route_backward"),
    "triton": triton("moe_route", "moe_route_backward"),
    "cpu": native("cpu", "moe_route_backward"),
}
ROUTE_BACKWARD_LACKS = dict.fromkeys(ROUTE_BACKWARD, _route_backward_lacks)
SORT: dict[str, Kernel] = {
    "cuda": native("cuda", "moe_sort"),
    "triton": triton("moe_sort", "moe_sort"),
    "cpu": native("cpu", "moe_sort"),
}
SORT_LACKS = dict.fromkeys(SORT, _sort_lacks)

"""Slots sorted by expert: what turns routed tokens into the contiguous groups of a grouped matmul."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pykern.ops._spec import Sample, define
from pykern.ops.moe._backends import SORT, SORT_LACKS
from pykern.ops.moe._common import check_id_values, check_ids, is_expert


def moe_sort_reference(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    flat = expert_ids.long().flatten()
    keys = torch.where(is_expert(flat, num_experts), flat, num_experts)
    keys, order = keys.sort(dim=0, stable=True)
    inverse = torch.zeros_like(order).scatter(0, order, torch.arange(order.numel(), device=order.device))
    experts = torch.arange(num_experts, device=order.device)
    offs = torch.searchsorted(keys.contiguous(), experts, right=True, out_int32=True)
    return order, inverse, offs


def _check(expert_ids: Tensor, num_experts: int) -> None:
    check_ids(expert_ids)
    torch._check_value(num_experts >= 1, lambda: f"num_experts: expected at least 1, got {num_experts}")


def _fake(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    slots = expert_ids.shape[0] * expert_ids.shape[1]
    order = expert_ids.new_empty((slots,), dtype=torch.int64)
    return order, torch.empty_like(order), expert_ids.new_empty((num_experts,), dtype=torch.int32)


def _torch(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    flat = expert_ids.flatten()
    keys = torch.where(flat < 0, num_experts, flat)
    order = keys.argsort(stable=True)
    counts = torch.nn.functional.one_hot(keys.long(), num_experts + 1).sum(0)[:num_experts]
    return order, order.argsort(), counts.cumsum(0).int()


def _samples(kind: str, make: Any) -> Iterator[Sample]:
    def ids(tokens: int, top_k: int, experts: int, low: int = 0) -> Tensor:
        return make(tokens, top_k, dtype=torch.int64, low=low, high=experts)

    if kind == "bench":
        yield Sample("mixtral 8192x2 of 8", (ids(8192, 2, 8), 8))
        yield Sample("qwen3 8192x8 of 128", (ids(8192, 8, 128), 128))
        yield Sample("deepseek-v3 4096x8 of 256", (ids(4096, 8, 256), 256))
        return
    yield Sample("mixtral", (ids(9, 2, 8), 8))
    yield Sample("prime", (ids(31, 3, 13), 13))
    yield Sample("some dropped", (ids(17, 2, 5, low=-1), 5))
    yield Sample("all dropped", (ids(6, 2, 0, low=-1), 4))
    yield Sample("one expert", (ids(5, 1, 1), 1))
    yield Sample("all to the last", (ids(7, 2, 6, low=5), 6))
    yield Sample("one slot", (ids(1, 1, 3), 3))
    yield Sample("no tokens", (ids(0, 2, 4), 4))
    yield Sample("int32", (ids(9, 2, 8).int(), 8))
    yield Sample("elements apart", (ids(4, 10, 8).t(), 8))
    if kind == "full":
        yield Sample("many tiles", (ids(4099, 8, 128), 128))
        yield Sample("1024 experts", (ids(513, 32, 1024), 1024))


def _bad(make: Any) -> Iterator[tuple[str, tuple[Any, ...], type[Exception], str]]:
    ids = make(4, 2, dtype=torch.int64, low=0, high=8)
    yield "floats", (make(4, 2), 8), TypeError, "expert_ids: expected dtype int64 or int32, got"
    yield "rank", (ids.flatten(), 8), ValueError, r"expert_ids: expected shape .* got \(8,\)"
    yield "no experts", (ids, 0), ValueError, "num_experts: expected at least 1, got 0"


_moe_sort = define(
    "pykern::moe_sort(Tensor expert_ids, int num_experts, *, str? backend=None)"
    " -> (Tensor order, Tensor inverse, Tensor offs)",
    reference=moe_sort_reference,
    check=_check,
    fake=_fake,
    backends=SORT,
    supports=SORT_LACKS,
    samples=_samples,
    bad=_bad,
    cost=lambda expert_ids, num_experts: (
        0.0,
        expert_ids.numel() * (expert_ids.element_size() + 16.0) + 4.0 * num_experts,
    ),
    peers={"torch": _torch},
    # Counting and placing read the ids once each.
    traffic=lambda backend, *_: 1.4,
)


@_moe_sort.public
def moe_sort(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sorts the slots of a routing by expert, stably, without waiting for the device.

    Args:
        expert_ids: (tokens, top_k) int64 or int32. −1 drops the slot, and so does any other id that is no expert
            (with PYKERN_CHECKS=1 such an id raises). Dropped slots come last, in order.
        num_experts: how many experts there are.

    Returns:
        order (tokens·top_k,) int64, the slots token·top_k + slot by expert; inverse (tokens·top_k,) int64, the place of
        each slot in it; offs (num_experts,) int32, where each expert's slots end, as `grouped_mm` takes them.

    Raises:
        ValueError, TypeError: a shape or dtype does not fit; the message names the argument.
    """
    if num_experts > 0:
        check_id_values(expert_ids, num_experts)
    return _moe_sort(expert_ids, num_experts)

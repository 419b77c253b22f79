"""A linear layer whose tokens go through different adapters, forward and backward, on a float or a 4-bit weight.

Tokens are sorted by adapter (moe_sort.py), then the kernels of lora.py do the same as for one adapter, with tiles of
tokens that share one. The base product takes the tokens as they come. Nothing waits for the device.
"""

from collections.abc import Sequence
from typing import Any

import torch
from pykern.kernels.lora import bias_gradient, zeros_or_none
from pykern.kernels.lora_gradients import adapter_gradient
from pykern.kernels.lora_products import layer_products, products
from pykern.kernels.lora_tiles import KEEP, Route
from pykern.kernels.lora_update import update
from pykern.kernels.moe_sort import moe_sort
from pykern.kernels.norm import as_rows
from torch import Tensor


def _route(adapter_ids: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: Tensor) -> tuple[Route, Tensor, ...]:
    """Who goes where, and adapters and factors for it. Where there is none, one that no token names."""
    if len(lora_a) == 0:
        adapter_ids = torch.full_like(adapter_ids, -1)
        lora_a, lora_b, scaling = (t.new_zeros((1, *t.shape[1:])) for t in (lora_a, lora_b, scaling))
    order, _, offs = moe_sort(adapter_ids, len(lora_a))
    return Route(len(lora_a), order, offs), lora_a, lora_b, scaling.contiguous()


def _forward(
    input: Tensor,
    weight: Tensor | Sequence[Any],
    outs: int,
    lora_a: Tensor,
    lora_b: Tensor,
    adapter_ids: Tensor,
    bias: Tensor | None,
    scaling: Tensor,
) -> Tensor:
    shape = (*input.shape[:-1], outs)
    if input.numel() == 0 or outs == 0:
        y = input.new_zeros(shape)
        return y if bias is None else y.copy_(bias)
    x = as_rows(input, input.shape[-1])
    route, lora_a, lora_b, scaling = _route(adapter_ids, lora_a, lora_b, scaling)
    base, small = layer_products(weight, False, x, x, lora_a.mT, None, KEEP, route)
    return update(base, small, lora_b.mT, scaling, x.dtype, bias=bias, route=route).view(shape)


def _backward(
    dy: Tensor | None,
    input: Tensor,
    weight: Tensor | Sequence[Any],
    outs: int,
    lora_a: Tensor,
    lora_b: Tensor,
    adapter_ids: Tensor,
    bias: Tensor | None,
    scaling: Tensor,
    wants: Sequence[bool],
) -> list[Tensor | None]:
    """Of input, weight (None if it has 4 bits), lora_a, lora_b, bias and scaling."""
    given = (input, weight if isinstance(weight, Tensor) else None, lora_a, lora_b, bias, scaling)
    wants = [w and t is not None for w, t in zip(wants, given, strict=True)]
    if dy is None or input.numel() == 0 or outs == 0:
        gradients = zeros_or_none(wants, given)
        if wants[4] and dy is not None and outs > 0:
            gradients[4] = bias_gradient(dy.reshape(-1, outs), bias)
        return gradients
    count = len(lora_a)
    dy, x = as_rows(dy, outs), as_rows(input, input.shape[-1])
    route, lora_a, lora_b, factors = _route(adapter_ids, lora_a, lora_b, scaling)
    dinput = da = db = dscaling = None
    if wants[0]:
        base, down = layer_products(weight, True, dy, dy, lora_b, None, KEEP, route)
        dinput = update(base, down, lora_a, factors, x.dtype, route=route).view(input.shape)
    elif wants[2]:
        down = products(None, None, dy, lora_b, None, KEEP, route)[1]
    if wants[2]:
        da = adapter_gradient(down, x, lora_a, False, factors, route=route)[0][:count]
    if wants[3] or wants[5]:
        small = products(None, None, x, lora_a.mT, None, KEEP, route)[1]
        db, along = adapter_gradient(
            small, dy, lora_b, True, factors, route=route, wanted=wants[3], wants_along=wants[5]
        )
        db = None if db is None else db[:count]
        dscaling = None if along is None else along.sum(1)[:count].to(scaling.dtype)
    dweight = dy.mT @ x if wants[1] else None
    return [dinput, dweight, da, db, bias_gradient(dy, bias) if wants[4] else None, dscaling]


# The ops' own signatures; shapes, types and meaning are documented with them in pykern/ops.


def multi_lora_linear(input, weight, *rest):
    return _forward(input, weight, len(weight), *rest)


def multi_lora_linear_backward(dy, input, weight, *rest):
    return tuple(_backward(dy, input, weight, len(weight), *rest))


def multi_lora_linear_4bit(input, *rest):
    return _forward(input, rest[:9], rest[7][0], *rest[9:])


def multi_lora_linear_4bit_backward(dy, input, *rest):
    *arguments, wants = rest
    wants = [wants[0], False, *wants[1:]]
    dinput, _, *gradients = _backward(dy, input, rest[:9], rest[7][0], *arguments[9:], wants)
    return dinput, *gradients

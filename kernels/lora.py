"""A linear layer with a low-rank adapter, forward and backward, on a float or a 4-bit weight.

Forward: one launch for x · Wᵀ and D(x) · Aᵀ, one for the sum of the base and the rank product (lora_products.py,
lora_update.py). The backward does the same with dy · W and dy · B, and has a launch for each adapter's gradient
(lora_gradients.py). A 4-bit weight goes through the kernels of linear_4bit.py, which decode it once for all rows.
Dropout is drawn inside of the kernels; nothing of it is stored.
"""

from collections.abc import Sequence
from typing import Any

import torch
from pykern.kernels.dequantize_4bit import dequantize_4bit
from pykern.kernels.lora_gradients import adapter_gradient, dora_gradients, rescaled
from pykern.kernels.lora_products import layer_products, products
from pykern.kernels.lora_tiles import KEEP, Dropout
from pykern.kernels.lora_update import update
from pykern.kernels.norm import as_rows
from torch import Tensor

Gradients = list[Tensor | None]


def bias_gradient(dy: Tensor | None, bias: Tensor) -> Tensor:
    """In a fixed order, as torch's sums are."""
    return torch.zeros_like(bias) if dy is None else dy.sum(0, dtype=torch.float32).to(bias.dtype)


def zeros_or_none(wants: Sequence[bool], tensors: Sequence[Tensor | None]) -> Gradients:
    return [t.new_zeros(t.shape) if w and t is not None else None for w, t in zip(wants, tensors, strict=True)]


def _forward(
    input: Tensor,
    weight: Tensor | Sequence[Any],
    outs: int,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    dora_scale: Tensor | None,
    scaling: float,
    dropout_p: float,
    rng: Tensor | None,
) -> Tensor:
    ins = input.shape[-1]
    shape = (*input.shape[:-1], outs)
    if input.numel() == 0 or outs == 0:
        y = input.new_zeros(shape)
        return y if bias is None else y.copy_(bias)
    x, dropout = as_rows(input, ins), Dropout.of(dropout_p, rng)
    if dora_scale is None or rng is None:
        base, small = layer_products(weight, False, x, x, lora_a.mT[None], None, dropout)
    else:
        both = rescaled(x, None, dropout, twice=True)
        base, small = layer_products(weight, False, both, both[len(x) :], lora_a.mT[None])
    y = update(base, small, lora_b.mT[None], scaling, x.dtype, dora_scale, bias, dropout.survival)
    return y.view(shape)


def _backward(
    dy: Tensor | None,
    input: Tensor,
    weight: Tensor | Sequence[Any],
    outs: int,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    dora_scale: Tensor | None,
    scaling: float,
    dropout_p: float,
    rng: Tensor | None,
    wants: Sequence[bool],
) -> Gradients:
    """Of input, weight (None if it has 4 bits), lora_a, lora_b, bias and dora_scale."""
    dense = weight if isinstance(weight, Tensor) else None
    wants = [w and t is not None for w, t in zip(wants, (input, dense, lora_a, lora_b, bias, dora_scale), strict=True)]
    ins = input.shape[-1]
    if dy is None or input.numel() == 0 or outs == 0:
        gradients = zeros_or_none(wants, (input, dense, lora_a, lora_b, bias, dora_scale))
        if wants[4] and dy is not None and outs > 0:
            gradients[4] = bias_gradient(dy.reshape(-1, outs), bias)
        return gradients
    dy, x = as_rows(dy, outs), as_rows(input, ins)
    g = None if dora_scale is None else dora_scale.contiguous()
    dropout = Dropout.of(dropout_p, rng)
    factor = scaling * dropout.survival
    dinput = dweight = da = db = dg = None
    if wants[0]:
        left = dy if g is None else rescaled(dy, g, KEEP, twice=rng is not None)
        base, down = layer_products(weight, True, left, dy, lora_b[None], g)
        survival = dropout.survival
        dinput = update(base, down, lora_a[None], scaling, x.dtype, None, None, survival, dropout).view(input.shape)
    elif wants[2]:
        down = products(None, None, dy, lora_b[None], g)[1]
    if wants[2]:
        da = adapter_gradient(down, x, lora_a[None], False, factor, None, dropout)[0][0]
    if wants[3] or wants[5]:
        small = products(None, None, x, lora_a.mT[None], None, dropout)[1]
        db, along = adapter_gradient(small, dy, lora_b[None], True, factor, g, wanted=wants[3], wants_along=wants[5])
        db = None if db is None else db[0]
    if g is not None and (wants[1] or wants[5]):
        # A 4-bit weight in the scale's dtype: rounded, it would show in the gradient of an fp32 scale.
        matrix = weight if dense is not None else dequantize_4bit(*weight, g.dtype)
        dweight, dg = dora_gradients(dy, x, matrix, g, dropout, wants[1], wants[5])
        dg = None if dg is None else (dg + factor * along[0]).to(g.dtype)
    elif wants[1]:
        dweight = dy.mT @ x
    return [dinput, dweight, da, db, bias_gradient(dy, bias) if wants[4] else None, dg]


# The ops' own signatures; shapes, types and meaning are documented with them in pykern/ops.


def lora_linear(input, weight, *rest):
    return _forward(input, weight, len(weight), *rest)


def lora_linear_backward(dy, input, weight, *rest):
    return tuple(_backward(dy, input, weight, len(weight), *rest))


def lora_linear_4bit(input, *rest):
    return _forward(input, rest[:9], rest[7][0], *rest[9:])


def lora_linear_4bit_backward(dy, input, *rest):
    *arguments, wants = rest
    wants = [wants[0], False, *wants[1:]]
    dinput, _, *gradients = _backward(dy, input, rest[:9], rest[7][0], *arguments[9:], wants)
    return dinput, *gradients

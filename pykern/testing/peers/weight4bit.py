"""What the ops on 4-bit weights are compared with: a weight that was never quantised, and bitsandbytes.

Each weight is laid out before anything is timed. bitsandbytes knows NF4 and FP4 alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pykern.ops._weight4bit import NESTED_BLOCK, NF4, decode


class Prepared:
    """A peer whose layout of the weight is not timed; one that is not `checked` is a floor, not a rival."""

    def __init__(self, prepare: Callable[..., Callable[..., Any]], checked: bool = True) -> None:
        self.prepare, self.checked = prepare, checked

    def __call__(self, *args: Any) -> Any:
        return self.prepare(*args)(*args)


def float_weight(_: Any) -> Prepared:
    """`F.linear` with a weight in the input's dtype, several times as large."""

    def prepare(input: Tensor, *rest: Any) -> Callable[..., Any]:
        weight = decode(*rest[:9], input.dtype)
        return lambda input, *rest: F.linear(input, weight, rest[9])

    return Prepared(prepare)


def filling(_: Any) -> Prepared:
    """Writing one number all over a tensor like the decoded one."""

    def prepare(*args: Any) -> Callable[..., Any]:
        shape, dtype = args[7], args[9]
        return lambda codes, *rest: codes.new_empty(shape, dtype=dtype).fill_(1)

    return Prepared(prepare, checked=False)


def dequantize(module: Any) -> Prepared:
    def prepare(*args: Any) -> Callable[..., Any]:
        state = _quant_state(module, args[:9], args[9])
        if state is None:
            return nothing
        return lambda codes, *rest: module.functional.dequantize_4bit(codes.unsqueeze(-1), state)

    return Prepared(prepare)


def matmul_4bit(module: Any) -> Prepared:
    """What `nn.Linear4bit` of bitsandbytes does in training."""

    def prepare(input: Tensor, *weight: Any) -> Callable[..., Any]:
        state = _quant_state(module, weight[:9], input.dtype)
        if state is None:
            return nothing
        codes = weight[0].unsqueeze(-1)
        return lambda input, *rest: module.matmul_4bit(input, codes.t(), state, bias=rest[9])

    return Prepared(prepare)


def repacked(module: Any) -> Prepared:
    """What it does in evaluation: on a CPU with AVX512-BF16 it repacks its weight at the first call."""

    def prepare(input: Tensor, *weight: Any) -> Callable[..., Any]:
        if weight[9] is not None or input.requires_grad:
            return nothing
        layer = bnb_layer(module, weight[:9], None, input.dtype)
        if layer is None:
            return nothing
        layer.eval()

        @torch.no_grad()
        def call(input: Tensor, *_: Any) -> Tensor:
            return layer(input)

        return call

    return Prepared(prepare)


def bnb_layer(module: Any, weight: tuple[Any, ...], bias: Tensor | None, dtype: torch.dtype) -> Any:
    """bitsandbytes' layer around the weight, in training; None for int4, which it does not have."""
    state = _quant_state(module, weight, dtype)
    if state is None:
        return None
    out, n = weight[7]
    layer = module.nn.Linear4bit(n, out, bias=False, compute_dtype=dtype, quant_type=state.quant_type)
    layer.bias = None if bias is None else torch.nn.Parameter(bias.detach(), requires_grad=False)
    layer.weight = module.nn.Params4bit(
        weight[0].clone().unsqueeze(-1),
        requires_grad=False,
        quant_state=state,
        blocksize=state.blocksize,
        quant_type=state.quant_type,
        bnb_quantized=True,
        module=layer,
    )
    return layer


def nothing(*_: Any) -> None:
    return None


def _quant_state(module: Any, weight: tuple[Any, ...], dtype: torch.dtype) -> Any:
    """bitsandbytes' description of the weight, or None for int4, which it does not have."""
    _, absmax, nested_absmax, nested_code, nested_offset, code, _, shape, blocksize = weight
    if code is None:
        return None
    make = module.functional.QuantState
    nested = {}
    if nested_absmax is not None:
        state2 = make(absmax=nested_absmax, blocksize=NESTED_BLOCK, code=nested_code, dtype=torch.float32)
        nested = {"offset": nested_offset, "state2": state2}
    quant_type = "nf4" if torch.equal(code.cpu(), torch.tensor(NF4)) else "fp4"
    return make(
        absmax=absmax,
        shape=torch.Size(shape),
        code=code,
        blocksize=blocksize,
        quant_type=quant_type,
        dtype=dtype,
        **nested,
    )

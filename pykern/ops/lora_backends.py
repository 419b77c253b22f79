"""Which kernel serves which call of the ops with low-rank adapters: the first of its device whose reason is None."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pykern.ops._backends import Kernel, native, triton
from pykern.ops.weight4bit_backends import cuda_tiles_lack, weight_lacks

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_CUDA_ROWS = 64  # of input: with more of them reading the weight is not what the product costs
_CUDA_RANK = 64  # what its kernel keeps in shared memory
_CUDA_CHUNK = 8  # numbers of a row that it reads at a time
_CUDA_COLUMNS = 65535 * 128  # tiles of a grid's second dimension, and so below
_TRITON_ROWS = 65535 * 32


def _float_lacks(input: Tensor, *_: Any) -> str | None:
    return None if input.dtype in _FLOATS else f"computes fp32, fp16 and bf16, not {input.dtype}"


def _float_backward_lacks(dy: Tensor | None, input: Tensor, *_: Any) -> str | None:
    return _float_lacks(input)


def _4bit_lacks(input: Tensor, *rest: Any) -> str | None:
    return weight_lacks(*rest[:9]) or _float_lacks(input)


def _4bit_backward_lacks(dy: Tensor | None, input: Tensor, *rest: Any) -> str | None:
    return _4bit_lacks(input, *rest)


def _in_a_grid(lacks: Callable[..., str | None], position: int = 0) -> Callable[..., str | None]:
    """What Triton lacks as well, of calls whose input is argument number `position`."""

    def reason(*args: Any) -> str | None:
        rows = args[position].numel() // max(args[position].shape[-1], 1)
        if rows > _TRITON_ROWS:
            return f"takes up to {_TRITON_ROWS} rows of input, not {rows}"
        return lacks(*args)

    return reason


def _cuda_lacks(input: Tensor, lora_a: Tensor, dropout_p: float, rng: Tensor | None) -> str | None:
    if input.dtype not in (torch.float16, torch.bfloat16):
        return f"multiplies fp16 and bf16, not {input.dtype}"
    if rng is not None and dropout_p > 0:
        return "is for decoding and has no dropout"
    if input.numel() > _CUDA_ROWS * input.shape[-1]:
        return f"takes up to {_CUDA_ROWS} rows of input, as decoding has, not {input.numel() // input.shape[-1]}"
    if lora_a.shape[0] > _CUDA_RANK:
        return f"takes ranks up to {_CUDA_RANK}, not {lora_a.shape[0]}"
    return None


def _cuda_float_lacks(input: Tensor, weight: Tensor, lora_a: Tensor, *rest: Any) -> str | None:
    reason = _cuda_lacks(input, lora_a, *rest[-2:])
    if reason is None and input.shape[-1] % _CUDA_CHUNK:
        return f"takes rows of a multiple of {_CUDA_CHUNK} weights, not {input.shape[-1]}"
    if reason is None and max(weight.shape) > _CUDA_COLUMNS:
        return f"takes weights of up to {_CUDA_COLUMNS} rows and columns, not {tuple(weight.shape)}"
    return reason


def _cuda_4bit_lacks(input: Tensor, *rest: Any) -> str | None:
    return weight_lacks(*rest[:9]) or _cuda_lacks(input, rest[9], *rest[-2:]) or cuda_tiles_lack(input, *rest[:9])


def _no_cuda_backward(*_: Any) -> str:
    return "is for decoding and has no backward"


LORA: dict[str, Kernel] = {
    "cuda": native("cuda", "lora_linear"),
    "triton": triton("lora", "lora_linear"),
    "cpu": native("cpu", "lora_linear"),
}
LORA_LACKS = {"cuda": _cuda_float_lacks, "triton": _in_a_grid(_float_lacks), "cpu": _float_lacks}
LORA_BACKWARD: dict[str, Kernel] = {
    "triton": triton("lora", "lora_linear_backward"),
    "cpu": native("cpu", "lora_linear_backward"),
}
LORA_BACKWARD_LACKS = {
    "cuda": _no_cuda_backward,
    "triton": _in_a_grid(_float_backward_lacks, 1),
    "cpu": _float_backward_lacks,
}
LORA_4BIT: dict[str, Kernel] = {
    "cuda": native("cuda", "lora_linear_4bit"),
    "triton": triton("lora", "lora_linear_4bit"),
    "cpu": native("cpu", "lora_linear_4bit"),
}
LORA_4BIT_LACKS = {"cuda": _cuda_4bit_lacks, "triton": _in_a_grid(_4bit_lacks), "cpu": _4bit_lacks}
LORA_4BIT_BACKWARD: dict[str, Kernel] = {
    "triton": triton("lora", "lora_linear_4bit_backward"),
    "cpu": native("cpu", "lora_linear_4bit_backward"),
}
LORA_4BIT_BACKWARD_LACKS = {
    "cuda": _no_cuda_backward,
    "triton": _in_a_grid(_4bit_backward_lacks, 1),
    "cpu": _4bit_backward_lacks,
}
MULTI: dict[str, Kernel] = {
    "triton": triton("multi_lora", "multi_lora_linear"),
    "cpu": native("cpu", "multi_lora_linear"),
}
MULTI_LACKS = {"triton": _in_a_grid(_float_lacks), "cpu": _float_lacks}
MULTI_BACKWARD: dict[str, Kernel] = {
    "triton": triton("multi_lora", "multi_lora_linear_backward"),
    "cpu": native("cpu", "multi_lora_linear_backward"),
}
MULTI_BACKWARD_LACKS = {"triton": _in_a_grid(_float_backward_lacks, 1), "cpu": _float_backward_lacks}
MULTI_4BIT: dict[str, Kernel] = {
    "triton": triton("multi_lora", "multi_lora_linear_4bit"),
    "cpu": native("cpu", "multi_lora_linear_4bit"),
}
MULTI_4BIT_LACKS = {"triton": _in_a_grid(_4bit_lacks), "cpu": _4bit_lacks}
MULTI_4BIT_BACKWARD: dict[str, Kernel] = {
    "triton": triton("multi_lora", "multi_lora_linear_4bit_backward"),
    "cpu": native("cpu", "multi_lora_linear_4bit_backward"),
}
MULTI_4BIT_BACKWARD_LACKS = {"triton": _in_a_grid(_4bit_backward_lacks, 1), "cpu": _4bit_backward_lacks}
DORA_NORM: dict[str, Kernel] = {"triton": triton("dora_norm", "dora_norm"), "cpu": native("cpu", "dora_norm")}
DORA_NORM_LACKS = dict.fromkeys(("cuda", "triton", "cpu"), _float_lacks)

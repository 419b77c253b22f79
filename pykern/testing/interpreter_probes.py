"""Is this version of Triton's interpreter right by itself? Each probe runs a kernel on it as it is."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl


def passes(probe: Callable[[], bool]) -> bool:
    """Whether the probe's answer is yes; an exception means no."""
    try:
        return probe()
    except Exception:
        return False


@triton.jit
def _cast(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, tl.load(x + i).to(y.dtype.element_ty))


@triton.jit
def _double(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    value = tl.load(x + i)
    tl.store(y + i, value + value)


@triton.jit
def _dot(a, b, c, N: tl.constexpr):
    tile = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(c + tile, tl.dot(tl.load(a + tile), tl.load(b + tile), input_precision="tf32"))


@triton.jit
def _atomic(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.atomic_add(y + i, tl.load(x + i))


@triton.jit
def _reduce(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    values = tl.load(x + i)
    tl.store(y, tl.sum(values, 0))
    tl.store(y + 1 + i, tl.cumsum(values, 0))


@triton.jit
def _assert(x):
    tl.device_assert(tl.load(x) > 0, "not positive")


@triton.jit
def _overflow(x, n):
    tl.store(x, n * n)


@triton.jit
def _loop(x, n):
    for i in range(n):
        tl.store(x + i, i)


_autotuned = triton.autotune([triton.Config({"N": 2}), triton.Config({"N": 1})], [])(_cast)


def casts() -> bool:
    # Ties, neighbours of ties, carries into the exponent; of fp8 what overflows saturates.
    x = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1.999, 3.99, 0.0311, -447.0, 1e30, 2**-9 * 1.5])
    right = True
    for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):
        y, limit = torch.empty(len(x), dtype=dtype), torch.finfo(dtype).max
        _cast[(1,)](x, y, N=len(x))
        right &= torch.equal(y.float(), x.clamp(-limit, limit).to(dtype).float())
        back = torch.empty(len(x))
        _cast[(1,)](y, back, N=len(x))
        right &= torch.equal(y.float(), back)
    return right


def arithmetic() -> bool:
    x = torch.tensor([1.0, -3.0, 0.5, 7.0]).bfloat16()
    y = torch.empty_like(x)
    _double[(1,)](x, y, N=4)
    return torch.equal(y, x + x)


def dot() -> bool:
    x, y = torch.full((16, 16), 1.5), torch.empty(16, 16)
    _dot[(1,)](x.bfloat16(), x.bfloat16(), y, N=16)
    right = y.eq(36.0).all()
    _dot[(1,)](x + 2**-12, x, y, N=16)  # a bit that tf32 has not
    return bool(right and y.eq(36.0).all())


def atomic() -> bool:
    x, y = torch.tensor([1.0, 2.0]).bfloat16(), torch.ones(2).bfloat16()
    _atomic[(1,)](x, y, N=2)
    return y.tolist() == [2.0, 3.0]


def reduction() -> bool:
    x, y = torch.tensor([1.0, 2.0, 3.0, 4.0]).bfloat16(), torch.empty(5).bfloat16()
    _reduce[(1,)](x, y, N=4)
    return y.tolist() == [10.0, 1.0, 3.0, 6.0, 10.0]


def device_assert() -> bool:
    return _raises(lambda: _assert[(1,)](torch.zeros(1)))


def overflow() -> bool:
    return _raises(lambda: _overflow[(1,)](torch.zeros(1, dtype=torch.int32), 2**16))


def loop() -> bool:
    x = torch.zeros(3)
    _loop[(1,)](x, 3)
    return x.tolist() == [0.0, 1.0, 2.0]


def autotune() -> bool:
    x, y = torch.ones(2), torch.zeros(2)
    _autotuned[(1,)](x, y)
    return y.tolist() == [1.0, 1.0]


def _raises(launch: Callable[[], object]) -> bool:
    try:
        launch()
    except Exception:
        return True
    return False

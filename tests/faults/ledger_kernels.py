"""Three Triton kernels for the ledger. Each has a setting that, made wrong, costs what a ledger must notice."""

import torch
import triton
import triton.language as tl

from pykern.ops._spec import Sample, define

SUM_REGISTERS = 128  # with 24, the row does not fit into them
COPY_UNIT = 8  # with 1, the compiler cannot know that rows are aligned
DOT_STAGES = 2  # with 16, the tiles that are on their way do not fit into shared memory
DOT_EXACT = 0  # with 1, no tensor core multiplies


@triton.jit
def _centre(x, factor: tl.constexpr):
    return x * factor - tl.sum(x * factor, 0) / 8192


@triton.jit
def _sum_kernel(x, y, BLOCK: tl.constexpr):
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + lane).to(tl.float32)
    tl.store(y + lane, (_centre(values, 2.0) + values * tl.max(values, 0)).to(y.dtype.element_ty))


@triton.jit(do_not_specialize=["stride"])
def _copy_kernel(x, y, stride, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    row, lane = tl.program_id(0), tl.arange(0, BLOCK)
    tl.store(y + row * BLOCK + lane, tl.load(x + row * stride * UNIT + lane))


@triton.jit
def _dot_kernel(a, b, c, N: tl.constexpr, EXACT: tl.constexpr):
    row, column = tl.arange(0, 64)[:, None], tl.arange(0, 64)[None, :]
    total = tl.zeros((64, 64), tl.float32)
    for start in range(0, N, 64):
        left = tl.load(a + row * N + start + column)
        right = tl.load(b + (start + row) * N + column)
        if EXACT:
            total += tl.dot(left.to(tl.float32), right.to(tl.float32), input_precision="ieee")
        else:
            total += tl.dot(left, right)
    tl.store(c + row * N + column, total.to(c.dtype.element_ty))


def _sum(x):
    y = torch.empty_like(x)
    _sum_kernel[(len(x),)](x, y, BLOCK=x.shape[1], num_warps=8, maxnreg=SUM_REGISTERS)
    return y


def _copy(x):
    y = x.new_empty(x.shape)
    _copy_kernel[(len(x),)](x, y, x.stride(0) // COPY_UNIT, UNIT=COPY_UNIT, BLOCK=x.shape[1], num_warps=4)
    return y


def _dot(a, b):
    c = torch.empty_like(a)
    _dot_kernel[(1,)](a, b, c, N=len(a), EXACT=DOT_EXACT, num_warps=4, num_stages=DOT_STAGES)
    return c


def _samples(*shapes):
    def samples(kind, make):
        if kind == "bench" and make.dtype == torch.bfloat16:
            yield Sample("one", tuple(make(*shape, grad=False) for shape in shapes))

    return samples


def _define(schema, launcher, reference, *shapes):
    return define(
        schema,
        reference=reference,
        fake=lambda x, *_: x.new_empty(x.shape),
        backends={"triton": launcher},
        samples=_samples(*shapes),
    )


_define(
    "ledgertest::sum(Tensor x, *, str? backend=None) -> (Tensor y)",
    _sum,
    lambda x: 2 * x - (2 * x).sum(1, keepdim=True) / 8192 + x * x.amax(1, keepdim=True),
    (4, 8192),
)
_define("ledgertest::copy(Tensor x, *, str? backend=None) -> (Tensor y)", _copy, torch.clone, (4, 4096))
_define(
    "ledgertest::dot(Tensor a, Tensor b, *, str? backend=None) -> (Tensor c)", _dot, torch.mm, (512, 512), (512, 512)
)

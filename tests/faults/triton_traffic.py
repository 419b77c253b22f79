"""An op outside the package whose kernel reads its input as often as it is told."""

from functools import partial

import torch
import triton
import triton.language as tl

from pykern.ops._spec import Sample, define


@triton.jit
def copy_kernel(x, y, n, TIMES: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(TIMES):
        total += tl.load(x + i, mask=i < n, other=0.0).to(tl.float32)
    tl.store(y + i, total / TIMES, mask=i < n)


def copy(x, times):
    y = torch.empty_like(x)
    copy_kernel[(triton.cdiv(x.numel(), 1024),)](x, y, x.numel(), TIMES=times, BLOCK=1024)
    return y


def samples(kind, make):
    yield Sample("3000 numbers", (make(3000, grad=False),))


for name, times, limit in (("once", 1, None), ("twice", 2, None), ("twice_allowed", 2, lambda backend, x: 1.5)):
    define(
        f"triton_traffic::{name}(Tensor x, *, str? backend=None) -> (Tensor y)",
        reference=lambda x: x * 1,
        fake=lambda x: x.new_empty(x.shape),
        samples=samples,
        cost=lambda x: (0.0, 2 * x.nbytes),
        traffic=limit,
        backends={"triton": partial(copy, times=times)},
    )

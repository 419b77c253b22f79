"""How kernels decode a 4-bit weight: codes to values, blocks to scales. The formats are in pykern/ops/_weight4bit.py.

What a weight does not have (nested scales, a code table, zero points) is None, which Triton takes as a constant:
nothing is loaded or computed for it. Kernels that decode are launched with `EXACT`.
"""

import triton
import triton.language as tl
from torch import Tensor

# Products and sums of scales round separately: no contraction to fused multiply-adds. Those of `tl.dot` stay fused.
EXACT = {"enable_fp_fusion": False}
ZERO = tl.constexpr(8.0)  # the code of zero where there are no zero points
NESTED_BLOCK = tl.constexpr(256)  # how many scales share a nested one


@triton.jit
def load(pointer, mask):
    return tl.load(pointer) if mask is None else tl.load(pointer, mask=mask, other=0)


@triton.jit
def block_scale(absmax, nested_absmax, nested_code, nested_offset, block, mask):
    """The fp32 scales of blocks, given by int64 numbers."""
    stored = load(absmax + block, mask)
    if nested_absmax is None:
        scale = stored.to(tl.float32)
    else:
        factor = load(nested_absmax + block // NESTED_BLOCK, mask)
        scale = tl.load(nested_code + stored.to(tl.int32)) * factor + tl.load(nested_offset)
    return scale


@triton.jit
def block_zero(zero_points, block, mask):
    """The codes of zero of blocks, in fp32."""
    return ZERO if zero_points is None else load(zero_points + block, mask).to(tl.float32)


@triton.jit
def centred(q, zero):
    """The fp32 values of int4 codes before they are scaled.

    A code in the last bits of 2²³ makes the float 2²³ + code: a logical instruction instead of a conversion, which has
    a fraction of its rate. The difference is exact.
    """
    return (q.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - (zero + 8388608.0)


@triton.jit
def in_order(high, low):
    """(R, C) of high and of low nibbles as (R, 2 C) elements."""
    return tl.join(high, low).reshape(high.shape[0], 2 * high.shape[1])


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]

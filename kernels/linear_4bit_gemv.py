"""A vector times a 4-bit weight: a kernel of its own, because a tensor core's tile would be empty but for one row.

It is bound by instructions for decoding, before it is by memory, so they are few: a thread takes eight codes as one
word, a shift and a mask each, looks their values up, and multiplies by inputs that stay in registers for all of the
tile's rows; the scale multiplies the sum of the eight. A program's threads lie along the row, so that the reduction at
the end is the only one, in a fixed order, and no part of a sum goes through memory.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from pykern.kernels.linear_4bit_config import processors
from pykern.kernels.norm import on
from pykern.kernels.weight4bit import EXACT, block_scale, block_zero, centred, contiguous, load
from torch import Tensor

WORD = tl.constexpr(8)  # codes in 32 bits


@dataclass(frozen=True)
class Config:
    """A program sums up for `outs` outputs, `words` words of each at a time."""

    outs: int
    words: int
    warps: int

    @staticmethod
    def of(outs: int, device: torch.device) -> "Config":
        """A word of each row a thread: up to eight loads under way, fewer where that would leave processors idle."""
        if device.type == "cpu":
            return Config(2, 8, 1)
        rows = 8
        while rows > 1 and outs < rows * 4 * processors(device):
            rows //= 2
        return Config(rows, 128, 4)


@triton.jit
def _load_inputs(x, start, words, WORDS: tl.constexpr):
    """The inputs that words from `start` on are multiplied by, in fp32: for each of their eight codes (WORDS,)."""
    word = start + tl.arange(0, WORDS)[:, None]
    inputs = tl.load(x + word * WORD + tl.arange(0, WORD)[None, :], mask=word < words, other=0.0).to(tl.float32)
    even, odd = inputs.reshape(WORDS, 2, 2, 2).split()
    x04, x26 = even.split()
    x15, x37 = odd.split()
    x0, x4 = x04.split()
    x1, x5 = x15.split()
    x2, x6 = x26.split()
    x3, x7 = x37.split()
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit(do_not_specialize=["outs", "ins"])
def _vector_kernel(
    x,  # (ins,)
    codes,  # (outs · ins / 2,), at a multiple of four bytes
    absmax,  # (blocks,)
    nested_absmax,  # (ceil(blocks / 256),) or None, and so are the next two
    nested_code,  # (256,)
    nested_offset,  # ()
    code,  # (16,), None for int4
    zero_points,  # (blocks,) or None
    bias,  # (outs,) or None
    y,  # (outs,)
    outs,
    ins,
    BLOCKSIZE: tl.constexpr,
    ALIGNED: tl.constexpr,  # whether blocks begin anew with each row
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
):
    words = ins  # of a row
    out = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # (R,)
    row = out.to(tl.int64)[:, None]
    live = row < outs
    # Told that no words are side by side, the compiler gives each thread one of each row, as it has inputs.
    lane = tl.max_contiguous(tl.arange(0, WORDS)[None, :], [1, 1])
    source = codes.to(tl.pointer_type(tl.int32)) + row * words
    sums = tl.zeros((ROWS, WORDS), tl.float32)
    for start in range(0, words, WORDS):
        word = start + lane  # (1, W)
        mask = live & (word < words)
        packed = load(source + word, mask)  # (R, W)
        if ALIGNED:
            block = row * tl.cdiv(words * WORD, BLOCKSIZE) + word * WORD // BLOCKSIZE
        else:
            block = (row * words + word) * WORD // BLOCKSIZE
        scale = block_scale(absmax, nested_absmax, nested_code, nested_offset, block, mask)
        zero = block_zero(zero_points, block, mask)
        inputs = _load_inputs(x, start, words, WORDS)
        products = tl.zeros((ROWS, WORDS), tl.float32)
        for i in tl.static_range(WORD):
            q = (packed >> (4 * (i ^ 1))) & 15  # the high half of a byte comes first
            value = centred(q, zero) if code is None else tl.load(code + q)
            products = tl.fma(value, tl.broadcast_to(inputs[i][None, :], (ROWS, WORDS)), products)
        sums = tl.fma(products, scale, sums)
    total = tl.sum(sums, 1)
    if bias is not None:
        total += tl.load(bias + out, mask=out < outs, other=0.0).to(tl.float32)
    tl.store(y + out, total.to(y.dtype.element_ty), mask=out < outs)


def serves(weight) -> bool:
    """Whether every word is within one row and one block, and at a multiple of its size."""
    codes, (_, n), blocksize = weight[0], weight[7], weight[8]
    return n % 8 == 0 and blocksize % 8 == 0 and codes.data_ptr() % 16 == 0


def vector_product(x: Tensor, weight, bias: Tensor | None) -> Tensor:
    """(in,) · Wᵀ + bias, contiguous, of a weight that is not empty."""
    *tensors, (outs, ins), blocksize = weight
    y = x.new_empty(outs)
    config = Config.of(outs, x.device)
    aligned = tensors[5] is None or ins % blocksize == 0
    with on(x.device):
        tensors = (x, *contiguous(*tensors), bias, y)
        sizes = (outs, ins // 8)
        blocks = {"ROWS": config.outs, "WORDS": config.words, "num_warps": config.warps}
        grid = (triton.cdiv(outs, config.outs),)
        _vector_kernel[grid](*tensors, *sizes, BLOCKSIZE=blocksize, ALIGNED=aligned, **blocks, **EXACT)
    return y

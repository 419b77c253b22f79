"""Small Triton kernels, each with one fault that `WRONG` turns on; without it they are right."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 32


@triton.jit
def mask_kernel(x, y, n, WRONG: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i <= n if WRONG else i < n
    tl.store(y + i, 2 * tl.load(x + i, mask=inside), mask=inside)


def off_by_one_mask(x: Tensor, wrong: bool) -> Tensor:
    y = torch.empty_like(x)
    mask_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, y, x.numel(), WRONG=wrong, BLOCK=BLOCK)
    return y


def uninitialised_output(x: Tensor, wrong: bool) -> Tensor:
    """Rounds the number of tiles down: nobody writes the last one."""
    y = torch.empty_like(x)
    tiles = x.numel() // BLOCK if wrong else triton.cdiv(x.numel(), BLOCK)
    mask_kernel[(tiles,)](x, y, x.numel(), WRONG=False, BLOCK=BLOCK)
    return y


@triton.jit
def in_place_kernel(x, y, n, WRONG: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = 2 * tl.load(x + i, mask=i < n)
    tl.store(y + i, value, mask=i < n)
    if WRONG:
        tl.store(x + i, value, mask=i < n)


def write_to_an_input(x: Tensor, wrong: bool) -> Tensor:
    y = torch.empty_like(x)
    in_place_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, y, x.numel(), WRONG=wrong, BLOCK=BLOCK)
    return y


@triton.jit
def aligned_kernel(x, y, n, WRONG: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0) * n
    if WRONG:  # rows of n are divisible by 4 only where n is
        start = tl.multiple_of(start, 4)
    i = tl.arange(0, BLOCK)
    tl.store(y + start + i, 2 * tl.load(x + start + i, mask=i < n), mask=i < n)


def false_alignment(x: Tensor, wrong: bool) -> Tensor:
    y = torch.empty_like(x)
    rows, n = x.shape
    aligned_kernel[(rows,)](x, y, n, WRONG=wrong, BLOCK=triton.next_power_of_2(n))
    return y


@triton.jit
def row_sum_kernel(x, y, n, WRONG: tl.constexpr, BLOCK: tl.constexpr):
    sums = tl.zeros((BLOCK,), x.dtype.element_ty if WRONG else tl.float32)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        sums += tl.load(x + tl.program_id(0) * n + i, mask=i < n, other=0.0)
    tl.store(y + tl.program_id(0), tl.sum(sums.to(tl.float32), 0))


def sum_in_16_bits(x: Tensor, wrong: bool) -> Tensor:
    y = x.new_empty(len(x))
    row_sum_kernel[(len(x),)](x, y, x.shape[1], WRONG=wrong, BLOCK=BLOCK)
    return y


@triton.jit
def partial_sum_kernel(x, partials, n, WRONG: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    share = tl.sum(tl.load(x + i, mask=i < n, other=0.0).to(tl.float32), 0)
    if WRONG == "atomic":
        tl.atomic_add(partials, share, sem="relaxed")
    elif WRONG == "race":
        tl.store(partials, tl.load(partials) + share)
    else:
        tl.store(partials + tl.program_id(0), share)


def _total(x: Tensor, wrong: str) -> Tensor:
    programs = triton.cdiv(x.numel(), BLOCK)
    partials = x.new_zeros(1 if wrong else programs, dtype=torch.float32)
    partial_sum_kernel[(programs,)](x, partials, x.numel(), WRONG=wrong, BLOCK=BLOCK)
    if wrong:
        return partials.to(x.dtype)
    y = x.new_empty(1)
    row_sum_kernel[(1,)](partials, y, programs, WRONG=False, BLOCK=BLOCK)
    return y


def atomic_sum(x: Tensor, wrong: bool) -> Tensor:
    return _total(x, "atomic" if wrong else "")


def race_of_programs(x: Tensor, wrong: bool) -> Tensor:
    return _total(x, "race" if wrong else "")


@triton.jit
def first_column_kernel(x, y, stride, WRONG: tl.constexpr):
    row = tl.program_id(0)
    offset = row * stride if WRONG else row.to(tl.int64) * stride
    tl.store(y + row, tl.load(x + offset))


def overflow_of_an_offset(x: Tensor, wrong: bool) -> Tensor:
    y = x.new_empty(len(x))
    first_column_kernel[(len(x),)](x, y, x.stride(0), WRONG=wrong)
    return y


@triton.jit
def ticket_kernel(x, ticket, slots, n, WRONG: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    slot = tl.atomic_add(ticket, 1) if WRONG else tl.program_id(0)
    tl.store(slots + slot * n + i, tl.load(x + tl.program_id(0) * n + i, mask=i < n), mask=i < n)


@triton.jit
def column_sum_kernel(slots, y, rows, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float32)
    for row in range(rows):
        sums += tl.load(slots + row * n + i, mask=i < n, other=0.0)
    tl.store(y + i, sums, mask=i < n)


def sum_in_order_of_arrival(x: Tensor, wrong: bool) -> Tensor:
    """Column sums of rows that lie in the order in which programs took a ticket."""
    rows, n = x.shape
    slots, y = torch.empty_like(x), x.new_empty(n)
    ticket = torch.zeros(1, dtype=torch.int32, device=x.device)
    ticket_kernel[(rows,)](x, ticket, slots, n, WRONG=wrong, BLOCK=triton.next_power_of_2(n))
    column_sum_kernel[(1,)](slots, y, rows, n, BLOCK=triton.next_power_of_2(n))
    return y

"""Slots sorted by expert: a stable counting sort in two launches, or one where there are few slots.

A span is some tiles of slots in a row, and belongs to one program. The first kernel counts each span's slots by expert.
In the second one each program adds up all spans' counts, which tells where every expert begins and how much of it comes
before this span: a scan by a launch of its own would take longer, as there are no more spans than multiprocessors.
Then it puts its slots into place, tile by tile. Expert and offset in the tile, packed into one integer, are sorted; no
two are equal, so the order is stable. What is at place p of the sorted tile goes to where its expert continues, plus p,
minus the place where its expert begins in the tile.

There is a bin for each expert and one for dropped slots. Sums are of integers: they are the same in any order.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from pykern.kernels.norm import on


@dataclass(frozen=True)
class Config:
    """How many slots a tile has, how many tiles a span, and how many spans there are."""

    slots: int
    tiles: int
    spans: int
    warps: int

    @staticmethod
    def of(slots: int, bins: int) -> "Config":
        if slots <= 128:
            return Config(128, 1, 1, warps=1)
        tiles = triton.cdiv(slots, 1024)
        in_span = triton.cdiv(tiles, 128)
        # Two slots to a thread. Where there are 1024 experts, their bins fill registers, and fewer threads may have
        # more of them each.
        return Config(1024, in_span, triton.cdiv(tiles, in_span), warps=16 if bins <= 1024 else 8)

    def registers(self) -> int:
        """Of a thread, for a program that has a multiprocessor to itself: for two, the compiler would spill."""
        return min(65536 // (32 * self.warps), 255)


@triton.jit
def _load_bins(expert_ids, slot, slots, EXPERTS: tl.constexpr):
    """The bins of slots, EXPERTS for one that is dropped or does not exist."""
    ids = tl.load(expert_ids + slot, mask=slot < slots, other=-1)
    return tl.where((ids >= 0) & (ids < EXPERTS), ids, EXPERTS).to(tl.int32)


@triton.jit
def _before(values):
    """The sum of the values before each one."""
    return tl.cumsum(values, 0) - values


@triton.jit
def _place_tile(bins, place, order, inverse, first, slots, BINS: tl.constexpr):
    """Puts a tile's slots, from `first` on, into place; returns where every bin continues, as `place` says before."""
    offset = tl.arange(0, bins.shape[0])
    key = tl.sort((bins << 16) | offset)  # a tile has fewer than 2¹⁶ slots
    count = tl.histogram(bins, BINS)
    to = tl.gather(place - _before(count), key >> 16, 0) + offset
    slot = first + (key & 0xFFFF)
    tl.store(order + to, slot, mask=slot < slots)
    tl.store(inverse + slot, to.to(tl.int64), mask=slot < slots)
    return place + count


@triton.jit(do_not_specialize=["slots", "tiles"])
def _count_kernel(
    expert_ids,  # (slots,)
    counts,  # (spans, EXPERTS + 1)
    slots,
    tiles,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
):
    span, bin = tl.program_id(0).to(tl.int64), tl.arange(0, BINS)
    slot = span * tiles * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BINS,), tl.int32)
    for _ in range(tiles):
        # Slots that do not exist count as dropped, behind which there is no bin.
        total += tl.histogram(_load_bins(expert_ids, slot, slots, EXPERTS), BINS)
        slot += BLOCK
    tl.store(counts + span * (EXPERTS + 1) + bin, total, mask=bin <= EXPERTS)


@triton.jit(do_not_specialize=["slots", "tiles", "spans"])
def _place_kernel(
    expert_ids,  # (slots,)
    counts,  # (spans, EXPERTS + 1), None if there is one span
    order,  # (slots,)
    inverse,  # (slots,)
    offs,  # (EXPERTS,)
    slots,
    tiles,
    spans,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
    SPANS: tl.constexpr,  # how many spans' counts are read at a time
):
    span, bin = tl.program_id(0), tl.arange(0, BINS)
    first = span.to(tl.int64) * tiles * BLOCK
    if counts is None:
        bins = _load_bins(expert_ids, first + tl.arange(0, BLOCK), slots, EXPERTS)
        total = tl.histogram(bins, BINS)
        _place_tile(bins, _before(total), order, inverse, first, slots, BINS)
    else:
        total = tl.zeros((BINS,), tl.int32)
        place = tl.zeros((BINS,), tl.int32)
        for start in range(0, spans, SPANS):
            other = start + tl.arange(0, SPANS)[:, None]
            inside = (other < spans) & (bin <= EXPERTS)[None, :]
            part = tl.load(counts + other * (EXPERTS + 1) + bin[None, :], mask=inside, other=0)
            total += tl.sum(part, 0)
            place += tl.sum(tl.where(other < span, part, 0), 0)
        place += _before(total)
        for _ in range(tiles):
            bins = _load_bins(expert_ids, first + tl.arange(0, BLOCK), slots, EXPERTS)
            place = _place_tile(bins, place, order, inverse, first, slots, BINS)
            first += BLOCK
    if span == 0:
        tl.store(offs + bin, tl.cumsum(total, 0), mask=bin < EXPERTS)


# The op's own signature; shapes, types and meaning are documented with it in pykern/ops/moe/sort.py.


def moe_sort(expert_ids, num_experts):
    slots = expert_ids.numel()
    order = expert_ids.new_empty((slots,), dtype=torch.int64)
    inverse = torch.empty_like(order)
    offs = expert_ids.new_empty((num_experts,), dtype=torch.int32)
    if slots == 0:
        return order, inverse, offs.zero_()
    flat = expert_ids.contiguous().view(-1)
    bins = triton.next_power_of_2(num_experts + 1)
    config = Config.of(slots, bins)
    counts = None if config.spans == 1 else offs.new_empty((config.spans, num_experts + 1))
    blocks = {"EXPERTS": num_experts, "BLOCK": config.slots, "BINS": bins, "num_warps": config.warps}
    with on(expert_ids.device):
        if counts is not None:
            _count_kernel[(config.spans,)](flat, counts, slots, config.tiles, **blocks)
        tensors, sizes = (flat, counts, order, inverse, offs), (slots, config.tiles, config.spans)
        blocks |= {"SPANS": max(4096 // bins, 1), "maxnreg": config.registers()}
        _place_kernel[(config.spans,)](*tensors, *sizes, **blocks)
    return order, inverse, offs

"""The memory of a launch in the repaired Triton interpreter: what a kernel may touch, and who has touched it already.

All loads, stores and atomics pass through `Memory.access`: whoever wants to count or check them does it there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from pykern.testing.interpreter_counters import Counter

# Tensors that no kernel may write to, as (name, first byte, end): see `read_only`.
_inputs: list[tuple[str, int, int]] = []


@contextmanager
def read_only(arguments: dict[str, Any]) -> Iterator[None]:
    """In this block a kernel's store or atomic to one of the tensors among the arguments raises."""
    found = [pair for name, value in arguments.items() for pair in _tensors(name, value)]
    before = list(_inputs)
    _inputs.extend((name, *_span(tensor)) for name, tensor in found)
    try:
        yield
    finally:
        _inputs[:] = before


class Memory:
    """In place of the native module that reads and writes: all loads, stores and atomics of a launch pass `access`.

    Programs run one after another, in an order that a seed and the number of the launch decide. `deterministic` may
    be set to False for kernels that are meant to add floats in any order.
    """

    PATIENCE = 1000  # accesses to one and the same address in a row, before a program is taken to wait for another

    def __init__(self, native):
        self.native = native
        self.deterministic = True
        self.counters: list[Counter] | None = None
        self.seed, self.launches = 0, 0
        self.spans: list[tuple[str, int, int]] = []
        self.index, self.program = (0, 0, 0), 0
        self.last, self.repeats = (0, 0), 0

    def __getattr__(self, name):
        return getattr(self.native, name)

    def launch(self, kernel: str, arguments: dict) -> None:
        """A kernel starts: these are the only tensors that it may touch, and no program has touched them yet."""
        tensors = [pair for name, value in arguments.items() for pair in _tensors(name, value)]
        self.spans = [(name, *_span(tensor)) for name, tensor in tensors]
        self.protected = _inputs[:]
        self.shadow = Shadow(min((tensor.element_size() for _, tensor in tensors), default=1))
        self.counter = None
        if self.counters is not None:
            self.counter = Counter(kernel, {name: (*_span(t), t.element_size()) for name, t in tensors})
            self.counters.append(self.counter)

    def order(self, grid: tuple[int, int, int]) -> np.ndarray:
        """The programs of the launch, in the order in which they are to run."""
        self.launches += 1
        if self.counter is not None:
            self.counter.grid = [int(n) for n in grid]
        return np.random.default_rng((self.seed, self.launches)).permutation(math.prod(grid))

    def enter(self, index: tuple[int, int, int], program: int) -> None:
        self.index, self.program = index, program
        self.shadow.before = set()
        self.last, self.repeats = (0, 0), 0

    def load(self, pointers, mask, other, dtype):
        self.access("load", pointers, mask, np.dtype(dtype).itemsize)
        return self.native.load(pointers, mask, other, dtype)

    def store(self, pointers, value, mask):
        self.access("store", pointers, mask, value.itemsize)
        self.native.store(pointers, value, mask)
        found = self.native.load(pointers, mask, value, value.dtype)  # the lanes that lost find another lane's value
        lost = np.ascontiguousarray(found).view(np.uint8) != np.ascontiguousarray(value).view(np.uint8)
        if lost.any():
            raise RuntimeError(f"race: two lanes of one store by program {self.index} write differently to one address")

    def atomic_rmw(self, op, pointers, value, mask, sem):
        self.access("atomic", pointers, mask, value.itemsize, ordering=sem != self.native.MEM_SEMANTIC.RELAXED)
        before = self.native.atomic_rmw(op, pointers, value, mask, sem)
        if op == self.native.RMW_OP.FADD:
            with np.errstate(all="ignore"):
                self.summed(pointers, mask, before, value, before + value)
        return before

    def atomic_cas(self, pointers, expected, value, sem):
        ordering = sem != self.native.MEM_SEMANTIC.RELAXED
        self.access("atomic", pointers, np.ones_like(pointers, bool), value.itemsize, ordering)
        return self.native.atomic_cas(pointers, expected, value, sem)

    def access(self, kind: str, pointers: np.ndarray, mask: np.ndarray, size: int, ordering: bool = False) -> None:
        addresses = pointers[np.broadcast_to(mask, pointers.shape)].astype(np.int64)
        if not addresses.size:
            return
        low, high = addresses.min(), addresses.max() + size
        if not any(start <= low and high <= stop for _, start, stop in self.spans):
            self._check_bounds(kind, addresses, size, pointers.size)
        if kind != "load":
            for name, start, stop in self.protected:
                if low < stop and start < high and ((start < addresses + size) & (addresses < stop)).any():
                    raise RuntimeError(f"{kind} to the input {name} of the op by program {self.index}")
        self._check_progress(int(low), int(high), pointers.size)
        if ordering and pointers.size == 1:
            self.shadow.synchronise(int(addresses[0]), self.program + 1)
        other = self.shadow.touch(kind, addresses, size, self.program + 1)
        if other is not None:
            name = self._name(addresses[other[0]])
            raise RuntimeError(f"race: {kind} of {name} by program {self.index}, where {other[1]} without ordering")
        if self.counter is not None:
            self.counter.access(kind, addresses, size)

    def summed(self, pointers, mask, before, value, after) -> None:
        """Lanes have added floats atomically: is there a cell whose last bits depend on the order?"""
        if not self.deterministic:
            return
        live = np.broadcast_to(mask, pointers.shape)
        before, value, after = (np.broadcast_to(array, pointers.shape)[live] for array in (before, value, after))
        with np.errstate(all="ignore"):
            # One of the differences is exact, so both are right only where the sum is.
            rounded = ((after - before != value) | (after - value != before)) & np.isfinite(after)
        addresses = pointers[live].astype(np.int64)
        cell = self.shadow.add(addresses, self.program + 1, before != 0, rounded)
        if cell is not None:
            raise RuntimeError(
                f"not deterministic: floats are added to {self._name(addresses[cell])} atomically in any order, and the"
                f" sum rounds (found by program {self.index}); write partial sums and add them in a fixed order"
            )

    def _name(self, address: int) -> str:
        return next(name for name, start, stop in self.spans if start <= address < stop)

    def _check_progress(self, low, high, lanes):
        if lanes > 1 or self.last != (low, high):
            self.last, self.repeats = (low, high), 0
            return
        self.repeats += 1
        if self.repeats >= self.PATIENCE:
            raise RuntimeError(
                f"program {self.index} waits at {self._name(low)} for another that need not run at the same time, or"
                " before it"
            )

    def _check_bounds(self, kind, addresses, size, lanes):
        inside = np.zeros(addresses.shape, bool)
        for _, start, stop in self.spans:
            inside |= (start <= addresses) & (addresses + size <= stop)
        if inside.all():
            return
        first = int(addresses[~inside][0])
        where = [(max(start - first, first + size - stop), first < start, name) for name, start, stop in self.spans]
        distance, before, name = min(where, default=(first, False, "no tensor"))
        side = "before the start" if before else "behind the end"
        raise IndexError(
            f"out-of-bounds {kind} by program {self.index}: {np.count_nonzero(~inside)} of {lanes} lanes, the first"
            f" {distance} bytes {side} of {name}"
        )


def _tensors(name: str, value) -> list[tuple[str, torch.Tensor]]:
    if isinstance(value, (tuple, list)):
        return [pair for i, item in enumerate(value) for pair in _tensors(f"{name}[{i}]", item)]
    if isinstance(value, torch.Tensor):
        return [(name, value)]
    # What has a base is a tensor descriptor or a reinterpreted tensor; the rest are numbers.
    return _tensors(name, value.base) if hasattr(value, "base") else []


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    if not tensor.numel():
        return 0, 0
    extent = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + extent * tensor.element_size()


class Shadow:
    """Which program last loaded, stored and atomically updated each cell of memory in this launch.

    Programs run one after another here; on a GPU in any order. So it is a race when two programs touch a cell, one of
    them writes, and not both do so atomically. A cell is as wide as the narrowest element of the launch; cells live in
    pages, so that huge strides cost little.
    """

    CONFLICTS = {"load": ("store", "atomic"), "store": ("load", "store", "atomic"), "atomic": ("load", "store")}
    DONE = {"load": "read", "store": "wrote", "atomic": "atomically updated"}
    SUMS = ("summands", "sources", "adder", "rounded")  # of floats added atomically
    PAGE, MANY = 12, -1

    def __init__(self, cell: int):
        self.cell = cell
        self.pages: dict[int, int] = {}
        self.books = {kind: np.zeros(1 << self.PAGE, np.int32) for kind in self.CONFLICTS}
        self.released: dict[int, set[int]] = {}
        self.before: set[int] = set()

    def synchronise(self, address: int, program: int) -> None:
        """An atomic on one address: all that its earlier users did is over for what this program does from now on."""
        self.before |= self.released.get(address, set())
        self.released[address] = self.before | {program}

    def touch(self, kind: str, addresses: np.ndarray, size: int, program: int) -> tuple[int, str] | None:
        """Record the access; (lane, what another program did there) if it races."""
        cells = self._cells(addresses, size)
        for other in self.CONFLICTS[kind]:
            seen = self.books[other][cells]
            foreign = (seen != 0) & (seen != program)
            if self.before:
                foreign &= ~np.isin(seen, [*self.before, self.MANY])
            if foreign.any():
                cell = int(foreign.argmax())
                whose = "several programs" if seen[cell] == self.MANY else f"program number {seen[cell] - 1}"
                return cell * len(addresses) // len(cells), f"{whose} {self.DONE[other]}"
        seen = self.books[kind][cells]
        alone = (seen == 0) | (seen == program) | (kind == "store")
        self.books[kind][cells] = np.where(alone, program, self.MANY)
        return None

    def add(self, addresses: np.ndarray, program: int, filled: np.ndarray, rounded: np.ndarray) -> int | None:
        """Record atomic additions of floats; the lane whose sum depends on the order of programs or lanes, if any.

        One program adds in its own order, two summands commute, and what never rounds is the same in any order.
        """
        for book in self.SUMS:
            if book not in self.books:
                self.books[book] = np.zeros_like(self.books["atomic"])
        summands, sources, adder, inexact = (self.books[book] for book in self.SUMS)
        cells, first, inverse, lanes = np.unique(
            self._cells(addresses, self.cell), return_index=True, return_inverse=True, return_counts=True
        )
        summands[cells] += lanes + (filled[first] & (summands[cells] == 0))  # what was there before is one as well
        sources[cells] += np.where(lanes > 1, 2, adder[cells] != program)
        adder[cells] = program
        inexact[cells] |= np.bincount(inverse.ravel(), rounded) > 0
        open_order = (sources[cells] > 1) & (summands[cells] > 2) & (inexact[cells] != 0)
        return int(first[open_order.argmax()]) if open_order.any() else None

    def _cells(self, addresses, size):
        cells = addresses // self.cell
        if size > self.cell:
            cells = (cells[:, None] + np.arange(size // self.cell)).ravel()
        inverse = cells >> self.PAGE
        first, last = int(inverse.min()), int(inverse.max())
        if last - first < 64:  # near each other, as most are: without a sort
            pages, inverse = range(first, last + 1), inverse - first
        else:
            pages, inverse = np.unique(inverse, return_inverse=True)
        slots = np.array([self.pages.setdefault(int(page), len(self.pages)) for page in pages])
        while len(self.pages) << self.PAGE > len(self.books["load"]):
            self.books = {kind: np.concatenate([book, np.zeros_like(book)]) for kind, book in self.books.items()}
        return (slots[inverse] << self.PAGE) | (cells & ((1 << self.PAGE) - 1))

"""The memory of a launch in the repaired Triton interpreter: what a kernel may touch, and who has touched it already.

All loads, stores and atomics pass through `Memory.access`: whoever wants to count or check them does it there.
"""

from __future__ import annotations

import numpy as np
import torch


class Memory:
    """In place of the native module that reads and writes: all loads, stores and atomics of a launch pass `access`."""

    def __init__(self, native):
        self.native = native
        self.spans: list[tuple[str, int, int]] = []
        self.index, self.program = (0, 0, 0), 0

    def __getattr__(self, name):
        return getattr(self.native, name)

    def launch(self, arguments: dict) -> None:
        """A kernel starts: these are the only tensors that it may touch, and no program has touched them yet."""
        tensors = [pair for name, value in arguments.items() for pair in _tensors(name, value)]
        self.spans = [(name, *_span(tensor)) for name, tensor in tensors]
        self.shadow = Shadow(min((tensor.element_size() for _, tensor in tensors), default=1))

    def enter(self, index: tuple[int, int, int], program: int) -> None:
        self.index, self.program = index, program
        self.shadow.before = set()

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
        return self.native.atomic_rmw(op, pointers, value, mask, sem)

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
        if ordering and pointers.size == 1:
            self.shadow.synchronise(int(addresses[0]), self.program + 1)
        other = self.shadow.touch(kind, addresses, size, self.program + 1)
        if other is not None:
            name = next(name for name, start, stop in self.spans if start <= addresses[other[0]] < stop)
            raise RuntimeError(f"race: {kind} of {name} by program {self.index}, where {other[1]} without ordering")

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
    PAGE, MANY = 12, -1

    def __init__(self, cell: int):
        self.cell = cell
        self.pages: dict[int, int] = {}
        self.seen = {kind: np.zeros(1 << self.PAGE, np.int32) for kind in self.CONFLICTS}
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
            seen = self.seen[other][cells]
            foreign = (seen != 0) & (seen != program)
            if self.before:
                foreign &= ~np.isin(seen, [*self.before, self.MANY])
            if foreign.any():
                cell = int(foreign.argmax())
                whose = "several programs" if seen[cell] == self.MANY else f"program number {seen[cell] - 1}"
                return cell * len(addresses) // len(cells), f"{whose} {self.DONE[other]}"
        seen = self.seen[kind][cells]
        alone = (seen == 0) | (seen == program) | (kind == "store")
        self.seen[kind][cells] = np.where(alone, program, self.MANY)
        return None

    def _cells(self, addresses, size):
        cells = addresses // self.cell
        if size > self.cell:
            cells = (cells[:, None] + np.arange(size // self.cell)).ravel()
        pages, inverse = np.unique(cells >> self.PAGE, return_inverse=True)
        slots = np.array([self.pages.setdefault(int(page), len(self.pages)) for page in pages])
        while len(self.pages) << self.PAGE > len(self.seen["load"]):
            self.seen = {kind: np.concatenate([seen, np.zeros_like(seen)]) for kind, seen in self.seen.items()}
        return (slots[inverse] << self.PAGE) | (cells & ((1 << self.PAGE) - 1))

"""What a launch in the repaired Triton interpreter moves and computes."""

from __future__ import annotations

from typing import Any

import numpy as np


class Counter:
    """Bytes that a launch requests of each argument, and how many of them are different bytes; `tl.dot` flops."""

    def __init__(self, kernel: str, tensors: dict[str, tuple[int, int, int]]) -> None:
        """`tensors`: first byte, end, and size of an element of each argument."""
        self.kernel, self.grid = kernel, [0, 0, 0]
        self.tensor_flops, self.atomics = 0.0, 0
        self.tensors = tensors
        self.bytes = {name: {"read": 0, "written": 0} for name in tensors}
        self.touched = {
            name: {way: np.zeros(-(-(stop - start) // item), bool) for way in ("read", "written")}
            for name, (start, stop, item) in tensors.items()
        }

    def access(self, kind: str, addresses: np.ndarray, size: int) -> None:
        self.atomics += addresses.size if kind == "atomic" else 0
        ways = {"load": ("read",), "store": ("written",), "atomic": ("read", "written")}[kind]
        for name, (start, stop, item) in self.tensors.items():
            mine = addresses[(start <= addresses) & (addresses < stop)]
            if not mine.size:
                continue
            elements = (mine - start) // item
            if size > item:
                elements = (elements[:, None] + np.arange(size // item)).ravel()
            for way in ways:
                self.bytes[name][way] += mine.size * size
                self.touched[name][way][elements] = True
            if mine.size == addresses.size:  # or the same tensor, passed as two arguments, would count twice
                return

    def record(self) -> dict[str, Any]:
        """In the form of the CUDA emulator's records."""
        regions = {}
        for name, (_, _, item) in self.tensors.items():
            unique = {f"unique_{way}": int(marks.sum()) * item for way, marks in self.touched[name].items()}
            if any(unique.values()):
                regions[name] = {**self.bytes[name], **unique}
        return {
            "kernel": self.kernel,
            "grid": self.grid,
            "regions": regions,
            "tensor_flops": self.tensor_flops,
            "atomics": self.atomics,
        }

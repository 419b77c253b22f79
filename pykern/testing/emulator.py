"""The CUDA emulator's settings, and what it counted: kernels of backend "cuda" on CPU tensors."""

import contextlib
import ctypes
import functools
import json
from collections.abc import Iterator
from typing import Any

from pykern import _native

ORDERS = {"random": 0, "ascending": 1, "descending": 2}
_DEFAULTS = {"seed": 0, "order": 0, "multiprocessors": 4, "watchdog_seconds": 10}


@functools.cache
def _library() -> ctypes.CDLL:
    problem = _native.emulator_problem()
    if problem:
        raise RuntimeError(problem)
    library = ctypes.CDLL(str(_native.EMULATOR))
    library.pykern_emulator_set.argtypes = [ctypes.c_char_p, ctypes.c_int64]
    library.pykern_emulator_counters.restype = ctypes.c_char_p
    return library


def _set(values: dict[str, int]) -> None:
    for name, value in values.items():
        if _library().pykern_emulator_set(name.encode(), value):
            raise ValueError(f"the emulator has no setting {name!r}, or it cannot be {value}")


@contextlib.contextmanager
def configured(
    *, seed: int = 0, order: str = "random", multiprocessors: int = 4, watchdog_seconds: int = 10
) -> Iterator[None]:
    """Runs kernels in another order of threads and blocks ("random", "ascending", "descending"), or on another GPU.

    `watchdog_seconds` is the processor time for which a thread may run and meet no other (0: any).
    """
    settings = {"seed": seed, "order": ORDERS[order], "multiprocessors": multiprocessors}
    _set(settings | {"watchdog_seconds": watchdog_seconds})
    try:
        yield
    finally:
        _set(_DEFAULTS)


@contextlib.contextmanager
def counted() -> Iterator[list[dict[str, Any]]]:
    """Yields a list that holds, after the block, a record of each launch in it: bytes by tensor, sectors, conflicts."""
    launches: list[dict[str, Any]] = []
    _library().pykern_emulator_counters(1)
    _set({"counting": 1})
    try:
        yield launches
    finally:
        _set({"counting": 0})
        launches += json.loads(_library().pykern_emulator_counters(1))

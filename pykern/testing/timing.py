"""Clocks and ceilings: how long a call takes, and how long the machine would need at the least."""

from __future__ import annotations

import contextlib
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

# Environment of a benchmark: malloc reuses memory, since on a CPU fresh pages cost more than the kernels do.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296"}

_SLICE = 2e-3  # seconds one measurement lasts at the least; short calls are repeated


def flush_cache(device: torch.device) -> None:
    """Overwrites a GPU's L2 cache, so that every call reads from memory."""
    if device.type == "cuda":
        torch.empty(256 << 20, dtype=torch.int8, device=device).zero_()


def seconds(fn: Callable[[], object], device: torch.device, repeats: int = 1, ahead: float = 1e-3) -> float:
    """The time of one call: by events on a GPU, by the wall clock elsewhere.

    The GPU waits `ahead` seconds first, so that the host has queued all of the call when its first kernel begins: else
    the gaps between launches are timed.
    """
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(repeats):
            fn()
        return (time.perf_counter() - start) / repeats
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush_cache(device)
    torch.cuda._sleep(int(ahead * 2e9))  # cycles, of which there are two billion a second at the most
    start.record()
    for _ in range(repeats):
        fn()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) * 1e-3 / repeats


def interleaved(
    contestants: dict[str, Callable[[], object]], device: torch.device, budget: float = 2.0
) -> dict[str, list[float]]:
    """Times of each contestant, one a round; every round runs all of them in an order of its own."""
    repeats, ahead = {}, {}
    for name, fn in contestants.items():
        fn()
        if device.type == "cuda":
            repeats[name], ahead[name] = 1, max(1e-3, 2 * _queueing(fn, device))
        else:
            once = min(seconds(fn, device) for _ in range(3))
            repeats[name], ahead[name] = max(1, math.ceil(_SLICE / max(once, 1e-9))), 0.0
    times: dict[str, list[float]] = {name: [] for name in contestants}
    order, rng = list(contestants), random.Random(0)
    begin = time.perf_counter()
    while len(times[order[0]]) < 7 or time.perf_counter() - begin < budget * len(order):
        rng.shuffle(order)
        for name in order:
            times[name].append(seconds(contestants[name], device, repeats[name], ahead[name]))
        if len(times[order[0]]) >= 200:
            break
    return times


def _queueing(fn: Callable[[], object], device: torch.device) -> float:
    """The host's time to queue a call."""
    found = []
    for _ in range(3):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        fn()
        found.append(time.perf_counter() - start)
    torch.cuda.synchronize(device)
    return min(found)


@dataclass
class Ratio:
    """How many times faster: the median over rounds, and a 95 % bootstrap interval of that median."""

    median: float
    low: float
    high: float


def ratio(slow: Sequence[float], fast: Sequence[float]) -> Ratio:
    """`slow` over `fast`, round by round, so that a drift of the machine cancels."""
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(400))
    return Ratio(statistics.median(ratios), medians[9], medians[-10])


def copy_bandwidth(nbytes: float, device: torch.device) -> float:
    """Bytes a second, read and written, of a copy that moves about `nbytes` in all: the ceiling at that size."""
    source = torch.randn(max(int(nbytes / 8), 1024), device=device)
    target = torch.empty_like(source)
    times = interleaved({"copy": lambda: target.copy_(source)}, device, budget=0.2)["copy"]
    return 2 * source.numel() * 4 / statistics.median(times)


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Flops a second of torch's own matrix product: the ceiling of arithmetic."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = interleaved({"matmul": lambda: a @ b}, device, budget=0.3)["matmul"]
    return 2 * size**3 / statistics.median(times)


def peak_memory(fn: Callable[[], object], device: torch.device) -> int:
    """The most bytes that torch held at once during a call, beyond what it held before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        fn()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with (
        _silent(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile,
    ):
        result = fn()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    del result
    return peak


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without the lines that torch's profiler writes to standard error when it starts and stops."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def host_seconds(fn: Callable[[], object], calls: int = 2000) -> float:
    """The host's time for one call on a tiny input: the best of several rounds, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(100):
            fn()
        return min(seconds(fn, torch.device("cpu"), calls // 10) for _ in range(20))
    finally:
        torch.set_num_threads(threads)

"""The CUDA emulator itself: it runs what is right as a GPU does, in any order, and says what is wrong and where.

The kernels are in tests/cuda/emulator_language.cu and emulator_memory.cu. What is tested with whole ops (off-by-one
masks, missing barriers, …) is in test_cuda_faults.py, the tensor cores' instructions in test_fragments.py.
"""

import math
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pykern
from pykern import toolchain
from pykern.extension import Library
from pykern.ops import layer_norm
from pykern.testing import emulator

pytestmark = pytest.mark.skipif(toolchain.cuda_include() is None, reason="the emulator needs CUDA's headers")

SOURCES = [Path(__file__).parent / f"cuda/emulator_{part}.cu" for part in ("language", "memory")]
LIBRARY = Library("pykern_test_emulator", *SOURCES)
ORDERS = [{"order": "ascending"}, {"order": "descending"}, *({"seed": seed} for seed in range(4))]

# What the kernels read when they read anything.
X = torch.arange(1.0, 1025.0)
INTS = torch.arange(1024, dtype=torch.int32)
LANES = torch.arange(32)


def run(
    kernel: str,
    x: Tensor,
    y: Tensor,
    threads: int | tuple[int, ...] = 32,
    *,
    blocks: int | tuple[int, ...] = 1,
    shared: int = 0,
    n: int = 0,
    filled: bool = False,
) -> Tensor:
    """y, which kernels may read if it is `filled`."""
    grid, block = ([extent] if isinstance(extent, int) else list(extent) for extent in (blocks, threads))
    LIBRARY.load("cpu").run(x, y, kernel, grid, block, shared, n, filled)
    return y


def floats(*sizes: int) -> Tensor:
    return torch.full(sizes, torch.nan)


def ints(*sizes: int) -> Tensor:
    return torch.full(sizes, -99, dtype=torch.int32)


@pytest.fixture(params=ORDERS, ids=lambda order: "-".join(map(str, *order.items())))
def order(request: pytest.FixtureRequest) -> Iterator[None]:
    with emulator.configured(**request.param):
        yield


# Threads and their meetings.


@pytest.mark.usefixtures("order")
@pytest.mark.parametrize("threads", [32, 256, 1024])
def test_block_sum(threads: int) -> None:
    x = INTS.repeat(9)[: 9 * threads].float()
    assert torch.equal(run("block_sum", x, floats(9), threads, blocks=9), x.view(9, -1).sum(1))


@pytest.mark.usefixtures("order")
@pytest.mark.parametrize("threads, left", [(64, 50), (24, 24), (1, 1), (70, 64)])
def test_threads_that_leave_are_not_waited_for(threads: int, left: int) -> None:
    want = [min(32, left - warp) for warp in range(0, left, 32) for _ in range(min(32, left - warp))]
    assert run("early_exit", INTS, ints(left), threads, n=left).tolist() == want


@pytest.mark.usefixtures("order")
@pytest.mark.parametrize("kernel", ["grid_barrier", "grid_barrier_atomic"])
def test_grid_barrier(kernel: str) -> None:
    y = run(kernel, INTS, torch.zeros(33, dtype=torch.int32), 64, blocks=16, filled=True)
    assert y.tolist() == [16, *range(0, 160, 10), *range(150, -1, -10)]


@pytest.mark.usefixtures("order")
def test_spin_lock() -> None:
    assert run("lock", INTS, torch.zeros(2, dtype=torch.int32), 256, blocks=8, filled=True).tolist() == [0, 64]


@pytest.mark.usefixtures("order")
def test_producer_and_consumer() -> None:
    assert torch.equal(run("producer_consumer", INTS, ints(4, 32), 64), INTS[:128].view(4, 32).flip(1))


@pytest.mark.usefixtures("order")
def test_nested_masks() -> None:
    pairs = [2 * (lane - 1) if lane % 2 else lane + 1 for lane in range(32)]
    # Lane i gives 2 i where it is even, i where it is odd, and gets its neighbour's.
    assert run("nested_masks", INTS, ints(32)).tolist() == pairs[::-1]


@pytest.mark.usefixtures("order")
def test_indices() -> None:
    assert torch.equal(run("indices", INTS, ints(720), (4, 5, 3), blocks=(2, 3, 2)), INTS[:720])


@pytest.mark.usefixtures("order")
def test_shared_memory() -> None:
    y = run("shared_memory", INTS, ints(256), 64, blocks=4, shared=256, n=1000)
    assert torch.equal(y, INTS[:256].view(4, 64).flip(1).reshape(-1) + 1000)


# What lanes tell each other.


def shuffle_source(kind: int, lane: int, b: int, width: int) -> int:
    """The pseudocode of shfl.sync in the PTX ISA, with c as CUDA's __shfl_sync passes it."""
    c = (32 - width) << 8 | (0 if kind == 1 else 31)
    mask = c >> 8
    max_lane = lane & mask | c & 31 & ~mask
    source = [lane & mask | b & 31 & ~mask, lane - b, lane + b, lane ^ b][kind]
    return source if (source >= max_lane if kind == 1 else source <= max_lane) else lane


@pytest.mark.parametrize("n", [0, 1, 5, 16, 31])
@pytest.mark.parametrize("dtype", ["int", "long", "float", "double", "half", "bfloat16", "half2", "bfloat162"])
def test_shuffles(dtype: str, n: int) -> None:
    known = {"int": torch.int32, "long": torch.int64, "double": torch.float64, "half": torch.float16}
    known |= {"float": torch.float32, "bfloat16": torch.bfloat16}
    x = (torch.arange(64).view(32, 2) + 100).to(known[dtype.removesuffix("2") if "2" in dtype else dtype])
    x = x if dtype.endswith("2") else x[:, 0].contiguous()
    y = run(f"shuffles_{dtype}", x, torch.zeros(6, 4, *x.shape, dtype=x.dtype), n=n)
    for w, kind in [(w, kind) for w in range(6) for kind in range(4)]:
        assert torch.equal(y[w, kind], x[[shuffle_source(kind, lane, n, 2**w) for lane in range(32)]]), (w, kind)


MASKS = pytest.mark.parametrize("mask", [0xFFFFFFFF, 0x0000FFFF, 0x55555555, 0x80000001, 0x00000010], ids=hex)


def lanes_of(mask: int) -> list[int]:
    return [lane for lane in range(32) if mask >> lane & 1]


def signed(x: int, bits: int = 32) -> int:
    return (x + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1)


@MASKS
@pytest.mark.parametrize("value", ["none", "some", "all"])
def test_votes(mask: int, value: str) -> None:
    x = {"none": torch.zeros(32), "some": LANES % 3 == 1, "all": torch.full((32,), -4)}[value].int()
    ballot = sum(1 << lane for lane in lanes_of(mask) if x[lane])
    y = run("votes", x, ints(3, 32), n=signed(mask))[:, lanes_of(mask)]
    assert all(y[0] == signed(ballot)) and all(y[1] == (ballot != 0)) and all(y[2] == (ballot == mask))


@MASKS
@pytest.mark.parametrize("distinct", [1, 3, 32])
def test_matches(mask: int, distinct: int) -> None:
    x = (LANES % distinct).int()
    lanes = lanes_of(mask)
    want = [sum(1 << other for other in lanes if x[other] == x[lane]) for lane in lanes]
    y = run("matches", x, ints(3, 32), n=signed(mask))[:, lanes]
    assert y[0].tolist() == list(map(signed, want))
    assert all(y[1] == (signed(mask) if want[0] == mask else 0)) and all(y[2] == (want[0] == mask))


@MASKS
def test_reductions(mask: int) -> None:
    x = torch.randint(-(2**31), 2**31, (32,), generator=torch.Generator().manual_seed(mask)).int()
    values = [x[lane].item() for lane in lanes_of(mask)]
    unsigned = [value % 2**32 for value in values]
    want = [sum(values), min(values), max(values), min(unsigned), max(unsigned), -1, 0, 0]
    for value in values:
        want[5:] = want[5] & value, want[6] | value, want[7] ^ value
    y = run("reductions", x, ints(8, 32), n=signed(mask))
    for lane in lanes_of(mask):
        assert y[:, lane].tolist() == list(map(signed, want))


@pytest.mark.usefixtures("order")
@pytest.mark.parametrize("count", [0, 7, 96])
def test_block_votes(count: int) -> None:
    y = run("block_votes", (INTS[:96] < count).int(), ints(3, 96), 96)
    assert all(y[0] == count) and all(y[1] == (count == 96)) and all(y[2] == (count > 0))


# Arithmetic.


def test_bits() -> None:
    known = [0, 1, -1, 2**31 - 1, -(2**31), 0x12345678, 0x00FF8000]
    x = torch.cat([torch.tensor(known), torch.randint(-(2**31), 2**31, (57,))]).int()

    def permuted(a: int, b: int, selector: int) -> int:
        source = a.to_bytes(4, "little") + b.to_bytes(4, "little")
        picks = [selector >> 4 * i & 15 for i in range(4)]
        chosen = [(255 if source[p & 7] & 128 else 0) if p & 8 else source[p] for p in picks]
        return int.from_bytes(bytes(chosen), "little")

    want = []
    for i in range(64):
        a, b = x[i].item() % 2**32, x[(i + 1) % 64].item() % 2**32
        both, clamped = b << 32 | a, min(i, 32)
        row = [int(f"{a:032b}"[::-1], 2), 32 - a.bit_length(), (a & -a).bit_length(), a.bit_count()]
        row += [permuted(a, b, 0x7531), permuted(a, b, 0xBA98)]
        row += [both << i % 32 >> 32, both >> i % 32, both << clamped >> 32, both >> clamped]
        row += [a * b >> 32, signed(a) * signed(b) >> 32]
        want.append([signed(value % 2**32) for value in row])
    assert run("bits", x, ints(12, 64), 64, n=64).T.tolist() == want


def test_floats_to_integers() -> None:
    x = torch.tensor([2.5, 3.5, -2.5, -2.7, -0.5, 0.49, 1e20, -1e20, 3e9, math.inf, -math.inf, math.nan, 16777217])

    def converted(rounded: Callable[[float], int], low: int, high: int) -> list[int]:
        values = [0 if math.isnan(v) else v if math.isinf(v) else rounded(v) for v in x.tolist()]
        return [int(min(max(value, low), high)) for value in values]

    want = [converted(by, -(2**31), 2**31 - 1) for by in (round, math.trunc, math.floor, math.ceil)]
    want += [converted(round, 0, 2**32 - 1), converted(math.trunc, -(2**63), 2**63 - 1)]
    y = torch.zeros(6, len(x), dtype=torch.int64)
    assert run("integers", x, y, len(x), n=len(x)).tolist() == want


def test_arithmetic() -> None:
    a = torch.tensor([1.0, math.nan, -2.5, 0.25, math.inf, -math.inf, math.nan, math.nan, 3.0, 1 + 2**-12, 1 + 2**-23])
    b = a.roll(-1)
    wide = a.double()
    want = [torch.fmin(a, b), torch.fmax(a, b), a.nan_to_num(0).clamp(0, 1), (wide * b.double() - wide).float()]
    want += [(1 / (a * a).double().sqrt()).float(), -a]
    y = run("arithmetic", a, floats(6, len(a)), len(a), n=len(a))
    torch.testing.assert_close(y, torch.stack(want), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(y.signbit()[5], ~a.signbit())


def all_values(dtype: torch.dtype) -> Tensor:
    integers = {1: torch.uint8, 2: torch.int16}[dtype.itemsize]
    return torch.arange(2 ** (8 * dtype.itemsize)).to(integers).view(dtype)


NARROW = [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_conversions(dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    narrow = all_values(dtype)
    wide = run(f"from_{name}", narrow, floats(len(narrow)), 256, blocks=4, n=len(narrow))
    torch.testing.assert_close(wide, narrow.float(), rtol=0, atol=0, equal_nan=True)

    # Each value, the points halfway to the next one, and what is just beside them.
    values = wide[wide.isfinite()].unique()
    halfway = (values[1:].double() + values[:-1]).div(2).float()
    x = torch.cat([wide, halfway, *(halfway.nextafter(torch.tensor(to)) for to in (-math.inf, math.inf))])
    x = torch.cat([x, 1.1 * values[[0, -1]], torch.tensor([math.inf, -math.inf, math.nan, 1e-40, -1e-40])])
    want = x
    if dtype.itemsize == 1:  # CUDA's constructors saturate
        want = torch.where(x.isnan(), x, x.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max))
    y = run(f"to_{name}", x, torch.zeros(len(x), dtype=dtype), 256, blocks=4, n=len(x))
    torch.testing.assert_close(y.float(), want.to(dtype).float(), rtol=0, atol=0, equal_nan=True)


# Memory.


@pytest.mark.usefixtures("order")
def test_integer_atomics() -> None:
    y = torch.tensor([5, 0, 0, -1, 0, 0, 0, 200], dtype=torch.int32)
    run("integer_atomics", INTS, y, 64, blocks=4, filled=True)
    # 256 steps through 0 … 10; the first step down is from 200, which is past its limit, to 10.
    assert y.tolist() == [5 - 256, -255, 255, signed(2**31), -1, 0, 256 % 11, (10 - 255) % 11]


@pytest.mark.usefixtures("order")
def test_tickets() -> None:
    y = run("tickets", INTS, torch.zeros(130, dtype=torch.int32), 64, blocks=2, filled=True)
    assert y[:2].tolist() == [256, 128] and y[2:].sort().values.tolist() == list(range(128))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.float16, torch.bfloat16], ids=str)
def test_atomic_sums(dtype: torch.dtype) -> None:
    x = (torch.arange(128) % 3).to(dtype)
    y = run("sum_" + str(dtype).removeprefix("torch."), x, torch.ones(1, dtype=dtype), 64, blocks=2, filled=True)
    assert y.item() == 1 + x.sum().item()


def test_atomic_sum_of_pairs() -> None:
    x = (torch.arange(128) % 3).half().view(64, 2)
    assert torch.equal(run("sum_half2", x, torch.zeros(2).half(), 64, filled=True), x.sum(0))


def test_vectors() -> None:
    y = run("vectors", X, floats(256, 4), 64, blocks=4)
    want = X.view(256, 4) * 2
    want[:, 3] = X.view(256, 4)[:, 3] + 1 + torch.arange(256) % 4
    assert torch.equal(y, want)


def test_a_thread_may_follow_a_pointer_to_its_own_variable() -> None:
    assert run("local_memory", X, torch.zeros(2, dtype=torch.int64), 64, n=0, filled=True)[1] == 1


def as_float(x: int) -> Tensor:
    return torch.tensor([x], dtype=torch.int32).view(torch.float32)


# Kernels near to a fault that have none: kernel, how it is run, y before if it is read, y after.
RIGHT: dict[str, tuple[dict[str, Any], Tensor | None, Tensor]] = {
    "adds": ({"threads": 64}, torch.ones(64), X[:64] + 1),
    "atomic_adds": ({"threads": 4, "blocks": 2}, torch.ones(1), torch.tensor([21.0])),
    "copy16": ({"threads": 128, "n": 500}, None, X[:500]),
    "past_dynamic": ({"threads": 128, "shared": 512}, None, X[:128]),
    "static_beside_dynamic": ({"threads": 128, "shared": 200 * 1024}, None, 2 * X[:128]),
    "halves": ({"threads": 128}, None, X[:128].view(-1, 2).flip(1).reshape(-1) + 1),
    "write_after_read_right": ({"threads": 64, "n": 5}, None, torch.ones(64)),
    "bytes_and_vectors_right": ({"threads": 8}, None, torch.zeros(8)),
    "warp_ring_right": ({}, None, X[:32].roll(-4)),
    "named_barrier_right": ({"threads": 128}, None, X[:64].flip(0)),
    "partial_warp": ({"threads": 40}, None, X[:40].flip(0)),
    "same_output": ({"threads": 64}, None, X[:64]),
    "count_right": ({"threads": 64, "blocks": 9}, torch.zeros(1), as_float(9)),
    "last_right": (
        {"threads": 64, "blocks": 8},
        torch.zeros(10),
        torch.cat([as_float(8), X[:16].sum(0, keepdim=True), X[:16].view(8, 2).sum(1)]),
    ),
    "flag_right": ({"threads": 1, "blocks": 2}, torch.zeros(3), torch.cat([as_float(1), X[:1], X[:1]])),
    "async_right": ({"threads": 128}, None, X[:512].roll(-7)[::4]),
}


@pytest.mark.usefixtures("order")
@pytest.mark.parametrize("kernel", RIGHT)
def test_no_false_alarm(kernel: str) -> None:
    how, before, after = RIGHT[kernel]
    y = floats(len(after)) if before is None else before.clone()
    assert torch.equal(run(kernel, X, y, **how, filled=before is not None), after)


# Faults.


def marked_lines(kernel: str) -> set[str]:
    """FILE:LINE of the lines that say `// fault: kernel`."""
    return {
        f"{source.name}:{number}"
        for source in SOURCES
        for number, line in enumerate(source.read_text().splitlines(), 1)
        if re.search(rf"// fault:.*\b{kernel}\b", line)
    }


def check_fault(kernel: str, message: str, how: dict[str, Any], x: Tensor, y: Tensor) -> None:
    with pytest.raises(RuntimeError, match=message) as caught:
        run(kernel, x, y, **how)
    said = str(caught.value)
    lines = marked_lines(kernel)
    named = set(re.findall(r"emulator_\w+\.cu:\d+", said))
    assert named <= lines and bool(named) == bool(lines), said
    assert re.search(r"\n  kernel .*::\w+(<.*>)?\(", said), said


# Kernel: how it is run, what the message says.
FAULTS_OF_THREADS: dict[str, tuple[dict[str, Any], str]] = {
    "deadlock": (
        {"threads": 96},
        r"deadlock: no thread can go on\n  block \(0, 0, 0\):\n(.*\n)*"
        r"    warp 0 lanes 0-15: __syncwarp with mask 0x0001ffff at (.*\n)*"
        r"    warp 0 lanes 16-31, warp 1, warp 2 lanes 16-31: __syncthreads at ",
    ),
    "crossed_barriers": (
        {"threads": 64},
        r"deadlock(.*\n)*    warp 0: named_barrier_sync of barrier 1 .*\n    warp 1: named_barrier_sync of barrier 2",
    ),
    "polls_for_ever": (
        {"threads": 64},
        r"poll memory that nothing changes any more\n(.*\n)*    warps 0-1: polls memory",
    ),
    "barrier_kinds": ({"threads": 64}, "divergent barrier: __syncthreads_(or|and) here.* in __syncthreads_(or|and) at"),
    "own_lane": ({}, r"__shfl_xor_sync: the mask 0x0000ffff lacks the calling lane\n.*\n.* lane (1[6-9]|2\d|3[01]),"),
    "own_lane_votes": ({}, "__any_sync: the mask 0x0000ffff lacks the calling lane"),
    "own_lane_syncs": ({}, "__syncwarp: the mask 0x0000ffff lacks the calling lane"),
    "source_outside": ({}, r"__shfl_down_sync: reads lane 16, which is not in the mask 0x0000ffff\n.*\n.* lane 8,"),
    "source_exited": ({}, r"reads lane 2\d, which has exited\n.*\n.* lane ([4-9]|1[0-5]),"),
    "source_missing": ({"threads": 24}, r"reads lane (2[4-9]|3[01]), which the block does not have\n.*\n.* lane"),
    "different_calls": (
        {},
        "in different calls: __a(ny|ll)_sync with mask 0xffffffff here, and lane .* in __a(ny|ll)_sync",
    ),
    "different_masks": ({}, "in different calls: __any_sync with mask 0xffff|deadlock: no thread"),
    "wrong_width": ({}, "__shfl_sync: width is 12, not a power of two up to 32"),
    "barrier_counts": ({"threads": 96}, r"barrier 3 for (64|96) threads here, for (64|96) at"),
    "barrier_short": (
        {"threads": 64},
        r"deadlock(.*\n)*    warp 0: named_barrier_sync of barrier 3 (.*\n)*    warp 1: exited",
    ),
    "barrier_number": ({}, "named_barrier_sync: barrier 16; there are 0 to 15"),
    "barrier_threads": ({}, "named_barrier_sync: 40 threads, not a multiple of 32"),
    "asserts": (
        {"threads": (8, 8), "blocks": (1, 2), "n": 5},
        r"assert\(static_cast<int>\(threadIdx.x\) != n\) failed\n.*\n  thread \(5, \d, 0\), .* of block \(0, [01], 0\)",
    ),
    "traps": ({"n": 3}, r"__trap\(\)\n.*\n  thread \(3, 0, 0\), which is warp 0 lane 3, of block \(0, 0, 0\)"),
    "throws": ({"n": 4}, r"exception in a kernel: no luck\n(.*\n)*  thread \(4, 0, 0\)"),
    "sum_overflows": ({"n": 2**31 - 1}, r"integer overflow: 2147483647 \+ 1 does not fit 'int'"),
    "difference_overflows": ({"n": 2**31 - 1}, "integer overflow: -2 - 2147483647 does not fit 'int'"),
    "product_overflows": ({"n": 100000}, r"integer overflow: 100000 \* 100000 does not fit 'int'"),
    "negation_overflows": ({"n": -(2**31)}, r"integer overflow: -\(-2147483648\) does not fit 'int'"),
    "shift_too_far": ({"n": 32}, "shift of 1, of type 'int', by 32"),
    "divides": ({}, "division of 5 by 0"),
    "quotient_overflows": ({"n": -1}, "division of -2147483648 by -1"),
    "index_outside": ({"n": 5}, r"index 3[2-6] is outside 'int \[32\]'"),
}


@pytest.mark.usefixtures("order")
@pytest.mark.parametrize("kernel", FAULTS_OF_THREADS)
def test_faults_of_threads(kernel: str) -> None:
    how, message = FAULTS_OF_THREADS[kernel]
    check_fault(kernel, message, {"filled": True, **how}, INTS, torch.zeros(128, dtype=torch.int32))


def test_endless_loop() -> None:
    with emulator.configured(watchdog_seconds=1):
        message = r"an endless loop\? (.*\n)*  thread \(33, 0, 0\)"
        check_fault("endless", message, {"threads": 64, "n": 33}, INTS, ints(64))


# Kernel: how it is run, the message, the sizes of x and y. A race is one whichever of the two comes first.
RACE = r"race: (read|write|atomic) of {} at .* by thread \d+ of block \d+ and (read|write|atomic) at .* in no order"
IN_SHARED = RACE.format(r"byte \d+ of {} in shared memory").format
FAULTS_OF_MEMORY: dict[str, tuple[dict[str, Any], str, int, int]] = {
    "copy16": ({"n": 128}, r"read of 16 bytes that ends 8 bytes past the end of x \(504 bytes\)", 126, 128),
    "before_start": ({}, "read of 4 bytes that begins 4 bytes before the start of x", 128, 128),
    "null": ({"n": 4}, "out of bounds: read of 4 bytes through a null pointer", 128, 128),
    "host_variable": ({}, "read of 4 bytes in no tensor that the launcher named", 128, 128),
    "adds": ({}, r"uninitialised: read of 4 bytes at y\[\d+\], which nothing has written", 128, 128),
    "atomic_adds": ({}, r"uninitialised: atomic of 4 bytes at y\[0\]", 128, 1),
    "atomic_on_input": ({}, r"atomic on its input x\[0\]", 128, 1),
    "misaligned_atomic": (
        {"filled": True},
        r"misaligned: atomic of 8 bytes at y\[1\], 4 bytes past a multiple of 8",
        128,
        4,
    ),
    "local_memory": (
        {"n": 3, "filled": True},
        "read of 4 bytes in the local memory of another thread, 0 of block 0",
        128,
        4,
    ),
    "past_tile": ({"threads": 128}, r"begins 0 bytes past the end of tile in shared memory \(512 bytes\)", 128, 128),
    "past_dynamic": ({"shared": 128, "n": 4}, r"past the end of dynamic shared memory \(128 bytes\)", 128, 128),
    "static_limit": ({}, "with second there are 49156 bytes in static variables; a kernel may have 49152", 128, 128),
    "static_beside_dynamic": ({"shared": 224 * 1024}, "with tile the block needs more than 232448 bytes", 128, 128),
    "write_after_read": ({"threads": 64, "n": 5}, IN_SHARED("box"), 128, 128),
    "bytes_and_vectors": ({"threads": 8}, IN_SHARED("tile"), 128, 128),
    "warp_ring": ({}, IN_SHARED("ring"), 128, 128),
    "named_barrier_late": ({"threads": 128}, IN_SHARED("box"), 128, 64),
    "named_barrier_twice": ({"threads": 128}, IN_SHARED("box"), 128, 64),
    "same_output": ({"blocks": 2}, RACE.format(r"y\[\d+\]"), 128, 128),
    "count_plainly": ({"blocks": 4, "filled": True}, RACE.format(r"y\[0\]"), 128, 1),
    "look_at_counter": ({"blocks": 2, "filled": True}, RACE.format(r"y\[0\]"), 128, 128),
    "last_no_release": ({"threads": 64, "blocks": 8, "filled": True}, RACE.format(r"y\[\d\]"), 128, 10),
    "last_no_acquire": ({"threads": 64, "blocks": 8, "filled": True}, RACE.format(r"y\[\d\]"), 128, 10),
    "flag_no_fence": ({"threads": 1, "blocks": 2, "filled": True}, RACE.format(r"y\[1\]"), 128, 4),
    "async_offset": ({"threads": 128, "n": 1}, "misaligned: read of 16 bytes at x", 1024, 128),
    "async_uninitialised": ({"threads": 128}, r"uninitialised: read of 16 bytes at y\[", 512, 512),
    "async_no_barrier": ({"threads": 128}, IN_SHARED("tile"), 512, 128),
    "async_again": ({"threads": 128}, r"cp.async: reads byte \d+ of tile in shared memory before the copy", 512, 128),
    "async_overwritten": ({"threads": 128, "filled": True}, r"race: the source of .*, y\[\d+\], was written", 512, 512),
    "async_to_global": ({"threads": 128}, "cp.async: copies to what is not shared memory", 512, 512),
    "async_from_shared": ({"threads": 128}, "cp.async: copies from what is not global memory", 512, 512),
    "async_under_write": ({"threads": 1}, "cp.async: writes byte 0 of tile in shared memory before the copy", 512, 1),
}


@pytest.mark.usefixtures("order")
@pytest.mark.parametrize("kernel", FAULTS_OF_MEMORY)
def test_faults_of_memory(kernel: str) -> None:
    how, message, x, y = FAULTS_OF_MEMORY[kernel]
    check_fault(kernel, message, how, X[:x].clone(), torch.zeros(y))


@pytest.mark.parametrize(
    "how, message",
    [
        *(
            ({"threads": threads}, r"a block is \(\d+, \d+, \d+\) threads")
            for threads in (0, 1025, (1, 1, 65), (32, 33))
        ),
        *(({"blocks": blocks}, r"the grid is \(\d+, \d+, \d+\) blocks") for blocks in (0, (1, 65536), (1, 1, 65536))),
        ({"shared": 227 * 1024 + 1}, "232449 bytes of dynamic shared memory, at most 232448 can be"),
    ],
)
def test_invalid_configurations(how: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=f"CUDA emulator: invalid configuration: {message}"):
        run("indices", INTS, ints(1), **how)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_faults_leave_nothing_behind() -> None:
    faults = ["own_lane", "deadlock", "throws", "barrier_short"]

    def fail(times: int) -> None:
        for i in range(times):
            with pytest.raises(RuntimeError, match="CUDA emulator"):
                run(faults[i % len(faults)], INTS, ints(1024), 1024)
        assert torch.equal(run("block_sum", X, floats(1), 1024), X.sum()[None])

    fail(len(faults))
    before = resident_bytes()
    fail(200)
    assert resident_bytes() - before < 20e6


# What it costs, on the GPU and here.

# Kernel: threads, x's and y's sizes; bytes read of x, as often as they are and once each; requests and sectors of
# reads and of writes; wavefronts of shared memory, as they are and at best; barriers.
COUNTED: dict[str, tuple[int, int, int, list[int], list[int], list[int]]] = {
    "copy16": (128, 512, 512, [2048, 2048], [4, 4, 64, 64], [0, 0, 0]),
    "stride2": (64, 128, 64, [256, 256], [2, 2, 16, 8], [0, 0, 0]),
    "broadcast": (64, 128, 64, [256, 4], [2, 2, 2, 8], [0, 0, 0]),
    "transpose": (32, 1024, 1024, [4096, 4096], [32, 32, 128, 128], [32 + 32 * 32, 64, 1]),
    "transpose_padded": (32, 1024, 1024, [4096, 4096], [32, 32, 128, 128], [64, 64, 1]),
    "shared16": (32, 128, 128, [512, 512], [1, 1, 16, 16], [8, 8, 0]),
    "shared8": (32, 32, 32, [128, 128], [1, 1, 4, 4], [8, 4, 0]),
    "diverges": (32, 128, 32, [320, 320], [4, 1, 16, 4], [0, 0, 0]),
}


@pytest.mark.usefixtures("order")
@pytest.mark.parametrize("kernel", COUNTED)
def test_counters(kernel: str) -> None:
    threads, x, y, read, requests, shared = COUNTED[kernel]
    with emulator.counted() as launches:
        run(kernel, X[:x], floats(y), threads, n=x)
    (launch,) = launches
    assert kernel.removesuffix("_padded") in launch["kernel"] and launch["block"] == [threads, 1, 1]
    of_x, of_y = launch["regions"]["x"], launch["regions"]["y"]
    assert [of_x["read"], of_x["unique_read"], of_x["written"]] == [*read, 0]
    assert [of_y["read"], of_y["written"], of_y["unique_written"]] == [0, 4 * y, 4 * y]
    assert [launch[f"{way}_{what}"] for what in ("requests", "sectors") for way in ("read", "write")] == requests
    assert [launch[name] for name in ("shared_wavefronts", "shared_wavefronts_ideal", "barriers")] == shared


def test_only_what_is_in_the_block_is_counted() -> None:
    def copy(n: int) -> None:
        run("copy16", X, floats(512), 128, n=n)

    copy(4)
    with emulator.counted() as launches:
        copy(8)
        with emulator.configured(seed=1):
            copy(12)
        copy(16)
        with pytest.raises(RuntimeError):
            run("traps", INTS, ints(1))
    copy(20)
    assert [launch["regions"]["x"]["read"] for launch in launches] == [32, 48, 64]
    assert emulator._library().pykern_emulator_counters(0) == b"[]"


def test_nothing_is_counted_unless_asked() -> None:
    code = "from test_emulator import *; run('copy16', X, floats(4), 1, n=4)"
    code += "; assert emulator._library().pykern_emulator_counters(0) == b'[]'"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=True)


def test_what_is_not_counted_is_quicker() -> None:
    reads = 2000  # so many that the launch itself is a small part
    x = torch.ones(reads * 128)

    def cost() -> float:
        start = time.process_time()
        run("reads_often", x, floats(128), 128, n=reads)
        return time.process_time() - start

    ratios = []
    for _ in range(15):
        uncounted = cost()
        with emulator.counted():
            ratios.append(cost() / uncounted)
    assert statistics.median(ratios) > 1.1


def test_a_norm_is_quick() -> None:
    x, weight, bias = torch.randn(1024, 1024).bfloat16(), torch.ones(1024).bfloat16(), torch.zeros(1024).bfloat16()
    with pykern.backend("cuda"):
        layer_norm(x[:1], (1024,), weight, bias)
        start = time.process_time()
        layer_norm(x, (1024,), weight, bias)
        assert time.process_time() - start < 1

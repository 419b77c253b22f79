"""The repaired Triton interpreter: each test of `TestFaults` fails on the stock one, and a test here sees to it."""

import os
import re
import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl
from interpreted import INTERPRETED, in_child

from pykern.testing import interpreter
from pykern.testing.interpreter_memory import read_only

STOCK = os.environ.get("PYKERN_STOCK_INTERPRETER") == "1"
if INTERPRETED and not STOCK:
    interpreter.install()


class TestInProcessesOfTheirOwn:
    __test__ = not INTERPRETED

    def test_repaired(self):
        result = in_child(__file__)
        assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]

    def test_stock_fails_every_one(self):
        summary = in_child(f"{__file__}::TestFaults", PYKERN_STOCK_INTERPRETER="1").stdout.splitlines()[-1]
        assert re.search(r"\d+ failed", summary) and "passed" not in summary and "error" not in summary, summary

    def test_none_of_it_is_there_in_normal_use(self):
        code = (
            "import sys, torch, pykern.ops, pykern.testing.cases, pykern.testing.commands, pykern.kernels.norm;"
            "pykern.ops.layer_norm(torch.ones(2, 8), (8,)); print(*(m for m in sys.modules if 'interpreter' in m))"
        )
        loaded = subprocess.check_output([sys.executable, "-c", code], text=True).split()
        assert not {m for m in loaded if m.startswith(("pykern", "triton.runtime"))}

    def test_install_names_the_variable(self):
        with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
            interpreter.install()


@triton.jit
def cast_kernel(x, y, N, ROUNDING: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + i, mask=i < N)
    tl.store(y + i, values.to(y.dtype.element_ty, fp_downcast_rounding=ROUNDING), mask=i < N)


@triton.jit
def arithmetic_kernel(x, y, out, flags, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a, b = tl.load(x + i), tl.load(y + i)
    tl.store(out + i, a + b)
    tl.store(out + BLOCK + i, a * b - 0.3)
    tl.store(out + 2 * BLOCK + i, a / b)
    tl.store(out + 3 * BLOCK + i, tl.maximum(a, b))
    tl.store(out + 4 * BLOCK + i, tl.where(a < b, a, -b))
    tl.store(flags + i, (a <= b).to(tl.int8))
    tl.store(flags + BLOCK + i, a.to(tl.int8))


@triton.jit
def _add(a, b):
    return a + b


@triton.jit
def reduce_kernel(x, out, M: tl.constexpr, N: tl.constexpr):
    values = tl.load(x + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :])
    tl.store(out + tl.arange(0, M), tl.sum(values, 1))
    tl.store(out + M + tl.arange(0, M), tl.max(values, 1))
    tl.store(
        out + 2 * M + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :], tl.associative_scan(values, 1, _add)
    )


@triton.jit
def dot_kernel(a, b, c, PRECISION: tl.constexpr, S: tl.constexpr):
    tile = tl.arange(0, S)[:, None] * S + tl.arange(0, S)[None, :]
    tl.store(c + tile, tl.dot(tl.load(a + tile), tl.load(b + tile), input_precision=PRECISION))


@triton.jit
def double_kernel(x, y):
    i = tl.arange(0, 16)
    value = tl.load(x + i)
    tl.store(y + i, value + value)


@triton.jit
def atomic_kernel(x, total, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.atomic_add(total + i % 2, tl.load(x + tl.program_id(0) * BLOCK + i))


@triton.jit
def assert_kernel(x, y):
    i = tl.arange(0, 16)
    value = tl.load(x + i)
    tl.device_assert(value >= 0, "negative value")
    tl.store(y + i, value)


@triton.jit
def overflow_kernel(y, stride):
    tl.store(y, (tl.program_id(0) + 3) * stride)


@triton.jit
def copy_kernel(x, y, n_read, n_written, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n_read, other=0.0), mask=i < n_written)


@triton.jit
def before_kernel(x, y):
    tl.store(y, tl.load(x - 1))


@triton.jit
def write_write_kernel(y):
    tl.store(y + tl.program_id(0) // 2, tl.program_id(0) // 2)


@triton.jit
def read_write_kernel(y, SHIFT: tl.constexpr):
    i = tl.program_id(0) + 1
    tl.store(y + i, tl.load(y + i + SHIFT) + 1)


@triton.jit
def relaxed_kernel(y):
    tl.atomic_add(y, 1, sem="relaxed")
    tl.store(y + 1 + tl.program_id(0), tl.load(y))


@triton.jit
def lanes_kernel(y):
    i = tl.arange(0, 16)
    tl.store(y + i // 2, i)


@triton.jit
def locked_kernel(lock, y, n):
    while tl.atomic_cas(lock, 0, 1) == 1:
        pass
    tl.store(y, tl.load(y) + tl.program_id(0))
    tl.atomic_xchg(lock, 0)
    tl.store(y + 1 + tl.program_id(0), n)


@triton.jit
def hint_kernel(x, y, start, step, DIVISOR: tl.constexpr, GROUP: tl.constexpr, CONSTANT: tl.constexpr):
    i = tl.arange(0, 16)
    offset = tl.max_contiguous(tl.multiple_of(start + i * step, DIVISOR), GROUP)
    tl.store(y + offset, tl.load(x + offset) + tl.max_constancy(i // 4, CONSTANT))


@triton.autotune([triton.Config({"VALUE": 7}), triton.Config({"VALUE": 8}, num_warps=8)], key=["n"])
@triton.jit
def autotuned_kernel(y, n, VALUE: tl.constexpr):
    tl.store(y + tl.arange(0, 1), VALUE + n)


@triton.jit
def order_kernel(ticket, order):
    tl.store(order + tl.atomic_add(ticket, 1), tl.program_id(0) * tl.num_programs(1) + tl.program_id(1))


@triton.jit
def waiting_kernel(ready, y):
    if tl.program_id(0) == 1:
        seen = tl.atomic_add(ready, 0)
        for _ in range(2000):  # not without end, so that the stock interpreter comes through
            if seen == 0:
                seen = tl.atomic_add(ready, 0)
        tl.store(y, seen)
    if tl.program_id(0) == 2:
        tl.atomic_xchg(ready, 1)


@triton.jit
def traffic_kernel(x, weight, y, total, N: tl.constexpr):
    row = tl.program_id(0) * N + tl.arange(0, N)
    value = tl.load(x + row, mask=tl.arange(0, N) < N - 1, other=0.0) * tl.load(weight + tl.arange(0, N))
    tl.store(y + row, value)
    tl.atomic_add(total, 1)


@triton.jit
def _welford(mean_a, m2_a, n_a, mean_b, m2_b, n_b):
    n = n_a + n_b
    delta = mean_b - mean_a
    return mean_a + delta * (n_b / n), m2_a + m2_b + delta * delta * (n_a * n_b / n), n


@triton.jit
def welford_kernel(x, out, M: tl.constexpr, N: tl.constexpr):
    values = tl.load(x + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :])
    mean, m2, n = tl.reduce((values, values * 0.0, values * 0.0 + 1.0), 1, _welford)
    tl.store(out + tl.arange(0, M), mean)
    tl.store(out + M + tl.arange(0, M), m2 / n)


@triton.jit
def _linear(a, b, c, d):
    return a * c, b * c + d


@triton.jit
def recurrence_kernel(a, b, out, N: tl.constexpr, REVERSE: tl.constexpr):
    i = tl.arange(0, N)
    _, state = tl.associative_scan((tl.load(a + i), tl.load(b + i)), 0, _linear, reverse=REVERSE)
    tl.store(out + i, state)


@triton.jit
def random_kernel(out, seed):
    i = tl.arange(0, 64)
    tl.store(out + i, tl.rand(seed, i))


def random_bits(count: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    return (
        torch.randint(
            -(2 ** (8 * dtype.itemsize - 1)),
            2 ** (8 * dtype.itemsize - 1) - 1,
            (count,),
            generator=generator,
            dtype=torch.int64,
        )
        .to(integer)
        .view(dtype)
    )


def cast(x: torch.Tensor, dtype: torch.dtype, rounding: str | None = None) -> torch.Tensor:
    y = torch.empty(x.shape, dtype=dtype)
    cast_kernel[(triton.cdiv(len(x), 1024),)](x, y, len(x), ROUNDING=rounding, BLOCK=1024)
    return y


def nearest_even(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The element of `dtype` nearest to fp64 x, of two the one with the even code; by looking at all of them."""
    codes = torch.arange(2 ** (8 * dtype.itemsize), dtype=torch.int32).to(
        torch.int16 if dtype.itemsize == 2 else torch.uint8
    )
    values = codes.view(dtype).double()
    codes, values = codes[values.isfinite()], values[values.isfinite()]
    order = values.argsort(stable=True)
    codes, values = codes[order], values[order]
    right = torch.searchsorted(values, x.double()).clamp(1, len(values) - 1)
    left = right - 1
    down, up = x.double() - values[left], values[right] - x.double()
    even = (codes.int() & 1) == 0
    return values[torch.where((up < down) | ((up == down) & even[right]), right, left)]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.double().nan_to_num(nan=1e300), b.double().nan_to_num(nan=1e300))


class TestFaults:
    __test__ = INTERPRETED

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
    def test_to_bf16_rounds_to_nearest_even(self, dtype):
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
        assert same(cast(every, torch.float32), every.float()) and same(cast(every.float(), torch.bfloat16), every)
        x = random_bits(20000, dtype)
        if dtype == torch.float32:  # ties and their neighbours
            middle = (every[every.isfinite()].float().view(torch.int32) | 0x8000).view(torch.float32)
            x = torch.cat([x, middle, torch.nextafter(middle, middle * 0), torch.nextafter(middle, middle * 4)])
        if dtype == torch.float64:  # all these are just above a tie, which fp32 can't tell
            x = torch.cat(
                [x, 1 + 2.0**-8 + 2.0 ** -torch.arange(30.0, 50.0, dtype=dtype), torch.tensor([3.4e38, -1e300])]
            )
        got, limit = cast(x, torch.bfloat16), torch.finfo(torch.bfloat16).max
        overflows = x.abs().double() >= limit + 2.0**119  # half a step further
        assert torch.equal(got.isinf(), overflows | x.isinf()) and torch.equal(got.isnan(), x.isnan())
        finite = x.isfinite() & ~overflows
        assert same(got[finite], nearest_even(x[finite], torch.bfloat16))

    def test_bf16_rounds_towards_zero_when_told(self):
        x = random_bits(4096, torch.float32)
        expected = (x.view(torch.int32) & -65536).view(torch.float32).bfloat16()
        assert same(cast(x, torch.bfloat16, "rtz").where(~x.isnan(), 0), expected.where(~x.isnan(), 0))
        assert same(cast(x, torch.bfloat16).isnan(), x.isnan()) and same(
            cast(1 - x.sigmoid() * 1e-3, torch.bfloat16), (1 - x.sigmoid() * 1e-3).bfloat16()
        )

    def test_bf16_arithmetic(self):
        a, b = torch.randn(2, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
        out, flags = torch.empty(5, 256, dtype=torch.bfloat16), torch.empty(2, 256, dtype=torch.int8)
        arithmetic_kernel[(1,)](a, b, out, flags, BLOCK=256)
        expected = [
            a + b,
            a * b - torch.tensor(0.3, dtype=torch.bfloat16),
            a / b,
            torch.maximum(a, b),
            torch.where(a < b, a, -b),
        ]
        assert same(out, torch.stack(expected)) and torch.equal(
            flags, torch.stack([(a <= b).to(torch.int8), a.to(torch.int8)])
        )

    def test_bf16_reductions_and_scans(self):
        x = torch.randn(8, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
        out = torch.empty(8 * 2 + 8 * 64, dtype=torch.bfloat16)
        reduce_kernel[(1,)](x, out, M=8, N=64)
        tree, running = x, [x[:, 0]]
        while tree.shape[1] > 1:
            tree = tree[:, 0::2] + tree[:, 1::2]
        for i in range(1, 64):
            running.append(running[-1] + x[:, i])
        assert same(out[:8], tree[:, 0]) and same(out[8:16], x.amax(1))
        assert same(out[16:].view(8, 64), torch.stack(running, 1))

    def test_bf16_dot(self):
        a, b = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(3)).bfloat16()
        out = torch.empty(64, 64)
        dot_kernel[(1,)](a, b, out, PRECISION=None, S=64)
        exact = a.double() @ b.double()
        assert (out - exact).norm() / exact.norm() < 1e-6

    def test_tf32_dot_drops_what_tensor_cores_drop(self):
        a, b = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(4))
        out = torch.empty(64, 64)
        dot_kernel[(1,)](a, b, out, PRECISION="tf32", S=64)
        short = [(x.view(torch.int32) & -8192).view(torch.float32).double() for x in (a, b)]
        expected = short[0] @ short[1]
        assert (out - expected).norm() / expected.norm() < 1e-6

    @pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
    def test_to_fp8_rounds_to_nearest_even_and_saturates(self, dtype):
        x = torch.cat(
            [
                torch.randn(4096) * 10.0 ** torch.linspace(-8, 6, 4096),
                torch.tensor([1.999, -1.999, 0.0, 1e30, -1e30, float("inf")]),
            ]
        )
        limit = torch.finfo(dtype).max
        got = cast(x, dtype)
        assert (
            same(got, nearest_even(x.clamp(-limit, limit), dtype)) and cast(x[:1] * float("nan"), dtype).isnan().all()
        )

    def test_fp8_arithmetic_raises(self):
        with pytest.raises(Exception, match="arithmetic in fp8e5: the compiler refuses"):
            double_kernel[(1,)](torch.ones(16).to(torch.float8_e5m2), torch.ones(16).to(torch.float8_e5m2))

    def test_bf16_atomic_add(self):
        x, total = torch.arange(32).bfloat16(), torch.zeros(2, dtype=torch.bfloat16)
        atomic_kernel[(2,)](x, total, BLOCK=16)
        assert total.tolist() == [240.0, 256.0]

    def test_device_assert_fires(self):
        with pytest.raises(Exception, match="negative value"):
            assert_kernel[(1,)](torch.arange(-1.0, 15.0), torch.empty(16))

    def test_int32_overflow_raises(self):
        with pytest.raises(Exception, match="overflow"):
            overflow_kernel[(1,)](torch.empty(1, dtype=torch.int32), 2**30)

    def test_load_out_of_bounds(self):
        backing = torch.zeros(128)
        with pytest.raises(
            Exception,
            match=r"out-of-bounds load by program \(0, 0, 0\): 16 of 64 lanes, the first 4 bytes behind the end of x",
        ):
            copy_kernel[(1,)](backing[:48], backing[64:], 64, 48, BLOCK=64)

    def test_store_out_of_bounds(self):
        backing = torch.zeros(128)
        with pytest.raises(
            Exception,
            match=r"out-of-bounds store by program \(0, 0, 0\): 3 of 64 lanes, the first 4 bytes behind the end of y",
        ):
            copy_kernel[(1,)](backing[64:], backing[:61], 64, 64, BLOCK=64)

    def test_load_before_the_start(self):
        with pytest.raises(Exception, match="1 of 1 lanes, the first 4 bytes before the start of x"):
            before_kernel[(1,)](torch.zeros(8)[4:], torch.zeros(1))

    def test_two_programs_write(self):
        with pytest.raises(Exception, match=r"race: store of y by program \(\d, 0, 0\), where program number \d wrote"):
            write_write_kernel[(4,)](torch.zeros(2, dtype=torch.int32))

    @pytest.mark.parametrize("shift", [-1, 1])
    def test_one_program_reads_what_another_writes(self, shift):
        with pytest.raises(Exception, match=r"race: (load of y .* wrote|store of y .* read)"):
            read_write_kernel[(4,)](torch.zeros(6), SHIFT=shift)

    def test_plain_read_of_what_another_updates(self):
        with pytest.raises(Exception, match="race: .* of y"):
            # Relaxed atomics order nothing: only the update itself is atomic.
            relaxed_kernel[(2,)](torch.zeros(4, dtype=torch.int32))

    def test_two_lanes_write_different_values(self):
        with pytest.raises(Exception, match="race: two lanes of one store"):
            lanes_kernel[(1,)](torch.zeros(8, dtype=torch.int32))

    @pytest.mark.parametrize(
        ("start", "step", "hints", "name"),
        [
            (8, 1, (16, 16, 4), "multiple_of"),
            (0, 2, (4, 1, 4), "multiple_of"),
            (0, 2, (2, 2, 4), "max_contiguous"),
            (0, 1, (16, 16, 8), "max_constancy"),
        ],
    )
    def test_false_hints(self, start, step, hints, name):
        with pytest.raises(Exception, match=rf"tl\.{name}\("):
            hint_kernel[(1,)](torch.zeros(64), torch.zeros(64), start, step, *hints)

    def test_autotune_takes_the_first_configuration(self):
        y = torch.zeros(1)
        autotuned_kernel[(1,)](y, 2)
        assert y.item() == 9

    def test_programs_run_in_an_order_of_their_own(self):
        orders = []
        for _ in range(2):
            order = torch.zeros(20, dtype=torch.int32)
            order_kernel[(5, 4)](torch.zeros(1, dtype=torch.int32), order)
            assert order.sort().values.tolist() == list(range(20))
            orders.append(order.tolist())
        assert orders[0] != orders[1] and orders[0] != list(range(20))

    def test_a_program_that_waits_for_another(self):
        with pytest.raises(Exception, match="waits at ready for another"):  # in some order of the three
            for _ in range(20):
                waiting_kernel[(3,)](torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_atomic_sum_whose_order_shows(self, dtype):
        x = torch.rand(48, generator=torch.Generator().manual_seed(9)).to(dtype)
        with pytest.raises(Exception, match="not deterministic: floats are added to total atomically"):
            atomic_kernel[(3,)](x, torch.zeros(2, dtype=dtype), BLOCK=16)

    @pytest.mark.parametrize("kernel", ["store", "atomic"])
    def test_write_to_an_input(self, kernel):
        x = torch.zeros(16)
        with read_only({"x": x[4:]}), pytest.raises(Exception, match=f"{kernel} to the input x of the op by program"):
            if kernel == "store":
                double_kernel[(1,)](torch.ones(16), x)
            else:
                atomic_kernel[(1,)](torch.ones(16), x[4:6], BLOCK=16)


class TestRepairs:
    """A repair is made where a probe finds the fault, and nowhere else."""

    __test__ = INTERPRETED and not STOCK

    def test_those_that_today_s_versions_need(self):
        needed = [name for name, _, _ in interpreter.REPAIRS if name != "loops to a bound known at run time"]
        assert [name for name in interpreter.repaired if name in needed] == needed

    def test_probes_pass_once_repaired(self):
        assert interpreter.repairs_needed() == []

    def test_what_upstream_has_mended_is_left_alone(self):
        code = (
            "from pykern.testing import interpreter as i; import triton.runtime.interpreter as t;"
            "i.REPAIRS = [(n, (lambda: True) if n in ('bf16 and tf32 dot', 'integer overflow') else r, m)"
            " for n, r, m in i.REPAIRS]; i.install(); b = type(t.interpreter_builder);"
            "print(i.Dots in b.__mro__, i.Casts in b.__mro__, len(i.REPAIRS) - len(i.repaired))"
        )
        environment = {**os.environ, "PYKERN_STOCK_INTERPRETER": "1"}
        out = subprocess.check_output([sys.executable, "-c", code], text=True, env=environment).split()
        assert out[:2] == ["False", "True"] and int(out[2]) in (2, 3)


class TestCounters:
    __test__ = INTERPRETED and not STOCK

    def test_bytes_by_argument(self):
        x, weight, y = torch.ones(4, 16).half(), torch.ones(16), torch.zeros(4, 16)
        with interpreter.counted() as launches:
            traffic_kernel[(4,)](x, weight, y, torch.zeros(1, dtype=torch.int32), N=16)
        assert launches == [
            {
                "kernel": "traffic_kernel",
                "grid": [4, 1, 1],
                "regions": {
                    "x": {"read": 120, "written": 0, "unique_read": 120, "unique_written": 0},
                    "weight": {"read": 256, "written": 0, "unique_read": 64, "unique_written": 0},
                    "y": {"read": 0, "written": 256, "unique_read": 0, "unique_written": 256},
                    "total": {"read": 16, "written": 16, "unique_read": 4, "unique_written": 4},
                },
                "tensor_flops": 0.0,
                "atomics": 4,
            }
        ]

    def test_dot_flops_and_launches_outside(self):
        a, c = torch.ones(32, 32), torch.zeros(32, 32)
        dot_kernel[(1,)](a, a, c, PRECISION=None, S=32)
        with interpreter.counted() as launches:
            dot_kernel[(1,)](a, a, c, PRECISION=None, S=32)
            dot_kernel[(1,)](a, a, c, PRECISION=None, S=32)
        assert [launch["tensor_flops"] for launch in launches] == [2 * 32**3] * 2
        assert launches[1]["regions"].keys() == {"a", "c"}  # one tensor: counted once, under its first name


class TestStillRight:
    """What the repairs must leave alone: right on the stock interpreter too, save for its speed."""

    __test__ = INTERPRETED

    def test_install_again_changes_nothing(self):
        assert interpreter.install() is interpreter.install()

    def test_true_hints(self):
        y = torch.zeros(64)
        hint_kernel[(1,)](torch.zeros(64), y, 16, 1, 16, 16, 4)
        hint_kernel[(1,)](torch.zeros(64), y, 32, 2, 2, 1, 4)
        assert torch.equal(y[16:32], torch.arange(16).div(4, rounding_mode="floor").float()) and torch.equal(
            y[32::2], y[16:32]
        )

    def test_masked_lanes_may_point_anywhere(self):
        y = torch.zeros(61)
        copy_kernel[(1,)](torch.ones(48), y, 48, 61, BLOCK=64)
        assert torch.equal(y, (torch.arange(61) < 48).float())

    def test_programs_that_keep_apart(self):
        x, y = torch.rand(1000, generator=torch.Generator().manual_seed(5)), torch.zeros(3000)[::3]
        assert torch.equal(cast(x, torch.float16), x.half())
        copy_kernel[(1,)](x, y.as_strided((1000,), (1,)), 1000, 1000, BLOCK=1024)
        assert torch.equal(y.as_strided((1000,), (1,)), x)

    def test_a_lock_orders_programs(self):
        lock, y = torch.zeros(1, dtype=torch.int32), torch.zeros(6, dtype=torch.int32)
        locked_kernel[(5,)](lock, y, 7)
        assert y.tolist() == [10, 7, 7, 7, 7, 7]

    def test_atomics_of_many_programs(self):
        total = torch.zeros(2)
        atomic_kernel[(4,)](torch.arange(64.0), total, BLOCK=16)  # sums of integers: exact in any order
        assert total.tolist() == [992.0, 1024.0]

    def test_atomic_sum_of_two_and_where_order_may_show(self):
        x, total = torch.rand(2, generator=torch.Generator().manual_seed(9)), torch.zeros(2)
        atomic_kernel[(2,)](x, total, BLOCK=1)
        assert total[0] == x[0] + x[1]
        if not STOCK:
            interpreter.install().deterministic = False
        atomic_kernel[(3,)](torch.rand(48), torch.zeros(2), BLOCK=16)
        if not STOCK:
            interpreter.install().deterministic = True

    def test_reduction_with_a_function_of_ones_own(self):
        x = torch.randn(4, 128, generator=torch.Generator().manual_seed(6)) + 100
        out = torch.empty(8)
        welford_kernel[(1,)](x, out, M=4, N=128)
        expected = torch.cat([x.double().mean(1), x.double().var(1, correction=0)])
        assert ((out - expected).abs() / expected).max() < 1e-5

    @pytest.mark.parametrize("reverse", [False, True])
    def test_scan_with_a_function_of_ones_own(self, reverse):
        a, b = torch.rand(2, 32, generator=torch.Generator().manual_seed(7))
        out = torch.empty(32)
        recurrence_kernel[(1,)](a, b, out, N=32, REVERSE=reverse)
        state, states = torch.tensor(0.0, dtype=torch.float64), []
        for i in reversed(range(32)) if reverse else range(32):
            state = state * a[i] + b[i]
            states.append(state)
        expected = torch.stack(states[::-1] if reverse else states)
        assert ((out - expected).abs() / expected).max() < 1e-6

    def test_random_numbers_do_not_overflow(self):
        out = torch.empty(64)
        random_kernel[(1,)](out, 12345)
        assert 0 <= out.min() < out.max() < 1 and out.unique().numel() > 60

    @pytest.mark.parametrize("precision", ["ieee", "tf32x3"])
    def test_dot_of_full_precision(self, precision):
        a, b = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(8))
        out = torch.empty(32, 32)
        dot_kernel[(1,)](a, b, out, PRECISION=precision, S=32)
        exact = a.double() @ b.double()
        assert (out - exact).norm() / exact.norm() < 1e-6

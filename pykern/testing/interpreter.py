"""The Triton interpreter, made honest: `install()` repairs it in a process started with TRITON_INTERPRET=1.

Stock, it runs a kernel on the CPU, but it computes with the bit patterns of bf16 and sees neither an access outside a
tensor nor two programs that touch the same memory. Repaired, the numbers are the GPU's up to the order of sums, and
what a GPU leaves undefined raises `triton.runtime.errors.InterpreterError`:

- bf16 rounds to nearest even; arithmetic, comparisons, reductions, scans, `tl.dot` and `tl.atomic_add` work on values;
- fp8 (e4m3, e5m2) rounds to nearest even and saturates; arithmetic in it raises, as the compiler refuses it;
- `tl.dot` with tf32 drops the mantissa bits that tensor cores drop;
- `tl.device_assert` fires, and integers of 32 bits and less raise where they overflow, as Triton's debug mode does
  (`tl.add(a, b, sanitize_overflow=False)` is meant to wrap);
- accesses outside the tensors of the launch raise, and so do races between programs or between lanes of one store;
- so do stores to an input of the op (the tests name the inputs, see `read_only`), and atomic additions of floats whose
  sum depends on the order of programs; programs run in random order, and one that waits for another's turn raises;
- `tl.multiple_of`, `tl.max_contiguous`, `tl.max_constancy` raise where the promise is false (`tl.assume` does anyway);
- an autotuned kernel runs in the first of its configurations: times mean nothing here.

Not seen: a missing barrier between the threads of one program, misaligned addresses, gaps inside a strided view. Memory
that nobody wrote reads as whatever is there: the tests fill it with NaN. Pointers loaded from memory count as out of
bounds, because nobody knows their tensor. bf16 `a * b + c` rounds twice where the compiler may contract it. Atomics on
one address that aren't relaxed are believed to be a lock: they order the programs that use it.

Works on triton 3.6 to 3.9, whose runtime/interpreter.py it patches. Repairs of what upstream may mend one day are made
only where a probe finds the fault; `repaired` names them. Nothing imports this module unless TRITON_INTERPRET=1.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as stock
from triton.language.semantic import TritonSemantic
from triton.runtime.autotuner import Autotuner
from triton.runtime.interpreter import TensorHandle

from pykern.testing import interpreter_probes as probes
from pykern.testing.interpreter_memory import Memory

# Numbers: the floats of Triton that numpy does not have, kept as bits, computed with as fp32.

NARROW = {tl.bfloat16: torch.bfloat16, tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}


def decode(handle: TensorHandle) -> np.ndarray:
    """The values behind a handle: fp32 for a narrow float, the data itself for everything else."""
    narrow = NARROW.get(handle.dtype.scalar)
    return handle.data if narrow is None else torch.tensor(handle.data).view(narrow).float().numpy()


def encode(values: np.ndarray, dtype: tl.dtype) -> TensorHandle:
    """Round to nearest even, once. fp8 saturates, infinities included, as `cvt.rn.satfinite` does; NaN stays NaN."""
    narrow = NARROW[dtype]
    values = _to_odd(values) if values.dtype == np.float64 else np.asarray(values, np.float32)
    if narrow.itemsize == 1:
        values = np.clip(values, -torch.finfo(narrow).max, torch.finfo(narrow).max)
    bits = torch.uint16 if narrow.itemsize == 2 else torch.uint8
    return TensorHandle(torch.tensor(values).to(narrow).view(bits).numpy(), dtype)


def _to_odd(values: np.ndarray) -> np.ndarray:
    """fp64 to fp32 towards zero, the last bit set if anything was lost: rounding the result once more is then exact."""
    with np.errstate(all="ignore"):
        rounded = values.astype(np.float32)
    bits = rounded.view(np.uint32) - (np.abs(rounded) > np.abs(values)).astype(np.uint32)
    return np.where((rounded != values) & ~np.isnan(values), bits | np.uint32(1), bits).view(np.float32)


# The builder is put together in `install` out of those of these classes that this version of Triton needs.


class Programs:
    """Tells the memory which program runs, and runs them in its order."""

    def set_grid_dim(self, nx, ny, nz):
        super().set_grid_dim(nx, ny, nz)
        self.order = stock._interpreter.order((nx, ny, nz))

    def set_grid_idx(self, x, y, z):
        turn = (x * self.grid_dim[1] + y) * self.grid_dim[2] + z
        program = int(self.order[turn])
        index = tuple(map(int, np.unravel_index(program, self.grid_dim)))
        super().set_grid_idx(*index)
        stock._interpreter.enter(index, program)

    def create_dot(self, a, b, d, *rest):
        self._count_flops(a.data.shape[-1], d)
        return super().create_dot(a, b, d, *rest)

    def create_dot_scaled(self, lhs, *rest):
        packed = 2 if lhs.dtype.scalar == tl.uint8 and rest[5] else 1  # two e2m1 numbers a byte, along K
        self._count_flops(lhs.data.shape[-1] * packed, rest[-1])
        return super().create_dot_scaled(lhs, *rest)

    @staticmethod
    def _count_flops(depth, result):
        if stock._interpreter.counter is not None:
            stock._interpreter.counter.tensor_flops += 2.0 * depth * result.data.size


class Casts:
    def get_bf16(self, value):  # 3.6 has none
        return encode(np.array([value], np.float32), tl.bfloat16)

    def cast_impl(self, src, dst_type):
        if dst_type.scalar in NARROW:
            return encode(decode(src), dst_type.scalar)
        if src.dtype.scalar in NARROW:
            src = TensorHandle(decode(src), tl.float32)
        return super().cast_impl(src, dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        if rounding_mode != stock._ir.ROUNDING_MODE.RTZ:
            return self.cast_impl(src, dst_type)
        if dst_type.scalar != tl.bfloat16:
            return super().create_fp_to_fp(src, dst_type, rounding_mode)
        values = decode(src).astype(np.float32)
        return encode(np.where(np.isnan(values), values, _drop_bits(values, 16)), tl.bfloat16)


class Arithmetic:
    def binary_op(self, lhs, rhs, op):
        return super().binary_op(lhs, rhs, op) if lhs.dtype.scalar not in NARROW else self._on_values(op, lhs, rhs)

    def unary_op(self, arg, op):
        return super().unary_op(arg, op) if arg.dtype.scalar not in NARROW else self._on_values(op, arg)

    def ternary_op(self, lhs, rhs, other, op):
        if op is np.where or other.dtype.scalar not in NARROW:  # a selection moves bits
            return super().ternary_op(lhs, rhs, other, op)
        return self._on_values(op, lhs, rhs, other)

    def create_fma(self, x, y, z):
        if z.dtype.scalar not in NARROW:
            return super().create_fma(x, y, z)
        return self._on_values(lambda a, b, c: a.astype(np.float64) * b + c, x, y, z)

    @staticmethod
    def _on_values(op, *handles):
        dtype = handles[-1].dtype.scalar
        if dtype != tl.bfloat16:
            raise TypeError(f"arithmetic in {dtype}: the compiler refuses it; cast to a wider type first")
        values = op(*map(decode, handles))
        return TensorHandle(values, tl.int1) if values.dtype == np.bool_ else encode(values, dtype)


class Dots:
    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        left, right, start = decode(a), decode(b), decode(d)
        if a.dtype.scalar == tl.float32 and input_precision == stock._ir.INPUT_PRECISION.TF32:
            # The PTX has no rounding before `mma…tf32` or `wgmma…tf32`, and those read the upper 19 bits.
            left, right = _drop_bits(left, 13), _drop_bits(right, 13)
        dtype = np.float32 if start.dtype == np.float16 else start.dtype
        total = np.matmul(left, right, dtype=dtype) + start.astype(dtype)
        return self.cast_impl(TensorHandle(total, tl.float32 if dtype == np.float32 else d.dtype.scalar), d.dtype)


class Atomics:
    def create_atomic_rmw(self, rmwOp, ptr, val, mask, sem, scope):
        if val.dtype.scalar != tl.bfloat16:
            return super().create_atomic_rmw(rmwOp, ptr, val, mask, sem, scope)
        if rmwOp != stock._ir.ATOMIC_OP.FADD:
            raise NotImplementedError(f"atomic {rmwOp} in bf16")
        memory, one, nothing = stock._interpreter, np.ones(1, bool), np.zeros(1, np.uint16)
        memory.access("atomic", ptr.data, mask.data, 2, ordering=str(sem) != str(stock._ir.MEM_SEMANTIC.RELAXED))
        before, after = np.zeros_like(val.data), np.zeros_like(val.data)
        for lane in map(tuple, np.argwhere(mask.data)):  # one after another: two lanes may meet at one address
            pointer = ptr.data[lane].reshape(1)
            old = TensorHandle(memory.native.load(pointer, one, nothing, nothing.dtype), tl.bfloat16)
            added = self.create_fadd(old, TensorHandle(val.data[lane].reshape(1), tl.bfloat16))
            before[lane], after[lane] = old.data[0], added.data[0]
            memory.native.store(pointer, added.data, one)
        sums = (decode(TensorHandle(data, tl.bfloat16)) for data in (before, val.data, after))
        memory.summed(ptr.data, mask.data, *sums)
        return TensorHandle(before, tl.bfloat16)


def _drop_bits(values: np.ndarray, count: int) -> np.ndarray:
    return (values.view(np.uint32) & np.uint32(0xFFFFFFFF << count & 0xFFFFFFFF)).view(np.float32)


# Reductions and scans: whole arrays at a time, in the arithmetic of their dtype.


class _Combine:
    """`combine_fn` on arrays instead of one element at a time: right for bf16, and far faster."""

    def combine(self, left, right, like):
        wrap = [self.to_tensor(data, arg.dtype) for data, arg in zip((*left, *right), (*like, *like), strict=True)]
        merged = self.combine_fn.fn(*wrap)
        merged = merged if isinstance(merged, tuple) else (merged,)
        return [np.broadcast_to(part.handle.data, lane.shape) for part, lane in zip(merged, left, strict=True)]


class Reduce(_Combine, stock.ReduceOps):
    def apply_impl(self, input):
        narrow = any(arg.dtype in NARROW for arg in input)
        return self.generic_reduce(input) if narrow else super().apply_impl(input)

    def generic_reduce(self, input):
        # Neighbours first, then neighbours of the results, as a GPU does (in some order): each partial sum is rounded.
        lanes, rank = [arg.handle.data for arg in input], input[0].handle.data.ndim
        lanes = [x.ravel() if self.axis is None else np.moveaxis(x, self.axis, 0) for x in lanes]
        while len(lanes[0]) > 1:
            lanes = self.combine([lane[0::2] for lane in lanes], [lane[1::2] for lane in lanes], input)
        lanes = [lane[0] for lane in lanes]
        if self.keep_dims:
            lanes = [np.reshape(x, (1,) * rank) if self.axis is None else np.expand_dims(x, self.axis) for x in lanes]
        return [self.to_tensor(lane, arg.dtype) for lane, arg in zip(lanes, input, strict=True)]


class Scan(_Combine, stock.ScanOps):
    def cumsum(self, input):
        return self.generic_scan((input,)) if input.dtype in NARROW else super().cumsum(input)

    def cumprod(self, input):
        return self.generic_scan((input,)) if input.dtype in NARROW else super().cumprod(input)

    def generic_scan(self, input):
        lanes = [np.moveaxis(arg.handle.data, self.axis, 0) for arg in input]
        rows = [[lane[:1] for lane in lanes]]
        for i in range(1, len(lanes[0])):
            rows.append(self.combine(rows[-1], [lane[i : i + 1] for lane in lanes], input))
        scanned = [np.moveaxis(np.concatenate(parts), 0, self.axis) for parts in zip(*rows, strict=True)]
        return [self.to_tensor(data, arg.dtype) for data, arg in zip(scanned, input, strict=True)]


# A launch: its memory is watched, and the language is patched for it once.


class Executor(stock.GridExecutor):
    def _init_args_hst(self, args_dev, kwargs):
        args, kwargs = super()._init_args_hst(args_dev, kwargs)
        stock._interpreter.launch(self.fn.__name__, inspect.getcallargs(self.fn, *args, **kwargs))
        _patched.clear()
        return args, kwargs


_patched: set[tuple[int, ...]] = set()


def _patch_lang(original, fn):
    """Stock patches the whole language again at each call of a device function: a third of a launch's time."""
    modules = tuple(sorted({id(module) for module in fn.__globals__.values() if module is tl or module is tl.core}))
    if modules in _patched:
        return stock._LangPatchScope()
    _patched.add(modules)
    return original(fn)


def _check_overflow(self, lhs, rhs, binary_op):
    """Stock builds this out of language operations, at a third of a launch's time, and then drops the result."""
    bits = lhs.type.scalar.int_bitwidth
    if 1 < bits < 64:
        ufunc = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[binary_op.__name__]
        wide = ufunc(lhs.handle.data, rhs.handle.data, dtype=np.int64)
        low, high = lhs.dtype.get_int_min_value(), lhs.dtype.get_int_max_value()
        if (wide < low).any() or (wide > high).any():
            raise OverflowError(f"overflow of {lhs.dtype} in {binary_op.__name__}")


# Hints: promises to the compiler, which makes wrong addresses out of false ones.


def _first_of_runs_divisible(data, axis, value, step):
    # What is promised is the first lane of each contiguous run: that is where a vector access begins.
    starts = np.ones(data.shape, bool)
    np.moveaxis(starts, axis, 0)[1:] = np.moveaxis(np.diff(data, axis=axis) != step, axis, 0)
    return not (starts & (data % value != 0)).any()


def _steps_within_groups(data, axis, value, step):
    change = np.moveaxis(np.diff(data, axis=axis), axis, 0)
    inside = np.arange(1, len(change) + 1) % value != 0
    return (change[inside] == step).all()


HINTS = {
    "multiple_of": _first_of_runs_divisible,
    "max_contiguous": _steps_within_groups,
    "max_constancy": lambda data, axis, value, step: _steps_within_groups(data, axis, value, 0),
}


def _checked_hint(name, original, input, values):
    result = original(input, values)
    if isinstance(input, tl.tensor):
        step = max(1, input.dtype.element_ty.primitive_bitwidth // 8) if input.dtype.is_ptr() else 1
        values = values if isinstance(values, (list, tuple)) else [values]
        for axis, value in enumerate(getattr(v, "value", v) for v in values):
            if not HINTS[name](input.handle.data.astype(np.int64), axis, value, step):
                raise ValueError(f"tl.{name}(…, {value}) is false along axis {axis}")
    return result


def _patch_core(original, lang, scope):
    original(lang, scope)
    for name in HINTS:
        scope.set_attr(lang, name, partial(_checked_hint, name, getattr(lang, name)))


def _debug() -> None:
    stock.interpreter_builder.options = stock.InterpreterOptions(debug=True)


def _mend_overflow() -> None:
    _debug()
    TritonSemantic.binary_op_sanitize_overflow_impl = _check_overflow


def _mend_reductions() -> None:
    stock.ReduceOps, stock.ScanOps = Reduce, Scan


def _mend_loops() -> None:
    def patch(original, tensor, scope):
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    stock._patch_lang_tensor = partial(patch, stock._patch_lang_tensor)


def _mend_autotune() -> None:
    Autotuner._bench = lambda self, *args, config, **meta: [1.0] * 3  # of equals the first is taken


# Name, whether this version of Triton is right by itself, and what mends it: a part of the builder, or a function.
REPAIRS: list[tuple[str, Callable[[], bool], Any]] = [
    ("casts to bf16 and fp8", probes.casts, Casts),
    ("bf16 arithmetic", probes.arithmetic, Arithmetic),
    ("bf16 and tf32 dot", probes.dot, Dots),
    ("bf16 atomics", probes.atomic, Atomics),
    ("bf16 reductions and scans", probes.reduction, _mend_reductions),
    ("device_assert", probes.device_assert, _debug),
    ("integer overflow", probes.overflow, _mend_overflow),
    ("loops to a bound known at run time", probes.loop, _mend_loops),
    ("autotune", probes.autotune, _mend_autotune),
]


def repairs_needed() -> list[tuple[str, Any]]:
    """The repairs whose fault a probe finds in the interpreter as it is."""
    return [(name, mend) for name, right, mend in REPAIRS if not probes.passes(right)]


repaired: tuple[str, ...] = ()


def install() -> Memory:
    """Repair the interpreter of this process, once. Returns the object that every memory access passes.

    Raises:
        RuntimeError: the process was not started with TRITON_INTERPRET=1. Triton reads that variable when it is first
            imported, and what was decorated before can't be changed.
    """
    global repaired
    if not isinstance(tl.sum, stock.InterpretedFunction):
        raise RuntimeError(
            "the Triton interpreter is off: start the process with TRITON_INTERPRET=1 in its environment"
        )
    if not isinstance(stock._interpreter, Memory):
        needed = repairs_needed()
        parts = [mend for _, mend in needed if isinstance(mend, type)]
        stock._interpreter = Memory(stock._interpreter)
        stock.InterpreterBuilder = type("Builder", (Programs, *parts, stock.InterpreterBuilder), {})
        stock.interpreter_builder.__class__ = stock.InterpreterBuilder
        stock.GridExecutor = Executor
        stock._patch_lang = partial(_patch_lang, stock._patch_lang)
        stock._patch_lang_core = partial(_patch_core, stock._patch_lang_core)
        for _, mend in needed:
            if not isinstance(mend, type):
                mend()
        repaired = tuple(name for name, _ in needed)
    return stock._interpreter


@contextmanager
def counted() -> Iterator[list[dict[str, Any]]]:
    """Yields a list that holds, after the block, a record of each launch in it, in the CUDA emulator's form.

    A record has the `kernel`, its `grid`, `regions` (for each argument that was touched the bytes "read" and "written",
    every request counted, and "unique_read" and "unique_written", every byte counted once), `tensor_flops` (those of
    `tl.dot`) and `atomics` (lanes; their bytes are read and written).
    """
    memory, launches = install(), []
    memory.counters = counters = []
    try:
        yield launches
    finally:
        memory.counters = None
        launches += [counter.record() for counter in counters]

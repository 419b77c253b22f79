"""Golden vectors: what a GPU's instructions made of fixed inputs, which the emulator is then held against anywhere.

They are the result of the conformance part, kept as benchmarks/results/GPU/conformance.json.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pykern.testing.gpu.paths import ROOT
from pykern.testing.inputs import as_tuple, map_tensors

SOURCE = ROOT / "tests/cuda/fragments.cu"


@dataclass(frozen=True)
class Vector:
    """A call of one thin wrapper. Results are the same bits, or as close as the order of its sums leaves them."""

    op: str
    args: Callable[[torch.Generator], tuple[Any, ...]]
    tolerance: float = 0.0  # over the largest result


def _whole(shape: Sequence[int], dtype: torch.dtype) -> Callable[[torch.Generator], Tensor]:
    """Small whole numbers: every product and sum of them is exact, so a wrong place shows and rounding does not."""
    return lambda generator: torch.randint(-4, 5, tuple(shape), generator=generator).to(dtype)


def _normal(shape: Sequence[int], dtype: torch.dtype) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: torch.randn(*shape, generator=generator).to(dtype)


def _numbered(shape: Sequence[int], dtype: torch.dtype) -> Callable[[torch.Generator], Tensor]:
    """Every element another one: what is moved to a wrong place shows."""
    count = int(torch.Size(shape).numel())
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    return lambda generator: (torch.arange(count, dtype=bits) + 0x3C00).view(dtype).reshape(tuple(shape))


def _call(op: str, *parts: Any, tolerance: float = 0.0) -> Vector:
    def args(generator: torch.Generator) -> tuple[Any, ...]:
        return tuple(part(generator) if callable(part) else part for part in parts)

    return Vector(op, args, tolerance)


def _vectors() -> dict[str, Vector]:
    half, bf16, single = torch.float16, torch.bfloat16, torch.float32
    found = {}
    # Registers of a warp: [lane][element].
    for name, dtype, sums, a, b in [
        ("bf16", bf16, single, 8, 4),
        ("fp16", half, single, 8, 4),
        ("fp16 sums in fp16", half, half, 8, 4),
        ("tf32", single, single, 4, 2),
    ]:
        shapes = ((32, a), dtype), ((32, b), dtype), ((32, 4), sums)
        found[f"mma {name}"] = _call("mma", *(_whole(*shape) for shape in shapes), 32)
        tolerance = 2.0**-9 if sums is half else 2.0**-18
        found[f"mma {name} random"] = _call("mma", *(_normal(*shape) for shape in shapes), 32, tolerance=tolerance)
    for count in (1, 2, 4):
        for trans in (False, True):
            name = f"x{count}{' trans' if trans else ''}"
            found[f"ldmatrix {name}"] = _call("ldmatrix", _numbered((8 * count, 8), half), count, trans)
            found[f"stmatrix {name}"] = _call("stmatrix", _numbered((32, 2 * count), half), count, trans, False)
    for size in (4, 8, 16):
        for filled in (size, size // 2):
            name = f"cp.async {size} bytes" + (f", {filled} of them read" if filled < size else "")
            found[name] = _call("cp_async", _numbered((32 * size // 4,), single), size, filled)
    found["product of bf16"] = _call("product", _whole((16, 16), bf16), _whole((16, 16), bf16), False, False)
    found["gemm"] = _call("gemm", _whole((100, 72), bf16), _whole((90, 72), bf16), 0)
    return found


VECTORS = _vectors()


def make(vector: Vector) -> tuple[Any, ...]:
    """The call's arguments, on the CPU, the same on every machine."""
    return vector.args(torch.Generator().manual_seed(1))


def record(namespace: Any, vector: Vector, device: str) -> dict[str, Any]:
    """Runs the call; the arguments and the results as JSON."""
    args = make(vector)
    results = as_tuple(getattr(namespace, vector.op)(*map_tensors(lambda t: t.to(device), args)))
    return {
        "op": vector.op,
        "args": [encode(a) if isinstance(a, Tensor) else a for a in args],
        "results": [encode(result.cpu()) for result in results],
        "tolerance": vector.tolerance,
    }


def disagreement(namespace: Any, recorded: dict[str, Any]) -> str | None:
    """Runs a recorded call with kernels for CPU tensors; how its results differ from the recorded ones, or None."""
    args = [decode(a) if isinstance(a, dict) else a for a in recorded["args"]]
    results = as_tuple(getattr(namespace, recorded["op"])(*args))
    if len(results) != len(recorded["results"]):
        return f"{len(results)} results instead of {len(recorded['results'])}"
    for index, (ours, encoded) in enumerate(zip(results, recorded["results"], strict=True)):
        theirs = decode(encoded)
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            return f"result {index}: {ours.dtype} {tuple(ours.shape)} instead of {theirs.dtype} {tuple(theirs.shape)}"
        if _bytes(ours) == _bytes(theirs):
            continue
        error = (ours.double() - theirs.double()).abs()
        allowed = recorded["tolerance"] * theirs.double().abs().max()
        if not bool((error <= allowed).all()):
            first = tuple((~(error <= allowed)).nonzero()[0].tolist())
            wrong = int((~(error <= allowed)).sum())
            return f"result {index}: {wrong} of {error.numel()} differ, at {first} {ours[first]} for {theirs[first]}"
    return None


def encode(tensor: Tensor) -> dict[str, Any]:
    data = base64.b64encode(_bytes(tensor)).decode()
    return {"dtype": str(tensor.dtype)[6:], "shape": list(tensor.shape), "data": data}


def decode(encoded: dict[str, Any]) -> Tensor:
    data = torch.frombuffer(bytearray(base64.b64decode(encoded["data"])), dtype=torch.uint8)
    return data.view(getattr(torch, encoded["dtype"])).reshape(encoded["shape"])


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

"""Loads the C++ libraries, if there are any.

`libpykern_native.so` has the kernels for CPUs and GPUs, `torch.ops.pykern_native.NAME`; `libpykern_emulated.so` has the
GPU's kernels once more, for CPU tensors on the emulator, `torch.ops.pykern_native_emulated.NAME`.
"""

import ctypes
import functools
import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).resolve().parent / "lib"
LIBRARY = FOLDER / "libpykern_native.so"
# Elsewhere for `pykern check --sanitize`, whose libraries are compiled with sanitizers.
SANITIZED = "PYKERN_EMULATOR_FOLDER" in os.environ
EMULATOR_FOLDER = Path(os.environ.get("PYKERN_EMULATOR_FOLDER") or FOLDER)
EMULATOR = EMULATOR_FOLDER / "libpykern_emulator.so"
EMULATED = EMULATOR_FOLDER / "libpykern_emulated.so"


def build_report() -> dict[str, Any] | None:
    """What the build wrote down about itself, or None where nothing was ever built."""
    try:
        return json.loads((FOLDER / "build.json").read_text())
    except (OSError, ValueError):
        return None


def _load() -> tuple[str | None, str | None]:
    if not LIBRARY.exists():
        report = build_report()
        return "; ".join(report["problems"]) if report else "no native library was built (make install)", None
    try:
        torch.ops.load_library(LIBRARY)
        ask = ctypes.CDLL(str(LIBRARY)).pykern_isa
    except (OSError, AttributeError, RuntimeError) as error:
        return f"the native library does not load: {error}", None
    ask.restype = ctypes.c_char_p
    isa = ask().decode()
    if isa == "none":
        return "the native library has no kernels for this processor", None
    wanted = os.environ.get("PYKERN_ISA", isa)
    if wanted != isa:
        warnings.warn(f"PYKERN_ISA is {wanted!r}, which this machine or library lacks; using {isa}", stacklevel=2)
    return None, isa


@functools.cache
def cuda_problem() -> str | None:
    """Why the library's CUDA kernels do not run on a GPU here, or None. Asks the driver, so not before it is needed."""
    if reason:
        return reason
    report = build_report() or {}
    if report.get("library") != "cuda":
        return "; ".join(report.get("problems", [])) or "the native library was built without CUDA kernels"
    ask = ctypes.CDLL(str(LIBRARY)).pykern_cuda_problem
    ask.restype = ctypes.c_char_p
    answer = ask()
    return answer.decode() if answer else None


def emulator_problem() -> str | None:
    """Why there is no emulator, on which CUDA kernels run for CPU tensors, or None."""
    if EMULATOR.exists():
        return None
    problems = "; ".join((build_report() or {}).get("problems", []))
    return f"on CPU tensors it is the emulator, which was not built: {problems or 'make install'}"


@functools.cache
def emulated_problem() -> str | None:
    """Why pykern's CUDA kernels do not run on CPU tensors here, or None; loads them."""
    if emulator_problem():
        return emulator_problem()
    try:
        torch.ops.load_library(EMULATED)
    except (OSError, RuntimeError) as error:
        return f"the emulated kernels do not load: {error}"
    return None


def poison_memory(on: bool) -> None:
    """Whether CPU kernels fill the memory that they allocate with NaN, so that what they leave unwritten is seen."""
    if reason is None:
        ctypes.CDLL(str(LIBRARY)).pykern_poison_memory(ctypes.c_bool(on))


reason, isa = _load()
"""Why there are no C++ kernels, or None; and the instruction set that the CPU kernels use."""

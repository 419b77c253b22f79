"""Loads the C++ library, if there is one: its kernels are then `torch.ops.pykern_native.NAME`.

`reason` says why they are not there, or is None. `isa` is the instruction set that the CPU kernels use.
"""

import ctypes
import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).resolve().parent / "lib"
LIBRARY = FOLDER / "libpykern_native.so"


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


reason, isa = _load()

"""What makes a kernel's silent fault loud: memory that shows what nothing wrote, tensors that nothing may write to."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

from pykern import _native


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fills fresh memory with NaN (integers with their maximum), C++ allocations included."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    _native.poison_memory(True)
    try:
        yield
    finally:
        _native.poison_memory(False)
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def unwritten(**tensors: Any) -> contextlib.AbstractContextManager[None]:
    """Where Triton is interpreted, a kernel that writes to one of the tensors raises. The CUDA emulator always does."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return contextlib.nullcontext()
    from pykern.testing.interpreter_memory import read_only

    return read_only(tensors)

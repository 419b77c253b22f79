"""Which backends this process can run, which one is forced, and lazy handles on their kernels."""

import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch

# A plain module global: a ContextVar or a context manager's state is lost inside compiled functions and is never seen
# by the autograd engine's threads. The public functions read it and pass it on as an argument of the op.
forced: str | None = os.environ.get("PYKERN_BACKEND") or None


class BackendError(RuntimeError):
    """A forced backend cannot serve the call; the message names it and says why."""


class backend:
    """Forces every following op call onto one backend, or lifts that with `None`.

    `pykern.backend("triton")` holds until changed; `with pykern.backend("triton"):` until the block ends. Names are
    the backends that `pykern ops` lists, and "reference". A call that the backend cannot serve raises `BackendError`.
    Global to the process.
    """

    def __init__(self, name: str | None) -> None:
        global forced
        if name is not None and not isinstance(name, str):
            raise TypeError(f"name: expected a backend's name or None, got {type(name).__name__}")
        self._previous = forced
        forced = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exc: object) -> None:
        global forced
        forced = self._previous


def unavailable(name: str, kernel: Callable[..., Any], device_type: str) -> str | None:
    """Why this kernel of backend `name` cannot run on tensors of that device in this process, or None if it can."""
    if name in ("cpu", "cuda"):
        if device_type != name:
            return f"serves {name.upper()} tensors, not {device_type}"
        return kernel.missing() if isinstance(kernel, _Lazy) else None
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            return "on CPU tensors it is the Triton interpreter: start the process with TRITON_INTERPRET=1"
        return None if device_type in ("cpu", "cuda") else f"does not run on {device_type}"
    return None


def is_emulation(name: str, device_type: str) -> bool:
    """Whether the backend only imitates its device here: right but slow, so never chosen unless forced."""
    return device_type == "cpu" and name in ("triton", "cuda")


class _Lazy:
    """A kernel that is looked up at its first call, so that importing pykern does not import triton.

    `missing` says why there is no such kernel in this installation, or None.
    """

    def __init__(self, find: Callable[[], Callable[..., Any]], missing: Callable[[], str | None]) -> None:
        self._find, self.missing = find, missing
        self._kernel: Callable[..., Any] | None = None

    def resolve(self) -> Callable[..., Any]:
        if self._kernel is None:
            self._kernel = self._find()
        return self._kernel

    def __call__(self, *args: Any) -> Any:
        return self.resolve()(*args)


def resolved(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel itself, where a lazy handle stands for it."""
    return kernel.resolve() if isinstance(kernel, _Lazy) else kernel


def native(name: str) -> Callable[..., Any]:
    """The C++ kernel `pykern_native::name`."""

    def missing() -> str | None:
        from pykern import _native

        return _native.reason

    return _Lazy(lambda: getattr(torch.ops.pykern_native, name).default, missing)


def triton(module: str, name: str) -> Callable[..., Any]:
    """The launcher `name` in `kernels/<module>.py`."""

    return _Lazy(lambda: getattr(importlib.import_module(f"pykern.kernels.{module}"), name), lambda: None)

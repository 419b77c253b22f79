"""Which backends this process can run, which one is forced, and lazy handles on their kernels."""

import functools
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
    if isinstance(kernel, Kernel):
        return kernel.missing(device_type)
    if name == "triton":
        return _no_triton(device_type)
    if name in ("cpu", "cuda") and device_type != name:
        return f"serves {name.upper()} tensors, not {device_type}"
    return None


def _no_triton(device_type: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "on CPU tensors it is the Triton interpreter: start the process with TRITON_INTERPRET=1"
    return None if device_type in ("cpu", "cuda") else f"does not run on {device_type}"


def is_emulation(name: str, device_type: str) -> bool:
    """Whether the backend only imitates its device here: right but slow, so never chosen unless forced."""
    return device_type == "cpu" and name in ("triton", "cuda")


class Kernel:
    """A kernel that is looked up at its first call, so that importing pykern imports no triton and loads no library."""

    def missing(self, device_type: str) -> str | None:
        """Why this installation has no such kernel for tensors of that device, or None."""
        raise NotImplementedError

    def resolve(self, device_type: str) -> Callable[..., Any]:
        raise NotImplementedError


def resolved(kernel: Callable[..., Any], device_type: str) -> Callable[..., Any]:
    """The function that serves tensors of that device."""
    return kernel.resolve(device_type) if isinstance(kernel, Kernel) else kernel


class _Native(Kernel):
    def __init__(self, backend: str, name: str) -> None:
        self._backend, self._name = backend, name

    def missing(self, device_type: str) -> str | None:
        from pykern import _native

        if self._backend == "cuda" and device_type in ("cpu", "cuda"):
            return _native.emulated_problem() if device_type == "cpu" else _native.cuda_problem()
        if device_type != self._backend:
            return f"serves {self._backend.upper()} tensors, not {device_type}"
        return _native.reason

    def resolve(self, device_type: str) -> Callable[..., Any]:
        emulated = is_emulation(self._backend, device_type)
        library = torch.ops.pykern_native_emulated if emulated else torch.ops.pykern_native
        return getattr(library, self._name).default


class _Triton(Kernel):
    def __init__(self, module: str, name: str) -> None:
        self._module, self._name = module, name

    def missing(self, device_type: str) -> str | None:
        return _no_triton(device_type)

    @functools.cached_property
    def _launcher(self) -> Callable[..., Any]:
        return getattr(importlib.import_module(f"pykern.kernels.{self._module}"), self._name)

    def resolve(self, device_type: str) -> Callable[..., Any]:
        return self._launcher


def native(backend: str, name: str) -> Kernel:
    """The C++ kernel `pykern_native::name` for backend "cpu" or "cuda"; for CUDA on CPU tensors its emulation."""
    return _Native(backend, name)


def triton(module: str, name: str) -> Kernel:
    """The launcher `name` in `kernels/<module>.py`."""
    return _Triton(module, name)

"""Every case that the declarations imply on this machine: op × backend × check × sample × dtype."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import pykern
from pykern.ops._backends import unavailable
from pykern.ops._spec import OpSpec, Sample
from pykern.testing import checks, refusals
from pykern.testing.graphs import check_graph
from pykern.testing.inputs import Make, as_tuple, differentiable, map_tensors, samples

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PER_SAMPLE = {
    "repeat": checks.check_repeat,
    "strides": checks.check_strides,
    "frozen": checks.check_frozen,
}
ONCE = {
    "opcheck": checks.check_opcheck,
    "thread": checks.check_thread,
    "statistics": checks.check_statistics,
    "autocast": checks.check_autocast,
    "second": checks.check_second,
    "far": checks.check_far,
    "checkpoint": checks.check_checkpoint,
}


@dataclass
class Case:
    op: str
    backend: str
    check: str
    detail: str
    run: Callable[[], None]

    def __str__(self) -> str:
        return f"{self.op}-{self.backend}-{self.check}-{self.detail}".replace(" ", "_")


def backends(spec: OpSpec, device: str) -> list[str]:
    """The backends whose kernels this process can run; where it interprets Triton, that alone."""
    names = [name for name, kernel in spec.backends.items() if unavailable(name, kernel, device) is None]
    if os.environ.get("TRITON_INTERPRET") == "1":
        return [name for name in names if name == "triton"]
    return [*names, "reference"]


def cases(
    names: Iterable[str] | None = None, device: str = "cpu", kind: str = "smoke", backend: str | None = None
) -> Iterator[Case]:
    """The cases of the named ops, or of all; of one backend, or of all and what does not depend on it."""
    for name, spec in pykern.catalogue().items():
        # A backward op is checked through its forward.
        if spec.gradient is not None and (names is None or name in names):
            for one in backends(spec, device):
                if backend in (None, one):
                    yield from _backend_cases(name, spec, one, device, kind)
            if backend is None and os.environ.get("TRITON_INTERPRET") != "1":
                yield from _op_cases(name, spec, device)


def _backend_cases(name: str, spec: OpSpec, backend: str, device: str, kind: str) -> Iterator[Case]:
    def case(check: str, detail: str, fn: Callable[..., None], args: Any) -> Case:
        return Case(name, backend, check, detail, lambda: fn(spec, backend, args))

    checked: set[str] = set()
    for dtype in DTYPES:
        for sample in _served(spec, backend, kind, device, dtype):
            if dtype != torch.float32 and not _varies(sample, dtype):
                continue
            label = f"{sample.name} {str(dtype)[6:]}"
            yield case("accuracy", label, checks.check_accuracy, sample.args)
            if dtype == torch.float16:
                continue  # the rest does not depend on which 16-bit type it is
            if (backend, device) == ("cuda", "cpu"):
                yield case("orders", label, checks.check_orders, sample.args)
            if kind == "smoke" and sample.name in checked:
                continue  # and these little on the width
            checked.add(sample.name)
            for check, fn in PER_SAMPLE.items():
                # The reference is torch's own kernels, which may add up strided memory in another order.
                if (check, backend) != ("strides", "reference"):
                    yield case(check, label, fn, sample.args)
    # In the first dtype that the backend has.
    served: list[Sample] = []
    for dtype in DTYPES:
        served = served or list(_served(spec, backend, "smoke", device, dtype))
    for sample in [s for s in served if _numel(s)][:2]:
        for check, fn in ONCE.items():
            yield case(check, sample.name, fn, sample.args)
        if device == "cuda" and backend != "reference":
            yield case("graph", sample.name, check_graph, sample.args)
    if served:
        yield case("compile", "changing shapes", checks.check_compile, [s.args for s in served[:6]])


def _op_cases(name: str, spec: OpSpec, device: str) -> Iterator[Case]:
    """What does not depend on the backend, because the reference does it or because nothing runs."""

    def case(check: str, detail: str, run: Callable[[], None]) -> Case:
        return Case(name, "any", check, detail, run)

    smoke = [
        s for s in samples(spec, "smoke", device, torch.float32) if 0 < _numel(s) <= 600 and differentiable(s.args)
    ]
    for sample in smoke[:3]:
        yield case("derivatives", sample.name, lambda s=sample: checks.check_derivatives(spec, s.args))
        yield case("transforms", sample.name, lambda s=sample: checks.check_transforms(spec, s.args))
    first = next(samples(spec, "smoke", device, torch.float32), None)
    if first is not None:
        yield case("forced", first.name, lambda: refusals.check_forced(spec, first.args))
        if sum(isinstance(a, Tensor) for a in first.args) > 1:
            yield case("device", first.name, lambda: refusals.check_device(spec, first.args))
    for detail, args, error, pattern in spec.bad(Make(device)) if spec.bad else ():
        bad = (spec, args, error, pattern)
        yield case("bad input", detail, lambda bad=bad: refusals.check_bad_input(*bad))


def _served(spec: OpSpec, backend: str, kind: str, device: str, dtype: torch.dtype) -> Iterator[Sample]:
    """The samples that the backend serves; without gradients those of which it serves the forward alone."""
    for sample in samples(spec, kind, device, dtype):
        if backend == "reference" or spec.why_not(backend, sample.args) is None:
            if _serves_backward(spec, backend, sample):
                yield sample
            else:
                yield Sample(f"{sample.name}, frozen", tuple(map_tensors(Tensor.detach, sample.args)))


def _serves_backward(spec: OpSpec, backend: str, sample: Sample) -> bool:
    binding, wanted = spec.gradient, set(differentiable(sample.args))
    supports = binding.op.supports.get(backend)
    if not wanted or supports is None:
        return True
    outputs = as_tuple(spec.fake(*sample.args))
    saved = [(outputs if of_output else sample.args)[i] for _, of_output, i in binding.saved]
    mask = [any(i in wanted for i in indices) for indices in binding.targets]
    return supports(*(outputs[i] for i in binding.gradients_in), *saved, mask) is None


def _varies(sample: Sample, dtype: torch.dtype) -> bool:
    return any(isinstance(a, Tensor) and a.dtype == dtype for a in sample.args)


def _numel(sample: Sample) -> int:
    return sum(a.numel() for a in sample.args if isinstance(a, Tensor))

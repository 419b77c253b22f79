"""The benchmark engine: every backend and peer of an op on its benchmark samples, correct before fast."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import pykern
from pykern.ops._backends import backend, is_emulation
from pykern.ops._spec import OpSpec, Sample
from pykern.testing import checks, timing
from pykern.testing.inputs import as_tuple, differentiable, fresh, map_tensors, samples


@dataclass
class Record:
    """One contestant on one sample."""

    op: str
    sample: str
    dtype: str
    mode: str
    contestant: str
    seconds: float
    speedup: float | None  # torch's time over this one's in the same rounds; low and high bound the median
    low: float | None
    high: float | None
    over_floor: float | None
    peak_bytes: int
    host_seconds: float
    over: dict[str, tuple[float, float, float]]  # the same of each other peer: median, low, high


def contestants(
    spec: OpSpec, args: Sequence[Any], device: str, peers: dict[str, Callable[..., Any]]
) -> dict[str, Callable[..., Any]]:
    """What serves this call: our backends, the reference, and the peers that cover it."""
    found = {name: forced(spec, name) for name in served_by(spec, args, device)}
    for name, peer in peers.items():
        peer = peer.prepare(*args) if hasattr(peer, "prepare") else peer
        if peer(*map_tensors(lambda t: t.detach(), args)) is not None:
            found[name] = peer
    return found


def modes(args: Sequence[Any]) -> list[str]:
    """What can be timed: the forward, and with the backward where an argument wants a gradient."""
    return ["forward", "forward+backward"] if differentiable(args) else ["forward"]


def served_by(spec: OpSpec, args: Sequence[Any], device: str) -> list[str]:
    """Our backends that serve this call at speed, and the reference."""
    fast = [name for name in spec.backends if not is_emulation(name, device) and spec.why_not(name, args) is None]
    return [*fast, "reference"]


def _as_timed(args: Sequence[Any], mode: str) -> Sequence[Any]:
    return map_tensors(lambda t: t.detach(), args) if mode == "forward" else args


def launch(fn: Callable[..., Any], args: Sequence[Any], mode: str) -> Callable[[], Any]:
    """A call to time; the backward gets the same incoming gradients every time."""
    if mode == "forward":
        frozen = _as_timed(args, mode)
        return lambda: fn(*frozen)
    leaves = fresh(args)
    wanted = [leaves[i] for i in differentiable(leaves)]
    incoming = [torch.randn_like(o) for o in as_tuple(fn(*leaves)) if o.requires_grad]

    def call() -> Any:
        outputs = [o for o in as_tuple(fn(*leaves)) if o.requires_grad]
        return torch.autograd.grad(outputs, wanted, incoming[: len(outputs)], allow_unused=True)

    return call


_verdicts: dict[tuple[str, ...], str | None] = {}


def verdict(spec: OpSpec, name: str, sample: Sample, dtype: torch.dtype) -> str | None:
    """What is wrong with a backend on this sample, checked once however many modes are timed."""
    key = (spec.name, name, sample.name, str(dtype))
    if key not in _verdicts:
        try:
            checks.check_accuracy(spec, name, sample.args)
            _verdicts[key] = None
        except AssertionError as wrong:
            _verdicts[key] = str(wrong)
    return _verdicts[key]


def run(
    spec: OpSpec,
    sample: Sample,
    mode: str,
    device: str,
    dtype: torch.dtype,
    budget: float,
    peers: dict[str, Callable[..., Any]],
    host_calls: int = 2000,
) -> Iterator[Record | tuple[str, str]]:
    """Records of one sample; for a contestant whose result is wrong, its name and the reason instead."""
    place = torch.device(device)
    runners = {}
    for name, fn in contestants(spec, _as_timed(sample.args, mode), device, peers).items():
        fault = None if name in peers else verdict(spec, name, sample, dtype)
        if fault is not None:
            yield name, fault
            continue
        runners[name] = launch(fn, sample.args, mode)
    times = timing.interleaved(runners, place, budget)
    floor = floor_seconds(spec, sample.args, mode, dtype, place)
    tiny = next((s for s in samples(spec, "smoke", device, dtype) if s.args), sample)
    tiny_contestants = contestants(spec, _as_timed(tiny.args, mode), device, peers)
    for name, measured in times.items():
        median = statistics.median(measured)
        over = {peer: timing.ratio(times[peer], measured) for peer in peers if peer in times and peer != name}
        against = timing.ratio(measured, measured) if name == "torch" else over.pop("torch", None)
        yield Record(
            op=spec.basename,
            sample=sample.name,
            dtype=str(dtype)[6:],
            mode=mode,
            contestant=name,
            seconds=median,
            speedup=against and against.median,
            low=against and against.low,
            high=against and against.high,
            over_floor=floor and median / floor,
            peak_bytes=timing.peak_memory(runners[name], place),
            host_seconds=_host_seconds(spec, name, tiny_contestants.get(name), tiny.args, mode, dtype, host_calls),
            over={peer: (r.median, r.low, r.high) for peer, r in over.items()},
        )


_on_host: dict[tuple[Any, ...], float] = {}


def _host_seconds(
    spec: OpSpec,
    name: str,
    contestant: Callable[..., Any] | None,
    args: Sequence[Any],
    mode: str,
    dtype: torch.dtype,
    calls: int,
) -> float:
    """Measured once: it is the same tiny call, whichever sample it is reported with."""
    if contestant is None:
        return float("nan")
    key = (spec.name, name, mode, dtype, next((a.device for a in args if isinstance(a, torch.Tensor)), None))
    if key not in _on_host:
        ours = name in spec.backends or name == "reference"
        fn = launch(spec if ours else contestant, args, mode)
        with backend(name if ours else None):  # around the timing, not in it
            _on_host[key] = timing.host_seconds(fn, calls)
    return _on_host[key]


def floor_seconds(
    spec: OpSpec, args: Sequence[Any], mode: str, dtype: torch.dtype, device: torch.device
) -> float | None:
    """The larger of the two times that the op's cost sets, against ceilings measured now."""
    if spec.cost is None:
        return None
    costs = [spec.cost(*args)]
    backward = spec.gradient.op
    if mode != "forward":
        if backward.cost is None:
            return None
        costs.append(backward.cost(*checks.backward_args(spec, None, args)))
    flops, nbytes = (sum(c[i] for c in costs) for i in range(2))
    bandwidth = _ceiling(timing.copy_bandwidth, nbytes, device)
    return max(nbytes / bandwidth, flops / _ceiling(timing.matmul_rate, dtype, device))


_ceilings: dict[tuple[Any, ...], float] = {}


def _ceiling(measure: Callable[[Any, torch.device], float], of: Any, device: torch.device) -> float:
    """A GPU's stays as it is; what a CPU can do at a time depends on what else it does."""
    if device.type != "cuda":
        return measure(of, device)
    if (measure, of, device) not in _ceilings:
        _ceilings[measure, of, device] = measure(of, device)
    return _ceilings[measure, of, device]


def machine(device: str) -> dict[str, str]:
    """What a result must name to mean anything."""
    name = torch.cuda.get_device_name() if device == "cuda" else _processor()
    return {
        "machine": name,
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "pykern": pykern.__version__,
    }


def write(path: Path, command: str, device: str, records: Sequence[dict[str, Any]]) -> None:
    """A result file: the machine, versions and command, then the records."""
    body = {"about": {**machine(device), "command": command}, "records": records}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(body, indent=1) + "\n")


def forced(spec: OpSpec, name: str) -> Callable[..., Any]:
    """The op on one backend, as a function of its arguments."""

    def call(*args: Any) -> Any:
        with backend(name):
            return spec(*args)

    return call


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()

"""What `pykern ops`, `pykern check` and `pykern bench` do."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

import pykern
from pykern import _native
from pykern.ops._backends import is_emulation, unavailable
from pykern.ops._spec import OpSpec


def ops(markdown: bool = False) -> int:
    """Prints every op, its backends, and why those that cannot run here cannot."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if markdown:
        print(backend_table())
        return 0
    console = Console()
    for name, spec in forward_ops().items():
        console.print(f"[bold]{name}[/]")
        for backend, kernel in spec.backends.items():
            ready = "emulated, when forced" if is_emulation(backend, device) else "ready"
            console.print(f"  {backend}: {unavailable(backend, kernel, device) or ready}")
        console.print("  reference: ready")
    return 0


def check(
    targets: Positional[tuple[str, ...]] = (),
    device: str = "cpu",
    kind: str = "smoke",
    backend: str | None = None,
    sanitize: bool = False,
) -> int:
    """Runs the cases that the declarations imply and prints what failed; 1 if anything did.

    On CPU tensors backend "cuda" runs on the emulator, and "triton" in the interpreter, in a process of its own.

    Args:
        targets: ops by name, and Python files outside the package that declare some; all of pykern's ops by default.
        device: cpu or cuda.
        kind: smoke or full samples; `attention` has every two features as pairs.
        backend: this one alone; by default all, and what depends on none.
        sanitize: backend "cuda" on CPU tensors, compiled with g++'s address and undefined-behaviour sanitizers.
    """
    from pykern.testing.cases import cases

    names = resolve(targets)
    if sanitize and not _native.SANITIZED:
        from pykern.testing.sanitize import environment

        if (backend or "cuda", device) != ("cuda", "cpu"):
            sys.exit(f"error: sanitize: works on backend cuda and device cpu, got {backend} and {device}")
        # The sanitizer's library has to be the first one that the process loads.
        command = [sys.executable, "-m", "pykern.cli", "check", *targets, "--kind", kind, "--backend", "cuda"]
        own = any(pykern.catalogue()[name].namespace == "pykern" for name in names)
        return subprocess.run([*command, "--sanitize"], env={**os.environ, **environment(own)}, check=False).returncode
    console = Console()
    table = Table("op", "backend", "check", "passed", "failed")
    failures, totals = [], {}
    for case in cases(names, device, kind, backend):
        total = totals.setdefault((case.op, case.backend, case.check), [0, 0])
        try:
            case.run()
            total[0] += 1
        except Exception as error:
            total[1] += 1
            last = traceback.format_exception_only(error)[-1].strip()
            failures.append(f"{case}: {last}")
    for key, (passed, failed) in totals.items():
        table.add_row(*key, str(passed), f"[red]{failed}[/]" if failed else "0")
    console.print(table)
    for failure in failures:
        console.print(failure, style="red", markup=False, highlight=False)
    passed, failed = (sum(t[i] for t in totals.values()) for i in range(2))
    console.print(f"{passed} passed, {failed} failed" + (" (interpreted Triton)" if interpreting() else ""))
    has_triton = any("triton" in pykern.catalogue()[n].backends for n in names) and backend in (None, "triton")
    interprets = device == "cpu" and has_triton and not interpreting()
    code = 1 if failures or not (passed or interprets) else 0
    if not passed and not interprets and backend is not None:
        reasons = {n: _reason(n, backend, device) for n in names}
        console.print(*(f"{n} has nothing to check on {backend}: {reason}" for n, reason in reasons.items()), sep="\n")
    if interprets:
        # The interpreter has to be chosen before triton is imported, hence a process of its own.
        command = [sys.executable, "-m", "pykern.cli", "check", *targets, "--device", device, "--kind", kind]
        command += ["--backend", backend] if backend else []
        code |= subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, check=False).returncode
    return code


def bench(
    targets: Positional[tuple[str, ...]] = (),
    device: str | None = None,
    dtypes: tuple[str, ...] = ("float32", "bfloat16"),
    budget: float = 1.0,
    out: Path | None = None,
) -> int:
    """Prints times as ratios to torch, interleaved in one run, and over the machine's floor.

    Args:
        targets: ops by name, and Python files outside the package that declare some.
        device: cpu or cuda; by default what there is.
        dtypes: torch dtypes by name.
        budget: seconds of measuring for each contestant.
        out: a JSON file for the results.
    """
    from pykern.testing import bench as engine
    from pykern.testing import peers as peer_libraries
    from pykern.testing import timing
    from pykern.testing.inputs import samples

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cpu" and any(os.environ.get(k) != v for k, v in timing.ENVIRONMENT.items()):
        # malloc reads these when a process starts.
        command = [sys.executable, "-m", "pykern.cli", *sys.argv[1:]]
        return subprocess.run(command, env={**os.environ, **timing.ENVIRONMENT}, check=False).returncode
    console, records, code = Console(), [], 0
    for name in resolve(targets):
        spec = pykern.catalogue()[name]
        peers = peer_libraries.peers(spec)
        for dtype in (getattr(torch, d) for d in dtypes):
            for sample in samples(spec, "bench", device, dtype):
                right = {n: p for n, p in peers.items() if peer_libraries.fault(spec, p, sample.args) is None}
                for mode in engine.modes(sample.args):
                    table = Table(title=f"{name} · {sample.name} · {str(dtype)[6:]} · {mode}", title_justify="left")
                    for column in ("", "time", "× torch", "95 %", "× floor", "peak MiB", "host µs"):
                        table.add_column(column, justify="left" if not column else "right")
                    for record in engine.run(spec, sample, mode, device, dtype, budget, right):
                        if isinstance(record, tuple):
                            console.print(f"{name} {record[0]}: wrong, so not timed: {record[1]}", style="red")
                            code = 1
                            continue
                        records.append(record)
                        table.add_row(*_row(record))
                    console.print(table)
        if out is not None:  # after each op: what is measured stays, should the rest be interrupted
            engine.write(out, " ".join(["pykern", *sys.argv[1:]]), device, list(map(asdict, records)))
    console.print(" · ".join(f"{k} {v}" for k, v in engine.machine(device).items()), highlight=False)
    return code


def forward_ops() -> dict[str, OpSpec]:
    return {name: spec for name, spec in pykern.catalogue().items() if spec.gradient is not None}


def backend_table() -> str:
    """The op × backend table of the README."""
    names = ["reference", "cpu", "triton", "cuda"]
    lines = ["| op | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for name, spec in forward_ops().items():
        if spec.namespace == "pykern":
            marks = ["yes" if n == "reference" or n in spec.backends else "" for n in names]
            lines.append(f"| `{name}` | " + " | ".join(marks) + " |")
    return "\n".join(lines)


def resolve(targets: Sequence[str]) -> list[str]:
    """Op names, after importing the files among the targets; a file stands for the ops it declares."""
    names: list[str] = []
    for target in targets:
        if target.endswith(".py"):
            before = set(forward_ops())
            _import_file(Path(target))
            added = [n for n in forward_ops() if n not in before]
            if not added:
                sys.exit(f"error: op: {target} declares no op")
            names += added
        elif target in forward_ops():
            names.append(target)
        else:
            sys.exit(f"error: op: expected a Python file or one of {', '.join(forward_ops())}, got {target!r}")
    return names or list(forward_ops())


def _reason(name: str, backend: str, device: str) -> str:
    spec = pykern.catalogue()[name]
    if backend not in spec.backends:
        return f"it has no such backend, only {', '.join([*spec.backends, 'reference'])}"
    return unavailable(backend, spec.backends[backend], device) or "no sample fits it"


def interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _import_file(path: Path) -> None:
    if not path.is_file():
        sys.exit(f"error: op: there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)


def _row(record: object) -> tuple[str, ...]:
    time = record.seconds
    text = f"{time * 1e3:.3f} ms" if time >= 1e-4 else f"{time * 1e6:.1f} µs"
    return (
        record.contestant,
        text,
        "" if record.speedup is None else f"{record.speedup:.2f}",
        "" if record.speedup is None else f"{record.low:.2f}–{record.high:.2f}",
        "" if record.over_floor is None else f"{record.over_floor:.2f}",
        f"{record.peak_bytes / 2**20:.1f}",
        f"{record.host_seconds * 1e6:.1f}",
    )

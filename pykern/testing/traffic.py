"""What kernels move through memory, over what their op's `cost` says must be moved, counted where there is no GPU.

The Triton interpreter and the CUDA emulator record each launch: of every argument the bytes requested and the different
bytes among them. From these comes what a GPU would move. A tensor that is small beside its launch (its different bytes
times 8 are at most the launch's) stays in the caches and moves once a launch; every other one moves each time it is
requested. So partial sums move when they are written, and again in the launch that reads them.

An op's `traffic` says how many times its cost a call may move; without, a forward may move 1.0 times, a backward 1.1
times. Its `samples` of kind "traffic" are to be so large that partial sums weigh what they do on a GPU: interpreter and
emulator have two processors.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

import pykern
from pykern.ops._spec import OpSpec, Sample
from pykern.testing import bench, checks
from pykern.testing.inputs import map_tensors, samples

SMALL = 8  # times smaller than the launch, so that it stays in the caches
SECTOR = 32  # bytes that a GPU moves at the least
BACKENDS = ("triton", "cuda")


@dataclass
class Row:
    """One call of an op. `moved` and `requested` are bytes, `flops` those of tensor cores."""

    op: str
    backend: str
    sample: str
    moved: float
    requested: float
    flops: float
    sectors: float | None
    cost_flops: float
    cost_bytes: float
    limit: float

    @property
    def over_cost(self) -> float:
        return self.moved / self.cost_bytes

    @property
    def within(self) -> bool:
        return self.moved <= self.limit * self.cost_bytes


def measure(spec: OpSpec, backend: str, sample: Sample) -> Iterator[Row]:
    """The traffic of one forward, and of its backward where something wants a gradient and the backend has it."""
    forward = map_tensors(lambda t: t.detach(), sample.args)
    yield _count(spec, backend, sample.name, forward, limit=1.0)
    backward = spec.gradient.op
    if backend in backward.backends:
        args = checks.backward_args(spec, backend, sample.args)
        if any(args[-1]):
            yield _count(backward, backend, sample.name, args, limit=1.1)


def moved(launch: dict[str, Any]) -> float:
    """Bytes that a launch moves, small tensors once and others at every request."""
    unique = {name: r["unique_read"] + r["unique_written"] for name, r in launch["regions"].items()}
    total = sum(unique.values())
    return sum(
        unique[name] if unique[name] * SMALL <= total else r["read"] + r["written"]
        for name, r in launch["regions"].items()
    )


def traffic(
    targets: Positional[tuple[str, ...]] = (), dtype: str | None = None, check: bool = False, out: Path | None = None
) -> int:
    """Prints the bytes that kernels move over those that their op must, and tensor-core flops likewise.

    Args:
        targets: ops by name, and Python files outside the package that declare some; all that have a Triton or CUDA
            kernel by default.
        dtype: of the samples' floats, a torch dtype by name; bfloat16 by default, float32 for a kernel without it.
        check: fail where an op moves more than its limit.
        out: a JSON file for the results.
    """
    from pykern.testing.commands import interpreting, resolve

    names = [n for n in resolve(targets) if any(b in pykern.catalogue()[n].backends for b in BACKENDS)]
    rows = list(_rows(names, (dtype,) if dtype else ("bfloat16", "float32")))
    console = Console() if sys.stdout.isatty() else Console(width=int(os.environ.get("COLUMNS", 140)))
    if rows:
        console.print(_table(rows))
    failures = [row for row in rows if check and not row.within]
    for row in failures:
        text = f"{row.op} {row.backend} {row.sample}: {row.over_cost:.3f} times the cost, the limit is {row.limit}"
        console.print(text, style="red", highlight=False)
    if out is not None:
        records = [asdict(row) for row in rows]
        if interpreting():  # the process that started this one has written its own
            records = json.loads(out.read_text())["records"] + records
        bench.write(out, f"pykern traffic {' '.join([*targets, '--out', str(out)])}", "cpu", records)
    code = 1 if failures else 0
    if not interpreting() and any("triton" in pykern.catalogue()[n].backends for n in names):
        # The interpreter has to be chosen before triton is imported, hence a process of its own.
        command = [sys.executable, "-m", "pykern.cli", "traffic", *targets]
        command += ["--dtype", dtype] if dtype else []
        command += ["--check"] if check else []
        command += ["--out", str(out)] if out is not None else []
        code |= subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, check=False).returncode
    elif not rows:
        console.print("no op among these has a kernel that could be counted here", style="red")
        code = 1
    return code


def _rows(names: Sequence[str], dtypes: Sequence[str]) -> Iterator[Row]:
    """In the first of the dtypes that a backend serves."""
    from pykern.testing.cases import backends

    for name in names:
        spec = pykern.catalogue()[name]
        for backend in (b for b in backends(spec, "cpu") if b in BACKENDS and spec.cost is not None):
            for dtype in dtypes:
                found = [
                    sample
                    for sample in samples(spec, "traffic", "cpu", getattr(torch, dtype))
                    if spec.why_not(backend, sample.args) is None and spec.cost(*sample.args)[1] > 0
                ]
                for sample in found:
                    yield from measure(spec, backend, sample)
                if found:
                    break


def _count(spec: OpSpec, backend: str, sample: str, args: Sequence[Any], limit: float) -> Row:
    with _counted(backend) as launches:
        spec.run(*args, backend=backend)
    regions = [region for launch in launches for region in launch["regions"].values()]
    requested = sum(r["read"] + r["written"] for r in regions)
    sectors = sum(launch.get("read_sectors", 0) + launch.get("write_sectors", 0) for launch in launches)
    return Row(
        spec.basename if spec.namespace == "pykern" else spec.name,
        backend,
        sample,
        sum(map(moved, launches)),
        requested,
        sum(launch["tensor_flops"] for launch in launches),
        requested / (sectors * SECTOR) if sectors else None,
        *spec.cost(*args),
        limit if spec.traffic is None else spec.traffic(backend, *args),
    )


@contextmanager
def _counted(backend: str) -> Iterator[list[dict[str, Any]]]:
    if backend == "triton":
        from pykern.testing import interpreter

        with interpreter.counted() as launches:
            yield launches
    else:
        from pykern.testing import emulator

        with emulator.configured(multiprocessors=2), emulator.counted() as launches:
            yield launches


def _table(rows: Sequence[Row]) -> Table:
    flops = ("tensor flops × cost",) if any(row.flops for row in rows) else ()
    table = Table("op", "backend", "sample")
    for column in ("KiB moved", "× cost", "limit", "requested × cost", "of its sectors", *flops):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row.op,
            row.backend,
            row.sample,
            f"{row.moved / 1024:.0f}",
            f"{row.over_cost:.3f}" if row.within else f"[red]{row.over_cost:.3f}[/]",
            f"{row.limit:g}",
            f"{row.requested / row.cost_bytes:.3f}",
            "" if row.sectors is None else f"{row.sectors:.0%}",
            *([f"{row.flops / row.cost_flops:.3f}" if row.flops else ""] if flops else []),
        )
    return table

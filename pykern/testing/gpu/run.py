"""Plans a run, gives each part its time, keeps the results, prints the summary."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pykern.testing import bench
from pykern.testing.gpu.child import Config, Journal
from pykern.testing.gpu.paths import RESULTS, ROOT
from pykern.testing.gpu.summary import summary


@dataclass(frozen=True)
class Part:
    """One step of the sequence, in processes of its own; `units` is the MODULE:FUNCTION that yields what it does."""

    name: str
    seconds: float  # its share of the time; what earlier parts leave over comes on top
    units: str
    sources: tuple[str, ...] = ("pykern", "kernels", "csrc", "setup.py")  # whose change makes a result stale


_HERE = "pykern.testing.gpu"
_WITH_TESTS = (*Part.sources, "tests")
PARTS = (
    Part("build", 40, f"{_HERE}.parts:build"),
    Part("conformance", 40, f"{_HERE}.parts:conformance", _WITH_TESTS),
    Part("tests", 150, f"{_HERE}.tools:tests", _WITH_TESTS),
    Part("sanitizer", 100, f"{_HERE}.tools:sanitizer", _WITH_TESTS),
    Part("repeat", 50, f"{_HERE}.parts:repeat"),
    Part("bench", 140, f"{_HERE}.parts:benchmarks"),
    Part("ledger", 30, f"{_HERE}.parts:ledger"),
)


def gpu(
    parts: Sequence[str] = (),
    dry_run: bool = False,
    out: Path | None = None,
    budget: float = 540.0,
    peers: Path | None = None,
    ops: Sequence[str] = (),
    seed: int | None = None,
    commit: str | None = None,
) -> int:
    """Runs everything that needs a GPU, and prints one page; 1 if anything failed or is missing.

    A part that has a result for the same sources, machine and options is not repeated; one that ran out of time goes
    on where it stopped. Parts run in processes of their own, so that none stops another.

    Args:
        parts: some of build, conformance, tests, sanitizer, repeat, bench, ledger; all by default.
        dry_run: rehearses on the CPU with tiny inputs; the results go to a folder for temporary files.
        out: the folder in which results are kept, by the GPU's name; benchmarks/results by default.
        budget: seconds for everything together.
        peers: a folder of wheels of libraries to compare with; they are installed for this run alone.
        ops: the ops to take; all by default.
        seed: of the random inputs; drawn and printed by default.
        commit: named in the results where there is no git.
    """
    chosen = [part for part in PARTS if part.name in parts or not parts]
    unknown = set(parts) - {part.name for part in PARTS}
    if unknown:
        sys.exit(f"error: part: expected one of {', '.join(p.name for p in PARTS)}, got {', '.join(sorted(unknown))}")
    if not dry_run and not torch.cuda.is_available():
        sys.exit("error: torch sees no usable GPU here; --dry-run rehearses on the CPU")
    if dry_run and out is not None and RESULTS in (out.resolve(), *out.resolve().parents):
        sys.exit(f"error: out: a rehearsal's results are none, so not into {RESULTS.relative_to(ROOT)}")
    if out is None:
        out = Path(tempfile.mkdtemp(prefix="pykern-gpu-dry-run-")) if dry_run else RESULTS
    device = "cpu" if dry_run else "cuda"
    seed = int(time.time()) % 2**31 if seed is None else seed
    with tempfile.TemporaryDirectory(prefix="pykern-gpu-") as scratch:
        config = Config(device, dry_run, tuple(ops), seed, str(peers.resolve()) if peers else None, scratch)
        about = _about(config, commit)
        folder = out / ("dry-run" if dry_run else re.sub(r"[^a-z0-9]+", "-", about["machine"].lower()).strip("-"))
        results = run(chosen, config, folder, budget, about)
    text = summary(results, about, folder)
    (folder / "summary.txt").write_text(text + "\n")
    print(text)
    return 0 if all(result["status"] == "passed" for result in results) else 1


def run(
    parts: Sequence[Part], config: Config, folder: Path, budget: float, about: dict[str, Any]
) -> list[dict[str, Any]]:
    """The result of each part, new or kept, as it stands in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    end = time.time() + budget
    keys = {part.name: _key(part, config, about) for part in parts}
    kept = {part.name: _kept(folder / f"{part.name}.json", keys[part.name]) for part in parts}
    waiting = [part for part in parts if (kept[part.name] or {}).get("status") not in ("passed", "failed")]
    scale = budget / (sum(part.seconds for part in waiting) or 1)
    results = []
    for part in parts:
        result = kept[part.name]
        if part not in waiting:
            _say(f"{part.name}: {result['status']} before, not repeated")
        else:
            later = scale * sum(other.seconds for other in waiting[waiting.index(part) + 1 :])
            seconds = end - time.time() - later
            _say(f"{part.name}: at most {seconds:.0f} s")
            result = _run_part(part, config, seconds, result["units"] if result else {})
            result = {"part": part.name, "key": keys[part.name], "about": about, **result}
            _write(folder / f"{part.name}.json", result)
        results.append(result)
    return results


def _run_part(part: Part, config: Config, seconds: float, done: dict[str, Any]) -> dict[str, Any]:
    start = time.time()
    journal = Journal(Path(config.scratch) / f"{part.name}.jsonl")
    for name, result in done.items():
        journal.write(unit=name, result=result)
    config = dataclasses.replace(config, deadline=start + 0.95 * seconds)
    command = [sys.executable, "-m", "pykern.testing.gpu.child", part.units, str(journal.path)]
    command.append(json.dumps(dataclasses.asdict(config)))
    error = None
    while True:
        before = len(journal.read())
        log = Path(config.scratch) / f"{part.name}.log"
        code = _watch(command, log, start + seconds - time.time())
        new = journal.read()[before:]
        if code is None or any("end" in entry for entry in new):
            break
        words = log.read_text(errors="replace")[-2000:]
        begun = new[-1].get("begin") if new else None
        if begun is not None:
            message = f"the process ended with {code} in this unit"
            journal.write(unit=begun, result={"ok": False, "error": message, "output": words})
        elif not any("unit" in entry for entry in new):
            error = f"the process ended with {code} before it began\n{words}"
            break
    return {"status": None, "seconds": round(time.time() - start, 1), **_outcome(journal, code is None, error)}


def _outcome(journal: Journal, stopped: bool, error: str | None) -> dict[str, Any]:
    entries = journal.read()
    units = {entry["unit"]: entry["result"] for entry in entries if "unit" in entry}
    left = [entry["left"] for entry in entries if "left" in entry]
    left += [entry["begin"] for entry in entries[-1:] if "begin" in entry]
    left = [name for name in dict.fromkeys(left) if name not in units]
    verdicts = {result["ok"] for result in units.values()}
    if error is not None:
        status = "error"
    elif stopped or left:
        status = "timeout"
    elif False in verdicts:
        status = "failed"
    else:
        # Where nothing could be looked at, nothing is proved.
        status = "passed" if True in verdicts else "absent"
    return {"status": status, "units": units, "left": left} | ({"error": error} if error else {})


def _watch(command: Sequence[str], log: Path, seconds: float) -> int | None:
    """The exit code of a command, or None if it was stopped because the time was over, with all that it started."""
    if seconds <= 0:
        return None
    # Left alone, a crash in a kernel would leave a core file of the size of the process.
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _about(config: Config, commit: str | None) -> dict[str, Any]:
    facts: dict[str, Any] = bench.machine(config.device)
    return {
        **facts,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "driver": _said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "commit": commit or _said_by("git", "describe", "--always", "--dirty", "--abbrev=40", "--match="),
        "command": " ".join(["pykern gpu", *sys.argv[1:]]),
        "seed": config.seed,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    } | ({"dry_run": "on the CPU, with stand-ins for tools: these are no results"} if config.dry else {})


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _said_by(*command: str) -> str | None:
    try:
        answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None if answer.returncode == 0 else None


def _key(part: Part, config: Config, about: dict[str, Any]) -> str:
    """Of what decides a part's result. The commit does not: a checkout without git, or with changes, has none."""
    machine = [about.get(name) for name in ("machine", "python", "torch", "triton", "cuda", "driver")]
    options = [part.name, part.units, config.device, config.dry, config.ops, config.peers and Path(config.peers).name]
    digest = hashlib.sha256(json.dumps([machine, options]).encode())
    for source in part.sources:
        path = ROOT / source
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            if file.suffix in (".py", ".cu", ".cuh", ".cpp", ".h"):
                digest.update(str(file.relative_to(ROOT)).encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def _kept(path: Path, key: str) -> dict[str, Any] | None:
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return result if result.get("key") == key else None


def _write(path: Path, result: dict[str, Any]) -> None:
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(fresh, path)


def _say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def main(args: Sequence[str] | None = None) -> int:
    """`gpu` from the flags of a command line."""
    parser = argparse.ArgumentParser(prog="pykern gpu", description=gpu.__doc__.split("\n\n")[0])
    names = ", ".join(part.name for part in PARTS)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"some of {names}; all by default")
    parser.add_argument("--dry-run", action="store_true", help="rehearse on the CPU with tiny inputs")
    parser.add_argument("--out", type=Path, help="the folder for results; benchmarks/results by default")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds for everything together (540)")
    parser.add_argument("--peers", type=Path, help="a folder of wheels of libraries to compare with")
    parser.add_argument("--ops", nargs="+", default=(), help="the ops to take; all by default")
    parser.add_argument("--seed", type=int, help="of the random inputs; drawn and printed by default")
    parser.add_argument("--commit", help="named in the results where there is no git")
    return gpu(**vars(parser.parse_args(args)))

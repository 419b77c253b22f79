"""The parts that run other programs: pytest, and NVIDIA's compute-sanitizer."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pykern.testing.gpu import sanitized
from pykern.testing.gpu.child import Config, Unit
from pykern.testing.gpu.paths import ROOT

WORKERS = 8  # processes that share the GPU: most of a test's time is the host's


def tests(config: Config) -> Iterator[Unit]:
    """Every test file that heeds --device; all others need no GPU, and CI has run them."""

    def unit(file: Path) -> dict[str, Any]:
        journal = Path(config.scratch) / f"{file.stem}.jsonl"
        command = [sys.executable, "-m", "pytest", str(file), f"--device={config.device}", "-q", "--tb=short"]
        command += [f"--kind={'smoke' if config.dry else 'full'}", "-p", "no:cacheprovider"]
        command += ["-p", "pykern.testing.gpu.journal_plugin", f"--journal={journal}"]
        workers = min(WORKERS, (os.cpu_count() or 1) - 1)
        if workers > 1 and not config.dry and importlib.util.find_spec("xdist"):
            command += ["-n", str(workers)]
        if config.ops:
            command += [
                "-k",
                " or ".join(config.ops) + (" and accuracy" if config.dry and len(config.ops) == 1 else ""),
            ]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=max(config.remaining, 1))
            code, said = done.returncode, done.stdout[-3000:] + done.stderr[-1000:]
        except subprocess.TimeoutExpired:
            code, said = None, ""
        lines = journal.read_text().splitlines() if journal.exists() else []
        return test_result([json.loads(line) for line in lines], code, said)

    for file in sorted((ROOT / "tests").glob("test_*.py")):
        if 'getoption("--device")' in file.read_text():
            yield file.name, lambda file=file: unit(file)


def test_result(entries: Sequence[dict[str, Any]], code: int | None, said: str) -> dict[str, Any]:
    """A unit's result from the journal of its tests, pytest's exit code (None: stopped) and what it printed."""
    outcomes = Counter(entry["outcome"] for entry in entries)
    failed = [e for e in entries if e["outcome"] == "failed"]
    failures = [f"{e['test'].partition('::')[2] or e['test']}: {e['message'].splitlines()[0]}" for e in failed]
    skipped = Counter(e["message"] for e in entries if e["outcome"] == "skipped")
    result = {
        "passed": outcomes["passed"],
        "failed": len(failed),
        "skipped": dict(skipped),
        "failures": failures,
        "messages": {e["test"]: e["message"] for e in failed},
        "note": f"{outcomes['passed']} passed" + (f", {sum(skipped.values())} skipped" if skipped else ""),
    }
    if code == 0 and outcomes["passed"] and not failed:
        return {"ok": True, **result}
    words = {None: "stopped: no time", 0: "no test was run", 1: "tests failed", 5: "no test was found"}
    error = f"{words.get(code, f'pytest ended with {code}')} ({len(failed)} failed, {outcomes['passed']} passed)"
    return {"ok": False, **result, "error": error, "output": said}


def sanitizer(config: Config) -> Iterator[Unit]:
    """compute-sanitizer over small calls of every kernel, and over a kernel with a fault that it has to see.

    The tools run all at once, since a process under one of them spends most of its time on loading.
    """
    running: dict[str, tuple[subprocess.Popen[str], Path]] = {}
    program = _stand_in(Path(config.scratch)) if config.dry else shutil.which("compute-sanitizer")
    planted = sanitized.prepare(config.device) if program and not config.dry else None

    def start(tool: str) -> None:
        log = Path(config.scratch) / f"{tool}.log"
        command = [str(program), "--tool", tool, "--log-file", str(log), "--print-limit", "1000"]
        command += ["--report-api-errors", "no", "--target-processes", "application-only"]
        command += [sys.executable, "-m", "pykern.testing.gpu.sanitized", config.device, str(config.seed)]
        command += ["-" if planted else tool, *config.ops]
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # else a tensor's neighbour is torch's pool
        if config.dry:
            environment["TRITON_INTERPRET"] = "1"
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        running[tool] = process, log

    def unit(tool: str) -> dict[str, Any]:
        if not program:
            return {"ok": None, "reason": "compute-sanitizer is not on the PATH"}
        if tool not in running:
            start(tool)
        process, log = running[tool]
        try:
            said, _ = process.communicate(timeout=max(config.remaining, 1))
        except subprocess.TimeoutExpired:
            process.kill()
            return {"ok": False, "error": "stopped: no time", "output": process.communicate()[0][-3000:]}
        text = log.read_text(errors="replace") if log.exists() else ""
        stand_in = {"stand_in": True, "note": "by a stand-in for compute-sanitizer"} if config.dry else {}
        return {**sanitizer_result(tool, text, said, planted), **stand_in}

    if program:
        for tool in sanitized.TOOLS:
            start(tool)
    for tool in sanitized.TOOLS:
        yield tool, lambda tool=tool: unit(tool)


def sanitizer_result(tool: str, log: str, said: str, planted: str | None) -> dict[str, Any]:
    """A unit's result from the tool's log and what its program printed; `planted` says why no fault was planted."""
    reports = parse_reports(log)
    seen = [report for report in reports if f"{tool}_kernel" in report["kernel"]]
    real = [f"{report['what']} in {report['kernel'] or 'no kernel'}" for report in reports if report not in seen]
    calls = re.search(r"^calls (\d+)$", said, re.MULTILINE)
    count = int(calls[1]) if calls else 0
    result = {"calls": count, "planted": planted or ("seen" if seen else "not seen"), "failures": real[:50]}
    result |= {"note": f"{count} calls, {len(real)} reports, planted fault: {result['planted']}"}
    if "SUMMARY" not in log:
        why = (log.strip() or said.strip() or "nothing was printed").splitlines()[-1]
        return {"ok": False, **result, "error": f"no summary: {why}", "output": (log + said)[-3000:]}
    if not count:
        return {"ok": False, **result, "error": "the calls did not come to their end", "output": said[-3000:]}
    if real:
        return {"ok": False, **result, "error": f"{len(real)} reports", "output": log[-6000:]}
    if not planted and not seen:
        return {"ok": False, **result, "error": "a planted fault was not seen, so silence proves nothing"}
    return {"ok": True, **result}


def parse_reports(log: str) -> list[dict[str, str]]:
    """What compute-sanitizer reports, each with the kernel in which it happened.

    A report is a line behind one space, with its details further to the right in the lines below it.
    """
    reports: list[dict[str, str]] = []
    for line in log.splitlines():
        words = re.match(r"=========( +)(\S.*)", line)
        if not words:
            continue
        if len(words[1]) == 1:
            if _REMARK.match(words[2]):
                continue
            reports.append({"what": words[2], "kernel": ""})
        place = re.search(r"\bat (?:0x[0-9a-f]+ in )?(\S.*?)(?:\+0x[0-9a-f]+| in \S+:\d+|$)", words[2])
        if place and reports and not reports[-1]["kernel"]:
            reports[-1]["kernel"] = place[1]
    return reports


# Lines of compute-sanitizer that report nothing about a kernel.
_REMARK = re.compile(r"COMPUTE-SANITIZER|[A-Z ]*SUMMARY|Target application|Error: process didn't|Saved host")


def _stand_in(scratch: Path) -> str:
    """For a rehearsal: a program that takes the sanitizer's options, runs the command, and writes such a log."""
    path = scratch / "compute-sanitizer"
    path.write_text(f"#!{sys.executable}\nfrom pykern.testing.gpu.sanitized import stand_in\nstand_in()\n")
    path.chmod(0o755)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return str(path)

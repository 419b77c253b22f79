"""`make gpu` without a GPU: its rehearsal, its bookkeeping, what it makes of tools' output, and golden vectors."""

import json
import os
import re
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pykern import extension, toolchain
from pykern.testing.gpu import golden, tools
from pykern.testing.gpu.child import Config
from pykern.testing.gpu.paths import RESULTS
from pykern.testing.gpu.run import PARTS, Part, gpu, main, run
from pykern.testing.gpu.summary import LINES, summary

ABOUT = {"machine": "a machine", "commit": "abc", "seed": 3, "torch": torch.__version__}


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rehearsal")
    before = _files(RESULTS)
    gpu(dry_run=True, out=out, ops=["layer_norm"], budget=900, seed=5)
    assert _files(RESULTS) == before, "a rehearsal has touched the committed results"
    return out / "dry-run"


def _files(folder: Path) -> dict[Path, float]:
    return {path: path.stat().st_mtime for path in folder.rglob("*")}


@pytest.mark.parametrize("part", [part.name for part in PARTS])
def test_rehearsal_of(part: str, rehearsed: Path) -> None:
    result = json.loads((rehearsed / f"{part}.json").read_text())
    # What a machine has no compiler or emulator for is not there; nothing may fail.
    lacking = {unit["reason"] for unit in result["units"].values() if unit["ok"] is None}
    assert result["status"] == ("passed" if not lacking else "absent"), (result.get("error"), result["units"])
    assert "dry_run" in result["about"] and result["about"]["seed"] == 5
    if part == "build":
        from pykern import _native

        assert lacking == ({_native.reason} - {None})
    elif part == "conformance":
        assert lacking == ({extension.Library("unused", golden.SOURCE).missing("cpu")} - {None})
    else:
        assert not lacking


def test_rehearsal_ran_the_checks(rehearsed: Path) -> None:
    found = {part.name: json.loads((rehearsed / f"{part.name}.json").read_text())["units"] for part in PARTS}
    assert found["tests"]["test_ops.py"]["passed"] > 10
    assert all(unit["stand_in"] and unit["calls"] and unit["planted"] == "seen" for unit in found["sanitizer"].values())
    assert all(unit["samples"] > 5 and unit["repeats"] == 20 for unit in found["repeat"].values())
    timed = [record for unit in found["bench"].values() for record in unit.get("records", ())]
    assert {"cpu", "torch", "torch.compile", "reference"} <= {record["contestant"] for record in timed}
    assert all(unit["offline"]["registers"] == unit["loaded"]["registers"] for unit in found["ledger"].values())


def test_rehearsal_stays_out_of_the_results() -> None:
    with pytest.raises(SystemExit, match="rehearsal"):
        gpu(dry_run=True, out=RESULTS / "somewhere")


def test_wrong_usage() -> None:
    with pytest.raises(SystemExit, match="expected one of build, .*got benhc"):
        gpu(["benhc"], dry_run=True)
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="no usable GPU"):
            main([])


UNITS = """
    import os, subprocess, sys, time
    from pathlib import Path

    def note(config, text):
        with open(Path(os.environ["UNITS_LOG"]), "a") as file:
            file.write(text + "\\n")

    def unit(config, name, result=True):
        return name, lambda: (note(config, name), {"ok": result, "seed": config.seed})[1]

    def good(config):
        yield unit(config, "one")
        yield unit(config, "two")

    def raises(config):
        yield unit(config, "one")
        yield "wrong", lambda: 1 / 0
        yield unit(config, "two")

    def crashes(config):
        yield unit(config, "one")
        yield "crash", lambda: os.abort()
        yield unit(config, "two")

    def hangs(config):
        yield unit(config, "one")
        if not Path(os.environ["UNITS_LOG"] + ".mended").exists():
            child = [sys.executable, "-c", "import time; time.sleep(600)"]
            yield "hang", lambda: subprocess.run(child)
        yield unit(config, "two")

    def slow(config):
        yield "slow", lambda: (time.sleep(config.remaining + 0.01), {"ok": True})[1]
        yield unit(config, "late")

    def never(config):
        raise RuntimeError("these units cannot be made")
        yield

    def absent(config):
        yield "tool", lambda: {"ok": None, "reason": "there is no tool"}
"""


class Bench:
    """Parts of a test's own, run as `make gpu` runs its own."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.log = folder, folder / "log"
        (folder / "gpu_units.py").write_text(textwrap.dedent(UNITS))
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
        monkeypatch.setenv("UNITS_LOG", str(self.log))

    def __call__(self, *names: str, budget: float = 60.0, seed: int = 1, **options: Any) -> dict[str, dict[str, Any]]:
        parts = [Part(name, 1.0, f"gpu_units:{name}", ("setup.py",)) for name in names]
        scratch = self.folder / f"scratch{time.monotonic_ns()}"
        scratch.mkdir()
        config = replace(Config("cpu", True, (), seed, None, str(scratch)), **options)
        results = run(parts, config, self.folder / "out", budget, ABOUT)
        assert [json.loads((self.folder / f"out/{name}.json").read_text()) for name in names] == results
        return dict(zip(names, results, strict=True))

    def ran(self) -> list[str]:
        return self.log.read_text().split() if self.log.exists() else []


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, monkeypatch)


def test_a_part_that_fails_stops_no_other(bench: Bench) -> None:
    results = bench("raises", "crashes", "never", "absent", "good")
    assert {name: r["status"] for name, r in results.items()} == {
        "raises": "failed", "crashes": "failed", "never": "error", "absent": "absent", "good": "passed",
    }  # fmt: skip
    assert "ZeroDivisionError" in results["raises"]["units"]["wrong"]["error"]
    assert "ended with -6" in results["crashes"]["units"]["crash"]["error"]
    assert "these units cannot be made" in results["never"]["error"]
    # What comes behind a failure is still done, in a new process after a crash.
    assert all(results[name]["units"]["two"]["ok"] for name in ("raises", "crashes"))
    text = summary(list(results.values()), ABOUT, bench.folder)
    for words in ("raises       failed", "2 ok, 1 failed", "division by zero", "there is no tool", "NOT all passed"):
        assert words in text, text


def test_a_result_is_not_made_twice(bench: Bench) -> None:
    first = bench("good", "raises")
    count = len(bench.ran())
    assert bench("good", "raises", seed=2) == first and len(bench.ran()) == count == 4
    bench("good", "raises", ops=("rms_norm",))
    assert len(bench.ran()) == 2 * count, "other options, and yet nothing was run"


def test_a_result_of_other_sources_is_stale(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pykern.testing.gpu import run as module

    (tmp_path / "setup.py").write_text("version = 1\n")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    bench("good")
    bench("good")
    assert len(bench.ran()) == 2
    (tmp_path / "setup.py").write_text("version = 2\n")
    bench("good")
    assert len(bench.ran()) == 4


def test_a_part_that_ran_out_of_time_goes_on_where_it_stopped(bench: Bench) -> None:
    start = time.monotonic()
    result = bench("hangs", budget=8)["hangs"]
    assert time.monotonic() - start < 60, "the limit did not hold"
    assert result["status"] == "timeout" and result["left"] == ["hang"] and list(result["units"]) == ["one"]
    assert "no time for hang" in summary([result], ABOUT, bench.folder)
    Path(f"{bench.log}.mended").touch()
    result = bench("hangs")["hangs"]
    assert result["status"] == "passed" and bench.ran() == ["one", "two"]


def test_no_unit_begins_after_the_deadline(bench: Bench) -> None:
    result = bench("slow", budget=6)["slow"]
    assert result["status"] == "timeout" and result["left"] == ["late"] and result["units"]["slow"]["ok"]


def test_the_summary_is_one_page() -> None:
    units = {f"unit {i}": {"ok": False, "error": f"error {i}\n{'x' * 300}"} for i in range(200)}
    results = [{"part": f"part{i}", "status": "failed", "seconds": 1.0, "units": units, "left": []} for i in range(7)]
    lines = summary(results, ABOUT, Path("out")).splitlines()
    assert LINES - 2 <= len(lines) <= LINES and max(map(len, lines)) <= 150
    assert all(any(line.startswith(f"part{i}: …") for line in lines) for i in range(7))


MEMCHECK = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at void pykern::norm_kernel<float, (int)4>(const float *, float *, long)+0x1b0 in norm.cuh:41
=========     by thread (96,0,0) in block (3,0,0)
=========     Access at 0x7f2b1fa00800 is out of bounds
=========     and is 1 bytes after the nearest allocation at 0x7f2b1fa00000 of size 2048 bytes
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame: cuLaunchKernel [0x2774ec] in libcuda.so.1
=========
========= Invalid __global__ write of size 4 bytes
=========     at pykern::<unnamed>::memcheck_kernel(const float *, float *, int)+0x90 in planted.cu:14
=========     by thread (0,0,0) in block (0,0,0)
=========
========= ERROR SUMMARY: 2 errors
"""
RACECHECK = """\
========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at racecheck_kernel(const float *)+0x90 in planted.cu:19
=========     and Read access at racecheck_kernel(const float *)+0xe0 in planted.cu:20 [384 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
CLEAN = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
REFUSED = "========= COMPUTE-SANITIZER\n========= Error: Device not supported. Please refer to the documentation\n"


@pytest.mark.parametrize(
    ("tool", "log", "said", "planted", "ok", "words"),
    [
        ("memcheck", MEMCHECK, "calls 7\n", None, False, "1 reports"),
        ("racecheck", RACECHECK, "calls 7\n", None, True, ""),
        ("racecheck", RACECHECK, "calls 0\n", None, False, "did not come to their end"),
        ("racecheck", RACECHECK, "Segmentation fault\n", None, False, "did not come to their end"),
        ("initcheck", CLEAN, "calls 7\n", None, False, "a planted fault was not seen"),
        ("initcheck", CLEAN, "calls 7\n", "no nvcc was found", True, ""),
        ("synccheck", REFUSED, "calls 7\n", None, False, "no summary: .*Device not supported"),
        ("synccheck", "", "", None, False, "no summary: nothing was printed"),
    ],
)
def test_what_the_sanitizer_says(tool: str, log: str, said: str, planted: str | None, ok: bool, words: str) -> None:
    result = tools.sanitizer_result(tool, log, said, planted)
    assert result["ok"] is ok
    if words:
        assert re.search(words, result["error"])
    if log is MEMCHECK:
        where = "void pykern::norm_kernel<float, (int)4>(const float *, float *, long)"
        assert result["failures"] == [f"Invalid __global__ write of size 4 bytes in {where}"]
        assert result["planted"] == "seen"


def test_what_pytest_says() -> None:
    entries = [
        {"test": "tests/test_ops.py::test_op[a]", "outcome": "passed"},
        {"test": "tests/test_ops.py::test_op[b]", "outcome": "failed", "message": "AssertionError: y: wrong\nmore"},
        {"test": "tests/test_ops.py::test_op[c]", "outcome": "skipped", "message": "no reason"},
    ]
    result = tools.test_result(entries, 1, "")
    assert result["ok"] is False and result["failures"] == ["test_op[b]: AssertionError: y: wrong"]
    assert (result["passed"], result["failed"], result["skipped"]) == (1, 1, {"no reason": 1})
    assert tools.test_result(entries[:1], 0, "")["ok"] is True
    for passed, code, words in [
        (entries[:1], None, "no time"),
        ([], 0, "no test was run"),
        ([], 5, "no test was found"),
    ]:
        result = tools.test_result(passed, code, "")
        assert result["ok"] is False and words in result["error"]


@pytest.mark.parametrize("name", golden.VECTORS)
def test_golden_vectors_are_the_same_everywhere(name: str) -> None:
    first, second = golden.make(golden.VECTORS[name]), golden.make(golden.VECTORS[name])
    for one, other in zip(first, second, strict=True):
        if isinstance(one, torch.Tensor):
            assert one.numel() > 1 and one.unique().numel() > 1
            again = golden.decode(json.loads(json.dumps(golden.encode(one))))
            assert again.dtype == one.dtype and torch.equal(again.view(torch.uint8), other.view(torch.uint8))
        else:
            assert one == other


EMULATED = extension.Library("pykern_fragments", golden.SOURCE)
needs_emulator = pytest.mark.skipif(toolchain.cuda_include() is None, reason="the emulator needs CUDA's headers")


@needs_emulator
@pytest.mark.parametrize("name", golden.VECTORS)
def test_the_emulator_agrees_with_itself_and_with_nothing_else(name: str) -> None:
    recorded = golden.record(EMULATED.load("cpu"), golden.VECTORS[name], "cpu")
    assert golden.disagreement(EMULATED.load("cpu"), recorded) is None
    result = golden.decode(recorded["results"][0])
    assert result.count_nonzero() > 0
    flat = result.reshape(-1)
    # Two elements in each other's places, as by a wrong layout.
    place = int((flat != flat[0]).nonzero()[0])
    flat[[0, place]] = flat[[place, 0]]
    recorded["results"][0] = golden.encode(result)
    assert "2 of" in golden.disagreement(EMULATED.load("cpu"), recorded)


# Nothing is committed before the first run on a GPU; then there is a test for each of its vectors.
COMMITTED = {
    (path.parent.name, name): unit["vector"]
    for path in sorted(RESULTS.glob("*/conformance.json"))
    for name, unit in json.loads(path.read_text())["units"].items()
    if "vector" in unit
}
if COMMITTED:

    @needs_emulator
    @pytest.mark.parametrize("key", COMMITTED, ids=" ".join)
    def test_the_emulator_does_what_a_gpu_did(key: tuple[str, str]) -> None:
        assert golden.disagreement(EMULATED.load("cpu"), COMMITTED[key]) is None

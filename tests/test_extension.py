"""An op and a CUDA kernel outside the package: the ones that the docs walk through."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pykern import toolchain
from pykern.extension import Library

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(toolchain.cuda_include() is None, reason="the emulator needs CUDA's headers")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def my_op(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outside")
    declaration, public = blocks("adding-an-op.md", "python")[:2]
    (backend,) = blocks("kernels-without-a-gpu.md", "python")
    (folder / "my_op.py").write_text("\n".join([declaration, public, backend]))
    (folder / "sine.cu").write_text(blocks("kernels-without-a-gpu.md", "cpp")[0])
    return folder / "my_op.py"


def pykern(*command: str | Path, fails: bool = False) -> str:
    env = {**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "pykern", *command], env=env, capture_output=True, text=True)
    assert bool(done.returncode) == fails, done.stdout + done.stderr
    return done.stdout + done.stderr


def with_change(my_op: Path, folder: Path, right: str, wrong: str) -> Path:
    source = my_op.with_name("sine.cu").read_text()
    assert right in source
    (folder / "sine.cu").write_text(source.replace(right, wrong))
    return Path(shutil.copy(my_op, folder / "my_op.py"))


def test_check(my_op: Path) -> None:
    printed = pykern("check", my_op, "--backend", "cuda")
    assert "orders" in printed and re.search(r"[1-9]\d* passed, 0 failed", printed)


def test_check_finds_a_fault(my_op: Path, tmp_path: Path) -> None:
    broken = with_change(my_op, tmp_path, "if (i < n)", "if (i <= n)")
    printed = pykern("check", broken, "--backend", "cuda", fails=True)
    assert "out of bounds: read of 4 bytes that begins 0 bytes past the end of x" in printed


def test_sanitizers_find_what_the_emulator_does_not(my_op: Path, tmp_path: Path) -> None:
    # A thread's own stack is no memory that the emulator watches: by itself it would only see wrong numbers.
    store = "if (i < n) y[i] = sinf(x[i]) * factor"
    table = "float ones[4] = {1, 1, 1, 1}, *one = ones + threadIdx.x % 4;\n  " + store
    right = with_change(my_op, tmp_path, store, f"{table} * one[0]")
    assert "0 failed" in pykern("check", right, "--backend", "cuda", "--sanitize")
    wrong = with_change(my_op, tmp_path, store, f"{table} * one[1]")
    printed = pykern("check", wrong, "--backend", "cuda", "--sanitize", fails=True)
    assert re.search("stack-buffer-overflow|too small an object", printed)


def test_traffic(my_op: Path) -> None:
    assert "cuda" in pykern("traffic", my_op)


@pytest.mark.skipif(toolchain.find_nvcc() is None, reason="no nvcc")
def test_ledger(my_op: Path) -> None:
    assert "1 CUDA kernels" in pykern("ledger", my_op, "--arch", "90a", "--update")
    assert (my_op.parent / "my_op.ledger.json").is_file()
    pykern("ledger", my_op, "--arch", "90a")


def test_a_source_that_does_not_compile_is_shown(tmp_path: Path) -> None:
    (tmp_path / "wrong.cu").write_text("this is no C++\n")
    with pytest.raises(RuntimeError, match="wrong.cu:1"):
        Library("pykern_test_wrong", tmp_path / "wrong.cu").load("cpu")


def test_a_source_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere.cu"):
        Library("pykern_test_nowhere", tmp_path / "nowhere.cu")


def test_a_changed_header_beside_the_source_compiles_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYKERN_CACHE", str(tmp_path / "cache"))
    compiled: list[str] = []

    def pretend(command: list[str]) -> None:
        compiled.append(command[0])
        Path(command[command.index("-o") + 1]).touch()

    monkeypatch.setattr(toolchain, "run", pretend)
    (tmp_path / "op.cu").write_text('#include "op.h"\n')
    (tmp_path / "op.h").write_text("// one\n")
    library = Library("pykern_test_header", tmp_path / "op.cu")
    first = library._compiled(toolchain.find_cxx(), emulated=True)
    calls = len(compiled)
    assert calls and library._compiled(toolchain.find_cxx(), emulated=True) == first and len(compiled) == calls
    (tmp_path / "op.h").write_text("// two\n")
    assert library._compiled(toolchain.find_cxx(), emulated=True) != first and len(compiled) > calls

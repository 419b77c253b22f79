"""The build, in copies of the checkout and mostly with compilers that only pretend; and the rules of the house."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = "pykern/lib/libpykern_native.so"

# Writes what it is asked to write, in no time, and logs what it was asked. $FAIL names the command that it refuses.
PRETENDER = """#!/bin/sh
case "$*" in *--version*|*--dryrun*) echo "pretender 1.0"; exit 0;; esac
echo "$*" >> "$(dirname "$0")/log"
if [ -n "$FAIL" ]; then case "$*" in *"$FAIL"*) echo "pretender: cannot compile this" >&2; exit 1;; esac; fi
while [ $# -gt 0 ]; do
    case "$1" in -o) shift; echo "$*" > "$1";; -MF) shift; echo "out:" > "$1";; esac
    shift
done
"""


class Copy:
    """A copy of the checkout's sources, with a pretended g++ and nvcc beside it."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "checkout"
        built = shutil.ignore_patterns("lib", "*.so", "__pycache__")
        for name in ("pykern", "kernels", "csrc"):
            shutil.copytree(ROOT / name, self.root / name, ignore=built)
        for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "Makefile", "constraints.txt", "README.md"):
            shutil.copy(ROOT / name, self.root / name)
        self.compilers = folder / "compilers"
        self.compilers.mkdir()
        for name in ("g++", "nvcc"):
            (self.compilers / name).write_text(PRETENDER)
            (self.compilers / name).chmod(0o755)

    def run(self, *command: str, **environment: str) -> str:
        clean = {k: v for k, v in os.environ.items() if not k.startswith("PYKERN_") and k != "CUDA_HOME"}
        tools = {"CXX": str(self.compilers / "g++"), "NVCC": str(self.compilers / "nvcc")}
        done = subprocess.run(
            [sys.executable, *command], cwd=self.root, env=clean | tools | environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def build(self, **environment: str) -> tuple[dict, str]:
        printed = self.run("setup.py", "-q", "build_ext", "--inplace", **environment)
        return json.loads((self.root / "pykern/lib/build.json").read_text()), printed

    def compiled(self) -> int:
        log = self.compilers / "log"
        return len(log.read_text().splitlines()) if log.exists() else 0

    def add_cuda(self) -> None:
        (self.root / "csrc/cuda").mkdir(exist_ok=True)
        (self.root / "csrc/cuda/added.cu").write_text("__global__ void added() {}\n")


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    return Copy(tmp_path)


def test_nothing_is_built_on_request(copy: Copy) -> None:
    report, printed = copy.build(PYKERN_BUILD="none")
    assert report["library"] is None and not copy.compiled()
    assert "PYKERN_BUILD=none" in printed
    assert "PYKERN_BUILD=none" in copy.run("-c", "from pykern import _native; print(_native.reason)")
    report, _ = copy.build(PYKERN_BUILD="cpu")
    assert report["library"] == "cpu" and not report["emulator"] and (copy.root / LIBRARY).exists()


def test_without_a_compiler(copy: Copy) -> None:
    report, printed = copy.build(CXX="/nowhere/g++")
    assert report["library"] is None and not report["introspect"]
    assert "no C++ compiler" in printed and "no C++ compiler" in report["problems"][0]


def test_without_nvcc(copy: Copy) -> None:
    copy.add_cuda()
    report, printed = copy.build(NVCC="/nowhere/nvcc")
    assert report["library"] == "cpu" and "no nvcc" in printed


@pytest.mark.parametrize(
    ("refused", "library", "isa", "introspect"),
    [
        ("-DISA=avx512", "cuda", ["baseline", "avx2"], True),
        ("-DISA=", None, [], True),
        ("added.cu", "cpu", ["baseline", "avx2", "avx512"], True),
        ("csrc/cpu/norm.cpp", None, [], True),
        ("introspect.cpp", "cuda", ["baseline", "avx2", "avx512"], False),
        ("-shared", None, [], False),
    ],
)
def test_what_does_not_compile_is_left_out(
    copy: Copy, refused: str, library: str | None, isa: list[str], introspect: bool
) -> None:
    copy.add_cuda()
    assert copy.build()[0]["library"] == "cuda"
    shutil.rmtree(copy.root / "build")
    report, printed = copy.build(FAIL=refused)
    assert (report["library"], report["isa"], report["introspect"]) == (library, isa, introspect)
    assert bool(report["cuda_archs"]) == (library == "cuda")
    assert report["problems"] and all(problem in printed for problem in report["problems"])
    # A library that an earlier build left would hide the failure.
    assert (copy.root / LIBRARY).exists() == (library is not None)


def test_second_build_does_nothing(copy: Copy) -> None:
    copy.build()
    compiled, built = copy.compiled(), (copy.root / LIBRARY).stat()
    copy.build()
    again = (copy.root / LIBRARY).stat()
    assert compiled and copy.compiled() == compiled
    assert (again.st_ino, again.st_mtime_ns) == (built.st_ino, built.st_mtime_ns)
    (copy.root / "csrc/cpu/norm.cpp").touch()
    copy.build()
    assert copy.compiled() == compiled + 2  # that file, and the link


def test_architectures_are_chosen(copy: Copy) -> None:
    copy.add_cuda()
    assert copy.build()[0]["cuda_archs"] == ["80", "90a"]
    report, _ = copy.build(PYKERN_CUDA_ARCHS="9.0a")
    assert report["cuda_archs"] == ["90a"]
    line = next(line for line in (copy.compilers / "log").read_text().splitlines()[::-1] if "added.cu -o" in line)
    assert "code=sm_90a" in line and "sm_80" not in line and "code=compute_90" in line


def test_sdist_and_wheel(copy: Copy) -> None:
    copy.run("-m", "build", "--no-isolation", "--outdir", "dist")  # the wheel is built from the sdist
    (wheel,) = (copy.root / "dist").glob("*.whl")
    files = set(zipfile.ZipFile(wheel).namelist())
    kernels = {f"pykern/{path.relative_to(ROOT)}" for path in (ROOT / "kernels").glob("*.py")}
    assert kernels and kernels <= files
    headers = {f"pykern/{path.relative_to(ROOT)}" for path in (ROOT / "csrc/include").rglob("*.*h")}
    assert headers and headers <= files and not any(name.endswith((".cu", ".cpp")) for name in files)
    assert {LIBRARY, "pykern/lib/build.json", "pykern/ops/_spec.py"} <= files
    assert any(name.startswith("pykern/_introspect.") for name in files)
    assert not [name for name in files if name.startswith(("tests", "benchmarks", "csrc", "kernels"))]


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
@pytest.mark.parametrize("source", sorted((ROOT / "csrc/cpu/simd").glob("*.cpp")), ids=lambda path: path.stem)
def test_instruction_sets_share_no_function(source: Path, tmp_path: Path) -> None:
    # The linker keeps one of several equal inline functions, and that could be the AVX512 one on a machine without.
    compiled = tmp_path / "out.o"
    subprocess.run(["g++", "-std=c++20", "-O0", "-w", "-DISA=avx2", "-mavx2", "-c", source, "-o", compiled], check=True)
    symbols = subprocess.run(["nm", "--defined-only", compiled], capture_output=True, text=True, check=True).stdout
    outside = {name for _, kind, name in map(str.split, symbols.splitlines()) if kind.isupper() or kind == "u"}
    assert outside - {"DW.ref.__gxx_personality_v0"} == {f"{source.stem}_avx2"}


NORMS_OF_ONE_SET = """
import torch
from pykern import _native
torch.manual_seed(0)
print(_native.isa)
op = torch.ops.pykern_native
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    for shape in ((3, 1), (5, 37), (9, 333), (2, 5000)):
        x, dy = torch.randn(shape).add(3).to(dtype), torch.randn(shape).to(dtype)
        weight, bias = torch.randn(2, shape[-1]).to(dtype)
        exact = [t.double().requires_grad_() for t in (x, weight, bias)]
        expected = torch.nn.functional.layer_norm(exact[0], shape[-1:], *exact[1:])
        y, mean, rstd = op.layer_norm(x, weight, bias, 1e-5)
        grads = op.layer_norm_backward(dy, x, weight, bias, 1e-5, mean, rstd, [True] * 3)
        wanted = [expected, *torch.autograd.grad(expected, exact, dy.double())]
        for name, got, want in zip(("y", "dx", "dweight", "dbias"), (y, *grads), wanted):
            if shape[-1] == 1 and name in ("dx", "dweight"):  # zero but for rounding
                continue
            error = (got.double() - want).norm() / want.norm()
            assert error < 2 * torch.finfo(dtype).eps, (dtype, shape, name, error)
"""


ATTENTION_OF_ONE_SET = """
import torch
from torch.nn.functional import scaled_dot_product_attention
from pykern import _native
torch.manual_seed(0)
print(_native.isa)
op = torch.ops.pykern_native
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    for length, keys, size in ((1, 5, 3), (70, 131, 40)):
        rows = [torch.randn(2, n, 2, size).to(dtype) for n in (length, keys, keys)]
        bias, dout = torch.randn(length, keys).to(dtype), torch.randn(2, length, 2, size).to(dtype)
        exact = [t.double().requires_grad_() for t in (*rows, bias)]
        expected = scaled_dot_product_attention(*(t.transpose(1, 2) for t in exact[:3]), exact[3]).transpose(1, 2)
        call = (*rows, bias, None, None, None, 0.0, size**-0.5, False, None, None, None, "top_left")
        out, lse = op.attention(*call)
        found = op.attention_backward(dout, None, *call, out, lse, [True] * 4 + [False] * 2)[:4]
        wanted = [expected, *torch.autograd.grad(expected, exact, dout.double())]
        for name, got, want in zip(("out", "dquery", "dkey", "dvalue", "dmask"), (out, *found), wanted):
            error = (got.double() - want).norm() / want.norm()
            assert error < 4 * torch.finfo(dtype).eps, (dtype, length, name, error)
"""


@pytest.mark.parametrize("family", [NORMS_OF_ONE_SET, ATTENTION_OF_ONE_SET], ids=["norm", "attention"])
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_computes(isa: str, family: str) -> None:
    from pykern import _native

    if _native.isa is None or isa not in (_native.build_report() or {}).get("isa", []):
        pytest.skip(f"the library has no {isa} kernels")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", family],
        env=os.environ | {"PYKERN_ISA": isa},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    if done.stdout.strip() != isa:
        pytest.skip(f"this processor has no {isa}")


# What each part of the package may import of the others; nothing points upward.
MAY_IMPORT = {
    "kernels": set(),
    "toolchain": set(),
    "_native": set(),
    "ops": {"kernels", "_native"},
    "extension": {"_native", "toolchain", "ops"},
    "nn": {"ops"},
    "model": {"nn", "ops"},
    "train": {"model", "nn", "ops"},
    "testing": {"ops", "nn", "kernels", "_native", "toolchain", "extension"},
    "integrations": {"nn", "ops"},
    "doctor": {"_native", "_introspect", "toolchain", "ops"},
    "cli": {"doctor", "testing", "train", "model", "nn", "ops"},
    "__main__": {"cli"},
    "__init__": {"ops", "nn", "integrations", "testing"},  # testing: the interpreter's repair
}


def imported_modules(path: Path, package: list[str]) -> set[str]:
    """The dotted names that a file imports, wherever in the file it does."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{prefix}.{alias.name}" for alias in node.names}
    return names


def python_files() -> list[Path]:
    return [*sorted((ROOT / "kernels").rglob("*.py")), *sorted((ROOT / "pykern").rglob("*.py"))]


@pytest.mark.parametrize("path", python_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_imports_upward(path: Path) -> None:
    inside = path.relative_to(ROOT).parts
    inside = inside[1:] if inside[0] == "pykern" else inside
    part = inside[0].removesuffix(".py")
    package = ["pykern", *inside[:-1]]
    for name in imported_modules(path, package):
        top, _, rest = name.partition(".")
        if top == "pykern":
            other = rest.split(".")[0]
            known = other in MAY_IMPORT or other == "_introspect"  # else a name of pykern/__init__.py itself
            assert not known or other == part or other in MAY_IMPORT[part], f"{part} imports {name}"
        elif part == "kernels":
            assert top in {"torch", "triton", "__future__", *sys.stdlib_module_names}, f"a kernel imports {name}"


def test_kernels_is_no_regular_package() -> None:
    # It would shadow the package `kernels` that transformers imports.
    assert list((ROOT / "kernels").glob("*.py"))
    assert not (ROOT / "kernels/__init__.py").exists()


def test_tests_and_benchmarks_share_no_file_name() -> None:
    tests, benchmarks = ({path.name for path in (ROOT / name).glob("test_*.py")} for name in ("tests", "benchmarks"))
    assert tests and benchmarks and not tests & benchmarks


def test_no_launcher_waits_for_the_device() -> None:
    """A call that does could not be captured in a CUDA graph. Those of Triton are run without memory in test_ledger."""
    sources = [path for folder in ("cuda", "include") for path in (ROOT / "csrc" / folder).rglob("*.*")]
    assert len(sources) > 20
    for path in sources:
        waits = re.search(r"cuda\w*Synchronize|cudaMemcpy\w*|cudaMalloc\w*|\bitem\(", path.read_text())
        assert not waits, f"{path.name} calls {waits[0]}"

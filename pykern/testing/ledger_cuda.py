"""The CUDA kernels in libraries, object files, cubins and sources: what each of them costs on each architecture."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from pykern import toolchain
from pykern.extension import CSRC
from pykern.testing import sass

_RELEASE = re.compile(rb"Cuda compilation tools, release [\d.]+, V([\d.]+)")


def cuda_kernels(path: Path, archs: Sequence[str]) -> tuple[str, dict[str, sass.Cost]]:
    """The compiler's version, and each kernel's cost by architecture and name as `sm_90a kernel(float*)`.

    `path` is a .cu file, which nvcc then compiles, or what a compiler made: a library, an object file, a cubin.
    """
    with tempfile.TemporaryDirectory() as folder:
        find = _compiled if path.suffix == ".cu" else _extracted
        code = [(arch, file.read_bytes()) for arch, file in find(path, archs, Path(folder))]
    for arch in archs:
        if arch not in dict(code):
            raise RuntimeError(f"{path} holds no machine code for sm_{arch}")
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        measured = list(pool.map(lambda pair: sass.costs(pair[1], pair[0]), code))
    release = _RELEASE.search(code[0][1])
    found: dict[str, sass.Cost] = {}
    for (arch, _), costs in zip(code, measured, strict=True):
        for name, cost in costs.items():
            key = f"sm_{arch} {sass.demangled(name)}"
            twins = sum(k == key or k.startswith(f"{key} #") for k in found)  # the same local name in two files
            found[f"{key} #{twins + 1}" if twins else key] = cost
    return release[1].decode() if release else "unknown", found


def built_objects() -> list[Path]:
    """The object files of csrc/cuda that pykern's own library was linked from; they still say which file it was."""
    sources = {source.stem for source in (CSRC / "cuda").glob("*.cu")}
    folder = CSRC.parent / "build/native/cuda"
    return [path for path in sorted(folder.glob("*.o")) if path.stem in sources]


def _compiled(source: Path, archs: Sequence[str], folder: Path) -> list[tuple[str, Path]]:
    nvcc = toolchain.find_nvcc()
    if not nvcc:
        raise FileNotFoundError("nvcc was not found: install a CUDA toolkit, or set NVCC or CUDA_HOME")
    flags = [*toolchain.NVCC_FLAGS, *toolchain.torch_flags(Path(torch.__file__).parent)]
    flags += ["-DPYKERN_NAMESPACE=pykern_ledger", f"-I{CSRC}", f"-I{CSRC / 'include'}"]

    def compiled(arch: str) -> tuple[str, Path]:
        cubin = folder / f"{source.stem}.sm_{arch}.cubin"
        command = [*nvcc, *flags, "-cubin", f"-arch=sm_{arch}", str(source), "-o", str(cubin)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"nvcc does not compile {source} for sm_{arch}:\n{done.stderr.strip()}")
        return arch, cubin

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(compiled, archs))


def _extracted(path: Path, archs: Sequence[str], folder: Path) -> list[tuple[str, Path]]:
    if path.read_bytes()[:4] != b"\x7fELF":
        raise RuntimeError(f"{path} is neither a .cu file nor an object file, library or cubin")
    sass.run_tool("cuobjdump", "-xelf", "all", str(path.resolve()), folder=folder)
    found = []
    for file in sorted(folder.iterdir(), key=lambda file: int(re.search(r"\.(\d+)\.sm_", file.name)[1])):
        arch = re.search(r"\.sm_(\w+)\.cubin$", file.name)[1]
        if arch in archs:
            found.append((arch, file))
    return found

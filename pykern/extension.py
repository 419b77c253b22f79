"""CUDA C++ kernels of ops that are declared outside pykern: compiled when they are first called.

    kernels = Library("mypkg_native", "sine.cu")
    sine = define(…, backends={"cuda": kernels.kernel("sine")})

A source declares schemas and registers launchers with the macros of `csrc/cuda/launch.h`. On a GPU it is compiled with
nvcc, for CPU tensors (backend "cuda" forced) with g++ for the emulator, so that kernels can be written without a GPU.
"""

import functools
import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from pykern import _native, toolchain
from pykern.ops._backends import Kernel

_here = Path(__file__).resolve().parent
# In a source checkout the folder csrc/ at the root, else its headers inside the package.
CSRC = _here.parent / "csrc" if (_here.parent / "setup.py").is_file() else _here / "csrc"


class Library:
    """CUDA C++ sources that are one torch library: `torch.ops.<namespace>` on a GPU.

    Args:
        namespace: of the raw kernels; no other library may have it. The emulated ones are in `<namespace>_emulated`.
        sources: .cu files; paths are relative to the working directory.
    """

    def __init__(self, namespace: str, *sources: str | Path) -> None:
        self.namespace = namespace
        self.sources = [Path(source).resolve() for source in sources]
        for source in self.sources:
            if not source.is_file():
                raise FileNotFoundError(f"sources: there is no file {source}")

    def kernel(self, name: str) -> Kernel:
        """A backend "cuda" for `define`."""
        return _Kernel(self, name)

    @functools.cache  # noqa: B019 - a library lives as long as the process
    def load(self, device_type: str = "cpu") -> Any:
        """Compiles, where this version was not compiled before, and loads; returns the namespace of `torch.ops`.

        Raises:
            RuntimeError: the compiler or what it needs is missing, or it refuses the source; with its words.
        """
        problem = self.missing(device_type)
        if problem:
            raise RuntimeError(f"{self.namespace}: {problem}")
        emulated = device_type == "cpu"
        namespace = f"{self.namespace}_emulated" if emulated else self.namespace
        torch.ops.load_library(self._compiled([*_command(emulated), f"-DPYKERN_NAMESPACE={namespace}"], emulated))
        return getattr(torch.ops, namespace)

    def missing(self, device_type: str) -> str | None:
        """Why the sources cannot be compiled or run for tensors of that device, or None."""
        if device_type == "cuda":
            return None if toolchain.find_nvcc() else "no nvcc was found"
        if device_type != "cpu":
            return f"serves CUDA tensors, not {device_type}"
        if not toolchain.find_cxx():
            return "no C++ compiler was found"
        return _native.emulator_problem()

    def _compiled(self, command: Sequence[str], emulated: bool) -> Path:
        folders = [CSRC.rglob("*"), *(source.parent.iterdir() for source in self.sources)]
        headers = sorted({path for found in folders for path in found if path.suffix in (".h", ".cuh", ".hpp")})
        key = hashlib.sha256(" ".join([*command, torch.__version__, toolchain.version_of(command[:1])]).encode())
        for path in [*self.sources, *headers]:
            key.update(path.read_bytes())
        folder = Path(os.environ.get("PYKERN_CACHE") or Path.home() / ".cache/pykern")
        target = folder / f"{self.namespace}-{key.hexdigest()[:16]}.so"
        if target.exists():
            return target
        folder.mkdir(parents=True, exist_ok=True)
        link = toolchain.torch_link_flags(Path(torch.__file__).parent)
        link = ["-Xlinker", "--no-as-needed", *link]
        if emulated:
            link += [f"-L{_native.EMULATOR_FOLDER}", "-lpykern_emulator", f"-Wl,-rpath,{_native.EMULATOR_FOLDER}"]
            link += ["-fsanitize=address"] if _native.SANITIZED else []
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            objects = []
            for source in self.sources:
                objects.append(f"{scratch}/{len(objects)}.o")
                toolchain.run([*command, "-c", str(source), "-o", objects[-1]])
            built = Path(scratch) / "library.so"
            linker = toolchain.find_cxx() if emulated else [*toolchain.find_nvcc(), "-cudart=static"]
            toolchain.run([*linker, "-shared", *objects, "-o", str(built), *link])
            os.replace(built, target)  # whole or not at all, should two processes compile at once
        return target


class _Kernel(Kernel):
    def __init__(self, library: Library, name: str) -> None:
        self.library, self.name = library, name

    def missing(self, device_type: str) -> str | None:
        return self.library.missing(device_type)

    def resolve(self, device_type: str) -> Callable[..., Any]:
        return getattr(self.library.load(device_type), self.name).default


def _command(emulated: bool) -> list[str]:
    torch_flags = toolchain.torch_flags(Path(torch.__file__).parent)
    includes = [f"-I{CSRC}", f"-I{CSRC / 'include'}"]
    if emulated:
        cuda = ["-isystem", str(toolchain.cuda_include())]
        flags = toolchain.SANITIZED_FLAGS if _native.SANITIZED else toolchain.EMULATED_FLAGS
        return [*toolchain.find_cxx(), *flags, *torch_flags, *cuda, *includes]
    capability = "".join(map(str, torch.cuda.get_device_capability()))
    arch = f"{capability}a" if capability == "90" else capability
    flags = [*toolchain.NVCC_FLAGS, f"-gencode=arch=compute_{arch},code=sm_{arch}"]
    return [*toolchain.find_nvcc(), *flags, *torch_flags, *includes]

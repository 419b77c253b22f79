"""The emulator and pykern's CUDA kernels compiled with g++'s address and undefined-behaviour sanitizers.

They see what the emulator's own checks cannot: accesses outside local arrays, and every kind of undefined operation.
"""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

from pykern import extension, toolchain

FOLDER = extension.CSRC.parent / "build/sanitized"


def environment() -> dict[str, str]:
    """The variables with which a process runs backend "cuda" under the sanitizers; compiles what is not up to date.

    Raises:
        RuntimeError: something that this needs is missing, or does not compile.
    """
    build()
    library = subprocess.run([*toolchain.find_cxx(), "-print-file-name=libasan.so"], capture_output=True, text=True)
    # The interpreter and torch leave memory to the end of the process, which is no fault of a kernel.
    options = {"LD_PRELOAD": library.stdout.strip(), "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"}
    return {**options, "PYKERN_EMULATOR_FOLDER": str(FOLDER)}


def build() -> None:
    """Compiles the libraries into build/sanitized."""
    sources = extension.CSRC
    if not (sources / "library.cpp").is_file():
        raise RuntimeError("the sanitizers need pykern's sources: run this in a source checkout")
    compiler, cuda = toolchain.find_cxx(), toolchain.cuda_include()
    if not compiler or not cuda:
        raise RuntimeError("the sanitizers need g++ and CUDA's headers")
    FOLDER.mkdir(parents=True, exist_ok=True)
    torch_folder = Path(torch.__file__).parent
    sanitize = [flag for flag in toolchain.SANITIZED_FLAGS if flag.startswith(("-fsanitize", "-fno-sanitize"))]
    runtime = [*compiler, *toolchain.EMULATOR_FLAGS, "-g", "-fsanitize=address", "-isystem", str(cuda)]
    flags = [*toolchain.SANITIZED_FLAGS, *sanitize, *toolchain.torch_flags(torch_folder), "-isystem", str(cuda)]
    flags += [f"-I{sources}", f"-I{sources / 'include'}"]
    kernels = [*compiler, *flags, "-DPYKERN_NAMESPACE=pykern_native_emulated"]
    link = [*compiler, "-shared", "-fsanitize=address"]
    _make("libpykern_emulator.so", sorted((sources / "emulator").glob("*.cpp")), runtime, [*link, "-ldl"])
    link = [*link, "-Wl,--no-as-needed", *toolchain.torch_link_flags(torch_folder), f"-L{FOLDER}", "-lpykern_emulator"]
    cuda_sources = [sources / "library.cpp", *sorted((sources / "cuda").glob("*.cu"))]
    _make("libpykern_emulated.so", cuda_sources, kernels, [*link, "-Wl,-rpath,$ORIGIN"])


def _make(name: str, sources: Sequence[Path], compile_with: Sequence[str], link_with: Sequence[str]) -> None:
    newest = max(path.stat().st_mtime for path in extension.CSRC.rglob("*.*"))
    objects = []
    for source in sources:
        objects.append(FOLDER / f"{source.parent.name}-{source.stem}.o")
        if not objects[-1].exists() or objects[-1].stat().st_mtime < newest:
            _run([*compile_with, "-c", str(source), "-o", str(objects[-1])])
    target = FOLDER / name
    if not target.exists() or target.stat().st_mtime < max(path.stat().st_mtime for path in objects):
        # The linker reads its arguments in order: objects before the libraries that they need.
        fresh = FOLDER / f".{os.getpid()}-{name}"
        head = [word for word in link_with if not word.startswith(("-l", "-L"))]
        tail = [word for word in link_with if word.startswith(("-l", "-L"))]
        _run([*head, *map(str, objects), "-o", str(fresh), f"-Wl,-soname,{name}", *tail])
        os.replace(fresh, target)


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{done.stderr or done.stdout}")

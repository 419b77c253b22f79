"""The emulator and CUDA kernels compiled with g++'s address and undefined-behaviour sanitizers.

They see what the emulator's own checks cannot: accesses outside local arrays, and every kind of undefined operation.
"""

import os
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from pykern import extension, toolchain

FOLDER = extension.CSRC.parent / "build/sanitized"


def environment(kernels: bool) -> dict[str, str]:
    """The variables with which a process runs backend "cuda" under the sanitizers; compiles what is not up to date.

    Args:
        kernels: compile pykern's own kernels too, which takes minutes.

    Raises:
        RuntimeError: something that this needs is missing, or does not compile.
    """
    build(kernels)
    # The sanitizer has to be the first library of the process, and finds what it needs of C++ only if that is there.
    ask = [[*toolchain.find_cxx(), f"-print-file-name={name}"] for name in ("libasan.so", "libstdc++.so.6")]
    libraries = [subprocess.run(command, capture_output=True, text=True).stdout.strip() for command in ask]
    # Python and torch leave memory to the end of the process, which is no fault of a kernel.
    options = {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"}
    return {**options, "PYKERN_EMULATOR_FOLDER": str(FOLDER)}


def build(kernels: bool) -> None:
    """Compiles the emulator, and pykern's kernels if wanted, into build/sanitized."""
    sources = extension.CSRC
    if not (sources / "library.cpp").is_file():
        raise RuntimeError("the sanitizers need pykern's sources: run this in a source checkout")
    compiler, cuda = toolchain.find_cxx(), toolchain.cuda_include()
    if not compiler or not cuda:
        raise RuntimeError("the sanitizers need g++ and CUDA's headers")
    FOLDER.mkdir(parents=True, exist_ok=True)
    includes = [f"-I{sources}", f"-I{sources / 'include'}", "-isystem", str(cuda)]
    link = [*compiler, "-shared", "-fsanitize=address"]
    runtime = [*compiler, *toolchain.SANITIZED_EMULATOR_FLAGS, *includes]
    _make("libpykern_emulator.so", sorted((sources / "emulator").glob("*.cpp")), runtime, link, ["-ldl"])
    if kernels:
        torch_folder = Path(torch.__file__).parent
        flags = [*toolchain.SANITIZED_FLAGS, *toolchain.torch_flags(torch_folder), *includes]
        flags += ["-DPYKERN_NAMESPACE=pykern_native_emulated"]
        libraries = [*toolchain.torch_link_flags(torch_folder), f"-L{FOLDER}", "-lpykern_emulator"]
        link += ["-Wl,--no-as-needed", "-Wl,-rpath,$ORIGIN"]
        cuda_sources = [sources / "library.cpp", *sorted((sources / "cuda").glob("*.cu"))]
        _make("libpykern_emulated.so", cuda_sources, [*compiler, *flags], link, libraries)


def _make(
    name: str, sources: Sequence[Path], compiler: Sequence[str], linker: Sequence[str], libraries: Sequence[str]
) -> None:
    newest = max(path.stat().st_mtime for path in extension.CSRC.rglob("*.*"))
    objects = {FOLDER / f"{source.parent.name}-{source.stem}.o": source for source in sources}
    stale = [o for o in objects if not o.exists() or o.stat().st_mtime < newest]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda o: toolchain.run([*compiler, "-c", str(objects[o]), "-o", str(o)]), stale))
    target = FOLDER / name
    if not target.exists() or target.stat().st_mtime < max(o.stat().st_mtime for o in objects):
        fresh = FOLDER / f".{os.getpid()}-{name}"
        toolchain.run([*linker, *map(str, objects), "-o", str(fresh), f"-Wl,-soname,{name}", *libraries])
        os.replace(fresh, target)

"""How C++ and CUDA C++ are compiled for pykern: compilers and flags, for setup.py and for ops of other packages.

Standard library only: setup.py reads this file before anything is installed.
"""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

# libtorch's stable ABI as of 2.11: the library loads in that version and every later one.
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]

CXX_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-Wall", "-Wextra"]
# A product that is fused into one difference but not into its twin leaves a residue where there should be zero.
CXX_FLAGS += ["-ffp-contract=off"]
# Vectors are only passed to inlined functions, GCC 12's own AVX512 headers use uninitialised values on purpose, and it
# sees overlapping copies in its std::string.
CXX_FLAGS += ["-Wno-psabi", "-Wno-maybe-uninitialized", "-Wno-restrict"]

NVCC_FLAGS = ["-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-cudart=static", "-DUSE_CUDA"]
DEFAULT_CUDA_ARCHS = ("80", "90a")

# Device code on the emulator. The thread sanitizer's hooks are linked to the emulator instead of to its own library:
# so every access to memory
_UNDEFINED = "signed-integer-overflow,shift,bounds,integer-divide-by-zero"
# of device code is seen, as is every undefined operation. Symbols are not hidden: messages name the kernel by its own.
EMULATED_FLAGS = ["-x", "c++", "-std=c++20", "-g1", "-O1", "-fPIC", "-Wall", "-Wextra"]
EMULATED_FLAGS += ["-Wno-unknown-pragmas", "-Wno-psabi", "-Wno-attributes", "-Wno-maybe-uninitialized"]
EMULATED_FLAGS += ["-fsanitize=thread", f"-fsanitize={_UNDEFINED}", f"-fno-sanitize-recover={_UNDEFINED}"]
# A kernel that polls a flag must let others run, so volatile accesses are told apart.
EMULATED_FLAGS += ["--param=tsan-instrument-func-entry-exit=0", "--param=tsan-distinguish-volatile=1"]
# Accesses stay as wide as they are written, and each stays the access of one instruction.
EMULATED_FLAGS += ["-fno-tree-sra", "-fno-tree-vectorize", "-fno-tree-slp-vectorize", "-fno-store-merging"]
EMULATED_FLAGS += ["-fno-tree-loop-distribute-patterns", "-fno-strict-aliasing", "-ffp-contract=off"]
# The hooks miss the store of a call's result: leave no call.
EMULATED_FLAGS += ["-finline-functions", "-finline-small-functions"]
EMULATED_FLAGS += [
    f"--param={name}=100000"
    for name in ("max-inline-insns-single", "max-inline-insns-auto", "large-function-growth", "inline-unit-growth")
]
# The emulator itself; what runs on it needs its symbols, and nothing replaces them.
EMULATOR_FLAGS = [flag for flag in CXX_FLAGS if flag != "-fvisibility=hidden"]
EMULATOR_FLAGS += ["-fno-semantic-interposition", "-fno-plt"]
# What the address sanitizer can see instead, in a process that has its library loaded first.
SANITIZED_FLAGS = [flag for flag in EMULATED_FLAGS if "sanitize=" not in flag and "tsan" not in flag]
SANITIZED_FLAGS += ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-omit-frame-pointer"]
SANITIZED_EMULATOR_FLAGS = [*EMULATOR_FLAGS, "-O1", "-g1", "-fsanitize=address"]


def find_program(variable: str, *candidates: str) -> list[str] | None:
    """The command that the environment variable names, else the first candidate that exists."""
    for candidate in [os.environ[variable]] if os.environ.get(variable) else candidates:
        command = shlex.split(candidate)
        if shutil.which(command[0]):
            return command
    return None


def find_cxx() -> list[str] | None:
    return find_program("CXX", "g++", "c++", "clang++")


def find_nvcc() -> list[str] | None:
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    return find_program("NVCC", "nvcc", f"{home}/bin/nvcc")


def cuda_include() -> Path | None:
    """The folder of CUDA's headers, which the emulator needs for the small float types, or None."""
    homes = [os.environ["CUDA_HOME"]] if os.environ.get("CUDA_HOME") else []
    nvcc = find_nvcc()
    if nvcc:
        try:
            command = [*nvcc, "--dryrun", "-x", "cu", os.devnull]
            answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.SubprocessError):
            pass
        else:
            homes += re.findall(r"^#\$ TOP=(.+)$", answer.stdout + answer.stderr, re.MULTILINE)
    for home in [*homes, "/usr/local/cuda"]:
        if (Path(home) / "include/cuda_bf16.h").is_file():
            return (Path(home) / "include").resolve()
    return None


def version_of(command: Sequence[str]) -> str:
    """The line of `command --version` that names the version."""
    try:
        answer = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    lines = answer.splitlines() or ["unknown"]
    return next((line for line in lines if "release" in line), lines[0]).strip()


def cuda_arch_flags(archs: Sequence[str]) -> list[str]:
    """Machine code for each, and PTX of the first for newer chips."""
    first = archs[0].rstrip("af")
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [*flags, f"-gencode=arch=compute_{first},code=compute_{first}"]


def torch_flags(torch_folder: Path) -> list[str]:
    """Compiler flags for code on libtorch's stable ABI."""
    # A system folder, so that torch's headers are not reported on, and not listed in every depfile.
    return [*STABLE_ABI, "-isystem", str(torch_folder / "include")]


def torch_link_flags(torch_folder: Path) -> list[str]:
    # libtorch.so names the libraries that hold the symbols, which differ between builds of torch.
    return [f"-L{torch_folder / 'lib'}", "-ltorch"]


def run(command: Sequence[str]) -> None:
    """Runs a compiler or linker; a RuntimeError has its words if it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{done.stderr or done.stdout}")

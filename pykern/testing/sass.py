"""What a kernel costs, read from its machine code: registers, spills, shared memory, widths of accesses, tensor cores.

Needs no GPU, only `cuobjdump` and `nvdisasm`, which come with triton as with a CUDA toolkit.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

KIB = 1024
# The most shared memory that one block can ask for. No compiler refuses more: the launch fails.
SHARED_LIMITS = {
    80: 163 * KIB,
    86: 99 * KIB,
    89: 99 * KIB,
    90: 227 * KIB,
    100: 227 * KIB,
    103: 227 * KIB,
    120: 99 * KIB,
}

_SECTION = re.compile(r"^\s*\.section\s+\.text\.([^,\s]+)")
_ANY_SECTION = re.compile(r"^\s*\.section\s")
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?(?:@!?U?P[T\d]\s+)?([A-Z][A-Z0-9_.]*)")
_USAGE = re.compile(r"Function (\S+):\s*\n\s*(.*)")
_WIDTH = re.compile(r"[US]?(8|16|32|64|128|256)")
_TENSOR = re.compile(r"(UTC)?[A-Z]G?MMA")  # HMMA, IMMA, QMMA, DMMA; HGMMA, IGMMA, QGMMA of sm_90; UTCHMMA of sm_100
_LOCAL = {"LDL", "STL"}
_LOADS = {"LDG", "LD", "LDGSTS"}  # LD, ST: the address space is not known, which in practice means global
_STORES = {"STG", "ST"}
_BULK = {"UBLKCP", "UTMALDG", "UTMASTG", "UTMAREDG", "UBLKRED"}


@dataclass(frozen=True)
class Cost:
    """One kernel's. Instructions are counted where they stand in the code, not as often as they run."""

    registers: int
    stack: int  # bytes of local memory a thread
    spills: int  # loads and stores of local memory: spilled registers, or arrays that are indexed at run time
    shared: int  # bytes a block, as far as the compiler knows
    loads: dict[int, int] = field(default_factory=dict)  # global loads: how many instructions of how many bits
    stores: dict[int, int] = field(default_factory=dict)
    bulk: int = 0  # asynchronous copies of whole tiles
    tensor: dict[str, int] = field(default_factory=dict)  # tensor-core instructions by name
    code: int = 0  # bytes

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value or name in ("registers", "spills")}

    @staticmethod
    def from_json(values: dict[str, Any]) -> Cost:
        known = {"stack": 0, "shared": 0, **values}
        for name in ("loads", "stores"):
            known[name] = {int(bits): count for bits, count in known.get(name, {}).items()}
        return Cost(**known)


def parse_sass(text: str) -> dict[str, list[tuple[int, str]]]:
    """The instructions (address, opcode with its modifiers) of each kernel in the output of nvdisasm."""
    kernels: dict[str, list[tuple[int, str]]] = {}
    code: list[tuple[int, str]] = []
    for line in text.splitlines():
        if section := _SECTION.match(line):
            code = kernels.setdefault(section[1], [])
        elif _ANY_SECTION.match(line):
            code = []  # data; nvdisasm prints addresses before it too
        elif instruction := _INSTRUCTION.match(line):
            code.append((int(instruction[1], 16), instruction[2]))
    return kernels


def count(instructions: list[tuple[int, str]], registers: int, stack: int, shared: int) -> Cost:
    loads, stores, tensor, spills, bulk = Counter(), Counter(), Counter(), 0, 0
    for _, opcode in instructions:
        base, *modifiers = opcode.split(".")
        if base in _LOADS or base in _STORES:
            widths = [int(m[1]) for m in map(_WIDTH.fullmatch, modifiers) if m]
            (loads if base in _LOADS else stores)[widths[0] if widths else 32] += 1
        elif _TENSOR.fullmatch(base):
            tensor[base] += 1
        spills += base in _LOCAL
        bulk += base in _BULK
    size = instructions[-1][0] + 16 if instructions else 0
    by_width = (dict(sorted(counted.items())) for counted in (loads, stores))
    return Cost(registers, stack, spills, shared, *by_width, bulk, dict(sorted(tensor.items())), size)


def costs(cubin: bytes, arch: str) -> dict[str, Cost]:
    """The cost of each kernel in a cubin, by its mangled name."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"kernel.sm_{arch}.cubin"
        path.write_bytes(cubin)
        usage = run_tool("cuobjdump", "--dump-resource-usage", str(path))
        sass = parse_sass(run_tool("nvdisasm", "-c", "-ndf", str(path)))  # code only, no dataflow analysis: quicker
    found = {}
    for name, line in _USAGE.findall(usage):
        used = {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", line)}
        found[name] = count(sass[name], used["REG"], used["STACK"] + used["LOCAL"], used["SHARED"])
    return found


def shared_limit(arch: str) -> int:
    return SHARED_LIMITS.get(int(arch.rstrip("af")), 48 * KIB)


def run_tool(name: str, *args: str, folder: str | Path | None = None) -> str:
    done = subprocess.run([_tool(name), *args], capture_output=True, text=True, cwd=folder, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} {' '.join(args)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


@cache
def _tool(name: str) -> str:
    triton = importlib.util.find_spec("triton")
    folders = [Path(triton.origin).parent / "backends/nvidia/bin"] if triton and triton.origin else []
    folders.append(Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda") / "bin")
    for folder in folders:
        if (folder / name).is_file():
            return str(folder / name)
    if found := shutil.which(name):
        return found
    raise FileNotFoundError(f"{name} was not found: it comes with triton (pip install triton) and with a CUDA toolkit")


def demangled(name: str) -> str:
    """A C++ name as one would write it; as it is where there is nothing to undo."""
    runtime = ctypes.CDLL("libstdc++.so.6")
    runtime.__cxa_demangle.restype = ctypes.c_void_p
    status = ctypes.c_int()
    address = runtime.__cxa_demangle(name.encode(), None, None, ctypes.byref(status))
    if not address:
        return name
    text = ctypes.string_at(address).decode()
    ctypes.CDLL(None).free(ctypes.c_void_p(address))
    return text

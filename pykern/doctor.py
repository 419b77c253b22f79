"""`pykern doctor`: what this installation has, what it lacks and why."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator

import torch

from pykern import __version__, _native, toolchain


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _software() -> Iterator[tuple[str, str]]:
    yield "pykern", __version__
    yield "python", platform.python_version()
    yield "torch", f"{torch.__version__}, {torch.get_num_threads()} threads"
    yield "triton", _version("triton")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    yield (
        "triton interpreter",
        "on (TRITON_INTERPRET=1)" if interpreted else "off (set TRITON_INTERPRET=1 to turn it on)",
    )


def _library() -> Iterator[tuple[str, str]]:
    report = _native.build_report() or {}
    if _native.reason:
        yield "C++ kernels", f"none: {_native.reason}"
    else:
        yield (
            "C++ kernels",
            f"{report.get('library', 'cpu')}, using {_native.isa} of {', '.join(report.get('isa', []))}",
        )
    if report.get("cuda_archs"):
        yield "CUDA architectures", ", ".join(report["cuda_archs"])
    for key, name in [("compiler", "built with"), ("nvcc", "nvcc"), ("torch", "built against torch")]:
        if report.get(key):
            yield name, report[key]
    yield "CUDA emulator", "ready (backend cuda on CPU tensors)" if report.get("emulator") else "not built"
    for problem in report.get("problems", []):
        yield "build problem", problem
    if importlib.util.find_spec("pykern._introspect"):
        from pykern import _introspect

        yield "processor", ", ".join(name for name, there in _introspect.cpu_features().items() if there)
    else:
        yield "processor", f"{platform.machine()} (pykern._introspect was not built, so no more is known)"


def _compilers() -> Iterator[tuple[str, str]]:
    for name, command in [("C++ compiler", toolchain.find_cxx()), ("CUDA compiler", toolchain.find_nvcc())]:
        yield name, shutil.which(command[0]) if command else "not found"


def _cuda() -> Iterator[tuple[str, str]]:
    if not torch.backends.cuda.is_built():
        yield "CUDA", "this torch is built without it"
        return
    if not torch.cuda.is_available():
        yield "CUDA", f"torch has {torch.version.cuda}, but sees no usable GPU"
        return
    yield "CUDA", torch.version.cuda
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        yield f"GPU {index}", f"{properties.name}, sm_{properties.major}{properties.minor}, {memory:.0f} GiB"
    driver = _driver_version()
    yield "driver", driver or "unknown"
    yield "CUDA kernels", _native.cuda_problem() or "ready"


def _driver_version() -> str | None:
    try:
        with open("/proc/driver/nvidia/version") as file:
            words = file.readline().split()
    except OSError:
        return None
    return next((word for word in words if word[:1].isdigit() and "." in word), None)


def main() -> int:
    """Prints the report. Returns 1 if there are C++ kernels that cannot be used, else 0."""
    rows = [row for part in (_software, _library, _compilers, _cuda) for row in part()]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
    return 1 if _native.reason and _native.LIBRARY.exists() else 0

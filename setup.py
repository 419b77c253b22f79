"""Builds pykern: the Python packages, and through ninja the native libraries of csrc/.

    PYKERN_BUILD=cpu|cuda|none    what to build; by default CUDA where nvcc and .cu files are there, else CPU
    PYKERN_CUDA_ARCHS="80;90a"    machine code for these architectures; PTX of the first is added for newer chips
    CXX, NVCC, CUDA_HOME          compilers to use

A step that cannot be done never stops the installation. It is reported, left out of the library, and recorded in
pykern/lib/build.json for `pykern doctor`.
"""

import filecmp
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
BUILD = Path("build/native")  # relative to ROOT, as is every source: no path of this machine ends up in a library
LIBRARY = "libpykern_native.so"
EMULATOR = "libpykern_emulator.so"  # CUDA on a CPU
EMULATED = "libpykern_emulated.so"  # pykern's CUDA kernels, on that


def _toolchain():
    # By its path: importing the package needs torch.
    spec = importlib.util.spec_from_file_location("toolchain", ROOT / "pykern/toolchain.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


toolchain = _toolchain()

ISA_FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c", "-mprefer-vector-width=512"],
}


def escape(text: str | Path) -> str:
    """A path as ninja spells it in a build line."""
    return re.sub(r"([$ :])", r"$\1", str(text))


def command_line(words: list[str]) -> str:
    return " ".join(shlex.quote(word) for word in words).replace("$", "$$")


APART = ("introspect", "emulator", "emulated")  # groups that are not part of the native library


class Plan:
    """The build.ninja of one build: object files in groups, each of which succeeds or fails as a whole."""

    def __init__(self, ninja: list[str]) -> None:
        self.ninja = ninja
        self.rules: dict[str, str] = {}
        self.groups: dict[str, dict[Path, tuple[str, Path]]] = {}
        self.links: dict[Path, tuple[str, list[Path], list[Path]]] = {}

    def compile(self, group: str, sources: list[Path], compiler: list[str], flags: list[str]) -> None:
        # g++ and nvcc both write a depfile as g++ does; -MMD leaves the system's own headers out.
        self.rules[group] = command_line([*compiler, *flags]) + " -MMD -MF $out.d -c $in -o $out"
        objects = {BUILD / group / f"{source.stem}.o": (group, source) for source in sources}
        self.groups[group] = objects

    def link(
        self, output: Path, groups: list[str], linker: list[str], flags: list[str], after: Sequence[Path] = ()
    ) -> None:
        """`after` are libraries that the flags name and that have to be there first."""
        rule = f"link_{output.stem.partition('.')[0]}"
        self.rules[rule] = command_line(linker) + " -shared $in -o $out " + command_line(flags)
        self.links[output] = (rule, [obj for group in groups for obj in self.groups[group]], list(after))

    def write(self) -> None:
        lines = []
        for rule, command in self.rules.items():
            lines += [f"rule {rule}", f"  command = {command}", f"  description = {rule} $out"]
            lines += ["  depfile = $out.d", "  deps = gcc"] if rule in self.groups else []
        for group, objects in self.groups.items():
            lines += [f"build {escape(obj)}: {rule} {escape(source)}" for obj, (rule, source) in objects.items()]
            lines += [f"build {group}: phony {' '.join(map(escape, objects))}"]
        for output, (rule, objects, after) in self.links.items():
            first = f" | {' '.join(map(escape, after))}" if after else ""
            lines += [f"build {escape(output)}: {rule} {' '.join(map(escape, objects))}{first}"]
        (ROOT / BUILD).mkdir(parents=True, exist_ok=True)
        (ROOT / BUILD / "build.ninja").write_text(f"builddir = {BUILD}\n" + "\n".join(lines) + "\n")

    def run(self, *targets: str | Path) -> bool:
        command = [*self.ninja, "-k", "0", "-f", str(BUILD / "build.ninja"), *map(str, targets)]
        return subprocess.run(command, cwd=ROOT).returncode == 0


class NativeBuild(build_ext):
    """Builds what can be built and says what could not."""

    def run(self) -> None:
        self.problems: list[str] = []
        self.outputs: list[Path] = []
        mode = os.environ.get("PYKERN_BUILD") or "auto"
        report = {
            "requested": mode,
            "library": None,
            "isa": [],
            "cuda_archs": [],
            "emulator": False,
            "introspect": False,
        }
        if mode not in ("auto", "cpu", "cuda", "none"):
            raise SystemExit(f"PYKERN_BUILD is {mode!r}; it must be cpu, cuda or none")
        if mode == "none":
            self.problem("PYKERN_BUILD=none: no native library was built")
        else:
            self.build(mode, report)
        report["problems"] = self.problems

        target = ROOT if self.inplace or self.editable_mode else Path(self.build_lib)
        self.place(report["library"] and BUILD / LIBRARY, target / "pykern/lib" / LIBRARY)
        for library in (EMULATOR, EMULATED):
            self.place(report["emulator"] and BUILD / library, target / "pykern/lib" / library)
        name = "_introspect" + sysconfig.get_config_var("EXT_SUFFIX")
        self.place(report["introspect"] and BUILD / name, target / "pykern" / name)
        (ROOT / BUILD).mkdir(parents=True, exist_ok=True)
        (ROOT / BUILD / "build.json").write_text(json.dumps(report, indent=2) + "\n")
        self.place(BUILD / "build.json", target / "pykern/lib/build.json")

    def problem(self, text: str) -> None:
        self.problems.append(text)
        print(f"pykern: {text}", file=sys.stderr, flush=True)

    def place(self, built: Path | None, target: Path) -> None:
        """Puts a file where the package looks for it; a library that could not be built leaves no stale one behind."""
        if not built:
            target.unlink(missing_ok=True)
            return
        self.outputs.append(target)
        if target.exists() and filecmp.cmp(ROOT / built, target, shallow=False):
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_suffix(".new")
        shutil.copy2(ROOT / built, fresh)
        os.replace(fresh, target)  # a process that runs from the old library keeps it

    def build(self, mode: str, report: dict) -> None:
        compiler = toolchain.find_cxx()
        has_ninja = importlib.util.find_spec("ninja")
        ninja = (
            [sys.executable, "-m", "ninja"] if has_ninja else toolchain.find_program("NINJA", "ninja", "ninja-build")
        )
        if not compiler:
            return self.problem("no C++ compiler was found (g++, or what CXX names): Triton and references only")
        if not ninja:
            return self.problem("ninja was not found: Triton and references only")
        report["compiler"] = toolchain.version_of(compiler)
        plan = Plan(ninja)
        introspect = self.plan_introspect(plan, compiler)
        library = self.plan_library(plan, compiler, mode, report)
        emulator = library and self.plan_emulator(plan, compiler, mode)
        plan.write()
        everything_built = plan.run()

        if introspect:
            report["introspect"] = everything_built or plan.run(introspect)
            if not report["introspect"]:
                self.problem("compiling csrc/introspect.cpp failed: pykern doctor knows less")
        if emulator:
            report["emulator"] = everything_built or plan.run(BUILD / EMULATOR, BUILD / EMULATED)
            if not report["emulator"]:
                self.problem("compiling the emulator failed: CUDA kernels do not run on CPU tensors")
        if library and not everything_built:
            library = self.best_library(plan)
        if library:
            built = [group for group in plan.groups if group not in APART]
            report["library"] = "cuda" if "cuda" in built else "cpu"
            report["isa"] = [group for group in built if group in ISA_FLAGS]
        if report["library"] != "cuda":
            report["cuda_archs"] = []

    def best_library(self, plan: Plan) -> bool:
        """Links the groups that do compile, if they make a library."""
        for group in [group for group in plan.groups if group not in APART and not plan.run(group)]:
            del plan.groups[group]
            self.problem(f"compiling {group} failed: left out")
        if "host" not in plan.groups or not any(group in ISA_FLAGS for group in plan.groups):
            self.problem("no CPU kernel could be compiled: Triton and references only")
            return False
        rule, objects, after = plan.links[BUILD / LIBRARY]
        compiled = {obj for group in plan.groups.values() for obj in group}
        plan.links[BUILD / LIBRARY] = rule, [obj for obj in objects if obj in compiled], after
        plan.write()
        if plan.run(BUILD / LIBRARY):
            return True
        self.problem("linking the native library failed: Triton and references only")
        return False

    def plan_introspect(self, plan: Plan, compiler: list[str]) -> Path | None:
        if not importlib.util.find_spec("pybind11"):
            self.problem("pybind11 was not found: pykern doctor knows less")
            return None
        import pybind11

        output = BUILD / ("_introspect" + sysconfig.get_config_var("EXT_SUFFIX"))
        includes = ["-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")]
        plan.compile("introspect", [Path("csrc/introspect.cpp")], compiler, [*toolchain.CXX_FLAGS, *includes])
        plan.link(output, ["introspect"], compiler, [])
        return output

    def plan_library(self, plan: Plan, compiler: list[str], mode: str, report: dict) -> bool:
        torch = importlib.util.find_spec("torch")
        if not torch:
            self.problem(
                "torch was not found, so no native library: install torch, then pykern with pip's --no-build-isolation"
            )
            return False
        report["torch"] = importlib.metadata.version("torch")
        torch_folder = Path(torch.submodule_search_locations[0])
        self.torch_flags = [*toolchain.torch_flags(torch_folder), "-Icsrc", "-Icsrc/include"]
        self.torch_link = toolchain.torch_link_flags(torch_folder)
        namespace = ["-DPYKERN_NAMESPACE=pykern_native"]
        host = [Path("csrc/library.cpp"), *sorted(Path("csrc/cpu").glob("*.cpp"))]
        plan.compile("host", host, compiler, [*toolchain.CXX_FLAGS, *self.torch_flags, *namespace])
        isas = ISA_FLAGS if platform.machine() in ("x86_64", "AMD64") else {"baseline": []}
        for isa, flags in isas.items():
            sources = sorted(Path("csrc/cpu/simd").glob("*.cpp"))
            plan.compile(isa, sources, compiler, [*toolchain.CXX_FLAGS, *flags, f"-DISA={isa}"])
        linker, groups = compiler, ["host", *isas]
        nvcc, archs = self.plan_cuda(mode)
        if nvcc:
            nvcc = [*nvcc, f"-ccbin={compiler[-1]}"]
            flags = [*toolchain.NVCC_FLAGS, *toolchain.cuda_arch_flags(archs), *self.torch_flags, *namespace]
            plan.compile("cuda", sorted([*Path("csrc").glob("*.cu"), *Path("csrc/cuda").glob("*.cu")]), nvcc, flags)
            linker, groups = [*nvcc, "-cudart=static"], [*groups, "cuda"]
            report["nvcc"], report["cuda_archs"] = toolchain.version_of(nvcc), archs
        whole = "-Xlinker=--no-as-needed" if nvcc else "-Wl,--no-as-needed"
        plan.link(BUILD / LIBRARY, groups, linker, [whole, *self.torch_link])
        return True

    def plan_emulator(self, plan: Plan, compiler: list[str], mode: str) -> bool:
        """CUDA kernels on CPU tensors: the emulator, and the kernels compiled for it."""
        sources = sorted(Path("csrc/cuda").glob("*.cu"))
        if mode == "cpu" or not sources:
            return False
        headers = toolchain.cuda_include()
        if not headers:
            self.problem("CUDA's headers were not found (CUDA_HOME): CUDA kernels do not run on CPU tensors")
            return False
        if platform.machine() not in ("x86_64", "AMD64"):
            self.problem(f"the emulator is not written for {platform.machine()}: no CUDA kernels on CPU tensors")
            return False
        cuda = ["-isystem", str(headers)]
        runtime = sorted(Path("csrc/emulator").glob("*.cpp"))
        plan.compile("emulator", runtime, compiler, [*toolchain.EMULATOR_FLAGS, *cuda])
        plan.link(BUILD / EMULATOR, ["emulator"], compiler, ["-ldl", f"-Wl,-soname,{EMULATOR}"])
        flags = [*toolchain.EMULATED_FLAGS, *self.torch_flags, *cuda, "-DPYKERN_NAMESPACE=pykern_native_emulated"]
        plan.compile("emulated", [Path("csrc/library.cpp"), *sources], compiler, flags)
        beside = [f"-L{BUILD}", "-lpykern_emulator", "-Wl,-rpath,$ORIGIN"]
        plan.link(
            BUILD / EMULATED,
            ["emulated"],
            compiler,
            ["-Wl,--no-as-needed", *self.torch_link, *beside],
            [BUILD / EMULATOR],
        )
        return True

    def plan_cuda(self, mode: str) -> tuple[list[str] | None, list[str]]:
        sources = list(Path("csrc/cuda").glob("*.cu"))
        if mode == "cpu" or not sources:
            if mode == "cuda":
                self.problem("PYKERN_BUILD=cuda, but csrc/cuda holds no .cu file: CPU kernels and Triton only")
            return None, []
        nvcc = toolchain.find_nvcc()
        if not nvcc:
            self.problem("no nvcc was found: CPU kernels and Triton only")
            return None, []
        archs = [
            word.replace(".", "") for word in re.split(r"[;,\s]+", os.environ.get("PYKERN_CUDA_ARCHS", "")) if word
        ]
        for arch in archs:
            if not re.fullmatch(r"\d{2,3}[af]?", arch):
                raise SystemExit(f"PYKERN_CUDA_ARCHS names {arch!r}; it takes architectures as 80;90a")
        return nvcc, archs or list(toolchain.DEFAULT_CUDA_ARCHS)

    def get_outputs(self) -> list[str]:
        return [str(path) for path in getattr(self, "outputs", [])]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


os.chdir(ROOT)
setup(
    packages=[*find_packages(include=["pykern", "pykern.*"]), "pykern.kernels", "pykern.csrc"],
    package_dir={"pykern.kernels": "kernels", "pykern.csrc": "csrc"},
    package_data={"pykern.csrc": ["*.h", "include/pykern/*", "cuda/*.h", "emulator/*.h"]},  # for pykern.extension
    ext_modules=[Extension("pykern._introspect", ["csrc/introspect.cpp"])],
    cmdclass={"build_ext": NativeBuild},
    include_package_data=False,
)

"""The parts that run in the child's own process: each function yields the units of one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import pykern
from pykern import _native, extension
from pykern.ops._op import OpSpec
from pykern.testing import bench, checks, timing
from pykern.testing import peers as peer_libraries
from pykern.testing.cases import DTYPES, backends
from pykern.testing.gpu import golden
from pykern.testing.gpu.child import Config, Unit
from pykern.testing.gpu.paths import ROOT
from pykern.testing.inputs import Make, differentiable, fresh

REPEATS = 20
ROUNDS = 0.15  # seconds of measuring for each contestant


def build(config: Config) -> Iterator[Unit]:
    """The C++ kernels load here; if not, they are built."""

    def native() -> dict[str, Any]:
        problem = _native.reason if config.dry else _native.cuda_problem()
        if problem is None:
            return {"ok": True, "built": _native.build_report()}
        if config.dry:
            return {"ok": None, "reason": problem}
        command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=max(config.remaining, 1))
        ask = [sys.executable, "-c", "from pykern import _native; print(_native.cuda_problem() or '')"]
        left = subprocess.run(ask, cwd=ROOT, capture_output=True, text=True)
        after = left.stdout.strip() or left.stderr[-500:]
        result = {
            "built": _native.build_report(),
            "note": f"built here, because: {problem}",
            "output": done.stderr[-4000:],
        }
        return {"ok": not after, **result} | ({"error": after} if after else {})

    yield "native library", native


def conformance(config: Config) -> Iterator[Unit]:
    """The thin wrappers on fixed inputs: kept as golden vectors, and compared with the emulator at once."""
    library = extension.Library("pykern_fragments", golden.SOURCE)

    def unit(vector: golden.Vector) -> dict[str, Any]:
        missing = library.missing(config.device)
        if missing:
            return {"ok": None, "reason": missing}
        recorded = golden.record(library.load(config.device), vector, config.device)
        result = {"ok": True, "vector": recorded, "emulator": library.missing("cpu")}
        if result["emulator"] is None:
            difference = golden.disagreement(library.load("cpu"), recorded)
            result |= {"ok": difference is None, "emulator": difference or "agrees"}
            result |= {"error": f"the emulator: {difference}"} if difference else {}
        return result

    for name, vector in golden.VECTORS.items():
        yield name, lambda vector=vector: unit(vector)


def repeat(config: Config) -> Iterator[Unit]:
    """The same bits twenty times, forward and backward, from inputs of this run's own."""

    def unit(spec: OpSpec, backend: str, dtype: torch.dtype) -> dict[str, Any]:
        different, count = [], 0
        kinds = ("smoke",) if config.dry else ("full", "bench")
        for sample in (s for kind in kinds for s in spec.samples(kind, Make(config.device, dtype, config.seed))):
            if spec.why_not(backend, sample.args) is not None:
                continue
            count += 1
            wrong = _differing_repeat(spec, backend, sample.args)
            if wrong is not None:
                different.append(f"{sample.name}: {wrong}")
        if not count:
            return {"ok": None, "reason": "no sample is served"}
        result = {"ok": not different, "samples": count, "repeats": REPEATS, "failures": different}
        return result | ({"error": f"{len(different)} of {count} samples differ"} if different else {})

    for name, spec in _specs(config):
        for backend in _kernels(spec, config.device):
            for dtype in DTYPES[:1] if config.dry else DTYPES:
                yield (
                    f"{name} {backend} {str(dtype)[6:]}",
                    lambda spec=spec, backend=backend, dtype=dtype: unit(spec, backend, dtype),
                )


def benchmarks(config: Config) -> Iterator[Unit]:
    """Each op against every peer there is, interleaved; what matters most first, should the time not suffice."""
    problem = _install(config.peers, config.scratch) if config.peers else None
    place = torch.device(config.device)
    budget, host_calls = (0.002, 20) if config.dry else (ROUNDS, 2000)
    torch._dynamo.config.recompile_limit = 1000  # past it, torch.compile is torch under another name

    def ceilings() -> dict[str, Any]:
        size = 2**20 if config.dry else 2**32
        rates = {str(d)[6:]: timing.matmul_rate(d, place) for d in (torch.bfloat16, torch.float16, torch.float32)}
        copy = timing.copy_bandwidth(size, place)
        note = f"copy {copy / 1e12:.2f} TB/s, " + ", ".join(f"{d} {r / 1e12:.0f} TFLOP/s" for d, r in rates.items())
        return {"ok": True, "copy_bytes": size, "copy_bytes_per_second": copy, "matmul_flops": rates, "note": note}

    def installed() -> dict[str, Any]:
        found = peer_libraries.libraries()
        result = {"libraries": found, "note": ", ".join(f"{k} {v}" for k, v in found.items())}
        return {"ok": False, "error": problem, **result} if problem else {"ok": True, **result}

    def unit(name: str, index: int, dtype: torch.dtype, mode: str) -> dict[str, Any]:
        spec = pykern.catalogue()[name]
        sample = _bench_samples(spec, config, dtype, config.seed)[index]
        peers = peer_libraries.gpu_peers(spec, "eager" if config.dry else "inductor")
        refused = {name: peer_libraries.fault(spec, peer, sample.args) for name, peer in peers.items()}
        refused = {name: problem for name, problem in refused.items() if problem is not None}
        peers = {name: peer for name, peer in peers.items() if name not in refused}
        found = list(bench.run(spec, sample, mode, config.device, dtype, budget, peers, host_calls))
        wrong = [f"{who}: {why}" for who, why in (r for r in found if isinstance(r, tuple))]
        records = [asdict(record) for record in found if not isinstance(record, tuple)]
        result = {
            "ok": not wrong,
            "records": records,
            "peers": list(peers),
            "refused_peers": refused,
            "failures": wrong,
        }
        return result | ({"error": "a wrong result is not timed"} if wrong else {})

    yield "ceilings", ceilings
    yield "peers", installed
    for dtype in (torch.bfloat16,) if config.dry else (torch.bfloat16, torch.float32):
        for index in range(1 if config.dry else 8):
            for name, spec in _specs(config):
                samples = _bench_names(spec, config, dtype)
                if index < len(samples) and _kernels(spec, config.device):
                    sample, modes = samples[index]
                    for mode in modes:
                        yield (
                            f"{name} {sample} {str(dtype)[6:]} {mode}",
                            lambda key=(name, index, dtype, mode): unit(*key),
                        )


def ledger(config: Config) -> Iterator[Unit]:
    """What the driver loads is what the ledger's tools read from the binary: Triton's kernels for this GPU."""
    from pykern.testing import ledger_triton

    if not ledger_triton.installed():
        yield "triton", lambda: {"ok": None, "reason": "triton is not installed"}
        return
    major, minor = (9, 0) if config.dry else torch.cuda.get_device_capability()
    arch = f"{major}{minor}" + ("a" if major >= 9 else "")
    specs = [spec for _, spec in _specs(config) if "triton" in spec.backends]
    launches, problems = ledger_triton.launches(specs, [arch])

    def unit(launch: ledger_triton.Launch) -> dict[str, Any]:
        offline = launch.compile()
        loaded = {"registers": offline.registers, "shared": offline.shared} if config.dry else _loaded(launch)
        differ = [f"{key}: the driver says {n}, the ledger {getattr(offline, key)}" for key, n in loaded.items()
                  if n != getattr(offline, key)]  # fmt: skip
        return {"ok": not differ, "loaded": loaded, "offline": offline.to_json()} | (
            {"error": "; ".join(differ)} if differ else {}
        )

    for problem in problems:
        yield problem, lambda problem=problem: {"ok": False, "error": problem}
    for launch in launches[:1] if config.dry else launches:
        yield launch.key, lambda launch=launch: unit(launch)


def _loaded(launch: Any) -> dict[str, int]:
    compiled = launch.compiled()
    compiled._init_handles()
    return {"registers": compiled.n_regs, "shared": compiled.metadata.shared}


def _differing_repeat(spec: OpSpec, backend: str, args: Any) -> str | None:
    first: list[torch.Tensor] = []
    incoming: list[torch.Tensor] = []
    for number in range(REPEATS):
        ours = fresh(args)
        outputs = checks.call(spec, backend, ours)
        live = [output for output in outputs if output.requires_grad]
        # Made once, where the kernels run: on the host it would take longer than all that is tested.
        incoming = incoming or [torch.randn_like(output) for output in live]
        wanted = [ours[i] for i in differentiable(ours)] if live else []
        found = [*outputs, *(torch.autograd.grad(live, wanted, incoming, allow_unused=True) if wanted else ())]
        first = first or found
        if not all(a is b or checks.same_bits(a, b) for a, b in zip(first, found, strict=True)):
            return f"repeat {number} differs from the first"
    return None


def _specs(config: Config) -> list[tuple[str, OpSpec]]:
    found = [(n, s) for n, s in pykern.catalogue().items() if s.gradient is not None and s.samples is not None]
    unknown = set(config.ops) - {name for name, _ in found}
    if unknown:
        raise ValueError(f"ops: there is no {', '.join(sorted(unknown))}")
    return [(name, spec) for name, spec in found if not config.ops or name in config.ops]


def _kernels(spec: OpSpec, device: str) -> list[str]:
    return [name for name in backends(spec, device) if name != "reference"]


def _bench_samples(spec: OpSpec, config: Config, dtype: torch.dtype, seed: int) -> list[Any]:
    return list(spec.samples("smoke" if config.dry else "bench", Make(config.device, dtype, seed)))


def _bench_names(spec: OpSpec, config: Config, dtype: torch.dtype) -> list[tuple[str, list[str]]]:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():  # only names are wanted: no memory, no time
        samples = spec.samples("smoke" if config.dry else "bench", Make("cpu", dtype))
        return [(sample.name, bench.modes(sample.args)) for sample in samples]


def _install(wheels: str, scratch: str) -> str | None:
    """Unpacks the wheels for this process; what they need has to be there or among them. What went wrong, or None."""
    target = Path(scratch) / "peers"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    command += ["--target", str(target), *map(str, sorted(Path(wheels).glob("*.whl")))]
    done = subprocess.run(command, capture_output=True, text=True)
    sys.path.insert(0, str(target))
    return f"pip failed: {done.stderr[-1000:]}" if done.returncode else None

"""What runs under compute-sanitizer: small calls of every kernel, then one with a fault.

`python -m pykern.testing.gpu.sanitized DEVICE SEED TOOL|- [OP…]`, where the tool is the one that has to see the fault.
Inputs are made on the CPU, so that the GPU runs little besides the kernels in question.
"""

from __future__ import annotations

import itertools
import subprocess
import sys

import torch

import pykern
from pykern import extension
from pykern.testing import checks
from pykern.testing.cases import backends
from pykern.testing.gpu.paths import ROOT
from pykern.testing.inputs import Make, map_tensors

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
ELEMENTS = 4096  # of the largest argument: every access is checked, which is slow


def planted() -> extension.Library:
    return extension.Library("pykern_planted", ROOT / "tests/cuda/planted.cu")


def prepare(device: str) -> str | None:
    """Compiles the faults, which is not to be done under a tool; why that cannot be, or None."""
    try:
        planted().load(device)
    except (RuntimeError, OSError) as error:
        return str(error)[-500:]
    return None


def run(device: str, seed: int, ops: list[str]) -> int:
    """How many calls, forward and backward, have come to their end."""
    count = 0
    for name, spec in pykern.catalogue().items():
        if spec.gradient is None or spec.samples is None or (ops and name not in ops):
            continue
        # A reference is torch's own kernels.
        for backend in (b for b in backends(spec, device) if b in ("triton", "cuda")):
            for dtype in (torch.float32, torch.bfloat16) if device == "cuda" else (torch.float32,):
                samples = spec.samples("smoke", Make("cpu", dtype, seed))
                for sample in samples if device == "cuda" else itertools.islice(samples, 1):
                    args = map_tensors(lambda t: t.detach().to(device).requires_grad_(t.requires_grad), sample.args)
                    sizes = [a.numel() for a in args if isinstance(a, torch.Tensor)]
                    if max(sizes, default=0) > ELEMENTS or spec.why_not(backend, args) is not None:
                        continue
                    checks.gradients(checks.call(spec, backend, args), args)
                    count += 1
    return count


def stand_in() -> None:
    """A compute-sanitizer for rehearsals: `OPTION VALUE … python -m …`; runs that, and reports the planted fault."""
    start = sys.argv.index(sys.executable)
    options = dict(zip(sys.argv[1:start:2], sys.argv[2:start:2], strict=True))
    command = sys.argv[start:]
    code = subprocess.run(command).returncode
    tool, lines = options["--tool"], ["COMPUTE-SANITIZER"]
    if tool in command:
        lines += ["A planted fault", f"    at pykern::{tool}_kernel(const float *, float *, int)+0x90 in planted.cu:14"]
    lines.append("RACECHECK SUMMARY: 1 hazard" if tool == "racecheck" else "ERROR SUMMARY: 1 error")
    with open(options["--log-file"], "w") as log:
        log.writelines(f"========= {line}\n" for line in lines)
    sys.exit(code)


def main() -> None:
    device, seed, tool, *ops = sys.argv[1:]
    print("calls", run(device, int(seed), ops), flush=True)
    if device == "cuda" and tool != "-":
        torch.cuda.synchronize()
        getattr(planted().load(device), tool)(torch.randn(128, device=device))
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()

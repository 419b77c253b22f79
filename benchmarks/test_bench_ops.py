"""One pytest-benchmark case for every op, sample, dtype, mode and contestant that the catalogue implies.

Pedantic mode throughout: pytest-benchmark's calibration needs a clock that runs by itself; a device's does not.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import pykern
from pykern.testing import bench, checks, timing
from pykern.testing.inputs import samples

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUNDS = 20


def _cases() -> Iterator[Any]:
    for name, spec in pykern.catalogue().items():
        if spec.gradient is None:
            continue
        for dtype in (torch.float32, torch.bfloat16):
            for index, sample in enumerate(samples(spec, "bench", DEVICE.type, dtype)):
                for contestant in bench.contestants(spec, sample.args, DEVICE.type):
                    for mode in bench.MODES:
                        group = f"{name} {sample.name} {str(dtype)[6:]} {mode}"
                        yield pytest.param(name, index, dtype, contestant, mode, group, id=f"{group} {contestant}")


@pytest.mark.parametrize(("name", "index", "dtype", "contestant", "mode", "group"), list(_cases()))
def test_bench(
    name: str, index: int, dtype: torch.dtype, contestant: str, mode: str, group: str, benchmark: Any
) -> None:
    spec = pykern.catalogue()[name]
    sample = list(samples(spec, "bench", DEVICE.type, dtype))[index]
    if contestant in spec.backends or contestant == "reference":
        checks.check_accuracy(spec, contestant, sample.args)
    call = bench.launch(bench.contestants(spec, sample.args, DEVICE.type)[contestant], sample.args, mode)
    benchmark.group = group
    benchmark.pedantic(call, setup=lambda: timing.flush_cache(DEVICE), rounds=ROUNDS, warmup_rounds=3)

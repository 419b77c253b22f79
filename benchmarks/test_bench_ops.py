"""One pytest-benchmark case for every op, sample, dtype, mode and contestant that the catalogue implies.

Pedantic mode throughout: pytest-benchmark's calibration needs a clock that runs by itself; a device's does not.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import pykern
from pykern.testing import bench, checks, timing
from pykern.testing.inputs import map_tensors, samples

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROUNDS = 20 if DEVICE.type == "cuda" else 5


def _cases() -> Iterator[Any]:
    for name, spec in pykern.catalogue().items():
        if spec.gradient is None:
            continue
        for dtype in (torch.float32, torch.bfloat16):
            with FakeTensorMode():  # only names are wanted: no memory, no time
                found = [
                    (s.name, [*bench.served_by(spec, s.args, DEVICE.type), *spec.peers], bench.modes(s.args))
                    for s in samples(spec, "bench", "cpu", dtype)
                ]
            for index, (sample, contestants, modes) in enumerate(found):
                for contestant in contestants:
                    for mode in modes:
                        group = f"{name} {sample} {str(dtype)[6:]} {mode}"
                        yield pytest.param(name, index, dtype, contestant, mode, group, id=f"{group} {contestant}")


@pytest.mark.parametrize(("name", "index", "dtype", "contestant", "mode", "group"), list(_cases()))
def test_bench(
    name: str, index: int, dtype: torch.dtype, contestant: str, mode: str, group: str, benchmark: Any
) -> None:
    spec = pykern.catalogue()[name]
    args = list(samples(spec, "bench", DEVICE.type, dtype))[index].args
    if contestant not in spec.peers:
        checks.check_accuracy(spec, contestant, args)
        fn = bench.forced(spec, contestant)
    else:
        fn = spec.peers[contestant]
        if fn(*map_tensors(lambda t: t.detach(), args)) is None:
            pytest.skip(f"{contestant} does not cover this sample")
    benchmark.group = group
    launch = bench.launch(fn, args, mode)

    def call() -> None:
        launch()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(call, setup=lambda: timing.flush_cache(DEVICE), rounds=ROUNDS, warmup_rounds=1)

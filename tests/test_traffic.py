"""Traffic: what kernels move over what their op must, held to the ops' limits.

Triton's is counted where it is interpreted: `make test` runs this file once more there.
"""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from interpreted import INTERPRETED

import pykern
from pykern.ops._spec import Sample
from pykern.testing import traffic
from pykern.testing.cases import backends
from pykern.testing.inputs import Make, samples

OUTSIDE = Path(__file__).parent / "faults/triton_traffic.py"
COUNTED = [
    (name, backend)
    for name, spec in pykern.catalogue().items()
    if spec.namespace == "pykern" and spec.gradient is not None and spec.cost is not None
    for backend in backends(spec, "cpu")
    if backend in traffic.BACKENDS
]


@pytest.mark.parametrize(("op", "backend"), COUNTED)
def test_within_the_ops_limits(op, backend):
    spec = pykern.catalogue()[op]
    rows = [
        row
        for sample in samples(spec, "traffic", "cpu", torch.bfloat16)
        for row in traffic.measure(spec, backend, sample)
    ]
    assert {row.op for row in rows} == {op, *([f"{op}_backward"] if backend in spec.gradient.op.backends else [])}
    assert not [row for row in rows if not row.within]


@pytest.mark.parametrize("backend", [backend for op, backend in COUNTED if op == "attention"])
def test_attention_does_not_visit_what_causality_and_window_hide(backend, monkeypatch):
    """In tiles as large as any GPU's: close to half of full attention at length 8192, and in proportion to a window."""
    spec, make, length, size = pykern.catalogue()["attention"], Make("cpu", torch.float16), 8192, 32
    if backend == "triton":
        from pykern.kernels import attention

        small = attention.forward_config
        monkeypatch.setattr(attention, "forward_config", lambda *a: replace(small(*a), queries=128, keys=128))
    tensors = [make(1, length, 1, size, grad=False) for _ in range(3)]
    full = 4 * length**2 * size

    def share(left: int | None) -> float:
        call = (None, None, None, None, 0.0, size**-0.5, False, left, 0, None, "top_left")
        (row,) = traffic.measure(spec, backend, Sample("long", (*tensors, *call)))
        assert row.within if backend == "cuda" else row.flops  # the limit is of the interpreter's own, smaller tiles
        return row.flops / full

    assert 0.5 <= share(None) <= 0.56
    for window in (256, 1024):
        assert window / length <= share(window - 1) + 0.5 * (window / length) ** 2 <= (window + 192) / length


@pytest.mark.parametrize("backend", [backend for op, backend in COUNTED if op == "attention_varlen"])
def test_packed_attention_does_no_work_for_padding(backend):
    """Neither for rows behind the last sequence nor for what the longest sequence is longer than the others."""
    spec, make, heads = pykern.catalogue()["attention_varlen"], Make("cpu", torch.bfloat16), (2, 1, 32)

    def measured(lengths: list[int], padding: int) -> traffic.Row:
        q, k, v = (make(sum(lengths) + padding, h, heads[2], grad=False) for h in (heads[0], heads[1], heads[1]))
        bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        longest = (max(lengths),) * 2
        call = (None, None, None, None, None, 0.0, heads[2] ** -0.5, None, 0, None)
        (row,) = traffic.measure(spec, backend, Sample("packed", (q, k, v, bounds, bounds, *longest, *call)))
        return row

    alone, beside = measured([320], 0), measured([320, 64, 0, 64], 0)
    short = measured([64], 0)
    assert beside.flops == alone.flops + 2 * short.flops > 0
    padded = measured([320, 64, 0, 64], 256)
    zeros = 256 * heads[0] * (2 * heads[2] + 4)
    assert padded.flops == beside.flops and padded.moved - beside.moved <= 1.1 * zeros


def region(read: int = 0, written: int = 0, times: int = 1) -> dict[str, int]:
    return {"read": read * times, "written": written * times, "unique_read": read, "unique_written": written}


def test_small_tensors_move_once_and_others_at_every_request():
    small, large = region(read=100, times=10), region(read=350, written=350, times=2)
    assert traffic.moved({"regions": {"weight": small, "x": large}}) == 100 + 1400
    assert traffic.moved({"regions": {"weight": region(read=101, times=10), "x": large}}) == 1010 + 1400


class TestCommand:
    __test__ = INTERPRETED

    def test_an_op_outside_the_package(self, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "200")
        assert traffic.traffic((str(OUTSIDE),)) == 0
        assert "1.500" in capsys.readouterr().out
        names = ("triton_traffic::once", "triton_traffic::twice", "triton_traffic::twice_allowed")
        assert traffic.traffic(names, check=True) == 1
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("triton_traffic::")]
        assert lines == ["triton_traffic::twice triton 3000 numbers: 1.500 times the cost, the limit is 1.0"]

    def test_no_kernel_to_count(self, capsys):
        assert traffic.traffic(("quantize_absmax",)) == 1
        assert "has a kernel that could be counted here" in capsys.readouterr().out

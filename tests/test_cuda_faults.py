"""The checks check: each seeded fault of a CUDA kernel is caught, and the same kernel without it passes."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pykern import extension, toolchain
from pykern.ops._spec import OpSpec, Sample, define
from pykern.testing import checks

pytestmark = pytest.mark.skipif(toolchain.cuda_include() is None, reason="the emulator needs CUDA's headers")

LIBRARY = extension.Library("pykern_test_faults", Path(__file__).parent / "cuda/faults.cu")


def spread_rows() -> Tensor:
    """(3,), the last element more than 2³¹ elements behind the first; the memory between is never touched."""
    stride = 2**30 + 1
    x = torch.empty(2 * stride + 1).as_strided((3,), (stride,))
    return x.copy_(torch.tensor([1.0, 2.0, 3.0]))


def sums_of_warps(x: Tensor) -> Tensor:
    return x.view(-1, 32).sum(1, keepdim=True).expand(-1, 32).reshape(-1)


# What the emulator finds by itself. Fault: input, what is right, what the message says.
FOUND: dict[str, tuple[Callable[[], Tensor], Callable[[Tensor], Tensor], str]] = {
    "mask": (lambda: torch.randn(500), lambda x: 2 * x, "read of 4 bytes.* past the end of x"),
    "barrier": (lambda: torch.randn(256), lambda x: x.view(-1, 2).flip(1).reshape(-1), "race.*tile"),
    "divergent": (lambda: torch.randn(256), lambda x: x, "divergent"),
    "shuffle": (lambda: torch.randn(256), sums_of_warps, "mask"),
    "offset": (spread_rows, lambda x: x, "overflow"),
    "uninitialised": (lambda: torch.randn(256), lambda x: x, "uninitialised.*tile"),
    "in_place": (lambda: torch.randn(500), lambda x: 2 * x, "writes.* x"),
    "alignment": (lambda: torch.randn(500), lambda x: x, "misaligned"),
    "resident": (lambda: torch.randn(1), lambda x: torch.ones(8), "cannot be resident"),
}


@pytest.mark.parametrize("fault", FOUND)
def test_the_emulator_finds(fault: str) -> None:
    make, right, message = FOUND[fault]
    run = getattr(LIBRARY.load("cpu"), fault)
    x = make()
    torch.testing.assert_close(run(x, False), right(x), rtol=1e-5, atol=0)
    with pytest.raises(RuntimeError, match=message) as caught:
        run(x, True)
    assert "faults.cu:" in str(caught.value)
    torch.testing.assert_close(run(x, False), right(x), rtol=1e-5, atol=0)  # a fault leaves nothing behind


def declare(name: str, reference: Callable[[Tensor], Tensor], samples: Callable[..., Iterator[Sample]]) -> OpSpec:
    """The op faults::NAME(x, broken) with the kernel of that name."""
    return define(
        f"pykern_test_faults_ops::{name}(Tensor x, bool broken, *, str? backend=None) -> (Tensor y)",
        reference=lambda x, broken: reference(x),
        fake=lambda x, broken: reference(x).contiguous(),
        backends={"cuda": LIBRARY.kernel(name)},
        samples=samples,
    )


def accumulated(x: Tensor) -> Tensor:
    return (x if x.dtype == torch.float64 else x.float()).sum(1).to(x.dtype)


# What the checks of the engine find. Fault: the op, the check, an input, what the message says.
CHECKED: dict[str, tuple[OpSpec, Callable[..., None], Callable[[], Tensor], str]] = {
    "unwritten": (
        declare("unwritten", lambda x: x.clone(), lambda kind, make: iter(())),
        checks.check_accuracy,
        lambda: torch.randn(500),
        "y: ",
    ),
    "accumulate": (
        declare("accumulate", accumulated, lambda kind, make: iter(())),
        checks.check_accuracy,
        lambda: torch.randn(4, 300).bfloat16(),
        "y: ",
    ),
    "atomic": (
        declare("atomic", lambda x: x.sum(0, keepdim=True), lambda kind, make: iter(())),
        checks.check_orders,
        lambda: torch.randn(128 * 40),
        "differs",
    ),
}


@pytest.mark.parametrize("fault", CHECKED)
def test_the_checks_find(fault: str) -> None:
    spec, check, make, message = CHECKED[fault]
    args: tuple[Any, ...] = (make(),)
    check(spec, "cuda", (*args, False))
    with pytest.raises(AssertionError, match=message):
        check(spec, "cuda", (*args, True))


def test_every_seeded_fault_is_in_the_docs() -> None:
    from test_fragments import FAULTS as of_fragments
    from test_triton_faults import FAULTS as of_triton

    table = (Path(__file__).parents[1] / "docs/what-slips-through.md").read_text()
    for fault in (*FOUND, *CHECKED, *of_triton, *of_fragments[1:]):
        assert f"`{fault}`" in table, fault

"""Proof that the checks check: each seeded fault of a Triton kernel is caught, and the kernel without it passes."""

from functools import partial

import pytest
import torch
from interpreted import INTERPRETED, in_child
from torch import Tensor

from pykern.testing import checks


def wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def doubled(x: Tensor) -> Tensor:
    return 2 * x


def row_sums(x: Tensor) -> Tensor:
    return wide(x).sum(1).to(x.dtype)


def column_sums(x: Tensor) -> Tensor:
    return wide(x).sum(0).to(x.dtype)


def total(x: Tensor) -> Tensor:
    return wide(x).sum().reshape(1).to(x.dtype)


# Fault: what the op computes, the shape and dtype of its input, and how the fault shows.
FAULTS = {
    "off_by_one_mask": (doubled, (3, 17), torch.float32, "out-of-bounds load .* 4 bytes behind the end of x"),
    "uninitialised_output": (doubled, (3, 17), torch.float32, "y: 19 values are finite and not in the reference"),
    "write_to_an_input": (doubled, (3, 17), torch.float32, "store to the input x of the op"),
    "false_alignment": (doubled, (3, 17), torch.float32, r"tl.multiple_of\(…, 4\) is false"),
    "sum_in_16_bits": (row_sums, (3, 8000), torch.bfloat16, "y: relative error .*, allowed"),
    "atomic_sum": (total, (5, 40), torch.float32, "not deterministic: floats are added to partials atomically"),
    "race_of_programs": (total, (5, 40), torch.float32, "race: .* of partials by program"),
    "sum_in_order_of_arrival": (column_sums, (8, 40), torch.float32, "two runs differ"),
}


class TestInAProcessOfTheirOwn:
    __test__ = not INTERPRETED

    def test_every_fault(self):
        result = in_child(__file__)
        assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


class TestFaults:
    __test__ = INTERPRETED

    @pytest.mark.parametrize("name", FAULTS)
    def test_caught(self, name):
        _, shape, dtype, pattern = FAULTS[name]
        x = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        self.check(name, x, wrong=False)
        with pytest.raises(Exception, match=pattern):
            self.check(name, x, wrong=True)

    def check(self, name: str, x: Tensor, wrong: bool) -> None:
        from faults import triton_kernels

        from pykern.ops._spec import define

        reference = FAULTS[name][0]
        spec = define(
            f"triton_faults::{name}_{'wrong' if wrong else 'right'}(Tensor x, *, str? backend=None) -> (Tensor y)",
            reference=reference,
            fake=lambda x: x.new_empty(reference(x).shape),
            backends={"triton": partial(getattr(triton_kernels, name), wrong=wrong)},
        )
        checks.check_accuracy(spec, "triton", [x])
        checks.check_repeat(spec, "triton", [x])

    def test_overflow_of_an_offset_is_caught(self):
        from faults.triton_kernels import overflow_of_an_offset

        # Two GiB of which three pages are touched; not through the checks, because they fill what they allocate.
        x = torch.empty(2**31 + 1, dtype=torch.int8).as_strided((3, 1), (2**30, 1))
        x[:, 0] = torch.tensor([5, 6, 7])
        assert overflow_of_an_offset(x, wrong=False).tolist() == [5, 6, 7]
        with pytest.raises(Exception, match="overflow of int32 in mul"):
            overflow_of_an_offset(x, wrong=True)

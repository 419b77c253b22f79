"""Grouped products beyond what their declarations say: 4-bit experts by the public function, adapters on experts."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import pykern
from pykern import toolchain
from pykern.ops import dequantize_4bit, grouped_mm, quantize_4bit
from pykern.ops.moe.grouped_lora import lora_grouped_mm
from pykern.testing.accuracy import check_close

OFFS = torch.tensor([0, 7, 7, 20], dtype=torch.int32)  # two empty groups, and rows behind the last
ROWS, SIZE, WIDTH, RANK = 23, 64, 48, 4


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype).requires_grad_()


def by_hand(a: Tensor, matrices: Tensor, gather: Tensor, scatter: Tensor) -> Tensor:
    """Row by row: row i reads a[gather[i]] and is written to scatter[i]."""
    group = torch.searchsorted(OFFS, torch.arange(ROWS, dtype=torch.int32), right=True)
    rows = torch.stack(
        [a[gather[i]] @ matrices[group[i]] if group[i] < len(OFFS) else a[0] @ matrices[0] * 0 for i in range(ROWS)]
    )
    return torch.zeros_like(rows).index_copy(0, scatter, rows)


def test_rows_and_groups_may_overlap_by_all_but_one_element() -> None:
    from pykern.kernels.grouped_mm_tiles import strides_in_units

    a, b = torch.empty(80).unfold(0, 64, 1), torch.empty(4096).as_strided((3, 64, 32), (1, 32, 1))
    assert strides_in_units(a, b, 64, 32) == (1, [1, 1, 32, None])
    assert strides_in_units(a[:1], b[:1], 64, 32) == (4, [0, 0, 8, None])


@pytest.mark.parametrize("quant_type", ["nf4", "int4"])
def test_4bit_experts_are_those_that_they_decode_to(quant_type: str) -> None:
    weight = quantize_4bit(torch.randn(4, WIDTH, SIZE), quant_type=quant_type, blocksize=32)
    a = leaf(9, SIZE)
    gather, scatter = torch.randint(9, (ROWS,)), torch.randperm(ROWS)
    bias = leaf(4, WIDTH)
    found = grouped_mm(a, weight, offs=OFFS, bias=bias, gather=gather, scatter=scatter)
    dense = dequantize_4bit(weight).mT
    other = grouped_mm(a, dense, offs=OFFS, bias=bias, gather=gather, scatter=scatter)
    torch.testing.assert_close(found, other)
    grad = torch.randn_like(found)
    found = torch.autograd.grad(found, (a, bias), grad)
    torch.testing.assert_close(found, torch.autograd.grad(other, (a, bias), grad))


def test_columns_in_the_order_of_the_weight() -> None:
    weight = quantize_4bit(torch.randn(4, WIDTH, SIZE), quant_type="int4", blocksize=32)
    order, a = torch.randperm(SIZE), torch.randn(ROWS, SIZE)
    found = grouped_mm(a, replace(weight, order=order), offs=OFFS)
    assert torch.equal(found, grouped_mm(a[:, order], weight, offs=OFFS))


def test_offsets_of_4bit_experts_are_checked_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYKERN_CHECKS", "1")
    weight = quantize_4bit(torch.randn(2, WIDTH, SIZE))
    with pytest.raises(ValueError, match="offs: expected ends that rise from 0 to at most 5, got"):
        grouped_mm(torch.randn(5, SIZE), weight, offs=torch.tensor([4, 6], dtype=torch.int32))


@pytest.mark.parametrize(
    ("dtype", "adapters"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)],
)
@pytest.mark.parametrize("quantized", [False, True])
def test_adapters_on_experts(dtype: torch.dtype, adapters: torch.dtype, quantized: bool) -> None:
    a, bias = leaf(9, SIZE, dtype=dtype), leaf(4, WIDTH, dtype=dtype)
    lora_a, lora_b = leaf(4, RANK, SIZE, dtype=adapters), leaf(4, WIDTH, RANK, dtype=adapters)
    weight = torch.randn(4, WIDTH, SIZE).to(dtype)
    weight = quantize_4bit(weight) if quantized else weight.mT
    gather, scatter = torch.randint(9, (ROWS,)), torch.randperm(ROWS)
    options = {"offs": OFFS, "gather": gather, "scatter": scatter}
    found = lora_grouped_mm(a, weight, lora_a, lora_b, scaling=0.5, bias=bias, **options)
    grad = torch.randn(found.shape).to(dtype)
    found = [found.detach(), *torch.autograd.grad(found, (a, lora_a, lora_b, bias), grad)]
    dense = dequantize_4bit(weight, dtype).mT if quantized else weight

    def merged(wide: torch.dtype) -> list[Tensor]:
        leaves = [t.detach().to(wide).requires_grad_() for t in (a, lora_a, lora_b, bias)]
        x, left, right, b = leaves
        out = by_hand(x, dense.to(wide) + 0.5 * (right @ left).mT, gather, scatter)
        group = torch.searchsorted(OFFS, torch.arange(ROWS, dtype=torch.int32), right=True)
        added = torch.cat([b, b.new_zeros(1, WIDTH)])[group]
        out = out + torch.zeros_like(out).index_copy(0, scatter, added)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(wide))]

    names = ("output", "mat_a", "lora_a", "lora_b", "bias")
    for name, ours, exact, plain in zip(names, found, merged(torch.float64), merged(torch.float32), strict=True):
        check_close(name, ours, exact, [plain])


@pytest.mark.skipif(toolchain.cuda_include() is None, reason="the emulator needs CUDA's headers")
@pytest.mark.parametrize("packed", ["rows", "columns", "neither"])
@pytest.mark.parametrize("rows", [40, 140, 290], ids=lambda rows: f"{rows // 4} rows a group")  # 16, 64, 128 in a tile
def test_tiles_of_the_cuda_kernels(rows: int, packed: str) -> None:
    a, bias = leaf(50, 72, dtype=torch.bfloat16), leaf(4, 136, dtype=torch.bfloat16)
    b = torch.randn(4, 72, 136).bfloat16()
    b = b if packed == "rows" else b.mT.contiguous().mT if packed == "columns" else b.repeat_interleave(2, 2)[..., ::2]
    offs = torch.tensor([rows // 5, rows // 7, rows - 3, rows - 3], dtype=torch.int32)  # the second counts as the first
    gather, scatter = torch.randint(-1, 51, (rows,)), torch.randperm(rows)
    scatter[2] = rows  # lost
    grad = torch.randn(rows, 136).bfloat16()

    def results(backend: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in (a, b, bias)]
        with pykern.backend(backend):
            out = grouped_mm(*leaves[:2], offs=offs, bias=leaves[2], gather=gather, scatter=scatter)
            return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]

    found, plain = results("cuda", torch.bfloat16), results("reference", torch.bfloat16)
    for name, ours, exact, torchs in zip(
        ("output", "mat_a", "mat_b", "bias"), found, results("reference", torch.float64), plain, strict=True
    ):
        check_close(name, ours, exact, [torchs])

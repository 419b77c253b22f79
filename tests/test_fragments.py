"""Tensor-core fragments, matrix copies, cp.async and swizzles on the emulator.

The oracle of layouts is CuTe, NVIDIA's own description of the instructions (tests/cuda/cute_layouts.cpp, which needs
the package nvidia-cutlass); of values it is torch, on numbers so small that every product and sum is exact.
"""

import importlib.util
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from pykern import toolchain
from pykern.extension import Library
from pykern.testing import emulator

CUDA = Path(__file__).parent / "cuda"
LIBRARY = Library("pykern_test_fragments", CUDA / "fragments.cu")
# As in fragments.cu.
FAULTS = ("none", "missing_wait", "wrong_swizzle", "swapped_rows", "missing_barrier", "early_overwrite", "no_swizzle")

# Operand dtype (float32 stands for tf32), accumulator dtype, by CuTe's name.
KINDS = {
    "bf16": (torch.bfloat16, torch.float32),
    "f16": (torch.float16, torch.float32),
    "f16_f16": (torch.float16, torch.float16),
    "tf32": (torch.float32, torch.float32),
}


@pytest.fixture(scope="module")
def ops() -> Any:
    return LIBRARY.load("cpu")


@pytest.fixture(scope="module")
def cute(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    package = importlib.util.find_spec("cutlass_library")
    assert package, "the tests need CuTe's headers: pip install nvidia-cutlass"
    headers = Path(package.origin).parent / "source/include"
    cuda = toolchain.cuda_include()
    program = tmp_path_factory.mktemp("cute") / "layouts"
    command = [*toolchain.find_cxx(), "-std=c++17", "-O0", "-w", str(CUDA / "cute_layouts.cpp"), "-o", str(program)]
    for folder in (headers, cuda, cuda / "cccl"):
        command += ["-isystem", str(folder)]
    subprocess.run(command, check=True)
    return json.loads(subprocess.run([program], check=True, capture_output=True, text=True).stdout)


def small_integers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def at(table: list[list[list[int]]], matrix: torch.Tensor) -> torch.Tensor:
    """Fragments [lane][element] of a matrix, by a table of (row, col)."""
    rows, cols = torch.tensor(table).unbind(-1)
    return matrix[rows, cols].contiguous()


def assembled(table: list[list[list[int]]], fragments: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    matrix = torch.full((rows, cols), torch.nan, dtype=fragments.dtype)
    r, c = torch.tensor(table).unbind(-1)
    matrix[r, c] = fragments
    return matrix


@pytest.mark.parametrize("operand", ["A", "B", "C"])
@pytest.mark.parametrize("kind", KINDS)
def test_layouts_are_cutes(ops: Any, cute: dict[str, Any], kind: str, operand: str) -> None:
    ours = ops.layout(torch.empty(1, dtype=KINDS[kind][0]), "ABC".index(operand))
    assert ours.int().tolist() == cute[f"mma.{kind}.{operand}"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_mma_multiplies_what_cute_lays_out(ops: Any, cute: dict[str, Any], kind: str, seed: int) -> None:
    dtype, sums = KINDS[kind]
    k = 8 if kind == "tf32" else 16
    a, b = small_integers(16, k, seed=seed, dtype=dtype), small_integers(k, 8, seed=seed + 10, dtype=dtype)
    c = small_integers(16, 8, seed=seed + 20, dtype=sums)
    tables = {operand: cute[f"mma.{kind}.{operand}"] for operand in "ABC"}
    d = ops.mma(at(tables["A"], a), at(tables["B"], b), at(tables["C"], c))
    assert torch.equal(assembled(tables["C"], d, 16, 8).float(), a.float() @ b.float() + c.float())


def test_swapped_rows_of_a_fragment_show(ops: Any, cute: dict[str, Any]) -> None:
    a, b, c = small_integers(16, 16), small_integers(16, 8, seed=1), torch.zeros(16, 8)
    tables = {operand: cute[f"mma.bf16.{operand}"] for operand in "ABC"}
    swapped = [[lane[e ^ 2] for e in range(8)] for lane in tables["A"]]
    d = assembled(tables["C"], ops.mma(at(swapped, a), at(tables["B"], b), at(tables["C"], c)), 16, 8)
    assert torch.equal(d, a.roll(8, 0).float() @ b.float())
    assert not torch.equal(d, a.float() @ b.float())


def test_mma_ignores_what_tf32_lacks(ops: Any) -> None:
    a = torch.full((32, 4), 1 + 2**-10 + 2**-11)
    b, c = torch.ones(32, 2), torch.zeros(32, 4)
    assert torch.equal(ops.mma(a, b, c), torch.full((32, 4), 8 * (1 + 2**-10)))


def test_half_accumulators_round_to_even(ops: Any) -> None:
    ones, c = torch.ones(32, 8, dtype=torch.float16), torch.tensor([2048, 2064, 4096, -4096]).expand(32, 4)
    for value, sums in [(1 / 16, [2048, 2064, 4096, -4096]), (3 / 16, [2052, 2068, 4100, -4092])]:
        d = ops.mma(ones, torch.full((32, 4), value, dtype=torch.float16), c.half().contiguous())
        assert d.tolist() == [sums] * 32


def test_mma_needs_a_whole_warp(ops: Any) -> None:
    with pytest.raises(RuntimeError, match=r"mma of bf16 needs all 32 lanes .* lane 16 has exited or is not in the"):
        ops.mma(small_integers(32, 8), small_integers(32, 4), torch.zeros(32, 4), 16)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("trans", [False, True])
def test_matrix_copies_are_cutes(ops: Any, cute: dict[str, Any], count: int, trans: bool) -> None:
    matrices = torch.arange(64 * count, dtype=torch.float16).view(8 * count, 8)
    name = f"{'T' if trans else 'N'}{count}"
    for instruction in ("ldmatrix", "stmatrix"):
        assert cute[f"{instruction}.{name}.address"] == list(range(8 * count))  # lane l names row l, as the ops do
        registers = at(cute[f"{instruction}.{name}.register"], matrices)
        if instruction == "ldmatrix":
            assert torch.equal(ops.ldmatrix(matrices, count, trans), registers)
        else:
            for elements in (False, True):  # True: as on GPUs that lack the instruction
                assert torch.equal(ops.stmatrix(registers, count, trans, elements), matrices)


@pytest.mark.parametrize("a_trans", [False, True])
@pytest.mark.parametrize("b_trans", [False, True])
def test_ldmatrix_fills_fragments(ops: Any, a_trans: bool, b_trans: bool) -> None:
    a, b = small_integers(16, 16), small_integers(16, 16, seed=1)
    c = ops.product(a, b, a_trans, b_trans)
    assert torch.equal(c, (a.T if a_trans else a).float() @ (b.T if b_trans else b).float())


def test_ldmatrix_fills_tf32_fragments_rounded(ops: Any) -> None:
    a, b = small_integers(16, 8, dtype=torch.float32), small_integers(8, 8, seed=1, dtype=torch.float32)
    assert torch.equal(ops.product(a, b, False, True), a @ b.T)
    # Halfway between two tf32 numbers, and a little below: the tie goes away from zero, in either sign.
    step = 2**-10
    for given, rounded in [(1 + step / 2, 1 + step), (-1 - step / 2, -1 - step), (1 + step * 0.499, 1)]:
        assert torch.equal(
            ops.product(torch.full_like(a, given), torch.eye(8), False, True), torch.full_like(a, rounded)
        )


def test_accumulators_become_operands(ops: Any) -> None:
    a, b, v = (small_integers(16, 16, seed=seed).clamp(-1, 1) for seed in range(3))
    assert torch.equal(ops.chained(a, b, v), a.float() @ b.float() @ v.float())


@pytest.mark.parametrize("count", [4, 8, 16])
def test_cp_async_fills_with_zeros(ops: Any, count: int) -> None:
    x = torch.arange(1, 32 * count // 4 + 1, dtype=torch.float32)
    for filled in range(0, count + 1, 4):
        y = x.view(32, -1).clone()
        y[:, filled // 4 :] = 0
        assert torch.equal(ops.cp_async(x, count, filled), y.view(-1))


@pytest.mark.parametrize("row_bytes", [32, 64, 128])
def test_swizzles_are_hoppers(ops: Any, cute: dict[str, Any], row_bytes: int) -> None:
    assert ops.swizzle(torch.empty(1), row_bytes).int().tolist() == cute[f"swizzle.{row_bytes}.offset"]


@pytest.mark.parametrize("m, n, k", [(64, 64, 64), (1, 3, 8), (100, 70, 200), (128, 64, 320)])
def test_gemm(ops: Any, m: int, n: int, k: int) -> None:
    a, b = small_integers(m, k), small_integers(n, k, seed=1)
    for seed in range(3):
        with emulator.configured(seed=seed):
            assert torch.equal(ops.gemm(a, b, 0), a.float() @ b.float().T)


@pytest.mark.parametrize("fault", ["wrong_swizzle", "swapped_rows"])
def test_gemm_with_a_wrong_layout_is_wrong(ops: Any, fault: str) -> None:
    a, b = small_integers(64, 128), small_integers(64, 128, seed=1)
    assert not torch.equal(ops.gemm(a, b, FAULTS.index(fault)), a.float() @ b.float().T)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "fault, message",
    [
        ("missing_wait", r"reads .* shared memory before the copy .* is waited for\n  at fragments.cu"),
        ("missing_barrier", r"(uninitialised: |race: |before the copy .* is waited for)(.|\n)* at fragments.cu"),
        ("early_overwrite", r"race: write of .* at fragments.cu.* and read at fragments.cu"),
    ],
)
def test_gemm_that_does_not_wait_is_caught(ops: Any, fault: str, message: str, seed: int) -> None:
    a, b = small_integers(64, 256), small_integers(64, 256, seed=1)
    with emulator.configured(seed=seed), pytest.raises(RuntimeError, match=message):
        ops.gemm(a, b, FAULTS.index(fault))


def test_gemm_is_counted(ops: Any) -> None:
    a, b = small_integers(128, 192), small_integers(64, 192, seed=1)
    with emulator.counted() as launches:
        for fault in ("none", "no_swizzle"):
            assert torch.equal(ops.gemm(a, b, FAULTS.index(fault)), a.float() @ b.float().T)
    swizzled, plain = launches
    for launch in launches:
        assert launch["tensor_flops"] == 2 * 128 * 64 * 192
        # Two blocks of 64 rows each: both read all of b.
        assert launch["regions"]["a"]["read"] == a.nbytes
        assert launch["regions"]["b"]["read"] == 2 * b.nbytes
        assert launch["regions"]["c"]["written"] == 4 * 128 * 64
    assert swizzled["shared_wavefronts"] == swizzled["shared_wavefronts_ideal"]
    # Two thirds of the accesses are ldmatrix, of eight rows that begin in the same bank.
    assert 3 * plain["shared_wavefronts"] == (2 * 8 + 1) * plain["shared_wavefronts_ideal"]

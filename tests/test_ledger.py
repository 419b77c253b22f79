"""The cost ledger: what it reads from machine code, what it lets pass, and that it notices each seeded fault."""

import json
import os
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pykern import toolchain
from pykern.extension import Library
from pykern.ops._spec import catalogue, define
from pykern.testing import ledger as ledgers
from pykern.testing import ledger_cuda, ledger_triton, sass
from pykern.testing.ledger import Book, Entry, Findings, compare, ledger, regressions
from pykern.testing.sass import Cost

FAULTS = Path(__file__).parent / "faults"
ARCHS = ("80", "90a")
# One of each family.
OPS = ["layer_norm", "attention", "attention_varlen", "attention_decode", "quantize_4bit", "dequantize_4bit"]
OPS += ["linear_4bit", "moe_route", "moe_sort", "grouped_mm", "grouped_mm_4bit", "moe_mlp"]
OPS += ["lora_linear", "multi_lora_linear", "dora_norm"]
WIDE = Cost(32, 0, 0, 1024, {128: 8, 32: 1}, {128: 4}, 0, {"HGMMA": 8}, 4096)

# As nvdisasm writes it, with every form of access that the parser must tell apart.
SASS = """
.section\t.nv.info.kernel,"",@"SHT_CUDA_INFO"
        /*0000*/ \t.byte\t0x04, 0x2f
.section\t.text.kernel,"ax",@progbits
\t.sectioninfo\t@"SHI_REGISTERS=50"
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/               @P0 LDG.E.U16 R128, desc[UR10][R74.64] ;
        /*0020*/              @!P3 LDG.E R108, desc[UR10][R76.64] ;
        /*0030*/                   LDG.E.LTC128B.64.CONSTANT R2, [R2.64] ;
        /*0040*/              @!PT LDG.E.128.CONSTANT R4, [R2.64] ;
        /*0050*/                   LDGSTS.E.BYPASS.LTC128B.128 [R3+0x1000], [R16.64], P0 ;
        /*0060*/                   LDGDEPBAR ;
        /*0070*/             @!UP0 STG.E.U8 desc[UR4][R2.64], R5 ;
        /*0080*/                   STG.E desc[UR4][R2.64], R5 ;
        /*0090*/                   STS.128 [R3], R4 ;
        /*00a0*/                   STL.64 [R1+0x8], R6 ;
        /*00b0*/                   LDL.64 R6, [R1+0x8] ;
        /*00c0*/                   HMMA.16816.F32.BF16 R4, R4, R8, RZ ;
        /*00d0*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], RZ, !UPT, gsb0 ;
        /*00e0*/                   UBLKCP [UR8], [UR6], UR5 ;
        /*00f0*/                   BRA 0xf0 ;
.L_x_1:
"""


def test_parser_tells_accesses_apart() -> None:
    parsed = sass.parse_sass(SASS)
    assert list(parsed) == ["kernel"] and len(parsed["kernel"]) == 16
    assert sass.count(parsed["kernel"], 50, 16, 1024) == Cost(
        registers=50,
        stack=16,
        spills=2,
        shared=1024,
        loads={16: 1, 32: 1, 64: 1, 128: 2},
        stores={8: 1, 32: 1},
        bulk=1,
        tensor={"HGMMA": 1, "HMMA": 1},
        code=256,
    )


def test_cost_survives_json() -> None:
    for cost in (WIDE, Cost(8, 0, 0, 0), replace(WIDE, stack=8, spills=2, bulk=3)):
        assert Cost.from_json(json.loads(json.dumps(cost.to_json()))) == cost


@pytest.mark.parametrize(
    ("change", "exact", "limits"),
    [
        ({"spills": 2}, "spills: 0 → 2", "spills: 0 → 2"),
        ({"stack": 16}, "local memory: 0 → 16", None),
        ({"loads": {64: 16, 32: 1}}, "narrower loads: 8 of 128 bits, 1 of 32 bits → 16 of 64 bits", "narrower loads"),
        ({"loads": {128: 8, 32: 2}}, "narrower loads", None),
        ({"stores": {16: 32}}, "narrower stores: 4 of 128 bits → 32 of 16 bits", "narrower stores"),
        ({"tensor": {"HMMA": 64}}, "lost HGMMA: 8 → 0", "lost HGMMA"),
        ({"tensor": {"HGMMA": 4}}, "lost HGMMA: 8 → 4", None),
        ({"registers": 255, "code": 9999}, None, None),
        ({"loads": {128: 9}, "shared": 9999}, None, None),
    ],
)
def test_what_counts_as_worse(change: dict, exact: str | None, limits: str | None) -> None:
    """Under the ledger's compiler, and under another one."""
    for same, wanted in ((True, exact), (False, limits)):
        found = regressions(WIDE, replace(WIDE, **change), same)
        assert len(found) == (wanted is not None), found
        assert wanted is None or found[0].startswith(wanted)


def test_another_compiler_may_spill_where_it_did() -> None:
    spilling = replace(WIDE, spills=2)
    assert regressions(spilling, replace(WIDE, spills=4), exact=True)
    assert not regressions(spilling, replace(WIDE, spills=4), exact=False)


def test_a_new_configuration_is_held_against_what_served_its_sample() -> None:
    before = Book("1", {"sm_90a kernel warps=8": Entry(WIDE, "a", "op sample forward")})
    now = Book("1", {"sm_90a kernel warps=1": Entry(replace(WIDE, loads={16: 64}), "b", "op sample forward")})
    findings = Findings()
    compare(before, now, findings)
    assert [text.partition(":")[0] for _, text in findings.faults] == ["narrower loads"]
    assert [text.partition(":")[0] for _, text in findings.moves] == ["is not in the ledger"]


def test_shared_memory_over_the_limit_is_never_written_down() -> None:
    fits, over = (Entry(Cost(32, 0, 0, shared)) for shared in (232448, 232449))
    book, findings = Book("1", {"sm_90a fits": fits, "sm_90a over": over}), Findings()
    compare(Book("1", {"sm_90a fits": fits}), book, findings)
    assert list(book.entries) == ["sm_90a fits"] and findings.fatal
    assert ("sm_90a over", "232449 bytes of shared memory, a block can have 232448") in findings.faults


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a file outside the package that declares ops, with the ledger that was made of it."""
    _need("triton")
    folder = tmp_path_factory.mktemp("ledger")
    file = shutil.copy(FAULTS / "ledger_kernels.py", folder)
    assert ledger((file,), update=True, backend="triton") == 0
    return Path(folder)


@pytest.fixture
def run(kernels: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs the ledger of those ops with some setting of theirs changed, and restores the file afterwards."""
    path = kernels / "ledger_kernels.ledger.json"
    good = path.read_text()
    monkeypatch.setattr(ledgers, "SAMPLE", 0)

    def run(setting: str = "", value: int = 0, **options: object) -> tuple[int, str]:
        if setting:
            monkeypatch.setattr(sys.modules["ledger_kernels"], setting, value)
        code = ledger(("ledgertest::sum",), backend="triton", **options)
        return code, capsys.readouterr().out

    run.path = path
    yield run
    path.write_text(good)


def test_unchanged_kernels_pass_and_are_not_compiled(run) -> None:
    code, out = run()
    assert code == 0 and "6 Triton kernels, 0 compiled, 6 unchanged" in out and "WRONG" not in out


def test_what_the_launchers_start_is_what_is_compiled(run) -> None:
    entries = ledgers.read(run.path)["triton"].entries
    assert sorted(key.split()[1] for key in entries) == sorted(2 * ["_copy_kernel", "_dot_kernel", "_sum_kernel"])
    assert "sm_90a _copy_kernel x=*bf16:16 y=*bf16:16 UNIT=8 BLOCK=4096 warps=4" in entries
    costs = {tuple(key.split()[:2]): entry.cost for key, entry in entries.items()}
    for arch, instruction in (("sm_80", "HMMA"), ("sm_90a", "HGMMA")):
        assert list(costs[arch, "_dot_kernel"].tensor) == [instruction]
        assert costs[arch, "_copy_kernel"].loads == costs[arch, "_copy_kernel"].stores == {128: 4}


@pytest.mark.parametrize(
    ("setting", "value", "kernel", "found"),
    [
        ("SUM_REGISTERS", 24, "_sum_kernel", r"spills: 0 → \d+"),
        ("COPY_UNIT", 1, "_copy_kernel", r"narrower loads: 4 of 128 bits → 32 of 16 bits"),
        ("DOT_STAGES", 16, "_dot_kernel", r"\d{6} bytes of shared memory, a block can have (166912|232448)"),
        ("DOT_EXACT", 1, "_dot_kernel", r"lost HG?MMA: \d+ → 0"),
    ],
)
def test_seeded_triton_faults_are_noticed(run, setting: str, value: int, kernel: str, found: str) -> None:
    code, out = run(setting, value)
    wrong = [line for line in out.splitlines() if line.startswith("WRONG")]
    assert code == 1 and all(kernel in line for line in wrong), out
    for arch in ("sm_80", "sm_90a"):
        assert any(re.search(rf"{arch} {kernel} .*{found}", line) for line in wrong), out


def test_update_writes_down_what_is_and_says_what_became_worse(run) -> None:
    code, out = run("SUM_REGISTERS", 24, update=True)
    assert code == 0 and re.search(r"RECORDED  sm_80 _sum_kernel .*: spills: 0 → \d+", out)
    assert run()[0] == 0
    code, out = run("SUM_REGISTERS", 128)  # the right one: better, but not what the ledger says
    assert code == 1 and "spills" not in out and "nothing starts it any more" in out
    assert run(update=True)[0] == 0 and run()[0] == 0


def test_a_ledger_that_was_made_up_is_noticed(run) -> None:
    books = json.loads(run.path.read_text())
    kernels = {key.split()[1]: value["cost"] for key, value in books["triton"]["kernels"].items() if "sm_90a" in key}
    kernels["_sum_kernel"]["registers"] = 1
    kernels["_copy_kernel"]["loads"] = {"256": 2}
    kernels["_dot_kernel"]["tensor"] = {"HGMMA": 999}
    run.path.write_text(json.dumps(books))
    assert run()[0] == 0  # by their hashes there is nothing to compile
    code, out = run(all=True, arch=("90a",))
    assert code == 1 and "3 compiled" in out
    assert "sm_90a _sum_kernel · sum one bfloat16 forward: registers 1 →" in out
    assert "WRONG  sm_90a _copy_kernel · copy one bfloat16 forward: narrower loads: 2 of 256 bits →" in out
    assert "WRONG  sm_90a _dot_kernel · dot one bfloat16 forward: lost HGMMA: 999 →" in out
    assert out.count("WRONG") == 2


def test_another_compiler_is_held_to_limits_only(run) -> None:
    books = json.loads(run.path.read_text())
    books["triton"]["compiler"] = "0.1"
    for values in books["triton"]["kernels"].values():
        values["cost"]["registers"] = 1
        values["cost"]["loads"] = {"128": 1}
    run.path.write_text(json.dumps(books))
    code, out = run(all=True, arch=("90a",))
    assert code == 0 and "the ledger is of triton 0.1" in out and "registers" not in out
    assert run(update=True, arch=("90a",))[0] == 0  # costs under two compilers do not go into one ledger
    after = ledgers.read(run.path)["triton"]
    assert after.compiler == ledger_triton.compiler() and all(key.startswith("sm_90a") for key in after.entries)


def test_hash_follows_the_functions_a_kernel_calls(kernels: Path) -> None:
    module = sys.modules["ledger_kernels"]
    before = ledger_triton.source_hash(module._sum_kernel)
    source = module._centre.src
    try:
        module._centre._unsafe_update_src(source.replace("- tl.sum", "+ tl.sum"))
        assert ledger_triton.source_hash(module._sum_kernel) != before
    finally:
        module._centre._unsafe_update_src(source)
    assert ledger_triton.source_hash(module._sum_kernel) == before
    assert ledger_triton.source_hash(module._copy_kernel) != before


def test_launchers_see_the_gpu_that_they_compile_for() -> None:
    _need("triton")
    import torch

    for arch, processors in (("80", 108), ("90a", 132)):
        with ledger_triton._pretended_gpu(arch) as gpu, gpu:
            x = torch.empty(6, 8, dtype=torch.float16, device="meta")
            assert x.is_cuda and x.device == x[1:].t().contiguous().device == x.new_empty(3).device
            assert torch.empty(2, device=x.device).device == x.device
            assert (x.data_ptr() % 16, x[:, 1:].data_ptr() % 16) == (0, 2)
            with torch.cuda.device(x.device):
                assert torch.cuda.get_device_properties(x.device).multi_processor_count == processors


def test_seeded_cuda_faults_are_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _need("nvcc")
    file = tmp_path / "kernels.cu"
    source = (FAULTS / "ledger_kernels.cu").read_text()
    file.write_text(source)
    assert ledger((str(file),), update=True) == 0
    assert "6 kernels are new or gone" in capsys.readouterr().out
    assert ledger((str(file),)) == 0 and "WRONG" not in capsys.readouterr().out

    file.write_text("#define FAULT_SPILL\n#define FAULT_SCALAR\n#define FAULT_TENSOR\n" + source)
    assert ledger((str(file),)) == 1
    out = capsys.readouterr().out
    for arch in ("sm_80", "sm_90a"):
        assert re.search(rf"WRONG  {arch} reverse\(.*: spills: 0 → \d+", out)
        assert f"WRONG  {arch} copy(float const*, float*, int): narrower loads: 1 of 128 bits → 1 of 32 bits" in out
        assert re.search(rf"WRONG  {arch} multiply\(.*: lost HMMA: 1 → 0", out)


def test_an_ops_own_cuda_sources_are_found() -> None:
    """Those of a `pykern.extension.Library`, beside the file that declares the op."""
    source = FAULTS / "ledger_kernels.cu"
    spec = define(
        "ledgertest::extension(Tensor x, *, str? backend=None) -> (Tensor y)",
        reference=lambda x: x.clone(),
        fake=lambda x: x.new_empty(x.shape),
        backends={"cuda": Library("ledgertest_native", source).kernel("extension")},
        samples=lambda kind, make: iter(()),
    )
    (family,) = ledgers.families((spec.name,))
    assert family.path == Path(__file__).with_suffix(".ledger.json")
    assert family.binaries == [source] and family.specs == [spec]


@pytest.mark.parametrize("missing", ["nvcc", "nvdisasm"])
def test_a_missing_tool_is_named(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("NVCC", raising=False)
    monkeypatch.setattr(sass.importlib.util, "find_spec", lambda name: None)
    sass._tool.cache_clear()
    if missing == "nvcc":
        file = shutil.copy(FAULTS / "ledger_kernels.cu", tmp_path)
        assert ledger((file,)) == 1
        assert "cuda: not checked: nvcc was not found: install a CUDA toolkit" in capsys.readouterr().out
    else:
        with pytest.raises(FileNotFoundError, match="nvdisasm was not found: it comes with triton"):
            sass.run_tool("nvdisasm")
    sass._tool.cache_clear()


def test_missing_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_triton, "installed", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="triton is not installed"):
        ledger_triton.compiler()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="unset it"):
        ledger_triton.compiler()


def test_bad_targets_are_named(tmp_path: Path) -> None:
    text = tmp_path / "library.so"
    text.write_text("not one")
    with pytest.raises(RuntimeError, match="neither a .cu file nor an object file"):
        ledger_cuda.cuda_kernels(text, ARCHS)
    for targets, options, message in (
        ((str(tmp_path / "none.cu"),), {}, "there is no file"),
        (("no_such_op",), {}, "expected a Python file or one of"),
        ((), {"arch": ("hopper",)}, "arch: expected an architecture such as 80 or 90a, got 'hopper'"),
    ):
        with pytest.raises(SystemExit, match=message):
            ledger(targets, **options)


@pytest.mark.parametrize("family", sorted({path.stem for path in ledgers.FOLDER.glob("*.json")} - {"norm"}))
def test_nothing_spills(family: str) -> None:
    """What is written down; other tests hold the kernels to it."""
    for book in json.loads((ledgers.FOLDER / f"{family}.json").read_text()).values():
        for key, entry in book["kernels"].items():
            assert entry["cost"]["spills"] == 0, key


def test_attentions_products_are_on_tensor_cores() -> None:
    for part, book in json.loads((ledgers.FOLDER / "attention.json").read_text()).items():
        for key, entry in book["kernels"].items():
            sums = part == "cuda" and "attention_statistics" in key
            if sums or any(word in key for word in ("_delta_kernel", "query=*fp32", " E=0 ")):
                continue  # no products of tiles, products in fp32, heads of nothing
            wanted = "HGMMA" if part == "triton" and key.startswith("sm_90a") else "HMMA"
            assert wanted in {name.split(".")[0] for name in entry["cost"]["tensor"]}, key


@pytest.mark.parametrize("op", OPS)
def test_pykerns_triton_kernels_keep_to_their_ledger(
    op: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What has changed, and some of the others, which change from day to day."""
    _need("triton")
    monkeypatch.setattr(ledgers, "SAMPLE", 4)
    code = ledger((op,), backend="triton")
    assert code == 0, capsys.readouterr().out


def test_pykerns_cuda_kernels_keep_to_their_ledger(capsys: pytest.CaptureFixture[str]) -> None:
    _need("nvcc")
    code = ledger([op for op in OPS if "cuda" in catalogue()[op].backends], backend="cuda")
    output = capsys.readouterr().out
    assert code == 0 and "CUDA kernels" in output, output


def _need(tool: str) -> None:
    if tool == "nvcc" and not toolchain.find_nvcc():
        pytest.skip("no nvcc was found")
    if tool == "triton" and (os.environ.get("TRITON_INTERPRET") == "1" or not ledger_triton.installed()):
        pytest.skip("no Triton compiler in this process")

"""Checkpoint formats of 4-bit weights against decoders written from their specifications, element by element."""

import json
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pykern.ops import (
    Weight4bit,
    dequantize_4bit,
    linear_4bit,
    lora_linear,
    multi_lora_linear,
    quantize_4bit,
)

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output that each nibble of a word is, lowest bits first
KEY = "model.layers.0.mlp.up_proj.weight"


def words(nibbles: list[int]) -> int:
    """Eight nibbles, the first lowest, as an int32."""
    word = sum(nibble << (4 * j) for j, nibble in enumerate(nibbles))
    return word - 2**32 if word >= 2**31 else word


def pack_columns(codes: Tensor, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """(rows, n) to int32 (rows, n / 8)."""
    packed = [[words([row[8 * c + o] for o in order]) for c in range(len(row) // 8)] for row in codes.tolist()]
    return torch.tensor(packed, dtype=torch.int32).reshape(codes.shape[0], codes.shape[1] // 8)


def nibble(word: int, j: int) -> int:
    return (word >> (4 * j)) & 15


def gptq_by_the_spec(qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: list[int], less: int) -> Tensor:
    """W[n][k] = scales[g][n] (q - z), g = g_idx[k], every number in fp64 and rounded at last."""
    rows = []
    for n in range(scales.shape[1]):
        row = []
        for k, g in enumerate(g_idx):
            code = nibble(int(qweight[k // 8, n]), k % 8)
            zero = nibble(int(qzeros[g, n // 8]), n % 8) + less
            row.append(float(scales[g, n]) * (code - zero))
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64).to(scales.dtype)


def awq_by_the_spec(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Tensor:
    size = qweight.shape[0] // scales.shape[0]
    rows = []
    for n in range(scales.shape[1]):
        j = AWQ_ORDER.index(n % 8)
        row = []
        for k in range(qweight.shape[0]):
            code, zero = nibble(int(qweight[k, n // 8]), j), nibble(int(qzeros[k // size, n // 8]), j)
            row.append(float(scales[k // size, n]) * (code - zero))
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64).to(scales.dtype)


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gptq(features: int = 64, out: int = 24, groups: int = 4, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    generator = random(features + out + groups)
    return {
        "qweight": torch.randint(-(2**31), 2**31, (features // 8, out), generator=generator, dtype=torch.int32),
        "qzeros": pack_columns(torch.randint(0, 15, (groups, out), generator=generator)),
        "scales": (torch.rand(groups, out, generator=generator) + 0.1).to(dtype),
    }


def awq(features: int = 64, out: int = 24, groups: int = 4, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    generator = random(features)
    return {
        "qweight": torch.randint(-(2**31), 2**31, (features, out // 8), generator=generator, dtype=torch.int32),
        "qzeros": torch.randint(-(2**31), 2**31, (groups, out // 8), generator=generator, dtype=torch.int32),
        "scales": (torch.rand(groups, out, generator=generator) + 0.1).to(dtype),
    }


def act_order(features: int, groups: int, size: int) -> Tensor:
    """Groups scattered over the features, the last one smaller where they do not fill up."""
    ascending = (torch.arange(features) // size).to(torch.int32)
    assert int(ascending[-1]) == groups - 1
    return ascending[torch.randperm(features, generator=random(1))]


GROUPINGS = [  # features, groups, size, g_idx: absent, ascending or scattered
    (64, 4, 16, None),
    (64, 1, 64, None),
    (64, 4, 16, "ascending"),
    (40, 3, 16, "ascending"),
    (64, 4, 16, "scattered"),
    (40, 3, 16, "scattered"),
    (64, 64, 1, "scattered"),
]


def g_idx_of(features: int, groups: int, size: int, kind: str | None) -> Tensor | None:
    if kind is None:
        return None
    return act_order(features, groups, size) if kind == "scattered" else (torch.arange(features) // size).int()


@pytest.mark.parametrize("checkpoint_format, less", [("gptq", 1), ("gptq_v2", 0)])
@pytest.mark.parametrize("features, groups, size, kind", GROUPINGS)
def test_gptq_is_what_the_spec_says(
    features: int, groups: int, size: int, kind: str | None, checkpoint_format: str, less: int
) -> None:
    g_idx = g_idx_of(features, groups, size, kind)
    found = [k // size for k in range(features)] if g_idx is None else g_idx.tolist()
    for dtype in FLOATS:
        tensors = gptq(features, 24, groups, dtype)
        weight = Weight4bit.from_gptq(**tensors, g_idx=g_idx, checkpoint_format=checkpoint_format)
        assert (weight.shape, weight.dtype, weight.blocksize) == ((24, features), dtype, size)
        assert (weight.order is None) == (kind != "scattered")
        decoded = dequantize_4bit(weight)
        assert decoded.dtype == dtype
        assert torch.equal(decoded, gptq_by_the_spec(**tensors, g_idx=found, less=less))


@pytest.mark.parametrize("features, groups", [(64, 4), (64, 1), (16, 16), (34, 2)])
def test_awq_is_what_the_spec_says(features: int, groups: int) -> None:
    for dtype in FLOATS:
        tensors = awq(features, 24, groups, dtype)
        weight = Weight4bit.from_awq(**tensors)
        assert (weight.shape, weight.dtype, weight.blocksize) == ((24, features), dtype, features // groups)
        assert torch.equal(dequantize_4bit(weight), awq_by_the_spec(**tensors))


def test_a_stored_15_means_16_and_carries_nowhere() -> None:
    tensors = gptq()
    zeros = torch.randint(0, 15, (4, 24), generator=random())
    zeros[1, 3], zeros[2, 7], zeros[0, 8] = 15, 15, 15  # inside a word, at its end, at its beginning
    tensors["qzeros"] = pack_columns(zeros)
    weight = Weight4bit.from_gptq(**tensors)
    assert torch.equal(weight.zero_points, (zeros + 1).t().to(torch.uint8)) and int(weight.zero_points.max()) == 16
    assert torch.equal(dequantize_4bit(weight), gptq_by_the_spec(**tensors, g_idx=[k // 16 for k in range(64)], less=1))


@pytest.mark.parametrize(
    "declared, stored, warns", [("gptq", 7, 0), ("gptq", 8, 1), ("gptq_v2", 8, 0), ("gptq_v2", 7, 1)]
)
def test_zero_points_that_contradict_the_metadata_bring_a_warning(declared: str, stored: int, warns: int) -> None:
    tensors = gptq() | {"qzeros": pack_columns(torch.full((4, 24), stored))}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        weight = Weight4bit.from_gptq(**tensors, checkpoint_format=declared)
    assert len(caught) == warns and all("qzeros: every stored zero point is" in str(w.message) for w in caught)
    assert all(w.filename == __file__ for w in caught)
    zero = stored + (declared == "gptq")
    assert (weight.zero_points is None) if zero == 8 else (weight.zero_points == zero).all()


def test_zero_points_that_overwrote_their_neighbours_are_refused() -> None:
    for first in range(8):
        # What a packer makes of zero points 9, …, 0, 9, …: each less one, shifted and or-ed as 32 bits.
        stored = [8] * first + [-1] + [8] * (7 - first)
        word = 0
        for j, value in enumerate(stored):
            word |= (value % 2**32) << (4 * j) & 0xFFFFFFFF
        tensors = gptq()
        tensors["qzeros"][2, 1] = word - 2**32
        if first == 7:  # it had no neighbour to overwrite
            assert int(Weight4bit.from_gptq(**tensors).zero_points[15, 2]) == 16
            continue
        with pytest.raises(ValueError, match=r"qzeros: 1 words, the first at \[2, 1\].*overwritten its neighbours"):
            Weight4bit.from_gptq(**tensors)
        Weight4bit.from_gptq(**tensors, checkpoint_format="gptq_v2")  # there they are plain zero points


@pytest.mark.parametrize("dtype", FLOATS)
def test_ops_on_an_act_order_weight(dtype: torch.dtype) -> None:
    """The public functions reorder what they are given; the columns of the weight are the features again."""
    tensors = gptq(dtype=dtype)
    weight = Weight4bit.from_gptq(**tensors, g_idx=act_order(64, 4, 16))
    plain = dequantize_4bit(weight)
    generator = random(2)
    x = torch.randn(2, 5, 64, generator=generator).to(dtype).requires_grad_()
    bias, dy = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((24,), (2, 5, 24)))
    a, b = torch.randn(3, 64, generator=generator).to(dtype), torch.randn(24, 3, generator=generator).to(dtype)
    a.requires_grad_()
    magnitude = torch.rand(24, generator=generator).to(dtype) + 1
    ids = torch.arange(10) % 3 - 1
    calls: dict[str, Callable[[Any], Tensor]] = {
        "linear": lambda w: linear_4bit(x, w, bias) if isinstance(w, Weight4bit) else F.linear(x, w, bias),
        "lora": lambda w: lora_linear(x, w, a, b, bias, magnitude=magnitude),
        "multi": lambda w: multi_lora_linear(x, w, a.expand(2, 3, 64), b.expand(2, 24, 3), ids, bias),
    }
    for name, call in calls.items():
        wanted = (x,) if name == "linear" else (x, a)
        results = []
        for base in (weight, plain):
            y = call(base)
            results.append((y.detach(), *torch.autograd.grad(y, wanted, dy)))
        for got, expected in zip(*results, strict=True):
            # The sum over features runs in another order.
            assert (got - expected).norm() <= 4 * torch.finfo(dtype).eps * expected.norm(), name


def test_an_act_order_weight_compiles() -> None:
    tensors, g_idx = gptq(dtype=torch.float32), act_order(64, 4, 16)
    weight = Weight4bit.from_gptq(**tensors, g_idx=g_idx)

    def step(x: Tensor) -> tuple[Tensor, Tensor]:
        rebuilt = Weight4bit(**vars(weight))
        return linear_4bit(x, rebuilt), dequantize_4bit(rebuilt)

    x = torch.randn(3, 64, generator=random())
    torch._dynamo.reset()
    for got, expected in zip(torch.compile(step, fullgraph=True, backend="aot_eager")(x), step(x), strict=True):
        assert torch.equal(got, expected)
    torch._dynamo.reset()


def test_an_order_that_does_not_fit_is_refused() -> None:
    weight = Weight4bit.from_gptq(**gptq(dtype=torch.float32), g_idx=act_order(64, 4, 16))
    with pytest.raises(ValueError, match=r"input: expected shape \(…, 64\).*got \(2, 65\)"):
        linear_4bit(torch.randn(2, 65), weight)
    weight.order = weight.order[:-1]
    with pytest.raises(ValueError, match=r"weight.order: expected shape \(64,\), got \(63,\)"):
        linear_4bit(torch.randn(2, 64), weight)


BAD_GPTQ = [
    (lambda t: t | {"qweight": t["qweight"].float()}, TypeError, "qweight: expected dtype torch.int32"),
    (lambda t: t | {"qweight": t["qweight"][0]}, ValueError, "qweight: expected two dimensions"),
    (lambda t: t | {"qweight": t["qweight"][:, :-1]}, ValueError, r"qweight: expected shape \(8, 24\), got \(8, 23\)"),
    (lambda t: t | {"qzeros": t["qzeros"][:-1]}, ValueError, r"qzeros: expected shape \(4, 3\), got \(3, 3\)"),
    (lambda t: t | {"qzeros": t["qzeros"][:, :-1]}, ValueError, r"qzeros: expected shape \(4, 3\), got \(4, 2\)"),
    (lambda t: t | {"qzeros": None}, TypeError, "qzeros: expected a Tensor, got NoneType"),
    (lambda t: t | {"scales": t["scales"].int()}, TypeError, "scales: expected dtype torch.float16"),
    (lambda t: {k: v[..., :20] for k, v in t.items()}, ValueError, "scales: expected a number of outputs that 8 divid"),
    (lambda t: t | {"scales": t["scales"][:3], "qzeros": t["qzeros"][:3]}, ValueError, "3 groups do not divide 64"),
    (lambda t: t | {"scales": t["scales"][:0], "qzeros": t["qzeros"][:0]}, ValueError, "scales: expected from 1 to 64"),
    (
        lambda t: t | {"qweight": t["qweight"][:0]},
        ValueError,
        "scales: expected from 1 to 0 groups for 0 input features",
    ),
    (lambda t: t | {"g_idx": torch.arange(63) // 16}, ValueError, r"g_idx: expected shape \(64,\), got \(63,\)"),
    (lambda t: t | {"g_idx": torch.arange(64) // 15}, ValueError, "g_idx: expected groups from 0 to 3, got 4"),
    (lambda t: t | {"g_idx": torch.arange(64) // 16 - 1}, ValueError, "g_idx: expected groups from 0 to 3, got -1"),
    (lambda t: t | {"g_idx": torch.arange(64) / 16}, TypeError, "g_idx: expected dtype torch.int32"),
    (lambda t: t | {"g_idx": torch.arange(64) // 22}, ValueError, "g_idx: expected groups of one size"),
    (lambda t: t | {"g_idx": (torch.arange(64) + 8) // 24}, ValueError, "sizes 16, 24, 24, 0"),
    (lambda t: t | {"g_idx": (torch.arange(64) // 8).clamp(max=3)}, ValueError, "sizes 8, 8, 8, 40"),
    (lambda t: t | {"g_idx": [0] * 64}, TypeError, "g_idx: expected a Tensor, got list"),
    (lambda t: t | {"checkpoint_format": "marlin"}, ValueError, "checkpoint_format: expected 'gptq' or 'gptq_v2'"),
]


@pytest.mark.parametrize("spoil, error, message", BAD_GPTQ)
def test_bad_gptq(spoil: Callable[[dict], dict], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Weight4bit.from_gptq(**spoil(gptq()))


BAD_AWQ = [
    (lambda t: t | {"qweight": t["qweight"][:-1]}, ValueError, "4 groups do not divide 63"),
    (lambda t: t | {"qweight": t["qweight"][:, :-1]}, ValueError, r"qweight: expected shape \(64, 3\), got \(64, 2\)"),
    (lambda t: t | {"qzeros": t["qzeros"].long()}, TypeError, "qzeros: expected dtype torch.int32"),
    (lambda t: t | {"qzeros": t["qzeros"][:2]}, ValueError, r"qzeros: expected shape \(4, 3\)"),
    (lambda t: t | {"scales": t["scales"].flatten()}, ValueError, "scales: expected two dimensions"),
    (lambda t: {"qweight": t["qweight"][:9]} | {k: t[k][:3] for k in ("qzeros", "scales")}, ValueError, "an even num"),
]


@pytest.mark.parametrize("spoil, error, message", BAD_AWQ)
def test_bad_awq(spoil: Callable[[dict], dict], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Weight4bit.from_awq(**spoil(awq()))


def saved(double_quant: bool = True, **options: Any) -> dict[str, Tensor]:
    weight = torch.randn(48, 64, generator=random()).bfloat16()
    return quantize_4bit(weight, double_quant=double_quant, blocksize=32, **options).to_bitsandbytes(KEY)


def same(one: Weight4bit, other: Weight4bit) -> bool:
    for name, value in vars(one).items():
        counterpart = getattr(other, name)
        if isinstance(value, Tensor):
            if value.dtype != counterpart.dtype or not torch.equal(value, counterpart):
                return False
        elif value != counterpart:
            return False
    return True


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(48, 64), (3, 17), (2, 5, 16)])
def test_bitsandbytes_round_trip_is_exact(shape: tuple[int, ...], quant_type: str, double_quant: bool) -> None:
    for dtype in FLOATS:
        values = torch.randn(shape, generator=random()).to(dtype)
        weight = quantize_4bit(values, quant_type=quant_type, blocksize=32, double_quant=double_quant)
        entries = weight.to_bitsandbytes(KEY)
        assert entries[KEY].shape == (-(-values.numel() // 2), 1) and all(key.startswith(KEY) for key in entries)
        assert len(entries) == (6 if double_quant else 4)
        again = Weight4bit.from_bitsandbytes(entries, KEY)
        assert same(weight, again)
        rewritten = again.to_bitsandbytes(KEY)
        assert rewritten.keys() == entries.keys() and all(torch.equal(rewritten[k], entries[k]) for k in entries)


def test_bitsandbytes_layouts_of_the_codes() -> None:
    entries = saved()
    weight = Weight4bit.from_bitsandbytes(entries, KEY)
    for codes in (entries[KEY].t(), *(entries[KEY].view(-1).view(dtype).unsqueeze(1) for dtype in FLOATS)):
        assert same(Weight4bit.from_bitsandbytes(entries | {KEY: codes}, KEY), weight)
    for dtype in FLOATS:
        stored = weight.to_bitsandbytes(KEY, quant_storage=dtype)
        assert stored[KEY].dtype == dtype and same(Weight4bit.from_bitsandbytes(stored, KEY), weight)


def test_bitsandbytes_offset_is_fp32_whatever_the_default_dtype() -> None:
    entries = saved()
    expected = Weight4bit.from_bitsandbytes(entries, KEY)
    torch.set_default_dtype(torch.bfloat16)
    try:
        weight = Weight4bit.from_bitsandbytes(entries, KEY)
    finally:
        torch.set_default_dtype(torch.float32)
    assert weight.nested_offset.dtype == torch.float32 and same(weight, expected)


def test_bitsandbytes_maps_and_narrow_scales_come_from_the_file() -> None:
    entries = saved(double_quant=False)
    decoded = dequantize_4bit(Weight4bit.from_bitsandbytes(entries, KEY))
    halved = entries | {f"{KEY}.quant_map": entries[f"{KEY}.quant_map"] / 2}
    assert torch.equal(dequantize_4bit(Weight4bit.from_bitsandbytes(halved, KEY)), decoded / 2)
    narrow = entries | {f"{KEY}.absmax": entries[f"{KEY}.absmax"].bfloat16()}
    absmax = Weight4bit.from_bitsandbytes(narrow, KEY).absmax
    assert absmax.dtype == torch.float32 and torch.equal(absmax, narrow[f"{KEY}.absmax"].float())


def without(*names: str) -> Callable[[dict], dict]:
    return lambda entries: {key: tensor for key, tensor in entries.items() if key.removeprefix(KEY) not in names}


def cut(name: str) -> Callable[[dict], dict]:
    return lambda entries: entries | {KEY + name: entries[KEY + name][:-1]}


STATE = ".quant_state.bitsandbytes__nf4"


def state(**changed: Any) -> Callable[[dict], dict]:
    def spoil(entries: dict) -> dict:
        fields = json.loads(bytes(entries[KEY + STATE].tolist())) | changed
        fields = {name: value for name, value in fields.items() if value is not ...}
        return entries | {KEY + STATE: torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)}

    return spoil


BAD_BITSANDBYTES = [
    (without(""), KeyError, "up_proj.weight: missing"),
    (without(".absmax"), KeyError, r"up_proj.weight.absmax: missing"),
    (without(".quant_map"), KeyError, r"weight.quant_map: missing"),
    (without(STATE), KeyError, "bitsandbytes__nf4 or .*bitsandbytes__fp4: missing"),
    (without(".nested_absmax"), KeyError, "weight.nested_absmax: missing"),
    (without(".nested_quant_map"), KeyError, "weight.nested_quant_map: missing"),
    (
        cut(""),
        ValueError,
        r"weight, as bytes of a weight of shape \(48, 64\),: expected shape \(1536,\), got \(1535,\)",
    ),
    (cut(".absmax"), ValueError, r"weight.absmax: expected shape \(96,\), got \(95,\)"),
    (cut(".quant_map"), ValueError, r"weight.quant_map: expected shape \(16,\), got \(15,\)"),
    (cut(".nested_absmax"), ValueError, r"weight.nested_absmax: expected shape \(1,\), got \(0,\)"),
    (cut(".nested_quant_map"), ValueError, r"weight.nested_quant_map: expected shape \(256,\), got \(255,\)"),
    (cut(STATE), ValueError, "bitsandbytes__nf4: expected JSON"),
    (lambda e: e | {KEY + STATE: e[KEY + STATE][:0]}, ValueError, "bitsandbytes__nf4: expected JSON"),
    (lambda e: e | {KEY + STATE: torch.tensor(list(b"[1]")).byte()}, ValueError, "a JSON object, got list"),
    (lambda e: e | {KEY + ".quant_state.bitsandbytes__fp4": e[KEY + STATE]}, ValueError, "one of the two, got both"),
    (lambda e: e | {KEY: e[KEY].long()}, TypeError, "weight: expected dtype torch.uint8 or"),
    (lambda e: e | {KEY: e[KEY].float()}, ValueError, r"expected shape \(1536,\), got \(6144,\)"),
    (lambda e: e | {KEY: None}, TypeError, "weight: expected a Tensor, got NoneType"),
    (lambda e: e | {KEY + ".absmax": e[KEY + ".absmax"].float()}, TypeError, "absmax: expected dtype torch.uint8"),
    (lambda e: e | {KEY + ".quant_map": e[KEY + ".quant_map"].int()}, TypeError, "quant_map: expected dtype torch.flo"),
    (state(shape=[48, 65]), ValueError, r"of shape \(48, 65\),: expected shape \(1560,\)"),
    (state(shape=[48, -64]), ValueError, r"expected shape to be a list of sizes, got \[48, -64\]"),
    (state(shape=None), ValueError, "expected shape to be a list of sizes, got None"),
    (state(shape=...), ValueError, "expected shape to be a list of sizes, it is missing"),
    (state(quant_type="fp4"), ValueError, "expected quant_type to be 'nf4', got 'fp4'"),
    (state(blocksize=48), ValueError, "expected blocksize to be one of 32, .*got 48"),
    (state(blocksize=64), ValueError, r"absmax: expected shape \(48,\), got \(96,\)"),
    (state(blocksize=64.0), ValueError, "expected blocksize to be one of 32"),
    (state(dtype="load"), ValueError, "expected dtype to be a floating dtype, got 'load'"),
    (state(nested_blocksize=128), ValueError, "expected nested_blocksize to be 256, got 128"),
    (state(nested_dtype="bfloat16"), ValueError, "expected nested_dtype to be 'float32'"),
    (state(nested_offset=...), ValueError, "expected nested_offset to be a number, it is missing"),
]


@pytest.mark.parametrize("spoil, error, message", BAD_BITSANDBYTES)
def test_bad_bitsandbytes(spoil: Callable[[dict], dict], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Weight4bit.from_bitsandbytes(spoil(saved()), KEY)


def test_what_bitsandbytes_has_no_place_for() -> None:
    weight = quantize_4bit(torch.randn(4, 10, generator=random()), quant_type="int4")
    with pytest.raises(ValueError, match="quant_type: bitsandbytes has nf4 and fp4, got 'int4'"):
        weight.to_bitsandbytes(KEY)
    weight = quantize_4bit(torch.randn(3, 10, generator=random()))
    with pytest.raises(ValueError, match="quant_storage: 15 bytes of codes are no whole number of torch.bfloat16"):
        weight.to_bitsandbytes(KEY, quant_storage=torch.bfloat16)
    with pytest.raises(ValueError, match="quant_storage: expected one of torch.uint8.*got torch.int32"):
        weight.to_bitsandbytes(KEY, quant_storage=torch.int32)

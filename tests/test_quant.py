"""4-bit formats bit for bit, and what the catalogue's generated tests cannot know about them."""

import hashlib
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import pykern
from pykern.ops._weight4bit import BLOCK_SIZES, DYNAMIC_MAP, FP4, NF4, Weight4bit
from pykern.ops.dequantize_4bit import dequantize_4bit
from pykern.ops.linear_4bit import linear_4bit
from pykern.ops.quantize_4bit import quantize_4bit
from pykern.testing.cases import backends

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
NF4_BITS = (
    "bf800000 bf3239b1 bf066b30 beca32a0 be91a24d be3d353f bdba7871 00000000"
    " 3da2faff 3e24cae3 3e7c04dd 3ead033a 3ee1a4b8 3f1007ab 3f3913b3 3f800000"
)
FP4_BITS = (
    "00000000 3baaaaab 3f2aaaab 3f800000 3eaaaaab 3f000000 3e2aaaab 3e800000"
    " 80000000 bbaaaaab bf2aaaab bf800000 beaaaaab bf000000 be2aaaab be800000"
)

# Digests of what bitsandbytes 0.50.2 computes on a CPU from `dyadic(shape)`: codes, absmax, nested absmax and offset;
# then the weight decoded to fp32, bf16 and fp16 by its portable path (C++ for FP4, whose row lengths take that path).
GOLDEN = [
    ((33, 64), "nf4", 64, False, "fc79b91b5431567b", "8d2893b118bfeb74"),
    ((26, 50), "nf4", 32, True, "11c3acb42e2ed196", "e042f19e481ba13f"),
    ((3, 17), "nf4", 64, False, "bfa26ceeba2644d2", "966a5b057896c9c0"),
    ((130, 258), "nf4", 32, True, "59607d5088adeb83", "ede082f1564bdd6d"),
    ((130, 258), "nf4", 4096, True, "31a58bf7f2e0ef1a", "45457f879a2ec9ad"),
    ((26, 50), "fp4", 64, False, "3f1afae05689649c", "b0c1dde8381d9ded"),
    ((130, 258), "fp4", 32, True, "e6dcdc24bab2be40", "3856b59f74d18b9e"),
    ((3, 18), "fp4", 128, False, "73e545c2a54d888f", "9cff46a94a54122d"),
]

# Mean absolute error of a standard normal weight, as bitsandbytes' own tests state it.
ROUND_TRIP = [
    ("nf4", 32, 0.0677),
    ("nf4", 64, 0.0728),
    ("nf4", 128, 0.0768),
    ("nf4", 256, 0.0803),
    ("fp4", 32, 0.0889),
    ("fp4", 64, 0.0965),
    ("fp4", 128, 0.1030),
    ("fp4", 256, 0.1087),
]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def dyadic(shape: tuple[int, ...]) -> Tensor:
    """Hashed multiples of 1/512 in [-4, 4): the same on every machine, and so are their sums in any order."""
    index = torch.arange(math.prod(shape))
    return ((((index * 2654435761) >> 12) & 0xFFF) - 2048).float().div(512).reshape(shape)


def digest(*tensors: Tensor) -> str:
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]


def bits(values: tuple[float, ...]) -> str:
    return " ".join(f"{word & 0xFFFFFFFF:08x}" for word in torch.tensor(values).view(torch.int32).tolist())


def nibbles(weight: Weight4bit) -> list[int]:
    return [code for byte in weight.codes.tolist() for code in (byte >> 4, byte & 15)]


def scales(weight: Weight4bit) -> Tensor:
    """The scale of each block, decoded one at a time."""
    if weight.nested_absmax is None:
        return weight.absmax
    found = []
    for i, code in enumerate(weight.absmax.tolist()):
        product = weight.nested_code[code] * weight.nested_absmax[i // 256]
        found.append(product + weight.nested_offset)
    return torch.stack(found)


def test_tables_are_the_published_bits() -> None:
    assert bits(NF4) == NF4_BITS
    assert bits(FP4) == FP4_BITS
    assert len(DYNAMIC_MAP) == 256
    assert digest(torch.tensor(DYNAMIC_MAP)) == "e732639a65f497b4"  # bitsandbytes' create_dynamic_map()


@pytest.mark.parametrize("shape, quant_type, blocksize, double_quant, state, decoded", GOLDEN)
def test_equals_bitsandbytes(
    shape: tuple[int, ...], quant_type: str, blocksize: int, double_quant: bool, state: str, decoded: str
) -> None:
    weight = quantize_4bit(dyadic(shape), quant_type=quant_type, blocksize=blocksize, double_quant=double_quant)
    nested = (weight.nested_absmax, weight.nested_offset) if double_quant else ()
    assert digest(weight.codes, weight.absmax, *nested) == state
    assert digest(*[dequantize_4bit(weight, dtype) for dtype in FLOATS]) == decoded


@pytest.mark.parametrize("quant_type, blocksize, expected", ROUND_TRIP)
def test_round_trip_error(quant_type: str, blocksize: int, expected: float) -> None:
    weight = normal(512, 1024)
    for double_quant, slack in ((False, 0.01), (True, 0.02)):
        decoded = dequantize_4bit(
            quantize_4bit(weight, quant_type=quant_type, blocksize=blocksize, double_quant=double_quant)
        )
        error = (decoded - weight).abs().mean().item()
        assert abs(error - expected) <= slack * expected


def test_first_element_is_in_the_high_nibble() -> None:
    weight = quantize_4bit(torch.tensor([1.0, -1.0, 0.0] + [0.0] * 29), blocksize=32)
    assert weight.codes[:2].tolist() == [0xF0, 0x77]
    odd = quantize_4bit(torch.tensor([1.0, -1.0, 1.0]), blocksize=32)
    assert odd.codes.tolist() == [0xF0, 0xF7], "the unused low nibble holds the code of zero"


def test_halfway_takes_the_lower_value() -> None:
    nf4 = torch.tensor(NF4)
    middles = (nf4[:-1] + nf4[1:]) / 2
    above = torch.nextafter(middles, torch.ones(()))
    weight = quantize_4bit(torch.cat([torch.ones(1), middles, above, torch.zeros(1)]), blocksize=32)
    assert nibbles(weight)[1:31] == [*range(15), *range(1, 16)]
    third = torch.tensor([12.0, 5.0, -5.0, 0.75 / 12, -0.75 / 12] + [0.0] * 27)
    assert nibbles(quantize_4bit(third, quant_type="fp4", blocksize=32))[:3] == [3, 4, 13]


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(7, 48), (3, 17), (2, 5, 19), (1,), (40, 33)])
def test_blocks_straddle_rows_and_the_last_may_be_short(
    shape: tuple[int, ...], quant_type: str, double_quant: bool
) -> None:
    weight = quantize_4bit(normal(*shape), quant_type=quant_type, blocksize=32, double_quant=double_quant)
    table, scale = torch.tensor(FP4 if quant_type == "fp4" else NF4), scales(weight)
    count = math.prod(shape)
    expected = torch.stack([table[c] * scale[i // 32] for i, c in enumerate(nibbles(weight)[:count])])
    for dtype in FLOATS:
        decoded = dequantize_4bit(weight, dtype)
        assert decoded.shape == shape and decoded.dtype == dtype
        assert torch.equal(decoded.reshape(-1), expected.to(dtype))
        assert torch.equal(decoded.reshape(-1).signbit(), expected.signbit())


@pytest.mark.parametrize("blocksize", BLOCK_SIZES)
def test_every_block_size(blocksize: int) -> None:
    values = normal(3, 4100)
    weight = quantize_4bit(values, blocksize=blocksize)
    flat = values.reshape(-1)
    for i in range(len(weight.absmax)):
        assert weight.absmax[i] == flat[i * blocksize : (i + 1) * blocksize].abs().max()
    gap = (torch.tensor(NF4)[1:] - torch.tensor(NF4)[:-1]).max() / 2
    bound = weight.absmax.repeat_interleave(blocksize)[: flat.numel()] * gap * (1 + 1e-6)
    assert ((dequantize_4bit(weight).reshape(-1) - flat).abs() <= bound).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_remembers_the_dtype(dtype: torch.dtype) -> None:
    values = normal(4, 64).to(dtype)
    weight = quantize_4bit(values)
    assert weight.dtype == dtype and weight.absmax.dtype == torch.float32 and weight.code.dtype == torch.float32
    assert dequantize_4bit(weight).dtype == dtype
    assert torch.equal(weight.codes, quantize_4bit(values.float()).codes)


def test_zeros_stay_zeros() -> None:
    for quant_type in ("nf4", "fp4", "int4"):
        for symmetric in (True, False) if quant_type == "int4" else (True,):
            values = normal(3, 70)
            values[1:] = 0
            weight = quantize_4bit(values, quant_type=quant_type, blocksize=32, symmetric=symmetric)
            decoded = dequantize_4bit(weight)
            assert not decoded[2].any() and decoded[0].any()
    nested = dequantize_4bit(quantize_4bit(torch.zeros(8, 64), double_quant=True))
    assert not nested.any()


@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int4"])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_block_that_is_not_finite_does_not_decode_to_finite_values(quant_type: str, poison: float) -> None:
    values = normal(2, 64)
    values[0, 5] = poison
    decoded = dequantize_4bit(quantize_4bit(values, quant_type=quant_type))
    assert not decoded[0].isfinite().any() and decoded[1].isfinite().all()


@pytest.mark.parametrize(
    "shape, blocksize", [((5, 50), 32), ((2, 3, 40), 16), ((4, 128), 128), ((3, 7), 2), ((64,), 64)]
)
@pytest.mark.parametrize("symmetric", [True, False])
def test_int4_groups_run_along_rows(shape: tuple[int, ...], blocksize: int, symmetric: bool) -> None:
    values = normal(*shape) + (0.0 if symmetric else 1.0)
    weight = quantize_4bit(values, quant_type="int4", blocksize=blocksize, symmetric=symmetric)
    groups = -(-shape[-1] // blocksize)
    assert weight.code is None and weight.absmax.shape == (*shape[:-1], groups)
    assert (weight.zero_points is None) == symmetric
    codes = torch.tensor(nibbles(weight)[: values.numel()]).reshape(shape)
    decoded = dequantize_4bit(weight)
    for column in range(shape[-1]):
        group = column // blocksize
        zero = 8 if symmetric else weight.zero_points[..., group].int()
        scale = weight.absmax[..., group]
        assert torch.equal(decoded[..., column], (codes[..., column] - zero).float() * scale)
        # Half a step for the code; the zero point, rounded too, may clip as much again at the ends of the range.
        assert (
            (decoded[..., column] - values[..., column]).abs() <= (0.5 if symmetric else 1.0) * scale * 1.0001
        ).all()


def test_int4_scale_dtype() -> None:
    values = normal(4, 64, dtype=torch.float32)
    assert quantize_4bit(values.bfloat16(), quant_type="int4").absmax.dtype == torch.bfloat16
    for dtype in FLOATS:
        weight = quantize_4bit(values, quant_type="int4", scale_dtype=dtype)
        error = (dequantize_4bit(weight) - values).abs()
        assert weight.absmax.dtype == dtype
        # The range may be cut by the rounding of the scale, beyond that codes suit the scale as stored.
        assert (error <= weight.absmax.float() * (0.5 + 8 * torch.finfo(dtype).eps)).all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"quant_type": "nf8"}, "quant_type: expected 'nf4', 'fp4' or 'int4', got 'nf8'"),
        ({"blocksize": 100}, "blocksize: expected one of 32, .*got 100"),
        ({"blocksize": 0, "quant_type": "int4"}, "blocksize: expected a positive number, got 0"),
        ({"symmetric": False}, "symmetric: only int4"),
        ({"double_quant": True, "quant_type": "int4"}, "double_quant: int4 scales"),
        ({"scale_dtype": torch.float16}, "scale_dtype: nf4 scales are torch.float32, got torch.float16"),
        ({"scale_dtype": torch.int8, "quant_type": "int4"}, "scale_dtype: expected a floating dtype"),
    ],
)
def test_options_that_do_not_go_together(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize_4bit(normal(2, 64), **options)


def test_a_plain_tensor_is_no_4bit_weight() -> None:
    for call in (dequantize_4bit, lambda w: linear_4bit(normal(2, 64), w)):
        with pytest.raises(TypeError, match="weight: expected a Weight4bit, from quantize_4bit, got Tensor"):
            call(normal(4, 64))


def test_quantising_is_constant() -> None:
    for options in ({}, {"double_quant": True}, {"quant_type": "int4", "symmetric": False}):
        weight = quantize_4bit(normal(4, 64).requires_grad_(), **options)
        assert not any(isinstance(t, Tensor) and t.requires_grad for t in weight.arguments)


@pytest.mark.parametrize("options", [{}, {"quant_type": "fp4", "double_quant": True}, {"quant_type": "int4"}])
def test_linear_is_dequantise_and_multiply(options: dict) -> None:
    weight = quantize_4bit(normal(24, 64, seed=1).bfloat16(), blocksize=32, **options)
    for dtype in (*FLOATS, torch.float64):
        x, bias = normal(2, 5, 64, seed=2).to(dtype).requires_grad_(), normal(24, seed=3).to(dtype).requires_grad_()
        y = linear_4bit(x, weight, bias)
        assert y.dtype == dtype and y.shape == (2, 5, 24)
        decoded = dequantize_4bit(weight, dtype)
        dy = normal(2, 5, 24, seed=4).to(dtype)
        dx, db = torch.autograd.grad(y, (x, bias), dy)
        product = F.linear(x.double(), decoded.double(), bias.double())
        exact = product, dy.double() @ decoded.double(), dy.double().sum((0, 1))
        for got, expected in zip((y, dx, db), exact, strict=True):
            assert (got - expected).norm() <= 4 * torch.finfo(dtype).eps * expected.norm()


def test_compiles_with_a_weight_built_on_call() -> None:
    def step(values: Tensor, x: Tensor) -> tuple[Tensor, Weight4bit]:
        weight = quantize_4bit(values, double_quant=True)
        rebuilt = Weight4bit(**vars(weight))
        return linear_4bit(x, rebuilt), weight

    values, x = normal(24, 64), normal(5, 64, seed=1).requires_grad_()
    torch._dynamo.reset()
    y, weight = torch.compile(step, fullgraph=True, backend="aot_eager")(values, x)
    expected, eager = step(values, x)
    assert torch.equal(y, expected)
    assert torch.equal(dequantize_4bit(weight), dequantize_4bit(eager)) and weight.quant_type == "nf4"
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    (expected_dx,) = torch.autograd.grad(expected.square().sum(), x)
    assert torch.equal(dx, expected_dx)
    torch._dynamo.reset()


def test_the_input_of_a_frozen_layer_is_not_kept_for_its_backward() -> None:
    weight, x = quantize_4bit(normal(24, 64)), normal(512, 64, seed=1).requires_grad_()
    kept: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = linear_4bit(x, weight)
    assert sum(kept) < weight.codes.nbytes + weight.absmax.nbytes + 256 < x.nbytes
    dy = normal(512, 24, seed=2)
    (dx,) = torch.autograd.grad(y, x, dy)
    exact = dy.double() @ dequantize_4bit(weight, torch.float64)
    assert (dx - exact).norm() <= 1e-6 * exact.norm()


KERNELS = [name for name in backends(pykern.catalogue()["linear_4bit"], "cpu") if name != "reference"]


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_no_less_exact_than_dequantise_and_multiply(backend: str, dtype: torch.dtype, gradient: bool) -> None:
    weight = quantize_4bit(normal(256, 512, seed=1), double_quant=True)
    decoded, rounded = dequantize_4bit(weight, torch.float64), dequantize_4bit(weight, dtype)
    spec = pykern.catalogue()["linear_4bit"]
    ours, theirs = [], []
    for rows in (1, 4, 5, 24, 33):
        x, dy = normal(rows, 512, seed=rows).to(dtype), normal(rows, 256, seed=rows + 1).to(dtype)
        args = (x, *weight.arguments, None)
        op, given = (spec.gradient.op, (dy, *args, [True, False])) if gradient else (spec, args)
        if op.why_not(backend, given) is not None:
            continue  # another one serves it: CUDA has no fp32 but for few rows
        with pykern.backend(backend):
            result = op.compute(given, backend)[0] if gradient else linear_4bit(x, weight)
        exact = dy.double() @ decoded if gradient else x.double() @ decoded.T
        ours.append((result - exact).norm())
        theirs.append(((dy @ rounded if gradient else F.linear(x, rounded)) - exact).norm())
    assert ours or (dtype, gradient) == (torch.float32, True)
    # A fiftieth, since in fp32 sums in another order fall to either side.
    assert not ours or torch.stack(ours).norm() <= 1.02 * torch.stack(theirs).norm()

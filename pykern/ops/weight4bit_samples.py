"""4-bit weights for samples: every format, and weights whose tensors contradict one another."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from pykern.ops._weight4bit import BLOCK_SIZES, TABLES, Weight4bit
from pykern.ops.quantize_4bit import quantize_4bit


def sample_weights(kind: str, make: Any) -> Iterator[tuple[str, Weight4bit]]:
    """4-bit weights (out, in) for samples: every format, blocks that straddle rows, short last blocks, odd counts."""
    if kind == "bench":
        yield "nf4 llama-8b q_proj 4096x4096", quantize_4bit(make(4096, 4096))
        yield "nf4 nested llama-8b up_proj 14336x4096", quantize_4bit(make(14336, 4096), double_quant=True)
        yield "fp4 llama-8b q_proj 4096x4096", quantize_4bit(make(4096, 4096), quant_type="fp4")
        int4 = quantize_4bit(make(4096, 4096), quant_type="int4", blocksize=128, symmetric=False)
        yield "int4 groups of 128 llama-8b q_proj 4096x4096", int4
        return
    if kind == "traffic":
        yield "nf4 512x1024", quantize_4bit(make(512, 1024))
        yield "nf4 nested 512x1024", quantize_4bit(make(512, 1024), double_quant=True)
        yield "int4 512x1024", quantize_4bit(make(512, 1024), quant_type="int4", blocksize=128, symmetric=False)
        return
    yield "nf4 whole blocks", quantize_4bit(make(8, 128))
    yield "nf4 straddling blocks", quantize_4bit(make(7, 48), blocksize=32)
    yield "nf4 odd count", quantize_4bit(make(3, 17))
    yield "nf4 nested", quantize_4bit(make(33, 256), blocksize=32, double_quant=True)
    yield "nf4 zeros", quantize_4bit(make(4, 64) * 0)
    yield "fp4 whole blocks", quantize_4bit(make(4, 64), quant_type="fp4")
    yield "fp4 short block", quantize_4bit(make(5, 30), quant_type="fp4", blocksize=64)
    yield "fp4 nested", quantize_4bit(make(5, 130), quant_type="fp4", blocksize=128, double_quant=True)
    yield "int4 symmetric", quantize_4bit(make(6, 64), quant_type="int4", blocksize=32)
    yield (
        "int4 asymmetric, short group",
        quantize_4bit(make(5, 50) + 1, quant_type="int4", blocksize=32, symmetric=False),
    )
    sevens = quantize_4bit(make(5, 47), quant_type="int4", blocksize=7, symmetric=False)
    yield "int4 groups of 7, odd rows", sevens
    # GPTQ's first format can mean 16; a byte holds more.
    far = torch.where(sevens.zero_points > 7, 16, 255).to(torch.uint8)
    yield "int4 zero points beyond the codes", replace(sevens, zero_points=far)
    yield "no rows", quantize_4bit(make(0, 64))
    if kind == "full":
        yield "nf4, larger than caches, odd count", quantize_4bit(make(2051, 4099))
        for blocksize in BLOCK_SIZES:
            yield (
                f"nf4 nested, block {blocksize}",
                quantize_4bit(make(300, 520), blocksize=blocksize, double_quant=True),
            )
            yield f"fp4 block {blocksize}", quantize_4bit(make(130, 258), quant_type="fp4", blocksize=blocksize)


def format_weights(make: Any) -> Iterator[tuple[str, Weight4bit]]:
    """One small weight (16, 24) of each format, for ops whose decoding is another op's."""
    yield "nf4", quantize_4bit(make(16, 24), blocksize=32)
    yield "fp4 nested", quantize_4bit(make(16, 24), quant_type="fp4", blocksize=32, double_quant=True)
    yield "int4", quantize_4bit(make(16, 24), quant_type="int4", blocksize=16, symmetric=False)


def bad_weights(make: Any) -> Iterator[tuple[str, tuple[Any, ...], type[Exception], str]]:
    """Weights (4, 64) whose tensors contradict one another."""
    plain, nested = quantize_4bit(make(4, 64)), quantize_4bit(make(4, 64), double_quant=True)
    asymmetric = quantize_4bit(make(4, 64), quant_type="int4", symmetric=False)

    def altered(weight: Weight4bit, **changes: Any) -> tuple[Any, ...]:
        return Weight4bit(**{**vars(weight), **changes}).arguments

    yield (
        "codes cut",
        altered(plain, codes=plain.codes[:-1]),
        ValueError,
        r"codes: expected shape \(128,\), got \(127,\)",
    )
    yield (
        "scales cut",
        altered(plain, absmax=plain.absmax[1:]),
        ValueError,
        r"absmax: expected shape \(4,\), got \(3,\)",
    )
    yield "scales' dtype", altered(plain, absmax=plain.absmax.half()), TypeError, "absmax: expected dtype torch.float32"
    yield "code table", altered(plain, code=plain.code[:8]), ValueError, r"code: expected shape \(16,\), got \(8,\)"
    yield "nested, half", altered(nested, nested_offset=None), ValueError, "belong together"
    yield "shape", altered(plain, shape=(4, 66)), ValueError, r"codes: expected shape \(132,\), got \(128,\)"
    yield (
        "zero points",
        altered(asymmetric, zero_points=asymmetric.zero_points[1:]),
        ValueError,
        "weight.zero_points: expected",
    )


def weight_formats(make: Any) -> Iterator[tuple[str, tuple[Any, ...], Weight4bit]]:
    """Every format and layout, for the table of what serves it: the arguments that quantise it, and a weight."""
    weight = make(16, 128)
    for name in TABLES:
        yield name, (weight, name, 64), quantize_4bit(weight, quant_type=name)
        nested = quantize_4bit(weight, quant_type=name, double_quant=True)
        yield f"{name}, scales quantised", (weight, name, 64), nested
    for name, symmetric in (("symmetric", True), ("asymmetric", False)):
        options = {"quant_type": "int4", "blocksize": 32, "symmetric": symmetric, "scale_dtype": torch.float16}
        yield f"int4 {name}", (weight, 32, symmetric, torch.float16), quantize_4bit(weight, **options)
    odd = make(16, 127)
    yield "nf4, blocks across rows", (make(16, 96), "nf4", 64), quantize_4bit(make(16, 96))
    yield "nf4, rows of odd length", (odd, "nf4", 64), quantize_4bit(odd)
    seven = quantize_4bit(odd, quant_type="int4", blocksize=7)
    yield "int4, groups of 7", (odd, 7, True, torch.bfloat16), seven
    experts = make(4, 16, 128)
    yield "experts (E, out, in)", (experts, "nf4", 64), quantize_4bit(experts)

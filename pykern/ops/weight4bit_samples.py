"""4-bit weights for samples: every format, and weights whose tensors contradict one another."""

from collections.abc import Iterator
from typing import Any

from pykern.ops._weight4bit import BLOCK_SIZES, Weight4bit
from pykern.ops.quantize_4bit import quantize_4bit


def sample_weights(kind: str, make: Any) -> Iterator[tuple[str, Weight4bit]]:
    """4-bit weights (out, in) for samples: every format, blocks that straddle rows, short last blocks, odd counts."""
    if kind == "bench":
        for name, shape in (
            ("llama-8b q_proj 4096x4096", (4096, 4096)),
            ("llama-8b down_proj 4096x14336", (4096, 14336)),
        ):
            yield f"nf4 {name}", quantize_4bit(make(*shape))
            yield f"nf4 nested {name}", quantize_4bit(make(*shape), double_quant=True)
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
    yield "no rows", quantize_4bit(make(0, 64))
    if kind == "full":
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

"""Quantise a weight to 4 bits. The formats are in `_weight4bit`.

Codes, scales and decoded values are those of bitsandbytes 0.50.2 on a CPU, bit for bit, where that is right. Where its
backends differ from one another:
- a value halfway between two codes takes the lower value (on CUDA FP4 takes the smaller magnitude), so a tiny positive
  number is FP4 code 8, which decodes to -0;
- full blocks multiply by 1 / absmax, a short last block divides by it (CUDA multiplies there too);
- a block of zeros has scale 0 and the code of zero (CUDA: NF4 code 0), a short last one the scale 1e-38;
- scales are quantised from 65536 steps over [-1, 1] (CUDA: to the nearest code);
- FP4 code 8 decodes to -0 (with AVX512 bitsandbytes gives +0), and every block to its own scale (with AVX512, rows
  that are no multiple of the block size but one of 16 get wrong scales).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pykern.ops._spec import define
from pykern.ops._weight4bit import (
    BLOCK_SIZES,
    DYNAMIC_MAP,
    INT4_ZERO,
    NESTED_BLOCK,
    TABLES,
    Weight4bit,
)
from pykern.ops.quantize_4bit_samples import (
    bad_quantize_4bit,
    bad_quantize_absmax,
    bad_quantize_int4,
    quantize_4bit_samples,
    quantize_absmax_samples,
    quantize_int4_samples,
)
from pykern.ops.weight4bit_backends import QUANTIZE, QUANTIZE_INT4, QUANTIZE_INT4_LACKS, QUANTIZE_LACKS

_SMALLEST = 1e-38  # below this a scale has no finite inverse


def quantize_4bit_reference(weight: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    flat = weight.reshape(-1).float()
    whole = flat.shape[0] - flat.shape[0] % blocksize
    blocks = flat[:whole].reshape(-1, blocksize)
    absmax = blocks.abs().amax(-1)
    scaled = (blocks * (1 / absmax.clamp(min=_SMALLEST)).unsqueeze(-1)).reshape(-1)
    if whole < flat.shape[0]:
        last = flat[whole:].abs().amax(0, keepdim=True).clamp(min=_SMALLEST)
        absmax = torch.cat([absmax, last])
        scaled = torch.cat([scaled, flat[whole:] / last])
    table = torch.tensor(TABLES[quant_type], device=weight.device)
    order = table.argsort(stable=True)
    middles = (table[order][:-1] + table[order][1:]) / 2
    nearest = torch.bucketize(F.pad(scaled, (0, scaled.shape[0] % 2)).clamp(-1, 1), middles)
    return _pack(order[nearest]), absmax


def quantize_absmax_reference(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    wide = absmax.float()
    offset = wide.mean() if wide.numel() else wide.new_zeros(())
    blocks = F.pad(wide - offset, (0, -wide.shape[0] % NESTED_BLOCK)).reshape(-1, NESTED_BLOCK)
    scale = blocks.abs().amax(-1, keepdim=True)
    step = ((blocks * (1 / scale)).clamp(-1, 1) + 1) * 0.5 * 65535 + 0.5
    table = torch.tensor(DYNAMIC_MAP, device=absmax.device)
    codes = torch.bucketize(2 * step.long().float() / 65535 - 1, (table[:-1] + table[1:]) * 0.5)
    codes = torch.where(scale == 0, 0, codes).reshape(-1)[: wide.shape[0]]
    return codes.to(torch.uint8), scale.squeeze(-1), offset


def quantize_int4_reference(
    weight: Tensor, blocksize: int, symmetric: bool, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    *rows, n = weight.shape
    groups = -(-n // blocksize)
    blocks = F.pad(weight.float(), (0, groups * blocksize - n)).reshape(*rows, groups, blocksize)
    if symmetric:
        scale = blocks.abs().amax(-1) / 7.5
    else:
        low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
        scale = (high - low) / 15
    scale = scale.to(scale_dtype)
    step = torch.where(scale > 0, scale.float(), 1.0)  # codes for the scale as it is stored
    zero = torch.full_like(step, INT4_ZERO) if symmetric else (-low / step).nan_to_num().round().clamp(0, 15)
    q = (blocks / step.unsqueeze(-1)).nan_to_num().round() + zero.unsqueeze(-1)
    q = q.clamp(0, 15).reshape(*rows, groups * blocksize)[..., :n].reshape(-1)
    return _pack(F.pad(q, (0, q.shape[0] % 2))), scale, zero.to(torch.uint8)


def _pack(codes: Tensor) -> Tensor:
    high, low = codes.to(torch.uint8).reshape(-1, 2).unbind(-1)
    return high << 4 | low


def _check_quantize(weight: Tensor, blocksize: int) -> None:
    torch._check_type(weight.is_floating_point(), lambda: f"weight: expected a floating dtype, got {weight.dtype}")
    torch._check_value(weight.dim() > 0, lambda: "weight: expected at least one dimension, got a scalar")
    torch._check_value(blocksize > 0, lambda: f"blocksize: expected a positive number, got {blocksize}")


def _check_quantize_4bit(weight: Tensor, quant_type: str, blocksize: int) -> None:
    _check_quantize(weight, blocksize)
    torch._check_value(
        quant_type in TABLES, lambda: f"quant_type: expected one of {', '.join(TABLES)}, got {quant_type!r}"
    )
    torch._check_value(
        blocksize in BLOCK_SIZES,
        lambda: f"blocksize: expected one of {', '.join(map(str, BLOCK_SIZES))}, got {blocksize}",
    )


def _check_quantize_int4(weight: Tensor, blocksize: int, symmetric: bool, scale_dtype: torch.dtype) -> None:
    _check_quantize(weight, blocksize)
    torch._check_value(
        scale_dtype.is_floating_point, lambda: f"scale_dtype: expected a floating dtype, got {scale_dtype}"
    )


def _check_quantize_absmax(absmax: Tensor) -> None:
    torch._check_type(
        absmax.dtype == torch.float32, lambda: f"absmax: expected dtype torch.float32, got {absmax.dtype}"
    )
    torch._check_value(absmax.dim() == 1, lambda: f"absmax: expected shape (blocks,), got {tuple(absmax.shape)}")


def _fake_quantize_4bit(weight: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    count = weight.numel()
    codes = weight.new_empty((count + 1) // 2, dtype=torch.uint8)
    return codes, weight.new_empty(-(-count // blocksize), dtype=torch.float32)


def _fake_quantize_int4(
    weight: Tensor, blocksize: int, symmetric: bool, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    scales = (*weight.shape[:-1], -(-weight.shape[-1] // blocksize))
    codes = weight.new_empty((weight.numel() + 1) // 2, dtype=torch.uint8)
    return codes, weight.new_empty(scales, dtype=scale_dtype), weight.new_empty(scales, dtype=torch.uint8)


def _fake_quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    blocks = -(-absmax.shape[0] // NESTED_BLOCK)
    return torch.empty_like(absmax, dtype=torch.uint8), absmax.new_empty(blocks), absmax.new_empty(())


_quantize_4bit = define(
    "pykern::quantize_4bit(Tensor weight, str quant_type, int blocksize, *, str? backend=None)"
    " -> (Tensor codes, Tensor absmax)",
    reference=quantize_4bit_reference,
    check=_check_quantize_4bit,
    fake=_fake_quantize_4bit,
    backends=QUANTIZE,
    supports=QUANTIZE_LACKS,
    samples=quantize_4bit_samples,
    bad=bad_quantize_4bit,
    cost=lambda weight, _, blocksize: (
        4.0 * weight.numel(),
        weight.numel() * (weight.element_size() + 0.5 + 4 / blocksize),
    ),
)

_quantize_absmax = define(
    "pykern::quantize_absmax(Tensor absmax, *, str? backend=None)"
    " -> (Tensor codes, Tensor nested_absmax, Tensor nested_offset)",
    reference=quantize_absmax_reference,
    check=_check_quantize_absmax,
    fake=_fake_quantize_absmax,
    samples=quantize_absmax_samples,
    bad=bad_quantize_absmax,
    cost=lambda absmax: (8.0 * absmax.numel(), 5.0 * absmax.numel()),
)

_quantize_int4 = define(
    "pykern::quantize_int4(Tensor weight, int blocksize, bool symmetric, ScalarType scale_dtype, *, str? backend=None)"
    " -> (Tensor codes, Tensor scales, Tensor zero_points)",
    reference=quantize_int4_reference,
    check=_check_quantize_int4,
    fake=_fake_quantize_int4,
    backends=QUANTIZE_INT4,
    supports=QUANTIZE_INT4_LACKS,
    samples=quantize_int4_samples,
    bad=bad_quantize_int4,
    cost=lambda weight, blocksize, _, scale_dtype: (
        4.0 * weight.numel(),
        weight.numel() * (weight.element_size() + 0.5 + (scale_dtype.itemsize + 1) / blocksize),
    ),
)


@_quantize_4bit.public
def quantize_4bit(
    weight: Tensor,
    *,
    quant_type: str = "nf4",
    blocksize: int = 64,
    double_quant: bool = False,
    symmetric: bool = True,
    scale_dtype: torch.dtype | None = None,
) -> Weight4bit:
    """Quantises a weight to 4 bits an element. No gradient flows through it.

    Args:
        weight: floating, any shape but a scalar's; (out, in) for a linear layer, (experts, out, in) for experts.
            A block that holds a NaN or an infinity decodes to no finite value, under double_quant the whole weight.
        quant_type: "nf4" (quantiles of a normal distribution) or "fp4" (a 4-bit float): bitsandbytes' codes over
            absmax-scaled blocks of the flattened weight; "int4": linear codes in groups along the last dimension.
        blocksize: elements that share a scale: a power of two from 32 to 4096, for int4 any positive number.
        double_quant: quantises the scales of NF4 and FP4 to 8 bits, in blocks of 256 around their mean.
        symmetric: int4 only: the zero point is 8 and the scale absmax / 7.5; else each group has a zero point of
            its own and spans its least to its greatest value, zero included.
        scale_dtype: of int4's scales, by default the weight's; codes are chosen for the rounded scale. NF4 and FP4 have
            fp32 scales.

    Returns:
        The packed codes with all that is needed to decode them.

    Raises:
        ValueError, TypeError: an option is unknown or does not go with the format, or the weight is not floating.
    """
    # Plain raises: this runs in the public function, where Dynamo refuses torch._check's message closures.
    if quant_type not in (*TABLES, "int4"):
        raise ValueError(f"quant_type: expected 'nf4', 'fp4' or 'int4', got {quant_type!r}")
    weight = weight.detach()
    described = {"shape": weight.shape, "dtype": weight.dtype, "quant_type": quant_type, "blocksize": blocksize}
    if quant_type == "int4":
        if double_quant:
            raise ValueError("double_quant: int4 scales are not quantised, got True with quant_type 'int4'")
        scale_dtype = weight.dtype if scale_dtype is None else scale_dtype
        codes, scales, zero_points = _quantize_int4(weight, blocksize, symmetric, scale_dtype)
        return Weight4bit(codes, scales, zero_points=None if symmetric else zero_points, **described)
    if not symmetric:
        raise ValueError(f"symmetric: only int4 has zero points, got False with quant_type {quant_type!r}")
    if scale_dtype not in (None, torch.float32):
        raise ValueError(f"scale_dtype: {quant_type} scales are torch.float32, got {scale_dtype}")
    codes, absmax = _quantize_4bit(weight, quant_type, blocksize)
    code = torch.tensor(TABLES[quant_type], device=weight.device)
    if not double_quant:
        return Weight4bit(codes, absmax, code=code, **described)
    absmax, nested_absmax, nested_offset = _quantize_absmax(absmax)
    nested = {"nested_absmax": nested_absmax, "nested_offset": nested_offset}
    nested_code = torch.tensor(DYNAMIC_MAP, device=weight.device)
    return Weight4bit(codes, absmax, code=code, nested_code=nested_code, **nested, **described)

"""What GPTQ and AWQ share: eight codes in an int32, and the groups of scales and zero points that go with them."""

import torch
from torch import Tensor

from pykern.ops._weight4bit import INT4_ZERO, Weight4bit
from pykern.ops.norm import check_like

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def check_words(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, shape: tuple[int, int], wanted: tuple[int, int]
) -> int:
    """How many groups the tensors of an (in, out) weight hold; raises where they are not of one weight.

    Args:
        shape: (in, out), as scales and the packed weight say.
        wanted: the shape that qweight must have for that.
    """
    groups = scales.shape[0]
    check_like("qweight", qweight, qweight, wanted, (torch.int32,))
    check_like("scales", scales, qweight, (groups, shape[1]), FLOATS)
    if shape[1] % 8:
        raise ValueError(f"scales: expected a number of outputs that 8 divides, got {shape[1]}")
    check_like("qzeros", qzeros, qweight, (groups, shape[1] // 8), (torch.int32,))
    if not 0 < groups <= shape[0]:
        raise ValueError(f"scales: expected from 1 to {shape[0]} groups for {shape[0]} input features, got {groups}")
    return groups


def even_groups(features: int, groups: int) -> int:
    """The size of `groups` equal groups of consecutive features."""
    if features % groups:
        raise ValueError(
            f"scales: {groups} groups do not divide {features} input features; g_idx would say where they lie"
        )
    return features // groups


def matrix(name: str, tensor: Tensor) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(tensor).__name__}")
    if tensor.dim() != 2:
        raise ValueError(f"{name}: expected two dimensions, got shape {tuple(tensor.shape)}")
    return tensor


def unpack(words: Tensor) -> Tensor:
    """int32 (rows, n) to uint8 (rows, 8 n), the lowest four bits of a word first."""
    octets = words.contiguous().view(torch.uint8)  # little-endian, as every device of torch's is
    return torch.stack([octets & 15, octets >> 4], dim=-1).flatten(-2)


def pack(codes: Tensor) -> Tensor:
    """uint8 (out, in), `in` even, to the bytes of a `Weight4bit`."""
    high, low = codes.reshape(-1, 2).unbind(-1)
    return high << 4 | low


def int4(
    codes: Tensor, scales: Tensor, zeros: Tensor, features: int, blocksize: int, order: Tensor | None = None
) -> Weight4bit:
    """The weight from its packed codes, with scales and zero points (groups, out)."""
    return Weight4bit(
        codes,
        scales.t().contiguous(),
        shape=(scales.shape[1], features),
        dtype=scales.dtype,
        quant_type="int4",
        blocksize=blocksize,
        zero_points=None if bool((zeros == INT4_ZERO).all()) else zeros.t().contiguous(),
        order=order,
    )

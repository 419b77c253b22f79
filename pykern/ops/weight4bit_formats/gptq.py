"""GPTQ's int4 weights, as AutoGPTQ and GPTQModel store them: Frantar et al., arXiv:2210.17323."""

import warnings

import torch
from torch import Tensor

from pykern.ops._weight4bit import INT4_ZERO, Weight4bit
from pykern.ops.norm import check_like
from pykern.ops.weight4bit_formats.words import check_words, even_groups, int4, matrix, pack, unpack

_STORED_LESS = {"gptq": 1, "gptq_v2": 0}  # by how much a stored zero point is less than the zero point


def read(qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None, checkpoint_format: str) -> Weight4bit:
    if checkpoint_format not in _STORED_LESS:
        raise ValueError(
            f"checkpoint_format: expected {' or '.join(map(repr, _STORED_LESS))}, got {checkpoint_format!r}"
        )
    for name, tensor in (("qweight", qweight), ("qzeros", qzeros), ("scales", scales)):
        matrix(name, tensor)
    features, out = 8 * qweight.shape[0], scales.shape[1]
    groups = check_words(qweight, qzeros, scales, (features, out), (features // 8, out))
    stored = unpack(qzeros)
    _check_zeros(stored, checkpoint_format)
    zeros = stored + _STORED_LESS[checkpoint_format]  # a byte each, so that 15 becomes 16 and carries nowhere
    if g_idx is None:
        blocksize, order = even_groups(features, groups), None
    else:
        blocksize, order = _order(g_idx, qweight, features, groups)
    if order is None:
        octets = qweight.t().contiguous().view(-1).view(torch.uint8)
        return int4(octets << 4 | octets >> 4, scales, zeros, features, blocksize)
    codes = unpack(qweight.t()).index_select(1, order)
    return int4(pack(codes), scales, zeros, features, blocksize, order)


def _check_zeros(stored: Tensor, checkpoint_format: str) -> None:
    others = {name: INT4_ZERO - less for name, less in _STORED_LESS.items() if name != checkpoint_format}
    for other, symmetric in others.items():
        if stored.numel() and bool((stored == symmetric).all()):
            warnings.warn(
                f"qzeros: every stored zero point is {symmetric}, as a symmetric weight has it in {other!r}, but"
                f" checkpoint_format is {checkpoint_format!r}, by which they are"
                f" {symmetric + _STORED_LESS[checkpoint_format]}",
                stacklevel=4,
            )
    if _STORED_LESS[checkpoint_format]:
        # Less one, a zero point of 0 is -1, whose sign bits were or-ed over the rest of the word.
        full = stored.view(stored.shape[0], -1, 8) == 15
        polluted = full[..., 6] & full[..., 7]
        if bool(polluted.any()):
            row, word = polluted.nonzero()[0].tolist()
            raise ValueError(
                f"qzeros: {int(polluted.sum())} words, the first at [{row}, {word}], end in several stored zero points"
                f" of 15: a zero point of 0 has overwritten its neighbours, which {checkpoint_format!r} cannot tell"
            )


def _order(g_idx: Tensor, qweight: Tensor, features: int, groups: int) -> tuple[int, Tensor | None]:
    """The size of the groups, and the features sorted by group where they are not so already."""
    if not isinstance(g_idx, Tensor):
        raise TypeError(f"g_idx: expected a Tensor, got {type(g_idx).__name__}")
    check_like("g_idx", g_idx, qweight, (features,), (torch.int32, torch.int64))
    low, high = (int(i) for i in g_idx.aminmax())
    if low < 0 or high >= groups:
        raise ValueError(f"g_idx: expected groups from 0 to {groups - 1}, got {low if low < 0 else high}")
    counts = g_idx.bincount(minlength=groups)
    blocksize = int(counts[0])
    if not bool((counts[:-1] == blocksize).all()) or not 0 < int(counts[-1]) <= blocksize:
        sizes = ", ".join(map(str, counts[:8].tolist())) + (", …" if groups > 8 else "")
        raise ValueError(f"g_idx: expected groups of one size, the last may be smaller, got sizes {sizes}")
    order = g_idx.argsort(stable=True)
    ascending = bool((g_idx[1:] >= g_idx[:-1]).all())
    return blocksize, None if ascending else order

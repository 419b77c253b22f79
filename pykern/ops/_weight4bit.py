"""A 4-bit weight: its tensors, its code tables, and how they decode.

Formats: NF4 (Dettmers et al., QLoRA, arXiv:2305.14314), the FP4 of bitsandbytes, and linear int4 in groups (Frantar et
al., GPTQ, arXiv:2210.17323).

NF4 and FP4 blocks run over the flattened weight and may straddle rows; int4 groups run along the last dimension and
start anew in every row. The last block, or the last group of a row, may be shorter. In every format element 2i of the
flattened weight is in the high nibble of byte i, element 2i + 1 in the low one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pykern.kernels.code_tables import FP4, NF4

TABLES = {"nf4": NF4, "fp4": FP4}

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK = 256  # how many absmax values share one nested absmax
INT4_ZERO = 8  # the code of zero in a symmetric int4 weight

# What an op that takes a 4-bit weight has in its schema, in the order of `Weight4bit.arguments`.
SCHEMA = (
    "Tensor codes, Tensor absmax, Tensor? nested_absmax, Tensor? nested_code, Tensor? nested_offset, Tensor? code,"
    " Tensor? zero_points, SymInt[] shape, int blocksize"
)


def _dynamic_map() -> tuple[float, ...]:
    """The signed 8-bit dynamic map (Dettmers, arXiv:1511.04561): seven decades, each twice as fine as the one below."""
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32, device="cpu")
        middles = ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (exponent - 6)).tolist()
        values += [sign * middle for sign in (1, -1) for middle in middles]
    return tuple(sorted(values))


DYNAMIC_MAP = _dynamic_map()


@dataclass(eq=False)
class Weight4bit:
    """A quantised weight, as a plain record of tensors: build one on call, it traces under torch.compile.

    Attributes:
        codes: uint8 (ceil(n / 2),), two codes a byte, the first in the high nibble.
        absmax: the scale of each block. NF4, FP4: fp32 (ceil(n / blocksize),), or uint8 codes into `nested_code` where
            the scales are quantised themselves. int4: floating (*shape[:-1], ceil(shape[-1] / blocksize)).
        shape: of the weight; (out, in) for a linear layer.
        dtype: that was quantised, and the default of `dequantize_4bit`.
        quant_type: "nf4", "fp4" or "int4".
        blocksize: elements that share a scale.
        code: fp32 (16,), the value of each code; None for int4.
        nested_absmax, nested_code, nested_offset: fp32 (ceil(len(absmax) / 256),), (256,) and (); a block's scale is
            nested_code[absmax] * nested_absmax + nested_offset. None where scales are not quantised.
        zero_points: int4: uint8 codes of zero, as many as `absmax`; None where it is 8 everywhere.
        order: int64 (shape[-1],), the input feature that each packed column is (GPTQ's act-order, whose groups gather
            features from all over a row); None: in order. Ops know nothing of it, public functions reorder their input.
    """

    codes: Tensor
    absmax: Tensor
    shape: Sequence[int]
    dtype: torch.dtype
    quant_type: str
    blocksize: int
    code: Tensor | None = None
    nested_absmax: Tensor | None = None
    nested_code: Tensor | None = None
    nested_offset: Tensor | None = None
    zero_points: Tensor | None = None
    order: Tensor | None = None

    @classmethod
    def from_bitsandbytes(cls, state_dict: Mapping[str, Tensor], key: str) -> "Weight4bit":
        """The weight that bitsandbytes or transformers saved as `key`, such as "model.layers.0.mlp.up_proj.weight".

        Args:
            state_dict: with `key`, the packed codes (uint8, or `quant_storage` floats of their bytes), `key.absmax`,
                `key.quant_map`, `key.quant_state.bitsandbytes__nf4` or `…__fp4`, and `key.nested_absmax` and
                `key.nested_quant_map` where scales are quantised. Codes of the older layout (1, n) are read alike.

        Raises:
            KeyError, ValueError, TypeError: an entry is missing, truncated or contradicts another; it is named.
        """
        from pykern.ops.weight4bit_formats.bitsandbytes import read

        return read(state_dict, key)

    def to_bitsandbytes(self, key: str, *, quant_storage: torch.dtype = torch.uint8) -> dict[str, Tensor]:
        """The entries of a state_dict from which bitsandbytes and transformers load this weight, NF4 or FP4.

        `quant_storage` is the dtype whose elements hold the bytes of the codes.
        """
        from pykern.ops.weight4bit_formats.bitsandbytes import write

        return write(self, key, quant_storage)

    @classmethod
    def from_gptq(
        cls,
        qweight: Tensor,
        qzeros: Tensor,
        scales: Tensor,
        g_idx: Tensor | None = None,
        *,
        checkpoint_format: str = "gptq",
    ) -> "Weight4bit":
        """A 4-bit weight of AutoGPTQ or GPTQModel; the result has shape (out, in) and the scales' dtype.

        Args:
            qweight: int32 (in / 8, out), eight input features a word, the first in the lowest bits.
            qzeros: int32 (groups, out / 8), eight outputs a word, the first in the lowest bits.
            scales: floating (groups, out).
            g_idx: integers (in,), the group of each input feature; all groups of one size, the last may be smaller.
                None: in / groups consecutive features each.
            checkpoint_format: "gptq" stores zero points less one, a stored 15 means 16 as in AutoGPTQ's torch path;
                "gptq_v2" stores them as they are. Values of a symmetric weight of the other format bring a warning.

        Raises:
            ValueError, TypeError: a tensor is truncated, contradicts another or is out of range, or a zero point of 0,
                for which "gptq" has no room, has overwritten its neighbours; the message names the argument.
        """
        from pykern.ops.weight4bit_formats.gptq import read

        return read(qweight, qzeros, scales, g_idx, checkpoint_format)

    @classmethod
    def from_awq(cls, qweight: Tensor, qzeros: Tensor, scales: Tensor) -> "Weight4bit":
        """A 4-bit weight in AWQ's GEMM layout; the result has shape (out, in) and the scales' dtype.

        Args:
            qweight: int32 (in, out / 8), eight outputs a word, from the lowest bits up 0, 2, 4, 6, 1, 3, 5, 7.
            qzeros: int32 (groups, out / 8), packed likewise; groups are of in / groups consecutive features.
            scales: floating (groups, out).

        Raises:
            ValueError, TypeError: a tensor is truncated or contradicts another; the message names it.
        """
        from pykern.ops.weight4bit_formats.awq import read

        return read(qweight, qzeros, scales)

    def ordered(self, tensor: Tensor) -> Tensor:
        """`tensor` (…, in) with its columns in the order of the packed weight's."""
        if self.order is None:
            return tensor
        if self.order.shape != tuple(self.shape[-1:]):
            raise ValueError(f"weight.order: expected shape ({self.shape[-1]},), got {tuple(self.order.shape)}")
        # A tensor that does not fit goes on as it is, to the op whose message names it.
        return tensor.index_select(-1, self.order) if tensor.shape[-1:] == self.order.shape else tensor

    @property
    def arguments(self) -> tuple[Tensor | Sequence[int] | int | None, ...]:
        """The weight as ops take it: `SCHEMA`."""
        nested = (self.nested_absmax, self.nested_code, self.nested_offset)
        return (self.codes, self.absmax, *nested, self.code, self.zero_points, self.shape, self.blocksize)


def decode(
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    nested_offset: Tensor | None,
    code: Tensor | None,
    zero_points: Tensor | None,
    shape: Sequence[int],
    blocksize: int,
    dtype: torch.dtype,
) -> Tensor:
    """The weight in `dtype`: the fp32 product of value and scale, whatever the dtype, rounded once."""
    count = math.prod(shape)
    byte = torch.arange(256, device=codes.device)
    table = torch.arange(16, device=codes.device) if code is None else code
    pairs = torch.stack([table[byte >> 4], table[byte & 15]], dim=-1).float()  # (256, 2)
    values = pairs[codes.int()].reshape(-1)[:count]
    if code is None:
        values = values.reshape(shape)
        zero = INT4_ZERO if zero_points is None else _spread(zero_points.float(), blocksize, shape[-1])
        return ((values - zero) * _spread(absmax.float(), blocksize, shape[-1])).to(dtype)
    if nested_absmax is not None:
        # Product and sum round separately, as bitsandbytes does in two kernels.
        scale = _spread(nested_absmax.float(), NESTED_BLOCK, absmax.shape[-1])
        absmax = nested_code.float()[absmax.int()] * scale + nested_offset.float()
    return (values * _spread(absmax.float(), blocksize, count)).to(dtype).reshape(shape)


def _spread(scales: Tensor, blocksize: int, count: int) -> Tensor:
    """Each scale for the `blocksize` elements it serves: (…, blocks) to (…, count)."""
    return scales.unsqueeze(-1).expand(*scales.shape, blocksize).flatten(-2)[..., :count]

"""What the forward and the backward of attention share: which keys a block of queries sees, scores, masks, dropout.

A feature that a call does not use arrives as None, which Triton takes as a constant, and leaves no trace in the code.
Scores are in base 2: what is added to a product has been multiplied by log2 e, so that a weight is one `exp2`.

Queries and keys may change places: every function takes the indices of rows and columns as tensors that broadcast, so
a backward with keys along the rows uses them too.
"""

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl
from pykern.kernels.attention_tiles import of_head
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def visible_range(first, last, offset, left, right, length, BLOCK: tl.constexpr):
    """Which blocks of the other axis the rows first…last see: start <= full_start <= full_end <= end, in elements.

    Row i sees the columns i + offset - left … i + offset + right. From full_start to full_end every row sees every
    column, and no column is beyond `length`. All are multiples of BLOCK. With keys along the rows, call it with the
    negative offset, and left and right exchanged.
    """
    start = 0
    full_start = 0
    end = length
    full_end = length
    if left is not None:
        start = tl.maximum(first + offset - left, 0)
        full_start = tl.maximum(last + offset - left, 0)
    if right is not None:
        end = tl.minimum(last + offset + right + 1, length)
        full_end = tl.minimum(first + offset + right + 1, length)
    start = start // BLOCK * BLOCK
    end = tl.maximum(tl.cdiv(tl.maximum(end, 0), BLOCK) * BLOCK, start)
    full_start = tl.minimum(tl.cdiv(full_start, BLOCK) * BLOCK, end)
    full_end = tl.maximum(tl.maximum(full_end, 0) // BLOCK * BLOCK, full_start)
    return start, full_start, full_end, end


@triton.jit
def is_allowed(query, key, offset, left, right, keys):
    """Whether the key exists and stands in the query's window; `query` and `key` are indices that broadcast."""
    allowed = key < keys
    if left is not None:
        allowed &= key >= query + (offset - left)
    if right is not None:
        allowed &= key <= query + (offset + right)
    return allowed


@triton.jit
def tanh(x, PRECISE: tl.constexpr):
    """Without PRECISE the error is absolute, 1e-7: nothing beside the rounding of a 16-bit input.

    With it, small arguments take the series, where 1 - exp would cancel.
    """
    decay = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    result = (1.0 - decay) / (1.0 + decay)
    result = tl.where(x < 0.0, -result, result)
    if PRECISE:
        square = x * x
        series = -0.00886323552990220
        series = series * square + 0.0218694885361552
        series = series * square - 0.0539682539682540
        series = series * square + 0.133333333333333
        series = series * square - 0.333333333333333
        result = tl.where(tl.abs(x) < 0.3, x + x * square * series, result)
    return result


@triton.jit
def base2_scores(products, query, key, offset, scale, softcap, slope, bias, PRECISE: tl.constexpr):
    """Scores in base 2 from query · key, and the derivative of softcap: 1 - tanh², 1.0 without softcap.

    Args:
        query, key: indices, for ALiBi alone.
        scale: log2 e times the score's scale; with softcap the scale over softcap.
        softcap: None, or log2 e times the cap.
        slope: None, or log2 e times the head's slope, a scalar.
        bias: None, or the additive mask as `load_bias` gives it.
    """
    slack = 1.0
    if softcap is not None:
        bent = tanh(products * scale, PRECISE)
        slack = 1.0 - bent * bent
        scores = bent * softcap
    else:
        scores = products * scale
    if slope is not None:
        scores -= slope * tl.abs(query + offset - key).to(tl.float32)
    if bias is not None:
        scores += bias
    return scores, slack


@triton.jit
def _load_mask(mask, query, key, query_stride, key_stride, query_live, key_live):
    """The tile of a mask as far as it is one: where a stride is None the mask has no such dimension.

    mask: the pointer to the element of query 0 and key 0 of this batch and head.
    query_live, key_live: None, or which indices exist; elements of others are 0 (False).
    """
    live = True
    if query_stride is not None:
        mask += query.to(tl.int64) * query_stride
        if query_live is not None:
            live &= query_live
    if key_stride is not None:
        mask += key.to(tl.int64) * key_stride
        if key_live is not None:
            live &= key_live
    if query_stride is None and key_stride is None:
        return tl.load(mask)
    return tl.load(mask, mask=live, other=0)


@triton.jit
def load_bias(mask, query, key, query_stride, key_stride, query_live, key_live):
    """An additive mask in base 2, fp32; see `_load_mask`. None for a boolean mask or none at all."""
    bias = None
    if mask is not None and mask.dtype.element_ty != tl.int1:
        bias = _load_mask(mask, query, key, query_stride, key_stride, query_live, key_live)
        bias = bias.to(tl.float32) * LOG2E
    return bias


@triton.jit
def load_permitted(mask, query, key, query_stride, key_stride, query_live, key_live):
    """A boolean mask; see `_load_mask`. None for an additive mask or none at all."""
    permitted = None
    if mask is not None and mask.dtype.element_ty == tl.int1:
        permitted = _load_mask(mask, query, key, query_stride, key_stride, query_live, key_live)
    return permitted


@triton.jit
def load_slope(slopes, batch, head, batch_stride, head_stride, BASE2: tl.constexpr):
    """The head's slope in fp32, or None; times log2 e if BASE2."""
    slope = None
    if slopes is not None:
        slope = tl.load(of_head(slopes, batch, head, batch_stride, head_stride, 1)).to(tl.float32)
        if BASE2:
            slope *= LOG2E
    return slope


@triton.jit
def kept(rng, row, first, keys, threshold, COLUMNS: tl.constexpr):
    """(M, COLUMNS) bool: which weights dropout keeps; the rule is that of pykern/ops/_philox.py.

    One call of the generator decides four neighbours.

    Args:
        rng: pointer to seed and offset.
        row: (M, 1) int64, as `dropout_rows` gives them.
        first: the first column, a multiple of 4.
        keys: how many columns a row has.
        threshold: as `keep_threshold` gives it.
    """
    seed = tl.load(rng)
    offset = tl.load(rng + 1)
    counter = row * tl.cdiv(keys, 4) + (first // 4 + tl.arange(0, COLUMNS // 4)[None, :])  # (M, COLUMNS / 4)
    low, high = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    nothing = tl.zeros_like(low)
    word0, word1, word2, word3 = tl.philox(
        seed, low, high, nothing + offset.to(tl.uint32), nothing + (offset >> 32).to(tl.uint32)
    )
    least = threshold.to(tl.uint32, bitcast=True)
    even = tl.join(word0 >= least, word2 >= least)  # (M, COLUMNS / 4, 2)
    odd = tl.join(word1 >= least, word3 >= least)
    return tl.reshape(tl.join(even, odd), (row.shape[0], COLUMNS))


@triton.jit
def dropout_rows(row, line, origin, head, heads):
    """Rows of a head as dropout counts them: ((b · H + h) · L + i), or packed ((origin + i) · H + h).

    line: of rows of statistics (B, H, L), the first of this head.
    """
    return line + row if origin is None else (origin + row).to(tl.int64) * heads + head


def keep_threshold(p: float) -> tuple[int, float]:
    """For `kept` the least word that is kept, its 32 bits as a signed number; and what kept weights are multiplied by.

    p = 1 would need 33 bits; then the factor makes the rest.
    """
    least = min(int(p * 2**32), 2**32 - 1)
    return least - 2**32 if least >= 2**31 else least, 1.0 / (1.0 - p) if p < 1 else 0.0


class Band(NamedTuple):
    """The keys that queries see, in numbers that fit 32 bits; None is unlimited."""

    offset: int
    left: int | None
    right: int | None

    @staticmethod
    def of(queries: int, keys: int, left: int | None, right: int | None, align: str) -> "Band":
        """A bound that hides nothing is None: the kernel without it is the faster one."""
        offset = keys - queries if align == "bottom_right" else 0
        if left is not None and left >= queries - 1 + offset:
            left = None
        if right is not None and right >= keys - 1 - offset:
            right = None
        return Band(offset, left, right)


def fold_mask(mask: Tensor | None, lead: tuple[int, ...]) -> tuple[Tensor | None, tuple[int | None, ...]]:
    """A mask whose batch dimensions fold into one, and its strides over (b, h, query, key).

    Those of queries and keys are None where the mask has one element there: a tile of it is then a row or a column.
    It is copied only where batch dimensions have no common stride, and then not along heads, queries and keys.
    """
    if mask is None:
        return None, (0, 0, None, None)
    mask = mask.reshape(*[1] * (len(lead) + 3 - mask.dim()), *mask.shape)
    tail = mask.shape[-3:]
    if len(lead) != 1:
        mask = mask.expand(*lead, *tail).reshape(math.prod(lead), *tail)
    batch, head, query, key = (s if n > 1 else 0 for n, s in zip(mask.shape, mask.stride(), strict=True))
    return mask, (batch, head, query if tail[1] > 1 else None, key if tail[2] > 1 else None)


def fold_slopes(slopes: Tensor | None, heads: int) -> tuple[Tensor | None, int, int]:
    """Slopes as (B, H) or (H,), and their strides over (b, h)."""
    if slopes is None:
        return None, 0, 0
    if slopes.dim() == 1:
        return slopes, 0, slopes.stride(0)
    slopes = slopes.reshape(-1, heads)
    return slopes, slopes.stride(0), slopes.stride(1)


def score_arguments(
    shape: tuple[int, int, int, int],
    band: Band,
    scale: float,
    softcap: float | None,
    slopes: Tensor | None,
    rng: Tensor | None,
    dropout_p: float,
    mask: Tensor | None = None,
    lead: tuple[int, ...] = (),
    base: float = LOG2E.value,
) -> dict[str, Any]:
    """What every kernel is told about scores and their weights.

    Args:
        shape: heads, key heads, queries, keys.
        lead: batch dimensions that the mask broadcasts to.
        base: what scores are multiplied by.
    """
    heads, key_heads, queries, keys = shape
    mask, mask_strides = fold_mask(mask, lead)
    slopes, *slope_strides = fold_slopes(slopes, heads)
    threshold, survival = keep_threshold(dropout_p)
    return {
        "mask": mask,
        "slopes": slopes,
        "rng": rng.contiguous() if dropout_p > 0 else None,
        "heads": heads,
        "group": heads // key_heads,
        "queries": queries,
        "keys": keys,
        **band._asdict(),
        "scale": scale * base if softcap is None else scale / softcap,
        "softcap": None if softcap is None else softcap * base,
        "threshold": threshold,
        "survival": survival,
        **dict(zip(("mask_batch", "mask_head", "mask_query", "mask_key"), mask_strides, strict=True)),
        **dict(zip(("slope_batch", "slope_head"), slope_strides, strict=True)),
    }

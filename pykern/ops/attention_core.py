"""What dense, packed and cached attention share: the mathematics in plain torch, and the checks on common arguments.

Softmax attention: Vaswani et al., arXiv:1706.03762. ALiBi: Press, Smith, Lewis, arXiv:2108.12409. Sinks: Xiao et al.,
arXiv:2309.17453, as a learned logit that only joins the denominator. Softcap: Gemma 2, arXiv:2408.00118.
"""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


def statistic_dtype(query: Tensor) -> torch.dtype:
    """What attention computes in, and the dtype of lse."""
    return torch.float64 if query.dtype == torch.float64 else torch.float32


class DenseCall(NamedTuple):
    """The arguments of the dense op, in its order; query (…, L, H, E), key (…, S, Hkv, E), value (…, S, Hkv, Ev)."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    rng: Tensor | None
    dropout_p: float
    scale: float
    enable_gqa: bool
    window_left: int | None
    window_right: int | None
    softcap: float | None
    align: str

    @property
    def lead(self) -> torch.Size:
        return self.query.shape[:-3]

    @property
    def offset(self) -> int:
        """The key position of query 0."""
        return self.key.shape[-3] - self.query.shape[-3] if self.align == "bottom_right" else 0

    @property
    def scores_shape(self) -> tuple[int, ...]:
        return (*self.lead, self.query.shape[-2], self.query.shape[-3], self.key.shape[-3])


@dataclass(frozen=True)
class Scoring:
    """How a score becomes a weight, apart from what tensors say.

    The query at row i sits at key position i + offset (a number, or a tensor that broadcasts against the scores) and
    may see keys from left before to right after that position; None is unlimited.
    """

    scale: float
    offset: int | Tensor
    left: int | None
    right: int | None
    softcap: float | None
    dropout_p: float = 0.0


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scoring: Scoring,
    *,
    mask: Tensor | None = None,
    present: Tensor | None = None,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention on (…, H, L, E), (…, Hkv, S, E), (…, Hkv, S, Ev): out (…, H, L, Ev) in fp32 (fp64), and lse.

    Args:
        mask: bool or additive, broadcasts to the scores (…, H, L, S).
        present: bool like a bool mask, for keys that exist.
        slopes: (H,) or (…, H).
        sinks: (H,).
        keep: bool (…, H, L, S), the weights that survive dropout.
    """
    dtype = statistic_dtype(query)
    scores = head_matmul(query.to(dtype), key.to(dtype).mT) * scoring.scale
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    row = torch.arange(query.shape[-2], device=query.device).unsqueeze(-1)
    distance = row + scoring.offset - torch.arange(key.shape[-2], device=query.device)
    if slopes is not None:
        scores = scores - slopes.to(dtype)[..., None, None] * distance.abs()
    allowed = [] if present is None else [present]
    if scoring.left is not None:
        allowed.append(distance <= scoring.left)
    if scoring.right is not None:
        allowed.append(distance >= -scoring.right)
    if mask is not None and mask.dtype == torch.bool:
        allowed.append(mask)
    elif mask is not None:
        scores = scores + mask.to(dtype)
    for permission in allowed:
        scores = torch.where(permission, scores, -math.inf)
    weights, lse = softmax(scores, None if sinks is None else sinks.to(dtype)[:, None, None])
    if keep is not None:
        survival = 1.0 - scoring.dropout_p
        weights = torch.where(keep, weights * (1.0 / survival if survival > 0 else 0.0), 0.0)
    return head_matmul(weights, value.to(dtype)), lse


def softmax(scores: Tensor, sinks: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Weights and their log-sum-exp; zeros and -inf where nothing is allowed, without a NaN in any derivative."""
    top = scores.new_full((*scores.shape[:-1], 1), -math.inf)
    if scores.shape[-1] > 0:
        top = scores.amax(-1, keepdim=True)
    if sinks is not None:
        top = torch.maximum(top, sinks)
    # The result does not depend on `top`, so it is a constant to differentiation.
    top = top.detach()
    top = torch.where(top == -math.inf, 0.0, top)
    exponentials = torch.exp(scores - top)
    total = exponentials.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks - top)
    empty = total == 0
    total = torch.where(empty, 1.0, total)
    lse = torch.where(empty, -math.inf, top + torch.log(total))
    return exponentials / total, lse.squeeze(-1)


def head_matmul(rows: Tensor, columns: Tensor) -> Tensor:
    """(…, H, L, K) @ (…, Hkv, K, N), a group of heads sharing each of the second's, which are not repeated."""
    heads, shared = rows.shape[-3], columns.shape[-3]
    if heads == shared:
        return rows @ columns
    length, lead = rows.shape[-2], rows.shape[:-3]
    grouped = rows.reshape(*lead, shared, heads // shared * length, rows.shape[-1])
    return (grouped @ columns).reshape(*lead, heads, length, columns.shape[-1])


def default_scale(query: Tensor, scale: float | None) -> float:
    """1/√E; without any elements of E every score is zero, whatever the scale."""
    size = query.shape[-1]
    return scale if scale is not None else 1.0 / math.sqrt(size) if size > 0 else 1.0


def window_bounds(window: Sequence[int | None] | None, is_causal: bool) -> tuple[int | None, int | None]:
    """Left and right of `window`, both checked; causal is no key to the right."""
    if window is None:
        return None, 0 if is_causal else None
    if len(window) != 2:
        raise ValueError(f"window: expected a pair (left, right), got {window!r}")
    left, right = window
    if (left is not None and left < 0) or (right is not None and right < 0):
        raise ValueError(f"window: expected left and right to be None or at least 0, got {window!r}")
    return left, 0 if is_causal else right


def require(condition: Any, message: Callable[[], str], error: type[Exception] = ValueError) -> None:
    """torch._check, which a symbolic size needs, but not its microsecond where the condition is plainly met."""
    if condition is not True:
        (torch._check_type if error is TypeError else torch._check_value)(condition, message)


def check_heads(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grouped: bool,
    hint: str = "",
    names: tuple[str, str] = ("key", "value"),
) -> None:
    """Tensors (…, length, heads, size): dtypes, devices, sizes and heads; lengths are the caller's."""
    require(query.is_floating_point(), lambda: f"query: expected a floating dtype, got {query.dtype}", TypeError)
    for name, x in zip(names, (key, value), strict=True):
        _check_kin(name, x, query)
    require(
        key.shape[-1] == query.shape[-1],
        lambda: f"{names[0]}: expected heads of size {query.shape[-1]} as the query's, got {key.shape[-1]}",
    )
    require(
        value.shape[-2] == key.shape[-2],
        lambda: f"{names[1]}: expected {key.shape[-2]} heads as {names[0]}, got {value.shape[-2]}",
    )
    heads, shared = query.shape[-2], key.shape[-2]
    require(
        heads == shared or (grouped and shared > 0 and heads % shared == 0),
        lambda: (
            f"{names[0]}: expected {'a number of heads that divides' if grouped else 'as many heads as'} the "
            f"query's {heads}{hint}, got {shared}"
        ),
    )


def _check_kin(name: str, x: Tensor, query: Tensor) -> None:
    require(x.dtype == query.dtype, lambda: f"{name}: expected dtype {query.dtype} as query, got {x.dtype}", TypeError)
    check_device(name, x, query)


def check_device(name: str, x: Tensor, query: Tensor) -> None:
    require(x.device == query.device, lambda: f"{name}: expected device {query.device} as query, got {x.device}")


def check_scoring(
    query: Tensor,
    lead: Sequence[int],
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    window_left: int | None,
    window_right: int | None,
    softcap: float | None,
    rng: Tensor | None = None,
    dropout_p: float = 0.0,
) -> None:
    """The arguments that shape the scores; query is (…, heads, size), `lead` the batch dimensions of the slopes."""
    _check_limit("left", window_left)
    _check_limit("right", window_right)
    require(
        softcap is None or 0 < softcap < math.inf,
        lambda: f"softcap: expected None or a positive number, got {softcap}",
    )
    heads = query.shape[-2]
    _check_per_head("alibi_slopes", alibi_slopes, [(heads,), (*lead, heads)] if len(lead) > 0 else [(heads,)], query)
    _check_per_head("sinks", sinks, [(heads,)], query)
    require(0 <= dropout_p <= 1, lambda: f"dropout_p: expected a probability, got {dropout_p}")
    require(
        dropout_p == 0 or rng is not None, lambda: f"rng: expected seed and offset for dropout_p={dropout_p}, got None"
    )
    if rng is not None:
        check_integers("rng", rng, query, (2,), torch.int64)


def _check_limit(side: str, limit: int | None) -> None:
    require(limit is None or limit >= 0, lambda: f"window: expected {side} to be None or at least 0, got {limit}")


def _check_per_head(name: str, x: Tensor | None, shapes: Sequence[tuple[int, ...]], query: Tensor) -> None:
    if x is None:
        return
    require(x.is_floating_point(), lambda: f"{name}: expected a floating dtype, got {x.dtype}", TypeError)
    require(
        tuple(x.shape) in shapes,
        lambda: f"{name}: expected shape {' or '.join(map(str, shapes))}, got {tuple(x.shape)}",
    )
    check_device(name, x, query)


def check_like(name: str, x: Tensor | None, shape: Sequence[int], query: Tensor, dtype: torch.dtype) -> None:
    """An output, or the gradient of one, handed back."""
    if x is not None:
        require(x.shape == torch.Size(shape), lambda: f"{name}: expected shape {tuple(shape)}, got {tuple(x.shape)}")
        require(x.dtype == dtype, lambda: f"{name}: expected dtype {dtype}, got {x.dtype}", TypeError)
        check_device(name, x, query)


def check_integers(name: str, x: Tensor, query: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.int32) -> None:
    """An integer argument; a size of -1 accepts any."""
    require(x.dtype == dtype, lambda: f"{name}: expected dtype {dtype}, got {x.dtype}", TypeError)
    require(
        x.dim() == len(shape) and all(want in (-1, got) for want, got in zip(shape, x.shape, strict=True)),
        lambda: f"{name}: expected shape {tuple('any' if s == -1 else s for s in shape)}, got {tuple(x.shape)}",
    )
    check_device(name, x, query)


def checks_on_host(x: Tensor) -> bool:
    """Whether PYKERN_CHECKS=1 asks for values to be looked at, and there are values: not while tracing."""
    if torch.compiler.is_compiling() or os.environ.get("PYKERN_CHECKS") != "1":
        return False
    return torch._guards.detect_fake_mode([x]) is None and x.device.type != "meta"


def check_lengths(name: str, lengths: Sequence[int], limits: Sequence[int]) -> None:
    """Values read back from the device."""
    for i, (length, limit) in enumerate(zip(lengths, limits, strict=True)):
        if not 0 <= length <= limit:
            raise ValueError(f"{name}: expected 0 to {limit} keys in sequence {i}, got {length}")


def check_pages(block_table: Sequence[Sequence[int]], lengths: Sequence[int], cache: Tensor) -> None:
    """Values read back from the device; what lies behind a sequence's length in the table is never used."""
    blocks, block_size = cache.shape[:2]
    for i, (pages, length) in enumerate(zip(block_table, lengths, strict=True)):
        needed = -(-length // block_size) if block_size > 0 else 0
        if length > len(pages) * block_size:
            raise ValueError(
                f"block_table: expected {needed} pages for the {length} keys of sequence {i}, got {len(pages)}"
            )
        for page in pages[:needed]:
            if not 0 <= page < blocks:
                raise ValueError(f"block_table: expected block ids from 0 to {blocks - 1}, got {page} in sequence {i}")


def key_padding(length: Tensor, longest: int) -> Tensor:
    """(B, longest) bool, whether a key exists, of lengths (B,)."""
    return torch.arange(longest, device=length.device) < length.unsqueeze(-1)


def take_rows(rows: Tensor, index: Tensor, inside: Tensor, fill: float = 0.0) -> Tensor:
    """`rows[index]` where inside, else `fill`: there nothing is read, NaN included, and no gradient flows."""
    if rows.shape[0] == 0:
        rows = torch.cat([rows, rows.new_full((1, *rows.shape[1:]), fill)])
    taken = rows[torch.where(inside, index, 0)]
    return torch.where(inside.reshape(*inside.shape, *[1] * (rows.dim() - 1)), taken, fill)


def take_pages(cache: Tensor, block_table: Tensor, length: Tensor, longest: int) -> Tensor:
    """(B, longest, Hkv, E) from pages (blocks, block_size, Hkv, E): zeros beyond each length, block ids clamped."""
    blocks, block_size = cache.shape[:2]
    position = torch.arange(longest, device=cache.device)
    page = block_table.long()[:, position // max(block_size, 1)].clamp(0, max(blocks - 1, 0))
    rows = cache.reshape(blocks * block_size, *cache.shape[2:])
    return take_rows(rows, page * block_size + position % max(block_size, 1), key_padding(length, longest))

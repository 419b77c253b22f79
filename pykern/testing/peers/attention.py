"""torch's own attention kernels for GPUs, each by itself: flash, cuDNN and flex_attention.

(query, key, value) are (…, length, heads, size), as the op takes them; a peer returns None for what it does not cover.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pykern.ops.attention_core import DenseCall


def sdpa(name: str) -> Callable[[Any], Callable[..., Any]]:
    """`F.scaled_dot_product_attention` on one of `torch.nn.attention.SDPBackend`'s kernels, full or causal."""

    def make(module: Any) -> Callable[..., Any]:
        kernel = getattr(module.SDPBackend, name)

        def peer(*args: Any) -> Tensor | None:
            call = DenseCall(*args)
            causal = (call.window_left, call.window_right, call.offset) == (None, 0, 0)
            plain = call.window_left is None and call.window_right is None
            if not (causal or plain) or call.dropout_p > 0 or _modified(call) or call.attn_mask is not None:
                return None
            with module.sdpa_kernel(kernel):
                out = F.scaled_dot_product_attention(
                    *_heads_first(call), is_causal=causal, scale=call.scale, enable_gqa=call.enable_gqa
                )
            return out.transpose(-3, -2)

        return peer

    return make


def flex(module: Any) -> Callable[..., Any]:
    """`flex_attention`, compiled; its block mask is made once for a geometry, outside what is timed after the first."""
    attend = torch.compile(module.flex_attention, dynamic=False)

    @functools.lru_cache(maxsize=8)
    def block_mask(length: int, keys: int, offset: int, left: float, right: float, device: torch.device) -> Any:
        def allowed(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (i + offset - j <= left) & (j - i - offset <= right)

        return module.create_block_mask(allowed, None, None, length, keys, device=str(device))

    def peer(*args: Any) -> Tensor | None:
        call = DenseCall(*args)
        if call.query.dim() != 4 or call.dropout_p > 0 or call.sinks is not None or call.attn_mask is not None:
            return None
        left, right = (math.inf if w is None else w for w in (call.window_left, call.window_right))
        mask = None
        if (left, right) != (math.inf, math.inf):
            mask = block_mask(*call.scores_shape[-2:], call.offset, left, right, call.query.device)
        softcap, slopes, offset = call.softcap, call.alibi_slopes, call.offset

        def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            if softcap is not None:
                s = softcap * torch.tanh(s / softcap)
            if slopes is not None:
                s = s - (slopes[h] if slopes.dim() == 1 else slopes[b, h]) * (i + offset - j).abs()
            return s

        modified = score if _modified(call) else None
        out = attend(
            *_heads_first(call), score_mod=modified, block_mask=mask, scale=call.scale, enable_gqa=call.enable_gqa
        )
        return out.transpose(-3, -2)

    return peer


def _modified(call: DenseCall) -> bool:
    return call.softcap is not None or call.alibi_slopes is not None or call.sinks is not None


def _heads_first(call: DenseCall) -> tuple[Tensor, ...]:
    return tuple(x.transpose(-3, -2) for x in (call.query, call.key, call.value))

"""torch's own attention: its CPU flash kernel as a backend of the dense op, and what we are measured against."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pykern.ops._philox import keep_mask, row_index
from pykern.ops.attention_core import DenseCall, head_matmul, softmax


def _is_causal(call: DenseCall) -> bool | None:
    """Whether the window is torch's is_causal (True) or hides nothing (False); None where it is neither."""
    length, keys, offset = call.query.shape[-3], call.key.shape[-3], call.offset
    if call.window_left is not None and call.window_left < length - 1 + offset:
        return None
    if call.window_right is None or offset + call.window_right >= keys - 1:
        return False
    return True if offset + call.window_right == 0 else None


def flash_lacks(*args: Any) -> str | None:
    """Why torch's CPU kernel cannot serve the forward."""
    call = DenseCall(*args)
    dtype = call.query.dtype
    if call.query.device.type != "cpu":
        return f"serves CPU tensors, not {call.query.device.type}"
    if dtype is not torch.float32 and dtype is not torch.bfloat16 and dtype is not torch.float16:
        return f"computes fp32, fp16 and bf16, not {dtype}"
    for name, given in (("ALiBi", call.alibi_slopes), ("sinks", call.sinks), ("softcap", call.softcap)):
        if given is not None:
            return f"torch's CPU kernel has no {name}"
    if call.dropout_p > 0:
        return "torch's CPU kernel has no dropout"
    if call.query.shape[-1] != call.value.shape[-1]:
        return (
            f"torch's CPU kernel has one head size for key and value, not {call.key.shape[-1]}, {call.value.shape[-1]}"
        )
    if call.query.numel() == 0 or call.key.numel() == 0:
        return "torch's CPU kernel divides by zero on empty tensors"
    if _is_causal(call) is None:
        return f"torch's CPU kernel has no window ({call.window_left}, {call.window_right}) at offset {call.offset}"
    return None


def _flat(x: Tensor) -> Tensor:
    """(…, length, heads, size) as (B, heads, length, size), rows dense as torch's kernel reads them, and in fp32.

    In 16 bits that kernel rounds the weights and approximates the exponential, and without AMX it is slower as well.
    """
    x = x.float()
    if x.dim() != 4:
        x = x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:])
    # clone and not contiguous(), which leaves a wrong stride where the size is one.
    return (x if x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)).transpose(1, 2)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -math.inf)
    return mask.to(dtype)


def _flat_mask(call: DenseCall) -> Tensor | None:
    """The mask as additive and of four dimensions, not broadcast further than it must be."""
    if call.attn_mask is None:
        return None
    mask = _additive(call.attn_mask, torch.float32)
    mask = mask.reshape(*[1] * (call.query.dim() - mask.dim()), *mask.shape)
    if len(call.lead) != 1:
        mask = mask.expand(*call.lead, *mask.shape[-3:]).reshape(math.prod(call.lead), *mask.shape[-3:])
    return mask.contiguous()


def flash(*args: Any) -> tuple[Tensor, Tensor]:
    """The forward on torch's CPU kernel."""
    call = DenseCall(*args)
    is_causal, mask = _is_causal(call), _flat_mask(call)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(
        _flat(call.query), _flat(call.key), _flat(call.value), 0.0, is_causal, attn_mask=mask, scale=call.scale
    )
    if mask is not None:
        # On a row with nothing allowed torch's kernel gives zeros, as we do, but an lse of zero.
        if is_causal:
            mask = mask + mask.new_full(call.scores_shape[-2:], -math.inf).triu_(1)
        lse = torch.where((mask == -math.inf).all(-1), -math.inf, lse)
    out, lse = out.transpose(1, 2).to(call.query.dtype).contiguous(), lse.contiguous()
    if call.query.dim() != 4:
        out, lse = out.view(*call.lead, *out.shape[1:]), lse.view(*call.lead, *lse.shape[1:])
    return out, lse


def flash_backward(dout: Tensor | None, dlse: Tensor | None, *args: Any) -> tuple[Tensor | None, ...]:
    """The backward of `flash`: torch's CPU kernel, or plain matrix products where that lacks a gradient."""
    *forward, out, lse, output_mask = args
    call = DenseCall(*forward)
    if lse.dim() != 3:
        lse = lse.reshape(math.prod(call.lead), *lse.shape[-2:])
    mask = _flat_mask(call)
    if mask is not None:
        # exp(-inf - lse) must be zero and not NaN where nothing is allowed.
        lse = torch.where(lse == -math.inf, 0.0, lse)
    if dout is None or dlse is not None or output_mask[3]:
        gradients = _unfused_backward(call, dout, dlse, mask)
    else:
        gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default(
            *(_flat(x) for x in (dout, call.query, call.key, call.value, out)),
            lse,
            0.0,
            _is_causal(call),
            attn_mask=mask,
            scale=call.scale,
        )
    found: list[Tensor | None] = []
    for gradient, x, wanted in zip(gradients, (call.query, call.key, call.value), output_mask, strict=False):
        found.append(gradient.transpose(1, 2).contiguous().view(x.shape).to(x.dtype) if wanted else None)
    dmask = None
    if output_mask[3]:
        dmask = gradients[3].view(call.scores_shape).sum_to_size(call.attn_mask.shape).to(call.attn_mask.dtype)
    return (*found, dmask.contiguous() if dmask is not None else None, None, None)


def _unfused_backward(
    call: DenseCall, dout: Tensor | None, dlse: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dquery, dkey, dvalue (B, heads, length, size) and dscores (B, H, L, S), in fp32."""
    query, key, value = (_flat(x) for x in (call.query, call.key, call.value))
    dout = torch.zeros_like(query) if dout is None else _flat(dout)
    scores = head_matmul(query, key.mT) * call.scale
    if mask is not None:
        scores = scores + mask
    if _is_causal(call):
        scores = scores + scores.new_full(scores.shape[-2:], -math.inf).triu(1)
    weights, lse = softmax(scores)
    dweights = head_matmul(dout, value.mT)
    delta = (weights * dweights).sum(-1, keepdim=True)
    if dlse is not None:
        delta = delta - dlse.reshape(lse.shape).unsqueeze(-1)
    dscores = weights * (dweights - delta)
    dquery, dkey = head_matmul(dscores, key) * call.scale, _by_shared_head(dscores, query, key) * call.scale
    return dquery, dkey, _by_shared_head(weights, dout, value), dscores


def _by_shared_head(rows: Tensor, right: Tensor, like: Tensor) -> Tensor:
    """rows' · right, (B, H, L, S) and (B, H, L, K) to (B, Hkv, S, K): summed over the heads that share a key head."""
    shape = (like.shape[0], like.shape[1], -1)
    return rows.reshape(*shape, rows.shape[-1]).mT @ right.reshape(*shape, right.shape[-1])


def torch_attention(*args: Any) -> Tensor:
    """F.scaled_dot_product_attention, with an explicit mask if needed; written out where it lacks a feature."""
    call = DenseCall(*args)
    query, key, value = (x.transpose(-3, -2) for x in (call.query, call.key, call.value))
    is_causal = call.window_right == 0 and call.offset == 0 and call.window_left is None
    is_causal = is_causal and call.attn_mask is None and call.alibi_slopes is None
    bias = None if is_causal else _explicit_mask(call)
    if call.softcap is None and call.sinks is None and call.dropout_p == 0:
        out = F.scaled_dot_product_attention(
            query, key, value, bias, is_causal=is_causal, scale=call.scale, enable_gqa=call.enable_gqa
        )
        return out.transpose(-3, -2)
    groups = query.shape[-3] // max(key.shape[-3], 1)
    scores = query @ key.repeat_interleave(groups, -3).mT * call.scale
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    if is_causal:
        scores = scores + scores.new_full(scores.shape[-2:], -math.inf).triu(1)
    elif bias is not None:
        scores = scores + bias
    if call.sinks is not None:
        sink = call.sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sink], -1)
    weights = torch.softmax(scores, -1)[..., : key.shape[-2]]
    if call.dropout_p > 0:
        keep = keep_mask(call.rng, row_index(call.scores_shape, query.device), call.scores_shape[-1], call.dropout_p)
        weights = torch.where(keep, weights / (1.0 - call.dropout_p), 0.0)
    return (weights @ value.repeat_interleave(groups, -3)).transpose(-3, -2)


def _explicit_mask(call: DenseCall) -> Tensor | None:
    length, keys = call.scores_shape[-2:]
    device, dtype = call.query.device, call.query.dtype
    distance = torch.arange(length, device=device)[:, None] + call.offset - torch.arange(keys, device=device)
    bias = None if call.attn_mask is None else _additive(call.attn_mask, dtype)
    if call.alibi_slopes is not None:
        alibi = (-call.alibi_slopes[..., None, None] * distance.abs()).to(dtype)
        bias = alibi if bias is None else bias + alibi
    if call.window_left is not None or call.window_right is not None:
        left = length + keys if call.window_left is None else call.window_left
        right = length + keys if call.window_right is None else call.window_right
        hidden = (distance > left) | (distance < -right)
        bias = (call.query.new_zeros(length, keys) if bias is None else bias).masked_fill(hidden, -math.inf)
    return bias


def key_lengths(args: Sequence[Any]) -> list[int]:
    """Of a packed call; reads them back, so it is for tests and benchmarks."""
    boundaries, used = args[4].tolist(), args[9]
    return used.tolist() if used is not None else [b - a for a, b in zip(boundaries, boundaries[1:], strict=False)]


def _one_sequence(
    query: Tensor, key: Tensor, value: Tensor, slopes: Tensor | None, sinks: Tensor | None, *rest: Any
) -> Tensor:
    """torch on a batch of one, aligned bottom-right; rest: scale, window_left, window_right, softcap."""
    scale, left, right, softcap = rest
    grouped = query.shape[-2] != key.shape[-2]
    call = (None, slopes, sinks, None, 0.0, scale, grouped, left, right, softcap, "bottom_right")
    return torch_attention(query[None], key[None], value[None], *call)[0]


def _pages(cache: Tensor, table: Tensor, length: int) -> Tensor:
    return cache[table.long()].flatten(0, 1)[:length]


def _slopes_of(slopes: Tensor | None, sequence: int) -> Tensor | None:
    return slopes if slopes is None or slopes.dim() == 1 else slopes[sequence]


def torch_varlen(*args: Any) -> Tensor:
    """One torch call a sequence."""
    query, key, value, bounds, starts = *args[:3], args[3].tolist(), args[4].tolist()
    slopes, sinks, table, scoring = args[7], args[8], args[10], args[13:]
    out = []
    for i, length in enumerate(key_lengths(args)):
        if table is not None:
            keys, values = _pages(key, table[i], length), _pages(value, table[i], length)
        else:
            keys, values = key[starts[i] :][:length], value[starts[i] :][:length]
        rows = query[bounds[i] : bounds[i + 1]]
        out.append(_one_sequence(rows, keys, values, _slopes_of(slopes, i), sinks, *scoring))
    padding = (out[0] if out else query).new_zeros(query.shape[0] - bounds[-1], query.shape[1], value.shape[-1])
    return torch.cat([*out, padding])


def torch_decode(*args: Any) -> Tensor:
    """One torch call a sequence."""
    query, key, value, lengths, table, slopes, sinks, scale, left, softcap = args
    out = []
    for i, length in enumerate(lengths.tolist()):
        if table is not None:
            keys, values = _pages(key, table[i], length), _pages(value, table[i], length)
        else:
            keys, values = key[i, :length], value[i, :length]
        out.append(_one_sequence(query[i], keys, values, _slopes_of(slopes, i), sinks, scale, left, 0, softcap))
    return torch.stack(out) if out else query.new_zeros(0, *query.shape[1:-1], value.shape[-1])

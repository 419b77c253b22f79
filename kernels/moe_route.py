"""The router: a token's best experts and their weights, forward and backward, each in one launch.

One warp holds a few tokens' scores in registers and takes the best expert of each token, top_k times over. Only
integers are compared: the bits of a float, ordered as the floats are, with NaN above and experts that do not exist
below all of them. The largest key is one `redux` instruction across the warp, and the lowest expert that has it a
second one. Where 16-bit logits decide, key and expert fit into one integer, and a round is one reduction.
For 8 of 128 experts that takes 270 instructions a token, 160 in 16 bits; one reduction of 64-bit keys takes 380, a
bitonic top-k 470. With several warps to a program, rows of fp32 would be split among them and every round wait twice.

How many experts there are and how many are chosen is compiled in; how many tokens there are is not.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from pykern.kernels.norm import on
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2_HIGH = tl.constexpr(0.693359375)  # 10 bits: its products with exponents are exact
LN_2_LOW = tl.constexpr(-2.1219444005469057e-4)
ABSENT = tl.constexpr(-(2**31))  # below the key of every number
NEGATIVE_INFINITY = tl.constexpr(-0x7F800001)  # its key


@dataclass(frozen=True)
class Config:
    """How many tokens a program of one warp has: 16 scores to a thread, which leaves room for keys and gradients."""

    tokens: int

    @staticmethod
    def of(columns: int) -> "Config":
        return Config(min(max(512 // columns, 1), 64))


@triton.jit
def _exp(x):
    """eˣ of x ≤ 0 to about an ulp, where `tl.exp` loses one for every doubling of |x|: experts' order depends on it."""
    x = tl.where(x < -120.0, -120.0, x)  # 0 in fp32, −∞ included; NaN stays
    power = tl.floor(x * LOG2_E + 0.5)
    rest = (x - power * LN_2_HIGH) - power * LN_2_LOW
    return tl.exp2(rest * LOG2_E) * tl.exp2(power)


@triton.jit
def _sigmoid(x):
    tail = _exp(-tl.abs(x))
    return tl.div_rn(tl.where(x < 0.0, tail, 1.0), 1.0 + tail)


@triton.jit
def _key(values, BITS: tl.constexpr):
    """Integers in the order of the values; the zeros are equal, and so are all NaN, above everything."""
    LARGEST: tl.constexpr = 2 ** (BITS - 1) - 1
    bits = values.to(tl.int16 if BITS == 16 else tl.int32, bitcast=True).to(tl.int32)
    key = bits ^ ((bits >> 31) & LARGEST)
    key = tl.where(key == -1, 0, key)  # −0
    return tl.where(values != values, LARGEST, key)


@triton.jit
def _value(key):
    """The fp32 value of a key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _best(keys, column, PACKED: tl.constexpr):
    """The column of each row's largest key, (rows, 1), ties to the lower one."""
    best = tl.max(keys, 1, keep_dims=True)
    if PACKED:
        place = 0xFFFF - (best & 0xFFFF)
    else:
        place = tl.min(tl.where(keys == best, column, column.shape[1]), 1, keep_dims=True)
    return place


@triton.jit
def _group_key(keys, TOP2: tl.constexpr):
    """(tokens, groups) keys of what (tokens, groups, experts) are worth together."""
    best = tl.max(keys, 2)
    if TOP2:
        lane = tl.arange(0, keys.shape[2])[None, None, :]
        first = tl.min(tl.where(keys == best[:, :, None], lane, keys.shape[2]), 2)
        second = tl.max(tl.where(lane == first[:, :, None], ABSENT, keys), 2)
        best = tl.where(best == ABSENT, ABSENT, _key(_value(best) + _value(second), 32))
    return best


@triton.jit
def _in_best_groups(keys, TOP2: tl.constexpr, TOP_GROUPS: tl.constexpr):
    """(tokens, groups, experts) keys; those of experts outside of the best groups become that of −∞."""
    worth = _group_key(keys, TOP2)
    group = tl.arange(0, keys.shape[1])[None, :]
    chosen = tl.zeros(worth.shape, tl.int1)
    for _ in range(TOP_GROUPS):
        now = group == _best(worth, group, False)
        chosen |= now
        worth = tl.where(now, ABSENT, worth)
    return tl.where(chosen[:, :, None] | (keys == ABSENT), keys, NEGATIVE_INFINITY)


@triton.jit
def _choose(keys, column, TOP_K: tl.constexpr, BLOCK_K: tl.constexpr, PACKED: tl.constexpr):
    """(tokens, BLOCK_K) columns of the TOP_K largest keys, largest first."""
    slot = tl.arange(0, BLOCK_K)[None, :]
    places = tl.zeros((keys.shape[0], BLOCK_K), tl.int32)
    for i in range(TOP_K):
        place = _best(keys, column, PACKED)
        keys = tl.where(column == place, ABSENT, keys)
        places = tl.where(slot == i, place, places)
    return places


@triton.jit
def _shares(x, top, SOFTMAX: tl.constexpr):
    """Scores, up to a factor common to the row; `top` is its largest logit."""
    if SOFTMAX:
        scores = _exp(x - top)
    else:
        # σ(x) = eˣ·σ(−x): where all are small, the factor that they share is left out before it underflows.
        tail = _exp(-tl.abs(x))
        below = tl.where(top < 0.0, _exp(tl.where(x > top, 0.0, x - top)), tail)
        scores = tl.div_rn(tl.where(x < 0.0, below, 1.0), 1.0 + tail)
    return scores


@triton.jit(do_not_specialize=["tokens", "token_stride", "expert_stride", "replay_token", "replay_slot"])
def _route_kernel(
    logits,  # (tokens, experts) by token_stride and expert_stride
    bias,  # (experts,) or None
    replay,  # (tokens, TOP_K) by replay_token and replay_slot, or None
    weights,  # (tokens, TOP_K)
    expert_ids,  # (tokens, TOP_K)
    tokens,
    token_stride,  # in units of UNIT elements
    expert_stride,  # None for 1
    replay_token,
    replay_slot,
    scale,
    UNIT: tl.constexpr,
    SOFTMAX: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BY_SCORE: tl.constexpr,  # whether scores decide and not logits
    TOP2: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    SIZE: tl.constexpr,  # experts of a group
    TOP_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]  # (T, 1)
    column = tl.arange(0, BLOCK_G * BLOCK_S)[None, :]  # (1, C): groups of BLOCK_S columns
    slot = tl.arange(0, BLOCK_K)[None, :]  # (1, K)
    live = token < tokens
    expert = (column // BLOCK_S) * SIZE + column % BLOCK_S
    exists = (column % BLOCK_S < SIZE) & (column // BLOCK_S < GROUPS)
    step = expert if expert_stride is None else expert.to(tl.int64) * expert_stride
    given = tl.load(logits + token * token_stride * UNIT + step, mask=live & exists, other=float("-inf"))  # (T, C)
    values = given.to(tl.float32)
    if SOFTMAX and (BY_SCORE or not RENORMALIZE):
        top = tl.max(values, 1, keep_dims=True)
        powers = _exp(values - top)
        total = tl.sum(powers, 1, keep_dims=True)

    PACKED: tl.constexpr = not BY_SCORE and logits.dtype.element_ty.primitive_bitwidth == 16
    if replay is not None:
        ids = tl.load(replay + token * replay_token + slot * replay_slot, mask=live & (slot < TOP_K), other=-1)
        ids = ids.to(tl.int64)
        kept = (ids >= 0) & (ids < SIZE)
        places = tl.where(kept, ids, 0).to(tl.int32)
    else:
        if BY_SCORE:
            choice = tl.div_rn(powers, total) if SOFTMAX else _sigmoid(values)
            if bias is not None:
                choice += tl.load(bias + expert, mask=exists, other=0.0).to(tl.float32)
            keys = _key(choice, 32)
        elif PACKED:
            keys = (_key(given, 16) << 16) | (0xFFFF - column)
        else:
            keys = _key(values, 32)
        keys = tl.where(exists, keys, ABSENT)
        if GROUPS > 1:
            keys = _in_best_groups(keys.reshape(BLOCK_T, BLOCK_G, BLOCK_S), TOP2, TOP_GROUPS)
            keys = keys.reshape(BLOCK_T, BLOCK_G * BLOCK_S)
        places = _choose(keys, column, TOP_K, BLOCK_K, PACKED)
        kept = slot < TOP_K
        ids = ((places // BLOCK_S) * SIZE + places % BLOCK_S).to(tl.int64)

    chosen = tl.where(kept, tl.gather(values, places, 1), float("-inf"))  # (T, K)
    if RENORMALIZE:
        result = _shares(chosen, tl.max(chosen, 1, keep_dims=True), SOFTMAX)  # −∞ takes no part
        result = tl.div_rn(result, tl.sum(result, 1, keep_dims=True))
    elif SOFTMAX:
        result = tl.div_rn(_exp(chosen - top), total)
    else:
        result = _sigmoid(chosen)
    result = tl.where(kept, result, 0.0) * scale
    unclear = tl.max((values != values).to(tl.int32), 1, keep_dims=True) > 0
    result = tl.where(unclear, float("nan"), result)
    out = token * TOP_K + slot
    tl.store(weights + out, result, mask=live & (slot < TOP_K))
    tl.store(expert_ids + out, ids, mask=live & (slot < TOP_K))


@triton.jit(
    do_not_specialize=["tokens", "token_stride", "expert_stride", "ids_token", "ids_slot", "grad_token", "grad_slot"]
)
def _backward_kernel(
    dweights,  # (tokens, TOP_K) by grad_token and grad_slot
    logits,  # (tokens, EXPERTS) by token_stride and expert_stride
    expert_ids,  # (tokens, TOP_K) by ids_token and ids_slot
    dlogits,  # (tokens, EXPERTS)
    tokens,
    token_stride,  # in units of UNIT elements
    expert_stride,  # None for 1
    ids_token,
    ids_slot,
    grad_token,
    grad_slot,
    scale,
    UNIT: tl.constexpr,
    SOFTMAX: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]  # (T, 1)
    expert = tl.arange(0, BLOCK_E)[None, :]  # (1, E)
    live = token < tokens
    inside = live & (expert < EXPERTS)
    step = expert if expert_stride is None else expert.to(tl.int64) * expert_stride
    values = tl.load(logits + token * token_stride * UNIT + step, mask=inside, other=float("-inf")).to(tl.float32)
    # The weights of a token with a NaN are NaN whatever its logits: they have no gradient.
    unclear = tl.max((values != values).to(tl.int32), 1, keep_dims=True) > 0

    # Slots are added up by expert, as a recorded choice may hold an expert twice.
    grad = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    count = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    for i in range(TOP_K):
        ids = tl.load(expert_ids + token * ids_token + tl.cast(ids_slot, tl.int64) * i, mask=live, other=-1)
        ids = tl.where((ids >= 0) & (ids < EXPERTS), ids, -1).to(tl.int32)  # (T, 1)
        given = tl.load(dweights + token * grad_token + tl.cast(grad_slot, tl.int64) * i, mask=live, other=0.0) * scale
        hit = expert == ids
        grad += tl.where(hit, tl.where(unclear, 0.0, given), 0.0)
        if RENORMALIZE:
            count += tl.where(hit, 1.0, 0.0)

    slope = 1.0 if SOFTMAX else _sigmoid(-values)  # of a score's logarithm over its logit
    if RENORMALIZE:
        chosen = count > 0.0
        part = tl.where(chosen, values, float("-inf"))
        share = _shares(part, tl.max(part, 1, keep_dims=True), SOFTMAX)
        share = tl.div_rn(share, tl.sum(tl.where(chosen, share * count, 0.0), 1, keep_dims=True))
        mean = tl.sum(tl.where(chosen, share * grad, 0.0), 1, keep_dims=True)
        result = tl.where(chosen, share * (grad - mean * count) * slope, 0.0)
    elif SOFTMAX:
        share = _shares(values, tl.max(values, 1, keep_dims=True), SOFTMAX)
        share = tl.div_rn(share, tl.sum(share, 1, keep_dims=True))
        result = share * (grad - tl.sum(share * grad, 1, keep_dims=True))
    else:
        result = grad * _sigmoid(values) * slope
    tl.store(dlogits + token * EXPERTS + expert, result.to(dlogits.dtype.element_ty), mask=inside)


def _strides(logits: Tensor, size: int) -> tuple[int, int, int | None]:
    """The most elements, up to 16 bytes, that divide a row's groups and its stride; the stride in them; experts'."""
    token, expert = logits.stride()
    if expert != 1 and logits.shape[1] > 1:
        return 1, token, expert
    unit = math.gcd(size, token, 16 // logits.element_size())
    return unit, token // unit, None


# The ops' own signatures; shapes, types and meaning are documented with them in pykern/ops/moe.


def moe_route(
    logits, selection_bias, replay_ids, top_k, score, renormalize, num_groups, top_groups, group_score, scale
):
    tokens, experts = logits.shape
    weights = logits.new_empty((tokens, top_k), dtype=torch.float32)
    ids = logits.new_empty((tokens, top_k), dtype=torch.int64)
    if tokens == 0:
        return weights, ids
    by_score = replay_ids is None and (selection_bias is not None or num_groups > 1)
    if replay_ids is not None or top_groups == num_groups:
        num_groups = top_groups = 1
    bias = selection_bias.contiguous() if by_score and selection_bias is not None else None
    size = experts // num_groups
    unit, *strides = _strides(logits, size)
    blocks = [triton.next_power_of_2(n) for n in (num_groups, size, top_k)]
    config = Config.of(blocks[0] * blocks[1])
    with on(logits.device):
        _route_kernel[(triton.cdiv(tokens, config.tokens),)](
            *(logits, bias, replay_ids, weights, ids, tokens, *strides),
            *((None, None) if replay_ids is None else replay_ids.stride()),
            scale,
            UNIT=unit,
            SOFTMAX=score == "softmax",
            RENORMALIZE=renormalize,
            BY_SCORE=by_score,
            TOP2=num_groups > 1 and size > 1 and group_score == "top2",
            GROUPS=num_groups,
            TOP_GROUPS=top_groups,
            SIZE=size,
            TOP_K=top_k,
            BLOCK_T=config.tokens,
            BLOCK_G=blocks[0],
            BLOCK_S=blocks[1],
            BLOCK_K=blocks[2],
            num_warps=1,
        )
    return weights, ids


def moe_route_backward(dweights, logits, expert_ids, score, renormalize, scale, output_mask):
    if not output_mask[0]:
        return None
    dlogits = logits.new_empty(logits.shape)
    if dweights is None or expert_ids.numel() == 0:
        return dlogits.zero_()
    (tokens, experts), columns = logits.shape, triton.next_power_of_2(logits.shape[1])
    config = Config.of(columns)
    unit, *strides = _strides(logits, experts)
    with on(logits.device):
        _backward_kernel[(triton.cdiv(tokens, config.tokens),)](
            *(dweights, logits, expert_ids, dlogits, tokens, *strides, *expert_ids.stride(), *dweights.stride()),
            scale,
            UNIT=unit,
            SOFTMAX=score == "softmax",
            RENORMALIZE=renormalize,
            EXPERTS=experts,
            TOP_K=expert_ids.shape[1],
            BLOCK_T=config.tokens,
            BLOCK_E=columns,
            num_warps=1,
        )
    return dlogits

"""What every kernel of attention's backward computes again of a tile: weights, and the gradients of its scores.

The forward keeps lse alone, from which a weight is one exponential. With delta, the part of a row's gradient that
normalisation takes away, the gradient of a score is weight · (gradient of the weight - delta).

Queries and keys may stand along either axis of a tile: their indices and statistics are tensors that broadcast.
"""

import triton
import triton.language as tl
from pykern.kernels.attention_scores import LN2, LOG2E, base2_scores, is_allowed, load_bias, load_permitted
from pykern.kernels.attention_tiles import SIZES

# What the backward's kernels are not compiled anew for.
BACKWARD_SIZES = [*SIZES, "mask_batch", "mask_head", "mask_query", "mask_key"]


@triton.jit
def load_lse(lse, row, queries):
    """+inf for rows that do not exist or see nothing, which makes all their weights zero."""
    values = tl.load(lse + row, mask=row < queries, other=float("inf"))
    return tl.where(values == float("-inf"), float("inf"), values)


@triton.jit
def load_row(statistic, row, queries):
    return tl.load(statistic + row, mask=row < queries, other=0.0)


@triton.jit
def tile_weights(
    products,
    query,
    key,
    lse,
    factor,
    query_live,
    key_live,
    keys,
    offset,
    left,
    right,
    scale,
    softcap,
    slope,
    mask,
    mask_query,
    mask_key,
    EDGE: tl.constexpr,
    PRECISE: tl.constexpr,
):
    """Weights before dropout, and the derivative of softcap or None, of products query · key.

    query_live, key_live: which exist, None for all.
    mask: the pointer to its element of query 0 and key 0 of this head.
    EDGE: whether some query of the tile may not see some key.
    """
    bias = load_bias(mask, query, key, mask_query, mask_key, query_live, key_live)
    if PRECISE and bias is not None:
        bias *= LN2
    permitted = load_permitted(mask, query, key, mask_query, mask_key, query_live, key_live)
    scores, slack = base2_scores(products, query, key, offset, scale, softcap, slope, bias, PRECISE)
    if EDGE:
        scores = tl.where(is_allowed(query, key, offset, left, right, keys), scores, float("-inf"))
    if permitted is not None:
        scores = tl.where(permitted, scores, float("-inf"))
    weights = tl.exp2((scores - lse) * LOG2E) if PRECISE else tl.exp2(scores - lse * LOG2E)
    if factor is not None:
        weights *= factor
    return weights, slack


@triton.jit
def survivors(values, keep, survival):
    """What dropout leaves; keep of None leaves everything."""
    if keep is not None:
        values = tl.where(keep, values * survival, 0.0)
    return values


@triton.jit
def tile_dscores(weights, dweights, delta, keep, survival):
    """Gradients of the scores, of what softcap has bent; dweights of None are zeros."""
    gradient = -delta
    if dweights is not None:
        gradient += survivors(dweights, keep, survival)
    return weights * gradient

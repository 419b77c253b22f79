"""Attention's corners, which samples in the catalogue cannot state: other formulations, and what must not matter."""

import math
import random

import pytest
import torch
import torch.nn.functional as F
from comparison import assert_same, gradients, int32, normal

import pykern
from pykern.ops._philox import keep_mask, philox, row_index
from pykern.ops.attention import attention
from pykern.ops.attention_cost import allowed_pairs
from pykern.ops.attention_decode import attention_decode
from pykern.ops.attention_varlen import attention_varlen

NAN, INF = math.nan, math.inf


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# --- the generator


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # Random123's kat_vectors for philox4x32 with ten rounds
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    words = philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert [w.item() for w in words] == expected


def test_keep_mask_takes_each_word_of_a_counter():
    seed, offset, row = 0x299F31D0A4093822, 0x0370734413198A2E, 0x05A308D3243F6A88
    counter = [0x243F6A88, 0x05A308D3, 0x13198A2E, 0x03707344]
    words = philox(tuple(map(torch.tensor, counter)), (torch.tensor(0xA4093822), torch.tensor(0x299F31D0)))
    rng, row = torch.tensor([seed, offset]), torch.tensor([row])
    for column, word in enumerate(word.item() for word in words):
        assert keep_mask(rng, row, 4, word / 2**32)[0, column]
        assert not keep_mask(rng, row, 4, (word + 1) / 2**32)[0, column]
        assert keep_mask(rng, row // 2, 8, word / 2**32)[0, column] and not keep_mask(rng, row, 8, 1.0).any()
    # The last group of a row is its own, full or not.
    whole = keep_mask(rng, torch.arange(5), 8, 0.5)
    for columns in (5, 6, 7):
        assert torch.equal(keep_mask(rng, torch.arange(5), columns, 0.5), whole[:, :columns])


def test_keep_mask_statistics():
    rng, rows = torch.tensor([12345, 678]), row_index((400, 502), torch.device("cpu"))
    for p in (0.1, 0.5, 0.9):
        keep = keep_mask(rng, rows, 502, p).double()
        deviation = math.sqrt(p * (1 - p) / keep.numel())
        assert abs(keep.mean() - (1 - p)) < 4 * deviation
        both = (keep[:, 1:] * keep[:, :-1]).mean()
        assert abs(both - (1 - p) ** 2) < 8 * deviation
    assert keep_mask(rng, rows, 502, 0.0).all() and not keep_mask(rng, rows, 502, 1.0).any()
    same = keep_mask(rng, rows, 502, 0.5) == keep_mask(torch.tensor([12346, 678]), rows, 502, 0.5)
    assert abs(same.double().mean() - 0.5) < 0.01


# --- dense: other formulations


def naive(q, k, v, mask, causal, scale, window, softcap, slopes, sinks, align):
    """One score at a time."""
    batch, heads, length, _ = q.shape
    keys, group = k.shape[2], heads // k.shape[1]
    left, right = window or (None, None)
    out = torch.zeros(batch, heads, length, v.shape[-1], dtype=q.dtype)
    lse = torch.full((batch, heads, length), -INF, dtype=q.dtype)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, (batch, heads, length))).tolist():
        position = i + (keys - length if align == "bottom_right" else 0)
        scores, rows = [], []
        for j in range(keys):
            if (causal and j > position) or (left is not None and j < position - left):
                continue
            if right is not None and j > position + right:
                continue
            score = (q[b, h, i] @ k[b, h // group, j]) * scale
            if softcap is not None:
                score = softcap * torch.tanh(score / softcap)
            if slopes is not None:
                score = score - (slopes if slopes.dim() == 1 else slopes[b])[h] * abs(j - position)
            if mask is not None:
                entry = mask.expand(batch, heads, length, keys)[b, h, i, j]
                if mask.dtype == torch.bool:
                    if not entry:
                        continue
                else:
                    score = score + entry
            scores.append(score)
            rows.append(v[b, h // group, j])
        everything = scores + ([sinks[h]] if sinks is not None else [])
        if everything:
            lse[b, h, i] = torch.stack(everything).logsumexp(0)
        if scores:
            out[b, h, i] = torch.exp(torch.stack(scores) - lse[b, h, i]) @ torch.stack(rows)
    return out, lse


@pytest.mark.parametrize("seed", range(24))
def test_every_feature_against_one_score_at_a_time(seed):
    pick = random.Random(seed)
    torch.manual_seed(seed)
    batch, shared, group = pick.randint(1, 2), pick.randint(1, 2), pick.randint(1, 2)
    length, keys, heads = pick.randint(1, 6), pick.randint(1, 6), shared * group
    q, k, v = normal(batch, heads, length, 4), normal(batch, shared, keys, 4), normal(batch, shared, keys, 3)
    scores = [pick.choice([1, n]) for n in (batch, heads, length, keys)][pick.randint(0, 3) :]
    scores = scores if len(scores) > 1 else [1, keys]
    masks = [None, normal(*scores), normal(*scores) > -0.5]
    given = {
        "attn_mask": pick.choice(masks),
        "is_causal": pick.random() < 0.5,
        "scale": pick.choice([None, 0.7]),
        "window": pick.choice([None, (2, None), (None, 1), (1, 2), (0, 0)]),
        "softcap": pick.choice([None, 1.5]),
        "alibi_slopes": pick.choice([None, normal(heads).abs(), normal(batch, heads).abs()]),
        "sinks": pick.choice([None, normal(heads)]),
        "align": pick.choice(["top_left", "bottom_right"]),
    }
    out, lse = attention(q, k, v, enable_gqa=True, return_lse=True, **given)
    scale = given.pop("scale") or 0.5
    mask, causal = given.pop("attn_mask"), given.pop("is_causal")
    expected = naive(q, k, v, mask, causal, scale, given["window"], given["softcap"], *list(given.values())[2:])
    assert_same(out, expected[0])
    assert_same(lse, expected[1])


SDPA = {
    "full": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "bool": {"attn_mask": torch.randn(5, 7, generator=torch.Generator().manual_seed(1)) > -0.5},
    "additive": {"attn_mask": torch.randn(2, 1, 5, 1, generator=torch.Generator().manual_seed(1))},
}


@pytest.mark.parametrize("name", SDPA)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(2, 4, 2), (2, 2, 2), (4, 4), ()])
def test_equals_sdpa_where_that_exists(name, dtype, shape):
    """fp64 on the reference, fp32 on the CPU backend; (batch, heads, key heads), (heads, key heads) or none."""
    given = dict(SDPA[name])
    if "attn_mask" in given and len(shape) != 3:
        given["attn_mask"] = given["attn_mask"].reshape(-1, *given["attn_mask"].shape[-2:])[0]
    if given.get("attn_mask") is not None and given["attn_mask"].is_floating_point():
        given["attn_mask"] = given["attn_mask"].to(dtype)
    query, key = ((*shape[:-1], 5, 8), (*shape[:-2], *shape[-1:], 7, 8))
    q, k, v = (normal(*s, grad=True, dtype=dtype) for s in (query, key, key))
    grouped = len(shape) == 3 and shape[1] != shape[2]
    ours = attention(q, k, v, enable_gqa=grouped, **given)
    theirs = F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped, **given)
    relative = 1e-12 if dtype == torch.float64 else 1e-6
    assert_same(ours, theirs, relative)
    for gradient, expected in zip(gradients(ours, (q, k, v)), gradients(theirs, (q, k, v)), strict=True):
        assert_same(gradient, expected, relative)


def test_layout_is_the_projections():
    """All heads of a row together, as SDPA gives it there: the reshape to (batch, length, width) copies nothing."""
    q = normal(2, 5, 3, 8, dtype=torch.float32, grad=True)
    heads_first = q.transpose(1, 2)
    out = attention(heads_first, heads_first, heads_first)
    assert out.stride() == F.scaled_dot_product_attention(heads_first, heads_first, heads_first).stride()
    assert attention(*[heads_first.double()] * 3).transpose(1, 2).is_contiguous()
    assert torch.autograd.grad(out.sum(), heads_first)[0].transpose(1, 2).is_contiguous()


def test_mask_and_causal_compose():
    q, k, v, mask = normal(2, 2, 6, 4), normal(2, 2, 6, 4), normal(2, 2, 6, 4), normal(6, 6)
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    for dtype in (torch.float64, torch.float32):
        a, b, c, m = (x.to(dtype) for x in (q, k, v, mask))
        theirs = F.scaled_dot_product_attention(q, k, v, mask.masked_fill(~causal, -INF))
        assert_same(attention(a, b, c, m, is_causal=True), theirs, 1e-6)
        assert_same(
            attention(a, b, c, m > 0, is_causal=True), F.scaled_dot_product_attention(q, k, v, causal & (m > 0)), 1e-6
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_are_rounded_once(dtype):
    q, k, v = (normal(2, 3, 9, 8, dtype=dtype) for _ in range(3))
    with pykern.backend("reference"):
        ours, lse = attention(q, k, v, softcap=2.0, return_lse=True)
        wide, wide_lse = attention(q.float(), k.float(), v.float(), softcap=2.0, return_lse=True)
    assert torch.equal(ours, wide.to(dtype)) and torch.equal(lse, wide_lse) and lse.dtype == torch.float32


@pytest.mark.parametrize("case", ["bool", "additive", "mask and causal", "bottom right", "window"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rows_with_nothing_allowed(case, dtype):
    q, k, v = (normal(1, 2, n, 4, dtype=dtype, grad=True) for n in (5, 3, 3))
    mask = torch.ones(5, 3, dtype=torch.bool)
    mask[1] = False
    bias = torch.zeros(5, 3, dtype=dtype).masked_fill(~mask, -INF).requires_grad_()
    late = torch.tensor([[False, True, True]])
    given, dead = {
        "bool": ({"attn_mask": mask}, [1]),
        "additive": ({"attn_mask": bias}, [1]),
        "mask and causal": ({"attn_mask": late, "is_causal": True}, [0]),
        "bottom right": ({"is_causal": True, "align": "bottom_right"}, [0, 1]),
        "window": ({"window": (0, None)}, [3, 4]),
    }[case]
    out, lse = attention(q, k, v, return_lse=True, **given)
    alive = [i for i in range(5) if i not in dead]
    assert not out[..., dead, :].any() and (lse[..., dead] == -INF).all()
    assert out[..., alive, :].all() and lse[..., alive].isfinite().all()
    inputs = (q, k, v, bias) if case == "additive" else (q, k, v)
    found = torch.autograd.grad((out.square().sum() + lse[..., alive].sum(),), inputs, create_graph=True)
    assert not found[0][..., dead, :].any() and found[0][..., alive, :].any()
    assert all(g.isfinite().all() for g in found)
    again = torch.autograd.grad(sum(g.square().sum() for g in found), inputs)
    assert all(g.isfinite().all() for g in again) and again[0].any() and not again[0][..., dead, :].any()
    nothing = torch.autograd.grad(attention(q, k, v, return_lse=True, **given)[1], q, torch.ones_like(lse))[0]
    assert nothing.isfinite().all() and not nothing[..., dead, :].any()


def test_a_sink_keeps_lse_finite_on_an_empty_row():
    q, k, v, sinks = normal(1, 2, 3, 4), normal(1, 2, 0, 4), normal(1, 2, 0, 5), normal(2, grad=True)
    out, lse = attention(q, k, v, sinks=sinks, return_lse=True)
    assert out.shape == (1, 2, 3, 5) and not out.any()
    assert_same(lse, sinks.detach()[:, None].expand(1, 2, 3))
    assert_same(torch.autograd.grad(lse.sum(), sinks)[0], torch.full((2,), 3.0))


@pytest.mark.parametrize("backend", ["reference", None])
def test_values_that_are_not_finite(backend):
    """NaN and infinity do what they do in torch."""
    with pykern.backend(backend):
        for value in (NAN, INF, -INF):
            q, k, v = (normal(1, 2, 4, 8, dtype=torch.float32) for _ in range(3))
            bias = normal(4, 4, dtype=torch.float32)
            bias[1, 2] = value
            assert_same(attention(q, k, v, bias), F.scaled_dot_product_attention(q, k, v, bias), 1e-6)
            v[0, 1, 3, 0] = value
            assert_same(attention(q, k, v), F.scaled_dot_product_attention(q, k, v), 1e-6)
            k[0, 0, 1, 0] = NAN
            assert_same(attention(q, k, v), F.scaled_dot_product_attention(q, k, v), 1e-6)
    huge = torch.full((1, 1, 2, 4), 1e18)
    assert_same(attention(huge, huge, huge), huge, 1e-6)


# --- dropout


def test_dropout_drops_by_element_index():
    q, k, v = normal(2, 2, 5, 4), normal(2, 2, 6, 4), normal(2, 2, 6, 4)
    torch.manual_seed(7)
    ours, lse = attention(q, k, v, dropout_p=0.4, return_lse=True)
    torch.manual_seed(7)
    rng = torch.randint(torch.iinfo(torch.int64).max, (2,))
    keep = keep_mask(rng, torch.arange(2 * 2 * 5).view(2, 2, 5), 6, 0.4)
    weights = torch.softmax(q @ k.mT / 2, -1)
    assert 0 < keep.sum() < keep.numel()
    assert_same(ours, (weights * keep / 0.6) @ v)
    assert_same(lse, (q @ k.mT / 2).logsumexp(-1))
    assert not torch.equal(ours, attention(q, k, v, dropout_p=0.4))
    assert not attention(q, k, v, dropout_p=1.0).any()


def test_dropout_is_the_same_in_backward_and_in_recomputation():
    q, k, v = (normal(1, 2, 6, 4, grad=True) for _ in range(3))

    def function(*tensors):
        torch.manual_seed(5)
        return attention(*tensors, dropout_p=0.3)

    assert torch.autograd.gradcheck(function, (q, k, v), fast_mode=True)
    torch.manual_seed(5)
    found = gradients(torch.utils.checkpoint.checkpoint(attention, q, k, v, None, 0.3, use_reentrant=False), (q, k, v))
    for ours, theirs in zip(found, gradients(function(q, k, v), (q, k, v)), strict=True):
        assert torch.equal(ours, theirs)


# --- around the ops


def test_bad_input_is_named_by_the_public_functions():
    q = normal(2, 2, 4, 8)
    for call, pattern in (
        (lambda: attention(q[0, 0, 0], q, q), r"query: expected dimensions .* got \(8,\)"),
        (lambda: attention(q, q[0], q), r"key: expected dimensions .*as many as query, got \(2, 4, 8\)"),
        (lambda: attention(q, q, q, window=(1, 2, 3)), r"window: expected a pair \(left, right\), got \(1, 2, 3\)"),
        (lambda: attention(q, q, q, is_causal=True, window=(1, -2)), r"window: .*at least 0, got \(1, -2\)"),
        (lambda: attention(q, q[:, :1], q[:, :1]), "key: expected as many heads as .* 2 .*enable_gqa=True.* got 1"),
        (lambda: attention(q, q, q, dropout_p=-0.1), "dropout_p: expected a probability, got -0.1"),
        (lambda: attention_decode(q, q, q, int32([1, 2]), window=(-1, 0)), r"window: .*got \(-1, 0\)"),
    ):
        with pytest.raises(ValueError, match=pattern):
            call()


def test_autocast_casts_what_sdpa_casts():
    q, k, v = (normal(1, 2, 5, 8, dtype=torch.float32, grad=True) for _ in range(3))
    mask, sinks = normal(5, 5, dtype=torch.float32), normal(2, dtype=torch.float32, grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(q, k.bfloat16(), v, mask)
        theirs = F.scaled_dot_product_attention(q, k.bfloat16(), v, mask)
        assert out.dtype == theirs.dtype == torch.bfloat16
        assert_same(out, theirs, 1e-2)
        _, lse = attention(q, k, v, sinks=sinks, return_lse=True)
        bounds = int32([0, 5])
        packed = attention_varlen(*(x[0].transpose(0, 1) for x in (q, k, v)), bounds, bounds, 5, 5)
        assert packed.dtype == torch.bfloat16 and lse.dtype == torch.float32
    assert all(g.dtype == torch.float32 for g in gradients(lse, (q, k, sinks)))


def test_public_functions_compile_whole():
    torch._dynamo.reset()
    compiled = [
        torch.compile(f, fullgraph=True, backend="aot_eager") for f in (attention, attention_varlen, attention_decode)
    ]
    for length in (5, 6, 9):
        q = normal(2, 2, length, 8, grad=True)
        ours, theirs = (f(q, q, q, is_causal=True, window=(3, None), return_lse=True) for f in (compiled[0], attention))
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(gradients(ours, q)[0], gradients(theirs, q)[0])
        packed, bounds = q[0].transpose(0, 1), int32([0, 2, length])
        args = (packed, packed, packed, bounds, bounds, length, length)
        assert torch.equal(compiled[1](*args, is_causal=True), attention_varlen(*args, is_causal=True))
        args = (q, q.transpose(1, 2), q.transpose(1, 2), int32([1, 3]))
        args = (q.transpose(1, 2)[:, :2], q.transpose(1, 2), q.transpose(1, 2), int32([1, 3]))
        assert torch.equal(compiled[2](*args), attention_decode(*args))
    torch._dynamo.reset()


def test_explain_says_what_serves_a_call_and_why_the_others_do_not():
    q = normal(1, 2, 4, 8, dtype=torch.float32)
    assert pykern.explain("attention", q, q, q, is_causal=True).chosen == "cpu"
    assert pykern.explain("attention", *[q.double()] * 3).chosen == "reference"
    for given, backend, reason in (
        ({"softcap": 2.0}, "cuda", "fp16 and bf16, not torch.float32"),
        ({"window": (1, 1)}, "triton", "interpreter"),
    ):
        assert reason in pykern.explain("attention", q, q, q, **given).reasons[backend]
    spec, half = pykern.catalogue()["attention"], torch.randn(1, 2, 4, 8).half()
    for given, reason in (({"attn_mask": half[0, 0, :, :4]}, "attn_mask"), ({"dropout_p": 0.1}, "dropout")):
        reasons = pykern.explain("attention", half, half, half, **given).reasons
        assert reason in reasons["cuda"] and "interpreter" in reasons["triton"]
    large = torch.randn(1, 4, 2, 264).half()
    call = (None, None, None, None, 0.0, 1.0, False, None, None, None, "top_left")
    for backend in ("cuda", "triton"):
        assert "elements up to 256, not 264 and 264" in spec.supports[backend](large, large, large, *call)


def test_allowed_pairs_counts():
    for length, keys, offset, left, right in (
        (5, 7, 0, None, 0),
        (5, 7, 2, 1, 1),
        (7, 5, -2, None, 0),
        (3, 3, 0, None, None),
    ):
        distance = torch.arange(length)[:, None] + offset - torch.arange(keys)
        allowed = (distance <= (99 if left is None else left)) & (distance >= -(99 if right is None else right))
        assert allowed_pairs(length, keys, offset, left, right) == allowed.sum()

"""Packed and cached attention: against dense calls, what must not be read, what must not matter."""

import math

import pytest
import torch
from comparison import assert_same, gradients, int32, normal
from interpreted import INTERPRETED, in_child
from torch import Tensor

import pykern
from pykern.ops._philox import keep_mask
from pykern.ops.attention import attention
from pykern.ops.attention_decode import attention_decode
from pykern.ops.attention_decode import attention_decode_reference as decode_reference
from pykern.ops.attention_varlen import attention_varlen
from pykern.ops.attention_varlen import attention_varlen_reference as varlen_reference
from pykern.testing.cases import backends

NAN, INF = math.nan, math.inf
KERNELS = [name for name in backends(pykern.catalogue()["attention_varlen"], "cpu") if name != "reference"]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# --- packed


LENGTHS = ([3, 0, 5, 1, 4], [4, 2, 5, 0, 2])


def boundaries(lengths) -> Tensor:
    return int32([0, *torch.tensor(lengths).cumsum(0).tolist()])


def one_by_one(q, k, v, queries, keys, slopes=None, **given):
    """A dense call a sequence, and its lse."""
    out, lse = [], []
    for i, (a, b) in enumerate(zip(q.split(queries), zip(k.split(keys), v.split(keys), strict=True), strict=True)):
        extra = {} if slopes is None else {"alibi_slopes": slopes if slopes.dim() == 1 else slopes[i]}
        heads_first = (x.transpose(0, 1) for x in (a, *b))
        o, s = attention(*heads_first, enable_gqa=True, align="bottom_right", return_lse=True, **given, **extra)
        out.append(o.transpose(0, 1))
        lse.append(s)
    return torch.cat(out), torch.cat(lse, -1)


@pytest.mark.parametrize(
    "given",
    [{}, {"is_causal": True}, {"window": (2, 1)}, {"softcap": 1.5, "is_causal": True}, {"slopes": 1}, {"slopes": 2}],
    ids=str,
)
@pytest.mark.parametrize("sinks", [False, True])
def test_packed_equals_a_dense_call_a_sequence(given, sinks):
    queries, keys = LENGTHS
    q, k, v = normal(13, 4, 8, grad=True), normal(13, 2, 8, grad=True), normal(13, 2, 5, grad=True)
    inputs, given = [q, k, v], dict(given)
    if sinks:
        given["sinks"] = normal(4, grad=True)
        inputs.append(given["sinks"])
    slopes = given.pop("slopes", None)
    slopes = slopes and normal(*[5, 4][2 - slopes :]).abs()
    ours = attention_varlen(
        q, k, v, boundaries(queries), boundaries(keys), 5, 6, alibi_slopes=slopes, return_lse=True, **given
    )
    theirs = one_by_one(q, k, v, queries, keys, slopes, **given)
    for a, b in zip((*ours, *gradients(ours, inputs)), (*theirs, *gradients(theirs, inputs)), strict=True):
        assert_same(a, b)


def test_packed_never_reads_padding():
    queries, keys = LENGTHS
    clean = [normal(16, 2, 4), normal(17, 2, 4), normal(17, 2, 4)]
    results = []
    for padding in (0.0, NAN):
        q, k, v = (torch.cat([x[:13], torch.full_like(x[13:], padding)]).requires_grad_() for x in clean)
        out, lse = attention_varlen(
            q, k, v, boundaries(queries), boundaries(keys), 5, 5, is_causal=True, return_lse=True
        )
        assert not out[13:].any() and (lse[:, 13:] == -INF).all()
        found = gradients(out, (q, k, v))
        assert all(not g[13:].any() and g[:13].any() for g in found)
        results.append((out, lse, *found))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_packed_keys_in_use_and_in_pages():
    queries, keys, used, block = [3, 2, 4], [5, 7, 4], [4, 7, 0], 4
    q, k, v = normal(9, 4, 8), normal(16, 2, 8), normal(16, 2, 6)
    rows = [torch.arange(s, s + u) for s, u in zip([0, 5, 12], used, strict=True)]
    some = torch.cat(rows)
    expected = one_by_one(q, k[some], v[some], queries, used, is_causal=True)
    common = (boundaries(queries), boundaries(keys), 4, 7)
    given = {"is_causal": True, "return_lse": True}
    hidden = torch.ones(16, dtype=torch.bool)
    hidden[some] = False
    k, v = k.masked_fill(hidden[:, None, None], NAN), v.masked_fill(hidden[:, None, None], NAN)
    for a, b in zip(attention_varlen(q, k, v, *common, seqused_k=int32(used), **given), expected, strict=True):
        assert_same(a, b)
    table = int32([[3, 0], [5, 1], [99, -7]])
    pages = [torch.full((6, block, *x.shape[1:]), NAN, dtype=x.dtype) for x in (k, v)]
    for sequence, row in enumerate(rows):
        for position, index in enumerate(row.tolist()):
            for page, x in zip(pages, (k, v), strict=True):
                page[table[sequence, position // block], position % block] = x[index]
    paged = attention_varlen(q, *pages, *common, seqused_k=int32(used), block_table=table, **given)
    lengths = boundaries(used)
    implied = attention_varlen(q, *pages, common[0], lengths, 4, 7, block_table=table, **given)
    for a, b, c in zip(paged, implied, expected, strict=True):
        assert_same(a, c)
        assert torch.equal(a, b)


def test_packed_dropout():
    q, k, v = normal(6, 2, 4), normal(6, 2, 4), torch.ones(6, 2, 4, dtype=torch.float64)
    bounds = boundaries([4, 2])
    torch.manual_seed(1)
    ours = attention_varlen(q, k, v, bounds, bounds, 4, 4, dropout_p=0.5)
    torch.manual_seed(1)
    rng = torch.randint(torch.iinfo(torch.int64).max, (2,))
    keep = keep_mask(rng, torch.arange(6 * 2).view(6, 2), 4, 0.5)
    for start, end in ((0, 4), (4, 6)):
        weights = torch.softmax(torch.einsum("ihe,jhe->ihj", q[start:end], k[start:end]) / 2, -1)
        dropped = weights * keep[start:end, :, : end - start] * 2
        assert_same(ours[start:end], torch.einsum("ihj,jhe->ihe", dropped, v[start:end]))


# --- cached


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize(
    "given",
    [{}, {"window": (2, 0)}, {"window": (1, None), "softcap": 2.0}, {"slopes": 1}, {"slopes": 2, "sinks": 1}],
    ids=str,
)
def test_cached_equals_a_dense_call_a_sequence(tokens, given):
    lengths, given = [7, 1, 10, 0], dict(given)
    q, k, v = normal(4, tokens, 4, 8), normal(4, 10, 2, 8), normal(4, 10, 2, 6)
    slopes = given.pop("slopes", None)
    slopes = slopes and normal(*[4, 4][2 - slopes :]).abs()
    if "sinks" in given:
        given["sinks"] = normal(4)
    used = torch.arange(10) < torch.tensor(lengths)[:, None]
    packed = (q.flatten(0, 1), k[used], v[used])
    expected = one_by_one(*packed, [tokens] * 4, lengths, slopes, is_causal=True, **given)
    k, v = (x.masked_fill(~used[..., None, None], NAN) for x in (k, v))
    found = attention_decode(q, k, v, int32(lengths), alibi_slopes=slopes, return_lse=True, **given)
    table = int32([[4, 9], [1, -1], [0, 6], [77, 77]])
    pages = [torch.full((10, 5, 2, x.shape[-1]), NAN, dtype=x.dtype) for x in (k, v)]
    for page, x in zip(pages, (k, v), strict=True):
        for sequence, length in enumerate(lengths):
            for i in range(-(-length // 5)):
                page[table[sequence, i]] = x[sequence, 5 * i : 5 * i + 5]
    paged = attention_decode(
        q, *pages, int32(lengths), block_table=table, alibi_slopes=slopes, return_lse=True, **given
    )
    for out, lse in (found, paged):
        assert_same(out.flatten(0, 1), expected[0])
        assert_same(lse.transpose(1, 2).flatten(0, 1), expected[1].T)


def test_cached_is_differentiable():
    q, k, v, lengths = (
        normal(2, 2, 2, 4, grad=True),
        normal(2, 5, 1, 4, grad=True),
        normal(2, 5, 1, 4, grad=True),
        int32([5, 3]),
    )
    found = gradients(attention_decode(q, k, v, lengths), (q, k, v))
    assert not found[1][1, 3:].any() and found[1][1, :3].all()
    assert torch.autograd.gradcheck(lambda *t: attention_decode(*t, lengths), (q, k, v), fast_mode=True)


# --- bit for bit


@pytest.mark.parametrize("backend", KERNELS)
def test_kernels_equal_the_dense_ones_bit_for_bit(backend):
    """Same tiles, same sums: only where rows lie differs. So nothing of one sequence depends on another.

    Triton's dense backward has another way to delta for at most 64 keys; packed, nobody asks the device for that.
    """
    queries, keys = [70, 0, 130, 1], [70, 66, 150, 75]
    q, k, v = (normal(sum(n), h, 16, grad=True, dtype=torch.float16) for n, h in ((queries, 4), (keys, 2), (keys, 2)))
    given = {"softcap": 3.0, "window": (90, 0)}
    with pykern.backend(backend):
        ours = attention_varlen(q, k, v, boundaries(queries), boundaries(keys), 130, 150, return_lse=True, **given)
        theirs = one_by_one(q, k, v, queries, keys, **given)
        pairs = zip((*ours, *gradients(ours, (q, k, v))), (*theirs, *gradients(theirs, (q, k, v))), strict=True)
        for a, b in pairs:
            assert torch.equal(a, b)


@pytest.mark.parametrize("backend", KERNELS)
def test_batch_invariant_decoding_gives_the_bits_of_training(backend):
    """A token decoded against its cache, in whatever pages and company, equals its row in a packed batch."""
    lengths, block = [70, 33, 9], 16
    q, k, v = (normal(sum(lengths), h, 16, dtype=torch.float16) for h in (4, 2, 2))
    bounds = boundaries(lengths)
    pages = [torch.full((20, block, 2, 16), NAN, dtype=torch.float16) for _ in range(2)]
    table = int32([[7 * (5 * i + j) % 19 for j in range(5)] for i in range(3)])
    for i, length in enumerate(lengths):
        for j in range(length):
            for page, x in zip(pages, (k, v), strict=True):
                page[table[i, j // block], j % block] = x[bounds[i] + j]
    with pykern.backend(backend):
        trained = attention_varlen(q, k, v, bounds, bounds, 70, 70, is_causal=True, return_lse=True)
        for rows in ([0, 1, 2], [1], [2, 0]):
            last = bounds[1:][rows].long() - 1
            decoded = attention_decode(
                q[last][:, None],
                *pages,
                int32(lengths)[rows],
                block_table=table[rows],
                return_lse=True,
                batch_invariant=True,
            )
            assert torch.equal(decoded[0][:, 0], trained[0][last])
            assert torch.equal(decoded[1][:, :, 0], trained[1][:, last].T)


@pytest.mark.parametrize("backend", KERNELS)
def test_kernels_survive_lengths_that_lead_outside(backend):
    """Emulator and interpreter raise at an access outside; a CPU kernel would crash or read NaN from behind."""
    q, k, v = (normal(9, 2, 8, dtype=torch.float16) for _ in range(3))
    big = 2**31 - 1
    with pykern.backend(backend):
        # Boundaries of queries that decrease would have two programs write one row: a race, and a fault in both.
        for rows in ([3, 99, 99], [-5, 3, 1000], [9, 9, 9], [big, big, big], [-big, -big, big]):
            for keys in ([0, 4, 9], [0, 5, 2], [3, 99, -4], [big, -big, big], [-big, big, 0]):
                out, lse = attention_varlen(q, k, v, int32(rows), int32(keys), 6, 7, is_causal=True, return_lse=True)
                assert out.isfinite().all() and not lse.isnan().any()
        pages, table = k.view(3, 3, 2, 8), int32([[big, -big], [-1, 3]])
        attention_varlen(
            q, pages, pages, int32([0, 4, 9]), int32([0, 0, 0]), 5, 6, seqused_k=int32([big, 5]), block_table=table
        )
        cache = normal(2, 4, 2, 8, dtype=torch.float16)
        for lengths in ([big, -big], [5, -1]):
            assert attention_decode(cache[:, :1], cache, cache, int32(lengths)).isfinite().all()
            attention_decode(cache[:, :1], pages, pages, int32(lengths), block_table=table)


class TestInAProcessOfTheirOwn:
    __test__ = not INTERPRETED

    def test_triton(self):
        result = in_child(__file__)
        assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


# --- what only the device knows


def test_lengths_that_lead_outside_are_clamped():
    q, k, v = normal(6, 2, 4), normal(7, 2, 4), normal(7, 2, 4)
    ours = attention_varlen(q, k, v, int32([0, 4, 99]), int32([-5, 3, 1000]), 6, 7)
    assert torch.equal(ours, attention_varlen(q, k, v, int32([0, 4, 6]), int32([0, 3, 7]), 6, 7))
    for odd in ([0, 5, 2], [3, 99, -4], [6, 6, 6]):
        assert attention_varlen(q, k, v, int32(odd), int32(odd), 6, 7).isfinite().all()
    cut = attention_varlen(q, k, v, int32([0, 4, 6]), int32([0, 3, 7]), 2, 7)
    assert not cut[2:4].any() and cut[:2].all() and cut[4:].all()
    q, k, v = normal(2, 1, 2, 4), normal(2, 5, 2, 4), normal(2, 5, 2, 4)
    ours = attention_decode(q, k, v, int32([99, -3]))
    assert torch.equal(ours, attention_decode(q, k, v, int32([5, 0])))
    table = int32([[1, 7], [-9, 0]])
    inside = int32([[1, 1], [0, 0]])
    ours = attention_decode(q, k, v, int32([8, 30]), block_table=table)
    assert torch.equal(ours, attention_decode(q, k, v, int32([8, 10]), block_table=inside))


def test_lengths_that_lead_outside_are_named_when_asked_for(monkeypatch):
    monkeypatch.setenv("PYKERN_CHECKS", "1")
    q, k, v = normal(6, 2, 4), normal(7, 2, 4), normal(7, 2, 4)
    good = boundaries([4, 2])

    def packed(bounds_q=good, bounds_k=good, longest_q=4, longest_k=4, **given):
        return attention_varlen(q, k, v, bounds_q, bounds_k, longest_q, longest_k, **given)

    assert packed().isfinite().all()
    for call, pattern in (
        (lambda: packed(int32([1, 4, 6])), r"cu_seqlens_q: expected to start at 0, got \[1\]"),
        (lambda: packed(int32([0, 4, 3])), "cu_seqlens_q: expected not to decrease, got 4 before 3"),
        (lambda: packed(int32([0, 4, 8])), "cu_seqlens_q: expected at most 6 rows, got 8"),
        (lambda: packed(longest_q=3), "max_seqlen_q: expected at least 4, sequence 0's length, got 3"),
        (lambda: packed(bounds_k=int32([0, 4, 8])), "cu_seqlens_k: expected at most 7 rows, got 8"),
        (lambda: packed(seqused_k=int32([5, 1])), "seqused_k: expected 0 to 4 keys in sequence 0, got 5"),
    ):
        with pytest.raises(ValueError, match=pattern):
            call()
    query, cache = normal(2, 1, 2, 4), normal(3, 4, 2, 4)
    with pytest.raises(ValueError, match="cache_seqlens: expected 0 to 4 keys in sequence 1, got 5"):
        attention_decode(query, cache[:2], cache[:2], int32([4, 5]))
    with pytest.raises(ValueError, match="block_table: expected block ids from 0 to 2, got 3 in sequence 0"):
        attention_decode(query, cache, cache, int32([5, 1]), block_table=int32([[0, 3], [1, -1]]))
    assert attention_decode(query, cache, cache, int32([5, 1]), block_table=int32([[0, 2], [1, -1]])).all()


def test_packed_and_cached_references_read_nothing_back():
    """A fake tensor has no values, so a host synchronisation or a branch on data would raise."""
    with torch._subclasses.FakeTensorMode():
        q, k, bounds = torch.empty(9, 4, 8), torch.empty(9, 2, 8), torch.empty(4, dtype=torch.int32)
        rng, rest = torch.empty(2, dtype=torch.int64), (0.1, 0.5, 3, 0, None)
        out, lse = varlen_reference(q, k, k, bounds, bounds, 5, 6, None, None, None, None, rng, *rest)
        assert out.shape == q.shape and lse.shape == (4, 9)
        pages, table = torch.empty(7, 4, 2, 8), torch.empty(3, 2, dtype=torch.int32)
        out, _ = varlen_reference(q, pages, pages, bounds, bounds, 5, 6, None, None, bounds[1:], table, rng, *rest)
        assert out.shape == q.shape
        q, lengths = torch.empty(3, 2, 4, 8), torch.empty(3, dtype=torch.int32)
        out, lse = decode_reference(q, pages, pages, lengths, table, None, None, 0.5, 3, None)
        assert out.shape == q.shape and lse.shape == (3, 4, 2)

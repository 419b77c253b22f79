"""Generation and its cache of pages against the model without a cache, and the sampler."""

import math
from dataclasses import replace

import pytest
import torch
from flavours import FLAVOURS, TINY, build, flavours, relative, tokens_for
from torch import Tensor

from pykern.model import KVCache, Packed, Transformer, TransformerConfig, generate
from pykern.model.generate import sample

LENGTHS = [7, 1, 16, 20, 33, 2]


def ragged_prompts(config: TransformerConfig, lengths: list[int] = LENGTHS) -> list[Tensor]:
    return [tokens_for(config, length, seed=i) for i, length in enumerate(lengths)]


@torch.no_grad()
def uncached(model: Transformer, tokens: Tensor, count: int) -> Tensor:
    """Greedy continuation of (T,), the whole sequence through the model for each token."""
    for _ in range(count):
        tokens = torch.cat([tokens, model(tokens[None])[:, -1].argmax(-1)])
    return tokens


@flavours
def test_cached_generation_equals_the_uncached_model(config: TransformerConfig) -> None:
    model, prompts = build(config).eval(), tokens_for(config, 3, 6)
    tokens = prompts
    with torch.no_grad():
        for _ in range(18):
            tokens = torch.cat([tokens, model(tokens)[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(generate(model, prompts, 18, temperature=0), tokens)
    assert len(tokens[:, 6:].unique()) > 2  # a constant would show nothing


@flavours
def test_prompts_of_different_lengths_continue_as_each_does_uncached(config: TransformerConfig) -> None:
    model = build(replace(config, context_length=80)).eval()
    prompts = ragged_prompts(config)
    found = generate(model, prompts, 40, temperature=0)  # pages of 16: each sequence comes to its end of one or more
    assert isinstance(found, list) and len(found) == len(prompts)
    for prompt, tokens in zip(prompts, found, strict=True):
        assert torch.equal(tokens, uncached(model, prompt, 40))
    assert len(torch.cat(found).unique()) > 2
    again = generate(model, [prompt.tolist() for prompt in prompts], 40, temperature=0, batch_invariant=True)
    assert all(map(torch.equal, again, found))


@flavours
def test_a_cache_may_be_filled_in_pieces(config: TransformerConfig) -> None:
    model, tokens = build(config).eval(), tokens_for(config, 2, 24)
    cache = KVCache(config, 2)
    with torch.no_grad():
        pieces = [model(piece, cache=cache) for piece in tokens.split([2, 17, 1, 1, 3], dim=1)]
        assert relative(torch.cat(pieces, 1), model(tokens)) < 1e-5
    assert cache.lengths.tolist() == [24, 24]


@flavours
@pytest.mark.parametrize("block_size", [1, 4, 64])
def test_sequences_grow_by_pieces_of_any_lengths(config: TransformerConfig, block_size: int) -> None:
    config = replace(config, context_length=64)
    model = build(config).eval()
    rows = [tokens_for(config, length, seed=i) for i, length in enumerate((40, 25, 31))]
    cache = KVCache(config, 3, block_size=block_size)
    # The tokens that each sequence gets in each piece: packed, then by attention_decode, then more than that takes.
    plan = [[5, 0, 2], [3, 1, 0], [1, 1, 1], [9, 3, 8], [3, 3, 3], [17, 17, 17], [2, 0, 0]]
    found, done = [[], [], []], [0, 0, 0]
    with torch.no_grad():
        for counts in plan:
            parts = [row[start : start + n] for row, start, n in zip(rows, done, counts, strict=True)]
            done = [start + n for start, n in zip(done, counts, strict=True)]
            if len(set(counts)) == 1:
                pieces = list(model(torch.stack(parts), cache=cache))
            else:
                packed = Packed.of(counts)
                pieces = model(torch.cat(parts), packed=packed, cache=cache).split(counts)
            for logits, piece in zip(found, pieces, strict=True):
                logits.append(piece)
        assert cache.lengths.tolist() == done == [len(row) for row in rows]
        for row, logits in zip(rows, found, strict=True):
            assert relative(torch.cat(logits), model(row[None])[0]) < 1e-5


def test_a_cache_is_kept_in_what_autocast_computes_in() -> None:
    config = FLAVOURS["mistral"]
    model, tokens = build(config).eval(), tokens_for(config, 2, 24)
    cache = KVCache(config, 2)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = torch.cat([model(piece, cache=cache) for piece in tokens.split([5, 1, 18], dim=1)], 1)
    heads = torch.zeros(0, 2, 8, dtype=torch.bfloat16)
    assert all(pages.dtype == torch.bfloat16 for pages in cache.write(0, heads, heads, torch.arange(0)))
    with torch.no_grad():
        assert relative(found, model(tokens)) < 0.03


def pages_in_use(cache: KVCache) -> list[int]:
    held = (-(-cache.lengths // cache.block_size)).tolist()
    return [page for row, count in zip(cache.block_table.tolist(), held, strict=True) for page in row[:count]]


def test_a_cache_holds_the_pages_it_needs_and_at_most_half_as_many_besides() -> None:
    cache = KVCache(replace(TINY, context_length=1000), 5, block_size=4)
    cache.append(torch.zeros(31, dtype=torch.int64), Packed.of([1, 4, 5, 20, 1]))
    assert cache.blocks == 1 + 1 + 2 + 5 + 1
    sizes = [cache.blocks]
    for _ in range(400):
        cache.append(torch.zeros(5, 1, dtype=torch.int64))
        used = pages_in_use(cache)
        assert len(set(used)) == len(used) and set(used) <= set(range(cache.blocks))
        assert len(used) <= cache.blocks <= max(1.5 * len(used), 10)
        sizes.append(cache.blocks)
    assert len(set(sizes)) < 12  # it grows seldom
    keys = torch.ones(5, 1, 2, 8)
    pages, _ = cache.write(0, keys, keys, torch.arange(5))
    assert pages.shape == (cache.blocks, 4, 2, 8)


def test_pages_of_sequences_that_ended_serve_the_others() -> None:
    cache = KVCache(replace(TINY, context_length=1000), 6, block_size=4)
    cache.append(torch.zeros(6, 40, dtype=torch.int64))
    blocks = cache.blocks
    assert blocks == 60
    cache.keep(torch.tensor([False, True, False, False, True, False]))
    assert cache.lengths.tolist() == [40, 40] and cache.block_table.shape == (2, 10)
    for _ in range(80):
        cache.append(torch.zeros(2, 1, dtype=torch.int64))
    used = pages_in_use(cache)
    assert cache.blocks == blocks == len(set(used)) == len(used)
    cache.append(torch.zeros(2, 1, dtype=torch.int64))
    assert cache.blocks == 90


@pytest.mark.parametrize("window", [None, (6, 0)])
def test_batch_invariant_attention_gives_a_token_the_bits_of_training(window: tuple[int, int] | None) -> None:
    lengths = [30, 1, 17, 5, 200]
    heads = torch.randn(sum(lengths), 8, 32, generator=torch.Generator().manual_seed(0)).split([4, 2, 2], dim=1)
    expected = Packed.of(lengths).attend(*heads, layer=0, window=window, dropout_p=0.0).split(lengths)
    parts = [x.split(lengths) for x in heads]
    for rows in ([4, 3], [0, 1, 2, 3, 4], [2]):
        cache = KVCache(replace(TINY, context_length=200), len(rows), batch_invariant=True)
        before = torch.tensor([lengths[i] - 1 for i in rows])
        for counts in (before, None):
            tokens = torch.zeros(len(rows), 1) if counts is None else torch.zeros(int(counts.sum()))
            piece = cache.append(tokens, None if counts is None else Packed.of(counts))
            given = [torch.cat([x[i][-1:] if counts is None else x[i][:-1] for i in rows]) for x in parts]
            given = [x[:, None] for x in given] if counts is None else given
            found = piece.attend(*given, layer=0, window=window, dropout_p=0.0)
        assert torch.equal(found[:, 0], torch.stack([expected[i][-1] for i in rows]))


def test_what_does_not_fit_a_cache_is_named_and_changes_nothing() -> None:
    model = build(TINY).eval()
    cache = KVCache(TINY, 2)
    model(tokens_for(TINY, 2, 20), cache=cache)
    with pytest.raises(ValueError, match="reach position 25, beyond the model's context_length 24"):
        model(tokens_for(TINY, 2, 5), cache=cache)
    with pytest.raises(ValueError, match="tokens has 3 sequences, and the cache 2"):
        model(tokens_for(TINY, 3, 1), cache=cache)
    assert cache.lengths.tolist() == [20, 20]
    model(tokens_for(TINY, 2, 4), cache=cache)


def test_generation_restores_the_mode_and_leaves_the_prompt() -> None:
    model, prompts = build(replace(TINY, dropout=0.5)), tokens_for(TINY, 2, 5)
    model.train()
    first = generate(model, prompts, 6, temperature=0)
    assert model.training and all(m.training for m in model.modules())
    assert torch.equal(first, generate(model, prompts, 6, temperature=0))  # no dropout meanwhile
    assert torch.equal(first[:, :5], prompts)
    assert not first.requires_grad
    model.eval()
    generate(model, prompts, 2)
    assert not model.training


def test_no_prompts_give_no_continuations() -> None:
    model = build(TINY)
    assert generate(model, [], 4) == []
    assert generate(model, torch.zeros(0, 5, dtype=torch.int64), 4, eos=1).shape == (0, 5)


def test_a_seed_repeats_the_draws() -> None:
    model, prompts = build(TINY), tokens_for(TINY, 4, 5)
    first = generate(model, prompts, 12, seed=5)
    torch.manual_seed(99)
    assert torch.equal(first, generate(model, prompts, 12, seed=5))
    assert not torch.equal(first, generate(model, prompts, 12, seed=6))


def test_the_draws_of_a_sequence_do_not_depend_on_which_others_have_ended() -> None:
    model, prompts = build(replace(TINY, context_length=40)), ragged_prompts(TINY, [5, 9, 1, 3] * 8)
    free = generate(model, prompts, 20, seed=1)
    eos = int(torch.cat(free).mode().values)
    ended = 0
    for prompt, row, cut in zip(prompts, free, generate(model, prompts, 20, seed=1, eos=eos), strict=True):
        new = row[len(prompt) :].tolist()
        count = new.index(eos) + 1 if eos in new else len(new)
        ended += count < len(new)
        assert torch.equal(cut, row[: len(prompt) + count])
    assert ended > 4


def test_sampling_follows_the_probabilities() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0, -math.inf]])
    count = 40_000
    draws = sample(logits.expand(count, -1), uniform(count), 0.7)
    expected = (logits[0].double() / 0.7).softmax(-1)
    found = torch.bincount(draws, minlength=5) / count
    assert ((found - expected).abs() <= 4 * (expected * (1 - expected) / count).sqrt()).all()


def test_a_draw_is_where_the_probabilities_add_up_to_it() -> None:
    logits = torch.tensor([-math.inf, 0.25, -math.inf, 0.5, 0.25, -math.inf])
    logits = torch.where(logits > 0, logits.log(), logits).expand(6, -1)
    draws = torch.tensor([0.0, 0.24, 0.26, 0.74, 0.76, 1 - 2**-53], dtype=torch.float64)
    assert sample(logits, draws, 1.0).tolist() == [1, 1, 3, 3, 4, 4]


def uniform(count: int) -> Tensor:
    return torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [
        (1, None, {2}),
        (2, None, {1, 2}),
        (99, None, {0, 1, 2, 3}),
        (None, 0.05, {2}),
        (None, 0.6, {2}),  # the likeliest has 0.64 alone
        (None, 0.7, {1, 2}),
        (None, 0.9, {0, 1, 2}),
        (3, 0.99, {0, 1, 2}),
        (None, 1.0, {0, 1, 2, 3}),
    ],
)
def test_top_k_and_top_p_keep_the_likeliest(top_k: int | None, top_p: float | None, kept: set[int]) -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]]).expand(2000, -1)  # probabilities .087 .237 .644 .032
    draws = sample(logits, uniform(2000), 1.0, top_k, top_p)
    assert set(draws.tolist()) == kept


def test_a_sequence_ends_with_its_end_token() -> None:
    model, prompts = build(TINY), tokens_for(TINY, 64, 3)
    free = generate(model, prompts, 20, seed=1)[:, 3:]
    eos = int(free.mode().values.mode().values)
    tokens = generate(model, prompts, 20, seed=1, eos=eos)[:, 3:]
    ended = 0
    for row in tokens.tolist():
        if eos in row:
            ended += 1
            assert set(row[row.index(eos) :]) == {eos}
    assert ended > 0
    with torch.no_grad():  # a model that wants nothing but the end token stops after one step
        model.norm.bias.copy_(100 * model.embedding.weight[eos])
        model.norm.weight.zero_()
    assert generate(model, prompts, 20, temperature=0, eos=eos).shape == (64, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 20}, "max_new_tokens is 20, expected 0 to 19: the longest prompt has 5 tokens"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1"),
        ({"prompts": torch.zeros(2, 0, dtype=torch.int64)}, "prompts is torch.int64"),
        ({"prompts": torch.zeros(2, 5)}, "prompts is torch.float32"),
        ({"prompts": [[1, 2], []]}, r"prompts\[1\] is torch.float32 \(0,\), expected int64 \(length,\)"),
        ({"prompts": [[1, 2], [0.5]]}, r"prompts\[1\] is torch.float32"),
        ({"prompts": [[1], [2] * 22]}, "max_new_tokens is 3, expected 0 to 2: the longest prompt has 22 tokens"),
        ({"prompts": [[1], [17]]}, "prompts holds ids 1 to 17"),
        ({"prompts": torch.full((2, 5), 17)}, "prompts holds ids 17 to 17, expected 0 to 16"),
        ({"prompts": torch.full((2, 5), -1)}, "prompts holds ids -1 to -1"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"eos": 17}, "eos is 17"),
    ],
)
def test_bad_arguments_of_generate_are_named(change: dict, message: str) -> None:
    arguments = {"prompts": tokens_for(TINY, 2, 5), "max_new_tokens": 3, **change}
    with pytest.raises(ValueError, match=message):
        generate(build(TINY), **arguments)

"""The transformer against a plain torch transcription of it, its cache against no cache, and the sampler."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import pykern
from pykern.model import PRESETS, KVCache, Transformer, TransformerConfig, generate
from pykern.model.generate import sample

TINY = TransformerConfig(vocab_size=17, context_length=24, num_layers=2, num_heads=4, width=32)
LLAMA = replace(TINY, positions="rotary", norm="rmsnorm", mlp="swiglu", bias=False, tie_embeddings=False)
FLAVOURS = {
    "gpt2": TINY,
    "nanogpt": replace(TINY, bias=False),
    "sinusoidal": replace(TINY, positions="sinusoidal"),
    "llama": LLAMA,
    "mistral": replace(LLAMA, num_kv_heads=2, sliding_window=5),
    "multi-query": replace(LLAMA, num_kv_heads=1),
    "mixtral": replace(LLAMA, num_kv_heads=2, mlp="moe", num_experts=4, experts_per_token=2),
}
flavours = pytest.mark.parametrize("config", FLAVOURS.values(), ids=FLAVOURS)


def build(config: TransformerConfig, seed: int = 0) -> Transformer:
    """A model whose every parameter matters: nanoGPT's initialisation leaves biases and norms trivial."""
    torch.manual_seed(seed)
    model = Transformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def tokens_for(config: TransformerConfig, *shape: int, seed: int = 1) -> Tensor:
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def transcription(model: Transformer, tokens: Tensor) -> Tensor:
    """The same logits in fp64, from the state dict and torch's own functions, one token's experts at a time."""
    c, w = model.config, {name: p.detach().double() for name, p in model.named_parameters()}
    length = tokens.shape[1]
    half = torch.arange(c.head_width // 2, dtype=torch.float64)
    turn = torch.polar(
        torch.ones(length, c.head_width // 2, dtype=torch.float64),
        torch.arange(length)[:, None] * c.rope_base ** (-2 * half / c.head_width),
    )

    def norm(x: Tensor, name: str) -> Tensor:
        if c.norm == "rmsnorm":
            return x / (x.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() * w[f"{name}.weight"]
        return F.layer_norm(x, (c.width,), w[f"{name}.weight"], w.get(f"{name}.bias"), c.norm_eps)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def rotary(x: Tensor) -> Tensor:  # (B, H, T, E), rotation as multiplication of complex numbers
        if c.positions != "rotary":
            return x
        a, b = x.chunk(2, -1)
        z = torch.complex(a, b) * turn
        return torch.cat([z.real, z.imag], -1)

    def attention(x: Tensor, name: str) -> Tensor:
        sizes = [c.width, c.kv_heads * c.head_width, c.kv_heads * c.head_width]
        q, k, v = (
            part.unflatten(-1, (-1, c.head_width)).transpose(1, 2) for part in linear(x, f"{name}.qkv").split(sizes, -1)
        )
        k, v = (t.repeat_interleave(c.num_heads // c.kv_heads, dim=1) for t in (rotary(k), v))
        distance = torch.arange(length)[:, None] - torch.arange(length)
        seen = (distance >= 0) & (distance < (c.sliding_window or length))
        scores = (rotary(q) @ k.mT / math.sqrt(c.head_width)).masked_fill(~seen, -math.inf)
        return linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), f"{name}.output")

    def mlp(x: Tensor, name: str) -> Tensor:
        if c.mlp == "gelu":
            return linear(F.gelu(linear(x, f"{name}.up")), f"{name}.down")
        if c.mlp == "swiglu":
            gate, up = linear(x, f"{name}.gate_up").chunk(2, -1)
            return linear(F.silu(gate) * up, f"{name}.down")
        out = torch.zeros_like(x)
        for b, t in [(b, t) for b in range(x.shape[0]) for t in range(length)]:
            best = linear(x[b, t], f"{name}.router").topk(c.experts_per_token)
            for share, e in zip(best.values.softmax(-1), best.indices, strict=True):
                gate, up = (w[f"{name}.gate_up"][e] @ x[b, t]).chunk(2)
                out[b, t] += share * (w[f"{name}.down"][e] @ (F.silu(gate) * up))
        return out

    x = w["embedding.weight"][tokens]
    if c.positions == "learned":
        x = x + w["position_embedding.weight"][:length]
    elif c.positions == "sinusoidal":
        angle = torch.arange(length)[:, None] * 10000.0 ** (-2 * torch.arange(c.width // 2).double() / c.width)
        x = x * math.sqrt(c.width) + torch.cat([angle.sin(), angle.cos()], -1)
    for i in range(c.num_layers):
        x = x + attention(norm(x, f"blocks.{i}.attention_norm"), f"blocks.{i}.attention")
        x = x + mlp(norm(x, f"blocks.{i}.mlp_norm"), f"blocks.{i}.mlp")
    return F.linear(norm(x, "norm"), w["embedding.weight" if c.tie_embeddings else "head.weight"])


@flavours
def test_logits_are_those_of_a_plain_transcription(config: TransformerConfig) -> None:
    model, tokens = build(config), tokens_for(config, 2, 13)
    assert relative(model(tokens), transcription(model, tokens)) < 1e-5


@flavours
def test_gradients_reach_every_parameter(config: TransformerConfig) -> None:
    model, tokens = build(config), tokens_for(config, 4, 20)
    (model(tokens, targets=tokens.roll(-1, 1)) + model.auxiliary_loss()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.norm() > 0, name


@flavours
def test_the_future_is_not_seen(config: TransformerConfig) -> None:
    model, tokens = build(config), tokens_for(config, 2, 20)
    changed = tokens.clone()
    changed[:, 12] = (changed[:, 12] + 1) % config.vocab_size
    before, after = model(tokens), model(changed)
    assert relative(after[:, :12], before[:, :12]) < 1e-6
    assert relative(after[:, 12:], before[:, 12:]) > 1e-2


def test_a_sliding_window_limits_what_is_seen() -> None:
    config = replace(LLAMA, sliding_window=4)
    model, tokens = build(config), tokens_for(config, 1, 20)
    changed = tokens.clone()
    changed[:, 3] = (changed[:, 3] + 1) % config.vocab_size
    reach = 3 + config.num_layers * (config.sliding_window - 1)
    moved = (model(changed) - model(tokens))[0].norm(dim=-1) > 0
    assert moved[3 : reach + 1].all() and not moved[reach + 1 :].any()


def test_targets_give_the_mean_cross_entropy_of_those_that_count() -> None:
    model, tokens = build(TINY), tokens_for(TINY, 3, 9)
    targets = tokens_for(TINY, 3, 9, seed=2)
    targets[0, :4] = -1
    log_probs = model(tokens).double().log_softmax(-1)
    kept = targets >= 0
    expected = -log_probs[kept].gather(1, targets[kept][:, None]).mean()
    assert model(tokens, targets=targets).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("std", [0.02, 0.1])
def test_initialisation_is_nanogpts(std: float) -> None:
    torch.manual_seed(0)
    model = Transformer(PRESETS["nanogpt-cpu"](vocab_size=96, bias=True, init_std=std))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            residual = name.endswith(("attention.output.weight", "mlp.down.weight"))
            expected = std / math.sqrt(2 * 4) if residual else std
            assert parameter.std().item() == pytest.approx(expected, rel=0.03), name


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # nanoGPT prints 0.80M, 10.65M and 123.59M (vocabulary padded to 50304): it leaves the position table out
        ("nanogpt-cpu", 795_904 + 64 * 128),
        ("nanogpt-char", 10_646_784 + 256 * 384),
        ("nanogpt", 123_587_328 + 1024 * 768),
    ],
)
def test_presets_have_nanogpts_sizes(name: str, parameters: int) -> None:
    with torch.device("meta"):
        assert Transformer(PRESETS[name]()).num_parameters() == parameters


@pytest.mark.parametrize("name", PRESETS)
def test_flops_a_token_count_what_a_forward_pass_multiplies(name: str) -> None:
    config = PRESETS[name]()
    with torch.device("meta"):
        model = Transformer(config)
    gates = 2 if config.mlp == "gelu" else 3
    experts = config.experts_per_token if config.mlp == "moe" else 1
    layer = config.width * config.head_width * (2 * config.num_heads + 2 * config.kv_heads)
    layer += experts * gates * config.width * config.hidden_width + config.num_experts * config.width
    weights = config.num_layers * layer + config.width * config.vocab_size
    seen = config.sliding_window or config.context_length
    expected = 6 * weights + 12 * config.num_layers * config.width * seen
    assert model.flops_per_token() == pytest.approx(expected, rel=2e-3)  # norms multiply a little as well


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"num_layers": -1}, "num_layers is -1"),
        ({"width": 30}, "width is 30, expected a multiple of num_heads = 4"),
        ({"num_kv_heads": 3}, "num_kv_heads is 3, expected a divisor of num_heads = 4"),
        ({"width": 12, "positions": "rotary"}, "width is 12, expected an even number of features a head"),
        ({"positions": "absolute"}, "positions is 'absolute'"),
        ({"norm": "batchnorm"}, "norm is 'batchnorm'"),
        ({"mlp": "moe"}, "num_experts is 0"),
        ({"mlp": "moe", "num_experts": 2, "experts_per_token": 3}, "experts_per_token is 3"),
        ({"num_experts": 4}, "num_experts is 4, expected 0 with mlp='gelu'"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"sliding_window": 0}, "sliding_window is 0"),
        ({"norm_eps": 0.0}, "norm_eps is 0.0"),
        ({"init_std": 0.0}, "init_std is 0.0"),
    ],
)
def test_a_config_names_the_field_that_does_not_fit(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)


def test_more_tokens_than_the_context_are_refused() -> None:
    model = build(TINY)
    model(tokens_for(TINY, 1, 24))
    with pytest.raises(ValueError, match="reach position 25, beyond the model's context_length 24"):
        model(tokens_for(TINY, 1, 25))
    cache = KVCache(TINY.num_layers, capacity=8)
    model(tokens_for(TINY, 1, 6), cache=cache)
    with pytest.raises(ValueError, match="reach position 9, beyond the cache's capacity 8"):
        model(tokens_for(TINY, 1, 3), cache=cache)
    with pytest.raises(ValueError, match=r"tokens has shape \(6,\), expected \(batch, length\)"):
        model(tokens_for(TINY, 6))


def test_dropout_is_active_in_training_only() -> None:
    model, tokens = build(replace(TINY, dropout=0.3)), tokens_for(TINY, 2, 10)
    assert relative(model(tokens), model(tokens)) > 1e-2
    model.eval()
    assert torch.equal(model(tokens), model(tokens))
    assert relative(model(tokens), transcription(model, tokens)) < 1e-5


@flavours
def test_bfloat16_autocast_stays_close(config: TransformerConfig) -> None:
    model, tokens = build(config), tokens_for(config, 2, 13)
    exact = model(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens)
        loss = model(tokens, targets=tokens)
        in_fp32 = model.logits(model.hidden(tokens), fp32=True)
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32 and in_fp32.dtype == torch.float32
    # A router whose two scores are close may choose another expert after rounding.
    assert relative(logits, exact) < (0.15 if config.mlp == "moe" else 0.03)
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_compiles_as_one_graph(name: str) -> None:
    model, tokens = build(replace(FLAVOURS[name], num_layers=1)), tokens_for(TINY, 2, 13)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = compiled(tokens, targets=tokens) + model.auxiliary_loss()
    loss.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    expected = model(tokens, targets=tokens) + model.auxiliary_loss()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for gradient, parameter in zip(gradients, model.parameters(), strict=True):
        assert relative(gradient, parameter.grad) < 1e-5


def test_experts_add_balance_and_z_loss() -> None:
    config = replace(FLAVOURS["mixtral"], num_layers=1)
    model, tokens = build(config), tokens_for(config, 2, 11)
    model(tokens)
    hidden = model.blocks[0].mlp.routing[0].detach().double()  # router logits (tokens, experts)
    chosen = F.one_hot(hidden.topk(2).indices, 4).double().sum(1)
    balance = 4 * (chosen.mean(0) * hidden.softmax(-1).mean(0)).sum()
    z = hidden.logsumexp(-1).square().mean()
    assert model.auxiliary_loss().item() == pytest.approx((0.01 * balance + 0.001 * z).item(), rel=1e-5)
    assert Transformer(TINY).auxiliary_loss().item() == 0


def test_a_model_with_experts_can_be_copied_after_a_forward_pass() -> None:
    model, tokens = build(FLAVOURS["mixtral"]), tokens_for(TINY, 1, 5)
    expected = model(tokens)
    assert torch.equal(copy.deepcopy(model)(tokens), expected)


def test_training_on_the_kernels_matches_training_on_the_references() -> None:
    def losses() -> list[float]:
        model = build(LLAMA, seed=3)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        found = []
        for step in range(12):
            tokens = tokens_for(LLAMA, 4, 20, seed=step % 3)
            loss = model(tokens[:, :-1], targets=tokens[:, 1:])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    default = losses()
    with pykern.backend("reference"):
        reference = losses()
    assert default[-1] < 0.7 * default[0]
    assert default == pytest.approx(reference, rel=1e-4)


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
def test_a_cache_may_be_filled_in_pieces(config: TransformerConfig) -> None:
    model, tokens = build(config).eval(), tokens_for(config, 2, 24)
    cache = KVCache(config.num_layers, capacity=24)
    with torch.no_grad():
        pieces = [model(piece, cache=cache) for piece in tokens.split([2, 17, 1, 1, 3], dim=1)]
        assert relative(torch.cat(pieces, 1), model(tokens)) < 1e-5
    assert cache.length == 24


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


def test_a_seed_repeats_the_draws() -> None:
    model, prompts = build(TINY), tokens_for(TINY, 4, 5)
    first = generate(model, prompts, 12, seed=5)
    torch.manual_seed(99)
    assert torch.equal(first, generate(model, prompts, 12, seed=5))
    assert not torch.equal(first, generate(model, prompts, 12, seed=6))


def test_sampling_follows_the_probabilities() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    count = 40_000
    draws = sample(logits.expand(count, -1), 0.7, generator=torch.Generator().manual_seed(0))
    expected = (logits[0].double() / 0.7).softmax(-1)
    found = torch.bincount(draws, minlength=4) / count
    assert ((found - expected).abs() < 4 * (expected * (1 - expected) / count).sqrt()).all()


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
    draws = sample(logits, 1.0, top_k, top_p, torch.Generator().manual_seed(0))
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
        ({"max_new_tokens": 20}, "max_new_tokens is 20, expected 0 to 19: prompts have 5 tokens"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1"),
        ({"prompts": torch.zeros(2, 0, dtype=torch.int64)}, "prompts is torch.int64"),
        ({"prompts": torch.zeros(2, 5)}, "prompts is torch.float32"),
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

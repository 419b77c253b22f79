"""The transformer against a plain torch transcription of it, and packed sequences against each sequence alone."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from flavours import FLAVOURS, LLAMA, TINY, build, flavours, relative, tokens_for
from torch import Tensor

import pykern
from pykern.model import PRESETS, Packed, Transformer, TransformerConfig


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
    with pytest.raises(ValueError, match="reach position 25, beyond the model's context_length 24"):
        model(tokens_for(TINY, 30), packed=Packed.of([5, 25]))
    with pytest.raises(ValueError, match=r"tokens has shape \(6,\), expected \(batch, length\)"):
        model(tokens_for(TINY, 6))
    with pytest.raises(ValueError, match=r"tokens has shape \(7,\), expected \(6,\) of what is packed"):
        model(tokens_for(TINY, 7), packed=Packed.of([2, 4]))


def test_dropout_is_active_in_training_only() -> None:
    model, tokens = build(replace(TINY, dropout=0.3)), tokens_for(TINY, 2, 10)
    assert relative(model(tokens), model(tokens)) > 1e-2
    model.eval()
    assert torch.equal(model(tokens), model(tokens))
    assert relative(model(tokens), transcription(model, tokens)) < 1e-5


LENGTHS = [3, 1, 0, 24, 7]


@flavours
def test_packed_sequences_are_what_each_is_alone(config: TransformerConfig) -> None:
    model, tokens, targets = build(config), tokens_for(config, sum(LENGTHS)), tokens_for(config, sum(LENGTHS), seed=2)
    logits = model(tokens, packed=Packed.of(LENGTHS))
    assert logits.shape == (len(tokens), config.vocab_size)
    for row, found in zip(tokens.split(LENGTHS), logits.split(LENGTHS), strict=True):
        assert len(row) == 0 or relative(found, transcription(model, row[None])[0]) < 1e-5

    def gradients(loss: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])

    found = gradients(model(tokens, packed=Packed.of(LENGTHS), targets=targets))
    pairs = zip(tokens.split(LENGTHS), targets.split(LENGTHS), strict=True)
    alone = [F.cross_entropy(model(row[None])[0], wanted, reduction="sum") for row, wanted in pairs if len(row)]
    assert relative(found, gradients(torch.stack(alone).sum() / len(tokens))) < 1e-5


def test_what_is_packed_is_known_on_the_host() -> None:
    packed = Packed.of(LENGTHS)
    assert packed.cu_seqlens.tolist() == [0, 3, 4, 4, 28, 35] and packed.cu_seqlens.dtype == torch.int32
    assert packed.max_seqlen == 24
    assert packed.positions.tolist() == [0, 1, 2, 0, *range(24), *range(7)]
    empty = Packed.of([])
    assert empty.cu_seqlens.tolist() == [0] and empty.max_seqlen == 0 and len(empty.positions) == 0


def test_attention_in_packed_sequences_is_dropped_out_in_training() -> None:
    model, tokens = build(replace(TINY, dropout=0.3)), tokens_for(TINY, sum(LENGTHS))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # of the residual stream
    packed = Packed.of(LENGTHS)
    assert relative(model(tokens, packed=packed), model(tokens, packed=packed)) > 1e-2
    model.eval()
    assert torch.equal(model(tokens, packed=packed), model(tokens, packed=packed))


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


@pytest.mark.parametrize("name", ["gpt2", "mistral"])
def test_packed_sequences_of_all_lengths_compile_as_few_graphs(name: str) -> None:
    config = replace(FLAVOURS[name], num_layers=1)
    model, graphs = build(config), []

    def count(graph: torch.fx.GraphModule, inputs: list) -> object:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=count)
    for lengths in ([5, 9], [3, 1, 7], [8, 8, 2, 1], [4, 20, 6], [11, 3, 2, 2, 2]):
        tokens = tokens_for(config, sum(lengths))
        found = compiled(tokens, packed=Packed.of(lengths), targets=tokens)
        assert found.item() == pytest.approx(model(tokens, packed=Packed.of(lengths), targets=tokens).item(), rel=1e-6)
    assert len(graphs) <= 3


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

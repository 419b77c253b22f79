"""`pykern.nn.MoE` against the sparse blocks of transformers: weights, outputs and gradients."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from pykern.nn import MoE
from pykern.nn.quantize_model import quantize_model
from pykern.testing.accuracy import check_close

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:.*_experts_implementation")

MODELS = transformers.models
SIZES = {"hidden_size": 48, "num_experts_per_tok": 3}


def mixtral(**options: object) -> nn.Module:
    config = transformers.MixtralConfig(**SIZES, intermediate_size=40, num_local_experts=6, **options)
    return MODELS.mixtral.modeling_mixtral.MixtralSparseMoeBlock(config)


def qwen3(**options: object) -> nn.Module:
    config = transformers.Qwen3MoeConfig(**SIZES, moe_intermediate_size=24, num_experts=12, **options)
    return MODELS.qwen3_moe.modeling_qwen3_moe.Qwen3MoeSparseMoeBlock(config)


def deepseek(**options: object) -> nn.Module:
    groups = {"n_group": 4, "topk_group": 2, "n_shared_experts": 2, "routed_scaling_factor": 2.5}
    sizes = {"moe_intermediate_size": 24, "n_routed_experts": 16}
    config = transformers.DeepseekV3Config(**SIZES, **sizes, **{**groups, **options})
    return MODELS.deepseek_v3.modeling_deepseek_v3.DeepseekV3MoE(config)


BLOCKS = {
    "mixtral": mixtral,
    "mixtral, gelu": lambda: mixtral(hidden_act="gelu_new"),
    "qwen3": lambda: qwen3(norm_topk_prob=True),
    "qwen3, not renormalised": lambda: qwen3(norm_topk_prob=False),
    "deepseek": deepseek,
    "deepseek, one group": lambda: deepseek(n_group=1, topk_group=1),
    "deepseek, not renormalised": lambda: deepseek(norm_topk_prob=False),
}
THREE = {"mixtral": mixtral, "qwen3": qwen3, "deepseek": deepseek}
blocks = pytest.mark.parametrize("make", BLOCKS.values(), ids=BLOCKS)
three = pytest.mark.parametrize("make", THREE.values(), ids=THREE)


def random_block(make, seed: int = 0) -> nn.Module:
    """Weights that matter, on the grid of bf16, so that a copy in bf16 has the very same."""
    torch.manual_seed(seed)
    block = make()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5)
        for buffer in block.buffers():
            buffer.uniform_(-0.2, 0.2)
        for tensor in (*block.parameters(), *block.buffers()):
            tensor.copy_(tensor.bfloat16())
    return block


def outputs_and_gradients(layer: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    named = dict(layer.named_parameters())
    y = layer(x)
    return {"y": y, "x": None, **named} | dict(
        zip(("x", *named), torch.autograd.grad(y, (x, *named.values()), dy), strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@blocks
def test_outputs_and_gradients_are_those_of_transformers(make, dtype: torch.dtype) -> None:
    block = random_block(make)
    x, dy = torch.randn(2, 19, 48).bfloat16(), torch.randn(2, 19, 48).bfloat16()
    # fp64 stands for the exact result only where it chooses the same experts: the seed leaves no near-ties.
    exact = outputs_and_gradients(copy.deepcopy(block).double(), x.double(), dy.double())
    theirs = outputs_and_gradients(copy.deepcopy(block).to(dtype), x.to(dtype), dy.to(dtype))
    ours = outputs_and_gradients(MoE.from_transformers(copy.deepcopy(block).to(dtype)), x.to(dtype), dy.to(dtype))
    assert {"gate.weight", "experts.gate_up_proj", "experts.down_proj"} <= ours.keys() == theirs.keys()
    for name, result in ours.items():
        # In 16 bits transformers rounds between the products, and we hardly do.
        check_close(name, result, exact[name], [theirs[name]], factor=2.0 if dtype == torch.float32 else 1.25)


@three
def test_a_state_dict_fits_both(make) -> None:
    block = random_block(make)
    shared = None if make is not deepseek else 48
    routing = {"selection_bias": True} if make is deepseek else {}
    width = block.experts.down_proj.shape[2]
    layer = MoE(48, width, len(block.experts.down_proj), 3, shared_size=shared, **routing)
    assert {k: v.shape for k, v in layer.state_dict().items()} == {k: v.shape for k, v in block.state_dict().items()}
    layer.load_state_dict(block.state_dict())
    other = random_block(make, seed=1)
    other.load_state_dict(layer.state_dict())
    for name, tensor in block.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)


def test_the_layer_takes_over_parameters_mode_and_what_is_frozen() -> None:
    block = random_block(deepseek).eval()
    block.experts.gate_up_proj.requires_grad_(False)
    layer = MoE.from_transformers(block)
    assert not layer.training
    theirs = dict(block.named_parameters())
    for name, parameter in layer.named_parameters():
        assert parameter is theirs[name]
    assert not layer.experts.gate_up_proj.requires_grad and layer.experts.down_proj.requires_grad
    assert layer.gate.e_score_correction_bias is block.gate.e_score_correction_bias


@pytest.mark.parametrize(
    "change", [quantize_model, lambda block: parametrizations.weight_norm(block.experts, "down_proj")]
)
def test_a_changed_block_is_named(change: Callable[[nn.Module], nn.Module]) -> None:
    block = random_block(mixtral)
    change(block)
    with pytest.raises(ValueError, match="block: expected the parameters of transformers, but experts.* was changed"):
        MoE.from_transformers(block)


@pytest.mark.parametrize("recorded", [False, True], ids=["", "router_logits recorded before"])
def test_in_a_model_of_transformers_it_changes_nothing_but_the_speed(recorded: bool) -> None:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        **SIZES, vocab_size=31, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    model = transformers.MixtralForCausalLM(config).eval()
    ids = torch.randint(31, (2, 9))
    expected = model(ids, labels=ids, output_router_logits=recorded)
    saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for layer in model.model.layers:
        layer.mlp = MoE.from_transformers(layer.mlp)
    ours = model(ids, labels=ids, output_router_logits=True)
    if recorded:
        torch.testing.assert_close(ours.router_logits, expected.router_logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(ours.aux_loss, expected.aux_loss)
    assert len(ours.router_logits) == 2
    torch.testing.assert_close(ours.logits, expected.logits, rtol=0, atol=1e-5 * expected.logits.abs().max().item())
    assert model.state_dict().keys() == saved.keys()
    ours.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_jitter_is_that_of_mixtral() -> None:
    block = random_block(lambda: mixtral(router_jitter_noise=0.1)).train()
    layer, x = MoE.from_transformers(block), torch.randn(2, 7, 48)
    quiet = layer.eval()(x)
    torch.manual_seed(3)
    noisy = layer.train()(x)
    torch.manual_seed(3)
    torch.testing.assert_close(noisy, block(x.clone()))  # the block multiplies its input in place
    assert not torch.equal(noisy, quiet)


def test_the_router_in_fp32_stays_so_under_autocast() -> None:
    layer, x = MoE.from_transformers(random_block(deepseek)), torch.randn(2, 7, 48)
    with torch.autocast("cpu", torch.bfloat16):
        logits, weights, ids = layer.gate(x)
        y = layer(x)
    plain_logits, _, plain_ids = layer.gate(x)
    assert logits.dtype == weights.dtype == torch.float32
    assert torch.equal(logits, plain_logits) and torch.equal(ids, plain_ids)
    assert 0 < (y - layer(x)).norm() / y.norm() < 0.02


def test_a_recorded_choice_is_repeated() -> None:
    layer, x = MoE.from_transformers(random_block(qwen3)), torch.randn(2, 7, 48)
    _, _, ids = layer.gate(x)
    assert torch.equal(layer(x, expert_ids=ids), layer(x))
    other = (ids + 1) % 12
    assert not torch.allclose(layer(x, expert_ids=other), layer(x))


@pytest.mark.parametrize("shape", [(0, 48), (1, 48), (48,), (2, 3, 5, 48)], ids=str)
def test_any_leading_dimensions(shape: tuple[int, ...]) -> None:
    layer, x = MoE.from_transformers(random_block(deepseek)), torch.randn(shape)
    y = layer(x)
    assert y.shape == shape
    torch.testing.assert_close(y.reshape(-1, 48), torch.cat([layer(row[None]) for row in x.reshape(-1, 48)] or [x]))


@three
def test_it_compiles_in_one_graph_for_every_token_count(make) -> None:
    layer = MoE.from_transformers(random_block(make))
    graphs = []

    def count(module: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        graphs.append(module)
        return torch._dynamo.lookup_backend("aot_eager")(module, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=count)
    for tokens in (6, 11, 3, 29):
        x, dy = torch.randn(1, tokens, 48), torch.randn(1, tokens, 48)
        results = [outputs_and_gradients(f, x, dy) for f in (compiled, layer)]
        for ours, expected in zip(*(result.values() for result in results), strict=True):
            assert torch.equal(ours, expected)
    assert len(graphs) <= 2, "a new token count compiles anew"
    torch._dynamo.reset()


def test_experts_and_shared_experts_can_be_kept_in_4_bits() -> None:
    layer, x = MoE.from_transformers(random_block(deepseek)).requires_grad_(False), torch.randn(5, 48)
    expected = layer(x)
    quantize_model(layer, blocksize=32)
    error = (layer(x) - expected).norm() / expected.norm()
    assert 1e-3 < error < 0.3
    assert layer.experts.parametrizations.gate_up_proj.original.dtype == torch.uint8
    assert layer.gate.weight.dtype == torch.float32


def test_what_cannot_be_taken_over_is_named() -> None:
    with pytest.raises(TypeError, match="block: expected one of MixtralSparseMoeBlock, .* got Linear"):
        MoE.from_transformers(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="activation: expected one of silu, .* got 'tanh'"):
        MoE.from_transformers(mixtral(hidden_act="tanh"))
    with pytest.raises(ValueError, match="activation: .* got 'swiglu'"):
        MoE(4, 4, 2, 1, activation="swiglu")
    with pytest.raises(ValueError, match="top_k: expected 1 to 2"):
        MoE(4, 4, 2, 3)(torch.zeros(1, 4))

"""Adapters against PEFT's own, on a small Mistral: loss curves, files in both directions, and rounding errors."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import pykern
from pykern.nn import Linear4bit, LoRALinear
from pykern.nn.lora_model import adapters
from pykern.ops import Weight4bit, dequantize_4bit
from pykern.ops._philox import keep_mask
from pykern.ops.lora import drop

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
QV = ["q_proj", "v_proj"]
OPTIONS = [{}, {"use_dora": True}, {"use_rslora": True}, {"use_dora": True, "use_rslora": True}]


def mistral() -> nn.Module:
    torch.manual_seed(0)
    return transformers.MistralForCausalLM(transformers.MistralConfig(**SHAPE)).eval()


def mixtral() -> nn.Module:
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SHAPE, num_local_experts=4)).eval()


def gpt_oss() -> nn.Module:
    """Its experts' weights are (experts, in, out)."""
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    config = transformers.GptOssConfig(**SHAPE, num_local_experts=4, head_dim=16, rope_parameters=rope)
    return transformers.GptOssForCausalLM(config).eval()


def batch(seed: int = 0) -> Tensor:
    return torch.randint(SHAPE["vocab_size"], (2, 12), generator=torch.Generator().manual_seed(seed))


def theirs(base: nn.Module, learnt: bool = True, **options: Any) -> nn.Module:
    """The model with PEFT's adapters, which have an effect if they are `learnt`."""
    settings = {"r": 64, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": QV} | options
    torch.manual_seed(1)
    one = peft.get_peft_model(base, peft.LoraConfig(**settings)).eval()
    with torch.no_grad():
        for name, parameter in one.named_parameters():
            if learnt and "lora_B" in name:
                parameter.normal_(std=0.1)
            if learnt and "magnitude" in name:
                parameter.mul_(torch.rand(parameter.shape) + 0.5)
    return one


def ours(base: nn.Module, peft_model: nn.Module, folder: Path) -> nn.Module:
    """The same adapters in our layers, by way of PEFT's files."""
    peft_model.save_pretrained(folder)
    return pykern.load_adapter(base, folder).eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(batch()).logits


def assert_same(found: Tensor, expected: Tensor, eps: float = 2e-6) -> None:
    assert expected.norm() > 0 and (found - expected).norm() <= eps * expected.norm()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_files_go_both_ways(options: dict[str, Any], tmp_path: Path) -> None:
    reference = theirs(mistral(), **options)
    one = ours(mistral(), reference, tmp_path / "theirs")
    layers = dict(adapters(one))
    assert len(layers) == 4 and all(a.r == 64 and a.dropout == 0.05 for a in layers.values())
    assert_same(logits(one), logits(reference))
    assert (logits(one) - logits(mistral())).norm() > 0.1 * logits(one).norm()
    pykern.save_adapter(one, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(mistral(), tmp_path / "ours").eval()
    assert torch.equal(logits(back), logits(reference))
    config = back.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout, sorted(config.target_modules)) == (64, 16, 0.05, QV)
    saved, again = (peft.get_peft_model_state_dict(m) for m in (reference, back))
    assert saved.keys() == again.keys() and all(torch.equal(saved[name], again[name]) for name in saved)


def test_an_adapted_output_layer_goes_both_ways(tmp_path: Path) -> None:
    """PEFT saves the layer itself beside its adapter."""
    base = mistral()
    torch.nn.init.normal_(base.lm_head.weight, std=0.1)  # as if it had been given other rows
    reference = theirs(base, target_modules=["lm_head"])
    one = ours(mistral(), reference, tmp_path / "theirs")
    assert_same(logits(one), logits(reference))
    pykern.save_adapter(one, tmp_path / "ours")
    back = mistral()
    back.lm_head.load_state_dict(one.lm_head.base_layer.state_dict())
    back = peft.PeftModel.from_pretrained(back, tmp_path / "ours").eval()
    assert_same(logits(back), logits(reference))


def test_ranks_and_alphas_by_layer_go_both_ways(tmp_path: Path) -> None:
    patterns = {
        "rank_pattern": {"v_proj": 4, "layers.1.self_attn.q_proj": 2},
        "alpha_pattern": {"0.self_attn.v_proj": 3},
    }
    reference = theirs(mistral(), r=8, **patterns)
    one = ours(mistral(), reference, tmp_path / "theirs")
    assert [(a.r, a.alpha) for _, a in adapters(one)] == [(8, 16), (4, 3), (2, 16), (4, 16)]
    assert_same(logits(one), logits(reference))
    pykern.save_adapter(one, tmp_path / "ours")
    assert torch.equal(logits(peft.PeftModel.from_pretrained(mistral(), tmp_path / "ours").eval()), logits(reference))


@pytest.mark.parametrize("modules", [[], QV], ids=["experts", "experts and layers"])
@pytest.mark.parametrize("make", [mixtral, gpt_oss])
def test_adapters_of_experts_go_both_ways(make: Callable[[], nn.Module], modules: list[str], tmp_path: Path) -> None:
    fused = ["experts.gate_up_proj", "experts.down_proj"]
    reference = theirs(make(), r=4, lora_dropout=0.0, target_modules=modules, target_parameters=fused)
    one = ours(make(), reference, tmp_path / "theirs")
    assert len(dict(adapters(one))) == 4 + 2 * len(modules)
    assert_same(logits(one), logits(reference))
    assert (logits(one) - logits(make())).norm() > 0.05 * logits(one).norm()
    pykern.save_adapter(one, tmp_path / "ours")
    assert torch.equal(logits(peft.PeftModel.from_pretrained(make(), tmp_path / "ours").eval()), logits(reference))


@pytest.mark.parametrize("targets", ["all-linear", r".*layers\.1.*proj", ["self_attn.o_proj", "k_proj"]], ids=str)
def test_the_same_layers_are_chosen(targets: Any) -> None:
    reference = theirs(mistral(), target_modules=targets)
    chosen = {name for name, module in reference.base_model.model.named_modules() if hasattr(module, "lora_A")}
    assert {name for name, _ in adapters(pykern.add_lora(mistral(), targets))} == chosen


def train(model: nn.Module, steps: int) -> list[float]:
    """Losses of a few batches that are learnt by heart."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-2)
    losses = []
    for step in range(steps):
        loss = model(batch(step % 3), labels=batch(step % 3)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=str)
def test_the_losses_of_fifty_steps_are_pefts(options: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    """Without dropout, as eval() leaves it: then they differ by rounding, which the optimiser makes grow."""
    reference = theirs(mistral().to(dtype), learnt=False, **options)
    one = ours(mistral().to(dtype), reference, tmp_path)
    expected, found = train(reference, 50), train(one, 50)
    assert expected[-1] < 0.9 * expected[0]
    assert found == pytest.approx(expected, rel=1e-9 if dtype == torch.float64 else 1e-4)


def test_dropout_learns_as_well() -> None:
    one = pykern.add_lora(mistral(), QV, r=64, alpha=16, dropout=0.05)
    plain = pykern.add_lora(mistral(), QV, r=64, alpha=16)
    torch.manual_seed(2)
    found, expected = train(one.train(), 30), train(plain.train(), 30)
    assert found != expected and found[-1] == pytest.approx(expected[-1], rel=0.2) and found[-1] < 0.9 * found[0]


# Rounding errors of a layer, forward and each gradient, against fp64

OUT, IN, ROWS, RANK = 160, 192, 96, 16


def base_layer(dtype: torch.dtype, kind: str) -> nn.Module:
    torch.manual_seed(3)
    linear = nn.Linear(IN, OUT, dtype=dtype).requires_grad_(False)
    if kind == "float":
        return linear
    quantized = bitsandbytes.nn.Linear4bit(IN, OUT, compute_dtype=dtype, quant_type="nf4", compress_statistics=True)
    quantized.load_state_dict(linear.state_dict())
    quantized.weight.data = linear.weight.data
    return quantized.to("cpu").requires_grad_(False)


class SameMask(nn.Module):
    """Our dropout, on a mask that is given, in place of PEFT's."""

    def __init__(self, p: float, rng: Tensor) -> None:
        super().__init__()
        self.p, self.rng = p, rng

    def forward(self, x: Tensor) -> Tensor:
        return drop(x, self.p, self.rng)


class One(nn.Module):
    def __init__(self, layer: nn.Module, four_bits: bool) -> None:
        super().__init__()
        self.q_proj, self.is_loaded_in_4bit = layer, four_bits

    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(x)


def pairs(
    dtype: torch.dtype, kind: str, narrow: bool, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> tuple[nn.Module, LoRALinear, Tensor, Tensor]:
    """PEFT's layer and ours with the same tensors and dropout's mask, and the weight and the mask in fp64."""
    settings = {"r": RANK, "lora_alpha": 24, "target_modules": ["q_proj"], **options}
    torch.manual_seed(4)
    model = peft.get_peft_model(
        One(base_layer(dtype, kind), kind == "nf4"), peft.LoraConfig(**settings), autocast_adapter_dtype=not narrow
    )
    reference = model.base_model.model.q_proj
    p = options.get("lora_dropout", 0.0)
    rng = torch.tensor([12345, 678])
    monkeypatch.setattr("pykern.ops.lora.draw_rng", lambda device: rng)
    if p:
        reference.lora_dropout["default"] = SameMask(p, rng)
    if kind == "nf4":
        entries = {f"weight.{k}": v for k, v in reference.base_layer.weight.quant_state.as_dict(packed=True).items()}
        weight = Weight4bit.from_bitsandbytes({"weight": reference.base_layer.weight.data, **entries}, "weight")
        base = Linear4bit(weight, reference.base_layer.bias)
        exact = dequantize_4bit(weight, torch.float64)
    else:
        base, exact = reference.base_layer, reference.base_layer.weight.double()
    a = reference.lora_A["default"].weight
    own = {"dropout": p, "use_dora": "use_dora" in options, "dtype": a.dtype}
    layer = LoRALinear(base, RANK, 24, **own)
    with torch.no_grad():
        reference.lora_B["default"].weight.normal_(std=0.2)
        layer.lora_A.weight.copy_(a)
        layer.lora_B.weight.copy_(reference.lora_B["default"].weight)
        if layer.use_dora:
            magnitude = reference.lora_magnitude_vector["default"].weight
            magnitude.mul_(torch.rand(OUT) + 0.5)
            layer.lora_magnitude_vector.copy_(magnitude)
    kept = keep_mask(rng, torch.arange(ROWS), IN, p) / (1 - p) if p else torch.ones(ROWS, IN)
    return reference, layer, exact.detach(), kept.double()


def gradients(y: Tensor, x: Tensor, leaves: list[Tensor], dy: Tensor) -> list[Tensor]:
    return [y.detach(), *torch.autograd.grad(y, [x, *leaves], dy.to(y.dtype))]


@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.2}, {"use_dora": True, "lora_dropout": 0.2}], ids=str)
@pytest.mark.parametrize("kind", ["float", "nf4"])
@pytest.mark.parametrize(
    ("dtype", "narrow"),
    [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)],
    ids=["fp32", "bf16 with fp32 adapters", "bf16"],
)
def test_errors_are_at_most_twice_pefts(
    dtype: torch.dtype, narrow: bool, kind: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, layer, weight, kept = pairs(dtype, kind, narrow, monkeypatch, **options)
    torch.manual_seed(6)
    x, dy = torch.randn(ROWS, IN).to(dtype), torch.randn(ROWS, OUT).to(dtype)
    inputs = [x.detach().requires_grad_() for _ in range(2)] + [x.double().requires_grad_()]
    own = [layer.lora_A.weight, layer.lora_B.weight]
    other = [reference.lora_A["default"].weight, reference.lora_B["default"].weight]
    if layer.use_dora:
        own.append(layer.lora_magnitude_vector)
        other.append(reference.lora_magnitude_vector["default"].weight)
    exact = [t.detach().double().requires_grad_() for t in own]
    x64 = inputs[2]
    y64 = x64 @ weight.T + layer.base_layer.bias.double()
    update = layer.scaling * (x64 * kept) @ exact[0].T @ exact[1].T
    if layer.use_dora:
        norm = (weight + layer.scaling * exact[1] @ exact[0]).detach().norm(dim=1)
        y64 = y64 + (exact[2] / norm - 1) * ((x64 * kept) @ weight.T) + exact[2] / norm * update
    else:
        y64 = y64 + update
    wanted = gradients(y64, x64, exact, dy)
    found = gradients(layer(inputs[0]), inputs[0], own, dy)
    theirs = gradients(reference(inputs[1]), inputs[1], other, dy)
    for name, got, peer, one in zip(("y", "dx", "dA", "dB", "dm"), found, theirs, wanted, strict=False):
        assert got.dtype == peer.dtype, name
        error, limit = ((t.double() - one).norm() for t in (got, peer))
        assert error <= 2 * limit, name


def test_files_go_both_ways_on_an_nf4_base(tmp_path: Path) -> None:
    """In train mode, without dropout: in eval mode bitsandbytes computes in bf16 on some CPUs."""

    def quantized() -> nn.Module:
        one = mistral()
        for name, layer in [(n, m) for n, m in one.named_modules() if n.endswith(tuple(QV))]:
            four = bitsandbytes.nn.Linear4bit(layer.in_features, layer.out_features, bias=False, quant_type="nf4")
            four.weight.data = layer.weight.data
            one.set_submodule(name, four.to("cpu"))
        one.is_loaded_in_4bit = True
        return one

    reference = theirs(quantized(), lora_dropout=0.0).train()
    own = mistral()
    for name, layer in [(n, m) for n, m in quantized().named_modules() if n.endswith(tuple(QV))]:
        entries = {f"weight.{k}": v for k, v in layer.weight.quant_state.as_dict(packed=True).items()}
        own.set_submodule(
            name, Linear4bit(Weight4bit.from_bitsandbytes({"weight": layer.weight.data, **entries}, "weight"))
        )
    one = ours(own, reference, tmp_path / "theirs")
    assert len(dict(adapters(one))) == 4
    assert all(isinstance(a.base_layer, Linear4bit) for _, a in adapters(one))
    assert_same(logits(one), logits(reference))
    pykern.save_adapter(one, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(quantized(), tmp_path / "ours").train()
    assert torch.equal(logits(back), logits(reference))

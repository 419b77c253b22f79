"""Models with adapters: which layers get them, experts among them, merging all, and files of adapters."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import pykern
from pykern.model import PRESETS, Transformer
from pykern.nn import Linear4bit, LoRALinear
from pykern.nn.lora_experts import AddLowRank
from pykern.nn.lora_model import adapters
from pykern.nn.quantize_model import dequantize_model

IDS = torch.arange(12).view(2, 6)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(32, 32), nn.Linear(32, 32, bias=False)
        self.up_proj = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up_proj(self.q_proj(x).relu() * self.v_proj(x))


class Experts(nn.Module):
    """Fused as in transformers: looked up one by one."""

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(count, 48, 32) / 6)
        self.down = nn.Parameter(torch.randn(count, 32, 48) / 6)
        self.bias = nn.Parameter(torch.randn(count, 32))

    def forward(self, x: Tensor) -> Tensor:
        parts = [F.linear(F.linear(x, self.up[i]).relu(), self.down[i], self.bias[i]) for i in range(len(self.bias))]
        return torch.stack(parts).sum(0)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 32)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.experts = Experts()
        self.lm_head = nn.Linear(32, 40, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x + self.experts(x))


def model() -> Model:
    torch.manual_seed(0)
    return Model()


def learnt(one: nn.Module) -> nn.Module:
    """The model with adapters that have an effect."""
    torch.manual_seed(5)
    with torch.no_grad():
        for _, adapter in adapters(one):
            adapter.lora_B.weight.normal_(std=0.2)
    return one.eval()


def adapted(**options: Any) -> nn.Module:
    options = {"r": 4, "alpha": 6, "target_parameters": ["experts.up", "experts.down"]} | options
    return learnt(pykern.add_lora(model(), **options))


ALL = {f"layers.{i}.{name}" for i in range(2) for name in ("q_proj", "v_proj", "up_proj")}


@pytest.mark.parametrize(
    ("targets", "found"),
    [
        ("all-linear", ALL),
        ("All-Linear", ALL),
        (["q_proj"], {"layers.0.q_proj", "layers.1.q_proj"}),
        (["1.q_proj", "layers.0.up_proj"], {"layers.1.q_proj", "layers.0.up_proj"}),
        (["lm_head"], {"lm_head"}),
        (["proj", "q_proj", "k_proj"], {"layers.0.q_proj", "layers.1.q_proj"}),
        (r".*\.[qv]_proj", {name for name in ALL if "up" not in name}),
        (r"layers\.1\..*", {name for name in ALL if name.startswith("layers.1")}),
    ],
)
def test_layers_are_chosen_by_pefts_rules(targets: Any, found: set[str]) -> None:
    one = pykern.add_lora(model(), targets, r=2)
    assert {name for name, _ in adapters(one)} == found
    trained = {name for name, parameter in one.named_parameters() if parameter.requires_grad}
    assert trained == {f"{name}.lora_{matrix}.weight" for name in found for matrix in "AB"}
    assert torch.allclose(one(IDS), model()(IDS), atol=1e-5)


def test_the_options_reach_every_layer() -> None:
    one = pykern.add_lora(
        model().bfloat16(),
        ["q_proj", "v_proj"],
        r=4,
        alpha=6,
        dropout=0.1,
        use_dora=True,
        use_rslora=True,
        rank_pattern={"layers.1.*": 16},
        alpha_pattern={"v_proj": 8, "q": 5},
        dtype=torch.bfloat16,
    )
    layers = dict(adapters(one))
    assert {name: layer.r for name, layer in layers.items()} == {
        "layers.0.q_proj": 4,
        "layers.0.v_proj": 4,
        "layers.1.q_proj": 16,
        "layers.1.v_proj": 16,
    }
    assert [layers[f"layers.{i}.{n}_proj"].scaling for i in (0, 1) for n in "qv"] == [6 / 2, 8 / 2, 6 / 4, 8 / 4]
    assert all(a.dropout == 0.1 and a.use_dora and a.lora_A.weight.dtype == torch.bfloat16 for a in layers.values())


def test_a_layer_under_two_names_gets_one_adapter() -> None:
    one = model()
    one.layers.append(one.layers[0])
    pykern.add_lora(one, ["q_proj"])
    assert one.layers[2].q_proj is one.layers[0].q_proj and isinstance(one.layers[0].q_proj, LoRALinear)


def test_adapters_are_added_to_adapted_models() -> None:
    one = pykern.add_lora(pykern.add_lora(model(), ["q_proj"]), ["experts_of_none", "v_proj"], r=2)
    assert {name for name, _ in adapters(one)} == {name for name in ALL if "up" not in name}
    assert one.layers[0].q_proj.lora_A.weight.requires_grad
    pykern.add_lora(one, "all-linear")
    assert {name for name, _ in adapters(one)} == ALL
    assert type(one.layers[0].q_proj.base_layer) is nn.Linear


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"target_modules": ["k_proj"]},
            ValueError,
            "nothing matches k_proj: .* Model end with q_proj, v_proj, up_proj",
        ),
        ({"target_modules": "q_proj"}, ValueError, "nothing matches q_proj"),
        ({"target_modules": []}, ValueError, "nothing matches an empty list"),
        (
            {"target_modules": None},
            TypeError,
            "target_modules: expected a name, a regular expression or names, got None",
        ),
        ({"target_modules": "*"}, ValueError, r"target_modules: '\*' is no regular expression"),
        ({"target_modules": [], "target_parameters": ["gate"]}, ValueError, "nothing matches an empty list or gate"),
        ({"target_modules": ["embed"]}, TypeError, "target_modules: embed: base_layer: .*Embedding"),
        ({"target_modules": ["q_proj", "layers.0"]}, TypeError, "target_modules: layers.0: base_layer: expected"),
        ({"r": 0}, ValueError, "r: expected a rank of 1 or more, got 0"),
        ({"rank_pattern": {"q_proj": 0}}, ValueError, "r: expected a rank of 1 or more, got 0"),
        ({"target_parameters": ["up"], "dropout": 0.1}, ValueError, "neither dropout nor DoRA"),
        ({"target_parameters": ["up"], "use_dora": True}, ValueError, "neither dropout nor DoRA"),
    ],
)
def test_what_cannot_be_adapted_leaves_the_model_as_it_was(options: dict, error: type, message: str) -> None:
    one = model()
    names = [name for name, _ in one.named_modules()]
    with pytest.raises(error, match=message):
        pykern.add_lora(one, **options)
    assert [name for name, _ in one.named_modules()] == names
    assert all(parameter.requires_grad for parameter in one.parameters())


def test_a_second_adapter_on_a_layer_is_an_error() -> None:
    one = adapted(target_modules=["q_proj"])
    with pytest.raises(ValueError, match="layers.0.q_proj has an adapter already"):
        pykern.add_lora(one, ["q_proj"])
    for name in ("experts.up", "experts.down"):
        one = adapted(target_modules=["q_proj"], target_parameters=["experts.up"])
        with pytest.raises(ValueError, match="target_parameters: experts has adapters already, give it all of them"):
            pykern.add_lora(one, ["v_proj"], target_parameters=[name])
    with pytest.raises(ValueError, match="a Linear cannot be replaced in place"):
        pykern.add_lora(nn.Linear(3, 4))


def test_4bit_models_are_adapted_and_adapted_models_quantised() -> None:
    one = learnt(pykern.add_lora(pykern.quantize_model(model(), blocksize=32), r=4, alpha=6))
    other = learnt(pykern.add_lora(model(), r=4, alpha=6))
    pykern.quantize_model(other, blocksize=32)
    for layers in (one.layers, other.layers):
        assert all(isinstance(layer.q_proj.base_layer, Linear4bit) for layer in layers)
    for name, adapter in adapters(one):
        other.get_submodule(name).lora_A.load_state_dict(adapter.lora_A.state_dict())
    assert torch.equal(one(IDS), other(IDS))
    one(IDS).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in one.parameters())


def test_quantising_leaves_adapters_alone() -> None:
    one = adapted()
    before = {name: tensor.clone() for name, tensor in one.state_dict().items() if "lora_" in name}
    pykern.quantize_model(one, blocksize=32)
    after = one.state_dict()
    assert len(before) == 8 * 2 and all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert one.experts.parametrizations.up.original.dtype == torch.float32, "it has another parametrization already"


def whole_experts(one: nn.Module, plain: Experts) -> Experts:
    """The experts with their adapters in the weights."""
    whole = copy.deepcopy(plain)
    for name in ("up", "down"):
        adapter = next(a for n, a in adapters(one) if n == f"experts.{name}")
        a, b = adapter.lora_A.weight, adapter.lora_B.weight
        update = torch.stack([adapter.scaling * b[e] @ a[e] for e in range(len(a))])
        delattr(whole, name)
        setattr(whole, name, getattr(plain, name).detach() + update)
    return whole


@pytest.mark.parametrize("quantized", [False, True])
def test_experts_have_adapters_of_their_own(quantized: bool) -> None:
    base = pykern.quantize_model(model().double(), blocksize=32) if quantized else model().double()
    one = learnt(pykern.add_lora(base, [], r=4, alpha=6, target_parameters=["experts.up", "down"], dtype=torch.float64))
    assert [name for name, _ in adapters(one)] == ["experts.up", "experts.down"]
    trained = [name for name, parameter in one.named_parameters() if parameter.requires_grad]
    assert len(trained) == 4 and all("lora_" in name for name in trained)
    plain = model().double().experts
    if quantized:
        decoded = pykern.quantize_model(model().double(), blocksize=32).experts
        plain.up, plain.down = nn.Parameter(decoded.up.detach()), nn.Parameter(decoded.down.detach())
    x = torch.randn(5, 32, dtype=torch.float64)
    whole = whole_experts(one, plain)
    assert torch.allclose(one.experts(x), whole(x), rtol=1e-12)
    leaves = [p for p in one.parameters() if p.requires_grad]
    found, wanted = (torch.autograd.grad(e(x).square().sum(), leaves) for e in (one.experts, whole))
    assert all(torch.allclose(a, b, rtol=1e-10) and b.any() for a, b in zip(found, wanted, strict=True))


def test_the_adapters_of_experts_start_as_those_of_layers_do() -> None:
    one = pykern.add_lora(model(), [], r=4, target_parameters=["experts.up"])
    ((_, adapter),) = adapters(one)
    assert adapter.lora_A.weight.shape == (3, 4, 32) and adapter.lora_B.weight.shape == (3, 48, 4)
    bound = 32**-0.5
    assert 0.9 * bound < adapter.lora_A.weight.abs().max() <= bound and not adapter.lora_B.weight.any()


def test_the_weights_of_experts_have_a_gradient_though_they_were_looked_at_without() -> None:
    class Counted(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = torch.nn.Parameter(torch.randn(3, 4, 5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                scale = self.up.abs().max()
            return torch.einsum("eoi,i->eo", self.up, x) / scale

    one = torch.nn.Sequential(Counted())
    pykern.add_lora(one, [], target_parameters=["up"])
    one(torch.randn(5)).sum().backward()
    ((_, adapter),) = adapters(one)
    assert adapter.lora_B.weight.grad.any()


def test_the_weights_of_experts_are_made_once_a_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    one = adapted()
    calls, add = [], torch.baddbmm
    monkeypatch.setattr(torch, "baddbmm", lambda weight, *a, **k: calls.append(weight.shape) or add(weight, *a, **k))
    one(IDS).sum().backward()
    assert calls == [(3, 48, 32), (3, 32, 48)]
    with pytest.raises(RuntimeError):
        one.experts(torch.ones(2, 31))
    assert [m._sum for m in one.modules() if isinstance(m, AddLowRank)] == [None, None]
    other = copy.deepcopy(one)
    assert torch.equal(other(IDS), one(IDS))
    with torch.no_grad():
        other.experts.parametrizations.up[0].lora_B.weight.zero_()
    assert not torch.equal(other(IDS), one(IDS))


def test_experts_of_the_small_model_are_adapted() -> None:
    torch.manual_seed(0)
    config = PRESETS["mixtral-tiny"](num_layers=1, width=32, ffn_width=48, num_heads=2, num_kv_heads=1, vocab_size=64)
    one = Transformer(config)
    before = one(IDS)
    learnt(pykern.add_lora(one, target_parameters=["mlp.gate_up", "mlp.down"], r=4))
    assert {name for name, _ in adapters(one)} == {
        "blocks.0.attention.qkv",
        "blocks.0.attention.output",
        "blocks.0.mlp.router",
        "blocks.0.mlp.gate_up",
        "blocks.0.mlp.down",
    }
    after = one(IDS, targets=IDS)
    after.backward()
    assert all((p.grad is not None and p.grad.any()) == p.requires_grad for p in one.parameters())
    assert not torch.allclose(one(IDS), before)


@pytest.mark.parametrize("fp32", [False, True])
def test_the_small_models_head_is_adapted_when_it_is_named(fp32: bool) -> None:
    torch.manual_seed(0)
    one = Transformer(PRESETS["mistral-tiny"](num_layers=1, width=32, num_heads=2, num_kv_heads=1, vocab_size=64))
    hidden = torch.randn(3, 32)
    plain = one.logits(hidden)
    learnt(pykern.add_lora(one, ["head"], r=4))
    with torch.autocast("cpu", torch.bfloat16):
        logits = one.logits(hidden, fp32=fp32)
    assert logits.dtype == (torch.float32 if fp32 else torch.bfloat16)
    assert torch.allclose(logits.float(), one.head(hidden), rtol=1e-6 if fp32 else 0.05, atol=1e-6 if fp32 else 0.05)
    assert not torch.allclose(logits.float(), plain, atol=0.05)


@pytest.mark.parametrize("quantized", [False, True])
def test_merging_a_model_leaves_plain_layers(quantized: bool) -> None:
    one = pykern.quantize_model(model(), blocksize=32) if quantized else model()
    one.layers.append(one.layers[0])
    learnt(pykern.add_lora(one, r=4, alpha=6, target_parameters=["experts.up"]))
    expected = one(IDS)
    assert pykern.merge_lora(one) is one
    assert torch.allclose(one(IDS), expected, atol=1e-4)
    assert type(one.layers[0].q_proj) is nn.Linear and one.layers[2] is one.layers[0]
    assert type(one.experts.up) is nn.Parameter and not one.experts.up.requires_grad
    with pytest.raises(ValueError, match="Model has no adapters to merge"):
        pykern.merge_lora(one)


def test_dequantising_a_model_leaves_the_values_that_it_had() -> None:
    one = pykern.quantize_model(model(), blocksize=32)
    one.layers.append(one.layers[0])
    expected = one(IDS)
    assert dequantize_model(one) is one
    assert torch.allclose(one(IDS), expected, atol=1e-5)
    assert {name for name, _ in one.named_parameters()} == {name for name, _ in model().named_parameters()}
    assert one.layers[2] is one.layers[0] and type(one.layers[0].q_proj) is nn.Linear
    assert not one.layers[0].q_proj.weight.requires_grad and one.layers[0].q_proj.bias.requires_grad
    assert type(one.experts) is Experts and not one.experts.up.requires_grad


# Files; those of PEFT itself are in test_peft.py


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"rank_pattern": {"v_proj": 2, "experts.up": 3}}], ids=str
)
def test_saved_adapters_are_loaded_as_they_were(options: dict[str, Any], tmp_path: Path) -> None:
    one = adapted(alpha_pattern={"layers.0.q_proj": 5}, **options)
    pykern.save_adapter(one, tmp_path / "new/folder")
    other = pykern.load_adapter(model(), tmp_path / "new/folder").eval()
    assert torch.equal(one(IDS), other(IDS))
    assert other.state_dict().keys() == one.state_dict().keys()
    again = pykern.load_adapter(
        pykern.add_lora(
            model(),
            **{"r": 4, "alpha": 6, "target_parameters": ["up", "down"], "alpha_pattern": {"layers.0.q_proj": 5}}
            | options,
        ),
        tmp_path / "new/folder",
    )
    assert torch.equal(one(IDS), again.eval()(IDS))


def test_a_file_says_which_layers_it_is_for(tmp_path: Path) -> None:
    def targets(one: nn.Module) -> Any:
        pykern.save_adapter(one, tmp_path)
        return json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]

    assert targets(adapted(target_modules=["q_proj"], target_parameters=[])) == ["q_proj"]
    assert targets(adapted(target_modules=[])) == []
    some = adapted(target_modules=["0.q_proj", "1.v_proj"], use_dora=True, target_parameters=[])
    assert targets(some) == r"layers\.0\.q_proj|layers\.1\.v_proj"
    assert torch.equal(pykern.load_adapter(model(), tmp_path).eval()(IDS), some(IDS))


def rewritten(folder: Path, change: Callable[[dict[str, Tensor]], Any], **settings: Any) -> Path:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **settings}))
    return folder


PREFIX = "base_model.model."
KEY = f"{PREFIX}layers.0.q_proj.lora_A.weight"


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize(
    ("change", "settings", "error", "message"),
    [
        (lambda t: t.pop(KEY), {}, KeyError, r"layers.0.q_proj.lora_A.weight: missing in .*adapter_model"),
        (
            lambda t: t.update({PREFIX + "x.lora_A.weight": t[KEY] + 0}),
            {},
            ValueError,
            "x.lora_A.weight: the model has",
        ),
        (
            lambda t: t.update({"x": t[KEY] + 0}),
            {},
            ValueError,
            "x: expected a name that begins with base_model.model.",
        ),
        (lambda t: t.update({KEY: t[KEY][:-1] + 0}), {}, ValueError, r"q_proj.lora_A.weight: expected shape \(4, 32\)"),
        (lambda t: None, {"bias": "all"}, ValueError, "bias is 'all', which no adapter here has"),
        (lambda t: None, {"modules_to_save": ["x"]}, ValueError, r"modules_to_save is \['x'\], which no adapter"),
        (lambda t: None, {"peft_type": "LOHA"}, ValueError, "peft_type: expected LORA, got LOHA"),
        (lambda t: None, {"init_lora_weights": "pissa"}, ValueError, "init_lora_weights is 'pissa', which changes"),
    ],
)
def test_files_that_do_not_fit(
    change: Any, settings: dict[str, Any], error: type, message: str, fresh: bool, tmp_path: Path
) -> None:
    pykern.save_adapter(adapted(target_modules=["q_proj"], target_parameters=[]), tmp_path)
    rewritten(tmp_path, change, **settings)
    one = model() if fresh else adapted(target_modules=["q_proj"], target_parameters=[])
    before = {name: parameter.requires_grad for name, parameter in one.named_parameters()}
    with pytest.raises(error, match=message):
        pykern.load_adapter(one, tmp_path)
    assert {name: parameter.requires_grad for name, parameter in one.named_parameters()} == before


def test_adapters_of_other_settings_are_not_loaded(tmp_path: Path) -> None:
    pykern.save_adapter(adapted(target_modules=["q_proj"], target_parameters=[]), tmp_path)
    for options, message in (
        ({"alpha": 8}, "layers.0.q_proj: expected a scaling of 1.5, as in the files, got 2.0"),
        ({"use_rslora": True}, "expected a scaling of 1.5"),
        ({"use_dora": True}, "layers.0.q_proj: expected use_dora=False"),
    ):
        one = adapted(target_modules=["q_proj"], target_parameters=[], **options)
        with pytest.raises(ValueError, match=message):
            pykern.load_adapter(one, tmp_path)


def test_nothing_to_save_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Model has no adapters to save"):
        pykern.save_adapter(model(), tmp_path)
    mixed = pykern.add_lora(pykern.add_lora(model(), ["q_proj"]), ["v_proj"], dropout=0.5)
    with pytest.raises(ValueError, match="dropout: expected the same in all layers, got 0.0, 0.5"):
        pykern.save_adapter(mixed, tmp_path)

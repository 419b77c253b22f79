"""Models quantised in place and from files: what becomes 4-bit, what stays, and how much memory it takes."""

import copy
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import pykern
from pykern import ops
from pykern.nn import Linear4bit
from pykern.nn.quantize_model import Decode4bit
from pykern.ops import Weight4bit, dequantize_4bit, quantize_4bit


class Experts(nn.Module):
    """Fused as in transformers: looked up one by one."""

    def __init__(self, count: int = 3, width: int = 32, hidden: int = 48) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(count, hidden, width))
        self.down = nn.Parameter(torch.randn(count, width, hidden))
        self.bias = nn.Parameter(torch.randn(count, width))

    def forward(self, x: Tensor) -> Tensor:
        parts = [F.linear(F.linear(x, self.up[i]).relu(), self.down[i], self.bias[i]) for i in range(len(self.bias))]
        return torch.stack(parts).sum(0)


class Model(nn.Module):
    def __init__(self, tie: bool = True, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 32)
        self.position = nn.Parameter(torch.randn(1, 8, 32))  # 3-D, but no experts
        self.layers = nn.ModuleList(nn.Linear(32, 32, bias=i % 2 == 0) for i in range(layers))
        self.experts = Experts()
        self.norm = nn.LayerNorm(32)
        self.lm_head = nn.Linear(32, 40, bias=False)
        self.register_buffer("scale", torch.ones(()))
        if tie:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.position[:, : ids.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(self.experts(x) * self.scale))


def model(**options: Any) -> Model:
    torch.manual_seed(0)
    return Model(**options)


IDS = torch.arange(12).reshape(2, 6)
BLOCKS = {"blocksize": 32}


def of_dequantised_weights(plain: Model, **options: Any) -> Model:
    """The float model that a quantised one computes."""
    other = copy.deepcopy(plain)
    with torch.no_grad():
        for weight in (*(layer.weight for layer in other.layers), other.experts.up, other.experts.down):
            weight.copy_(dequantize_4bit(quantize_4bit(weight, **options)))
    return other


def packed(one: nn.Module) -> dict[str, Tensor]:
    return {name: t for name, t in one.state_dict().items() if t.dtype == torch.uint8 and t.dim() == 1}


@pytest.mark.parametrize(
    "options", [BLOCKS, BLOCKS | {"double_quant": True}, {"quant_type": "int4", "blocksize": 16, "symmetric": False}]
)
def test_computes_with_the_dequantised_weights(options: dict[str, Any]) -> None:
    plain = model()
    quantized = copy.deepcopy(plain)
    assert pykern.quantize_model(quantized, **options) is quantized
    reference = of_dequantised_weights(plain, **options)
    logits, expected = quantized(IDS), reference(IDS)
    assert (logits - expected).norm() <= 1e-5 * expected.norm()
    assert (logits - plain(IDS)).norm() > 0.01 * expected.norm()
    for one in (logits, expected):
        one.square().sum().backward()
    for name in ("embed.weight", "position", "layers.0.bias", "experts.bias", "norm.weight"):
        got, wanted = quantized.get_parameter(name).grad, reference.get_parameter(name).grad
        assert (got - wanted).norm() <= 1e-5 * wanted.norm(), name


def test_what_is_quantised_and_what_is_left_alone() -> None:
    class Special(nn.Linear):
        pass

    plain = model()
    plain.extra = nn.ModuleDict({"special": Special(32, 32), "conv": nn.Conv1d(4, 4, 3)})
    plain.layers[1].requires_grad_(False)
    plain.layers.append(plain.layers[0])  # one layer under two names
    plain.eval()
    floats = dict(plain.named_parameters())
    pykern.quantize_model(plain)
    kinds = {name for name, module in plain.named_modules(remove_duplicate=False) if isinstance(module, Linear4bit)}
    assert kinds == {"layers.0", "layers.1", "layers.2"}
    assert plain.layers[0] is plain.layers[2] and not plain.layers[0].training
    assert plain.layers[0].bias is floats["layers.0.bias"] and plain.layers[0].bias.requires_grad
    assert plain.lm_head.weight is plain.embed.weight is floats["embed.weight"]
    for name in ("position", "experts.bias", "extra.special.weight", "extra.conv.weight"):
        assert plain.get_parameter(name) is floats[name]
    assert [n for n, p in plain.experts.named_parameters() if p.dtype == torch.uint8] == [
        "parametrizations.up.original",
        "parametrizations.down.original",
    ]
    assert plain.experts.up.shape == (3, 48, 32) and plain.experts.up.dtype == torch.float32


def test_shared_parameters_stay_where_they_are_named_nowhere() -> None:
    plain = model()
    pykern.quantize_model(plain, skip=())
    assert type(plain.lm_head) is nn.Linear and plain.lm_head.weight is plain.embed.weight
    untied = pykern.quantize_model(model(tie=False), skip=())
    assert isinstance(untied.lm_head, Linear4bit)


@pytest.mark.parametrize(
    "skip, quantized",
    [
        (("lm_head",), {"layers.0", "layers.1", "experts.up", "experts.down"}),
        (("lm_head", "layers.0"), {"layers.1", "experts.up", "experts.down"}),
        (("lm_head", "layers"), {"experts.up", "experts.down"}),
        (("lm_head", "experts.up", "1"), {"layers.0", "experts.down"}),
        (("lm_head", "experts", "layer"), {"layers.0", "layers.1"}),
    ],
)
def test_skips_what_is_named(skip: tuple[str, ...], quantized: set[str]) -> None:
    one = pykern.quantize_model(model(tie=False), skip=skip)
    found = {name for name, module in one.named_modules() if isinstance(module, Linear4bit)}
    found |= {
        name.replace("parametrizations.", "").removesuffix(".0")
        for name, module in one.named_modules()
        if isinstance(module, Decode4bit)
    }
    assert found == quantized


def test_nothing_to_quantise_is_an_error() -> None:
    with pytest.raises(ValueError, match="Model has nothing to quantise; skipped: lm_head, layers, experts"):
        pykern.quantize_model(model(), skip=("lm_head", "layers", "experts"))
    with pytest.raises(ValueError, match="Sequential has nothing to quantise"):
        pykern.quantize_model(nn.Sequential(nn.GELU()), skip=())
    with pytest.raises(ValueError, match="a Linear cannot be replaced in place"):
        pykern.quantize_model(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="blocksize: expected one of"):
        pykern.quantize_model(model(), blocksize=33)


def test_experts_are_decoded_once_a_forward_pass_and_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    one = pykern.quantize_model(model(), **BLOCKS)
    calls = []
    decode = ops.dequantize_4bit
    monkeypatch.setattr(ops, "dequantize_4bit", lambda w, dtype: calls.append(w.shape) or decode(w, dtype))
    with torch.no_grad():
        one(IDS)
    assert calls == [(3, 48, 32), (3, 32, 48)]
    assert [m._decoded for m in one.modules() if isinstance(m, Decode4bit)] == [None, None]
    with torch.no_grad():
        one.experts.bfloat16()
        assert one.experts(torch.ones(2, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16
        one.experts.bias.data = one.experts.bias.data.half()  # as mixed precision does, which casts parameters alone
        assert one.experts(x=torch.ones(2, 32, dtype=torch.float16)).dtype == torch.float16
        one.float()
    with pytest.raises(RuntimeError):
        one.experts(torch.ones(2, 31))
    assert one.experts.up is not one.experts.up, "after an error nothing is kept either"


def test_a_quantised_model_compiles_whole() -> None:
    one = pykern.quantize_model(model(), **BLOCKS)
    expected = one(IDS)
    torch._dynamo.reset()
    logits = torch.compile(one, fullgraph=True, backend="aot_eager")(IDS)
    torch._dynamo.reset()
    assert (logits - expected).norm() <= 1e-6 * expected.norm()


def test_casts_copies_and_state_dicts_keep_experts_exact(tmp_path: Path) -> None:
    one = pykern.quantize_model(model(tie=False), double_quant=True, **BLOCKS)
    other = copy.deepcopy(one).half().bfloat16()
    assert torch.equal(other.experts.up, one.experts.up.bfloat16()), "rounded once, from the same codes"
    assert other(IDS).dtype == torch.bfloat16
    assert packed(one).keys() == packed(other).keys() and len(packed(one)) > 8
    assert all(torch.equal(t, packed(other)[name]) for name, t in packed(one).items())
    save_file(one.state_dict(), tmp_path / "model.safetensors")
    with torch.device("meta"):
        skeleton = pykern.quantize_model(Model(tie=False), double_quant=True, **BLOCKS)
    skeleton.load_state_dict(load_file(tmp_path / "model.safetensors"), assign=True)
    assert torch.equal(skeleton(IDS), one(IDS))


def test_quantising_frees_each_weight_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    one = model(tie=False, layers=5)
    originals = [weakref.ref(layer.weight) for layer in one.layers]
    originals += [weakref.ref(one.experts.up), weakref.ref(one.experts.down)]
    alive = []
    quantize = ops.quantize_4bit

    def note(weight: Tensor, **options: Any) -> Weight4bit:
        alive.append(sum(original() is not None for original in originals))
        return quantize(weight, **options)

    monkeypatch.setattr(ops, "quantize_4bit", note)
    pykern.quantize_model(one)
    assert alive == [7, 6, 5, 4, 3, 2, 1] and not any(original() is not None for original in originals)


def test_sharding_with_mixed_precision_keeps_experts_exact(tmp_path: Path) -> None:
    reference = pykern.quantize_model(model(tie=False), **BLOCKS)
    before = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    one = copy.deepcopy(reference)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        fully_shard(one.experts, mesh=dist.init_device_mesh("cpu", (1,)), mp_policy=policy)
        x = torch.randn(4, 32, requires_grad=True)
        y = one.experts(x)
        y.float().sum().backward()
        assert torch.equal(y, reference.experts.bfloat16()(x.bfloat16())) and x.grad.any()
        for name, tensor in one.state_dict().items():
            whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            assert whole.dtype == before[name].dtype and torch.equal(whole, before[name]), name
    finally:
        dist.destroy_process_group()


class Live(TorchDispatchMode):
    """The most bytes that tensors which an op saw or made held at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves((args, kwargs, result)):
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.storages = {key: entry for key, entry in self.storages.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.storages.values()))
        return result


def shards(one: nn.Module, folder: Path, count: int = 2) -> Path:
    state = {name: tensor for name, tensor in one.state_dict().items() if name != "lm_head.weight"}
    names = list(state)
    for i in range(count):
        save_file({name: state[name] for name in names[i::count]}, folder / f"model-{i}.safetensors")
    return folder


def empty(**options: Any) -> Model:
    with torch.device("meta"):
        one = Model(**options)
    one.scale = torch.zeros(())
    return one


def test_loading_floats_is_load_state_dict_and_quantize_model(tmp_path: Path) -> None:
    plain = model()
    folder = shards(plain, tmp_path)
    expected = pykern.quantize_model(copy.deepcopy(plain), **BLOCKS)
    skeleton = empty()
    skeleton.norm.requires_grad_(False)
    loaded = pykern.load_quantized(skeleton, folder, **BLOCKS)
    state = expected.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == state[name].dtype and torch.equal(tensor, state[name]), name
    assert loaded.lm_head.weight is loaded.embed.weight
    assert not loaded.norm.weight.requires_grad and loaded.embed.weight.requires_grad
    assert torch.equal(loaded(IDS), expected(IDS))
    files = sorted(folder.glob("*.safetensors"))
    narrow = pykern.load_quantized(empty().bfloat16(), files, skip=("lm_head", "layers.1"), **BLOCKS)
    assert narrow.layers[1].weight.dtype == torch.bfloat16 and type(narrow.layers[1]) is nn.Linear
    assert narrow.layers[0].weight4bit.dtype == torch.bfloat16


def test_loading_ties_what_was_untied_on_the_way(tmp_path: Path) -> None:
    class Tying(Model):
        def tie_weights(self) -> None:
            self.lm_head.weight = self.embed.weight

    plain = model()
    with torch.device("meta"):
        one = Tying(tie=False)
    one.scale = torch.zeros(())
    pykern.load_quantized(one, shards(plain, tmp_path), **BLOCKS)
    assert one.lm_head.weight is one.embed.weight and torch.equal(one.embed.weight, plain.embed.weight)


def test_loading_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    def stack() -> nn.Sequential:
        return nn.Sequential(*(nn.Linear(128, 128, bias=False) for _ in range(12)))

    save_file(stack().state_dict(), tmp_path / "model.safetensors")
    with torch.device("meta"):
        one = stack()
    with Live() as live:
        pykern.load_quantized(one, tmp_path)
    final = sum(t.untyped_storage().nbytes() for t in one.state_dict().values())
    tensor = 128 * 128 * 4
    assert final < 12 * tensor / 5
    assert tensor < live.peak <= final + 1.5 * tensor


def gptq(linear: nn.Linear, name: str, awq: bool = False) -> Iterator[tuple[str, Tensor]]:
    out, features = linear.weight.shape
    words = (features, out // 8) if awq else (features // 8, out)
    generator = torch.Generator().manual_seed(len(name))
    yield f"{name}.qweight", torch.randint(-(2**31), 2**31, words, generator=generator, dtype=torch.int32)
    yield f"{name}.qzeros", torch.full((2, out // 8), 0x77777777, dtype=torch.int32)
    yield f"{name}.scales", torch.rand(2, out, generator=generator)
    if not awq:
        yield f"{name}.g_idx", (torch.arange(features) // (features // 2)).flip(0).int()


@pytest.mark.parametrize("kind", ["bitsandbytes", "gptq", "awq"])
def test_loading_what_is_quantised_takes_it_as_it_is(kind: str, tmp_path: Path) -> None:
    plain = model()
    state = {name: tensor for name, tensor in plain.state_dict().items() if name != "lm_head.weight"}
    weights = {}
    for i, linear in enumerate(plain.layers):
        name = f"layers.{i}"
        del state[f"{name}.weight"]
        if kind == "bitsandbytes":
            weights[name] = quantize_4bit(linear.weight, double_quant=True, blocksize=32)
            state |= weights[name].to_bitsandbytes(f"{name}.weight")
        else:
            parts = dict(gptq(linear, name, kind == "awq"))
            read = Weight4bit.from_awq if kind == "awq" else Weight4bit.from_gptq
            weights[name] = read(**{key.rpartition(".")[2]: tensor for key, tensor in parts.items()})
            state |= parts
    names = sorted(state)
    for i in range(2):  # what belongs together is in different files
        save_file({name: state[name] for name in names[i::2]}, tmp_path / f"{i}.safetensors")
    loaded = pykern.load_quantized(empty(), tmp_path)
    for name, weight in weights.items():
        layer = loaded.get_submodule(name)
        assert isinstance(layer, Linear4bit) and torch.equal(dequantize_4bit(layer.weight4bit), dequantize_4bit(weight))
        assert (layer.order is not None) == (kind == "gptq")
    assert torch.equal(loaded.layers[0].bias, plain.layers[0].bias)
    assert type(loaded.experts.up) is nn.Parameter, "what is stored as floats stays so"
    assert loaded(IDS).isfinite().all()


def test_bad_checkpoints(tmp_path: Path) -> None:
    plain = model()
    folder = shards(plain, tmp_path)
    first, second = sorted(folder.glob("*.safetensors"))
    with pytest.raises(KeyError, match="missing in the checkpoint"):
        pykern.load_quantized(empty(), first)
    with pytest.raises(ValueError, match="in another file"):
        pykern.load_quantized(empty(), [first, second, first])
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="files: expected safetensors files or a folder of them"):
        pykern.load_quantized(empty(), tmp_path / "none")
    with pytest.raises(ValueError, match="expected its parameters on the meta device, position, .* and 5 more are not"):
        pykern.load_quantized(model(), folder)
    with pytest.raises(ValueError, match="nothing to quantise"):
        pykern.load_quantized(empty(), folder, skip=("lm_head", "layers", "experts"))
    with pytest.raises(ValueError, match=r"layers.0.weight: expected shape \(16, 16\), got \(32, 32\)"):
        smaller = empty()
        smaller.layers[0] = nn.Linear(16, 16, device="meta")
        pykern.load_quantized(smaller, folder)
    with pytest.raises(ValueError, match="layers.1.weight: the model has no place"):
        pykern.load_quantized(empty(layers=1), folder)
    pykern.load_quantized(empty(layers=1), folder, strict=False)
    broken = quantize_4bit(plain.layers[0].weight).to_bitsandbytes("layers.0.weight")
    del broken["layers.0.weight.absmax"]
    save_file(broken, tmp_path / "none/broken.safetensors")
    with pytest.raises(KeyError, match="layers.0.weight.absmax: missing"):
        pykern.load_quantized(empty(), tmp_path / "none")

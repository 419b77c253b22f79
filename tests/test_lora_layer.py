"""LoRALinear: what it computes on float and 4-bit weights, what it keeps in memory, merging, and where it is used."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from pykern.nn import Linear4bit, LoRALinear
from pykern.ops import dequantize_4bit, quantize_4bit

OUT, IN, R = 48, 64, 6


def linear(dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(IN, OUT, bias=bias, dtype=dtype)


def adapted(base: nn.Linear | Linear4bit, r: int = R, **options: Any) -> LoRALinear:
    """A layer whose adapter is of the weight's size, so that nothing it does wrong is lost in rounding."""
    torch.manual_seed(2)
    layer = LoRALinear(base, r, alpha=1.5 * r, **options)
    with torch.no_grad():
        layer.lora_B.weight.normal_(std=0.3)
        if layer.lora_magnitude_vector is not None:
            layer.lora_magnitude_vector.mul_(torch.rand(OUT) + 0.5)
    return layer


def inputs(dtype: torch.dtype = torch.float32, rows: int = 10) -> Tensor:
    return torch.randn(rows, IN, generator=torch.Generator().manual_seed(3)).to(dtype)


def exact_weight(layer: LoRALinear, weight: Tensor, a: Tensor, b: Tensor, magnitude: Tensor | None) -> Tensor:
    """The adapted weight by the definition of LoRA or DoRA, the norm without gradient."""
    whole = weight + layer.scaling * b @ a
    if magnitude is None:
        return whole
    return (magnitude / whole.detach().norm(dim=1)).unsqueeze(1) * whole


def parts(layer: LoRALinear) -> list[Tensor | None]:
    """Weight, adapter and magnitude in fp64."""
    base = layer.base_layer
    weight = dequantize_4bit(base.weight4bit, torch.float64) if isinstance(base, Linear4bit) else base.weight
    tensors = (weight, layer.lora_A.weight, layer.lora_B.weight, layer.lora_magnitude_vector)
    return [None if t is None else t.detach().double().requires_grad_() for t in tensors]


OPTIONS = [{}, {"use_dora": True}, {"use_rslora": True}, {"use_dora": True, "use_rslora": True}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", ["float", "4bit"])
def test_values_and_gradients_are_those_of_the_definition(kind: str, options: dict[str, Any]) -> None:
    base = linear(torch.float64)
    if kind == "4bit":
        base = Linear4bit.from_linear(linear(), blocksize=32)
        base.bias = nn.Parameter(base.bias.double())
    layer = adapted(base, dtype=torch.float64, **options)
    assert layer.scaling == (1.5 * R / R**0.5 if options.get("use_rslora") else 1.5)
    x = inputs(torch.float64).requires_grad_()
    y = layer(x)
    exact = parts(layer)
    expected = x @ exact_weight(layer, *exact).T + base.bias
    assert (y - expected).norm() <= 1e-12 * expected.norm()
    dy = torch.randn_like(y)
    own = [layer.lora_A.weight, layer.lora_B.weight, base.bias, x]
    wanted = [exact[1], exact[2], base.bias, x]
    if layer.use_dora:
        own.append(layer.lora_magnitude_vector)
        wanted.append(exact[3])
    if kind == "float":
        own.append(base.weight)
        wanted.append(exact[0])
    found = torch.autograd.grad(y, own, dy)
    for got, one in zip(found, torch.autograd.grad(expected, wanted, dy), strict=True):
        assert one.norm() > 0 and (got - one).norm() <= 1e-12 * one.norm()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_adapter_has_pefts_start_and_no_effect(dtype: torch.dtype, options: dict[str, Any]) -> None:
    base = linear(dtype)
    layer = LoRALinear(base, 8, alpha=16, **options)
    a, b = layer.lora_A.weight, layer.lora_B.weight
    assert a.dtype == b.dtype == torch.float32 and a.requires_grad and b.requires_grad
    assert not b.any()
    bound = IN**-0.5
    assert 0.9 * bound < a.abs().max() <= bound and abs(a.mean()) < bound / 10
    expected = F.linear(inputs(dtype).double(), base.weight.double(), base.bias.double())
    rounding = (expected.to(dtype).double() - expected).norm()
    assert (layer(inputs(dtype)).double() - expected).norm() <= 2 * rounding + 1e-6 * expected.norm()


def test_names_in_the_state_dict_are_pefts() -> None:
    layer = LoRALinear(linear(), use_dora=True)
    assert set(layer.state_dict()) == {
        "base_layer.weight",
        "base_layer.bias",
        "lora_A.weight",
        "lora_B.weight",
        "lora_magnitude_vector",
    }
    assert torch.allclose(layer.lora_magnitude_vector, layer.base_layer.weight.norm(dim=1))
    other = LoRALinear(nn.Linear(IN, OUT), R, alpha=1.5 * R, use_dora=True)
    other.load_state_dict(adapted(linear(), use_dora=True).state_dict())
    assert torch.equal(other(inputs()), adapted(linear(), use_dora=True)(inputs()))


def test_dropout_is_for_training_alone() -> None:
    layer = adapted(linear(), dropout=0.5)
    assert layer.training and not torch.equal(layer(inputs()), layer(inputs()))
    layer.eval()
    assert torch.equal(layer(inputs()), adapted(linear())(inputs()))
    all_dropped = adapted(linear(), dropout=1.0)
    torch.testing.assert_close(all_dropped(inputs()), F.linear(inputs(), *all_dropped.base_layer.parameters()))
    assert not LoRALinear(linear().eval()).training


def test_a_frozen_base_gets_no_gradient() -> None:
    layer = adapted(linear().requires_grad_(False), use_dora=True)
    layer(inputs()).sum().backward()
    assert layer.base_layer.weight.grad is None and layer.base_layer.bias.grad is None
    assert all(p.grad.any() for p in (layer.lora_A.weight, layer.lora_B.weight, layer.lora_magnitude_vector))


def test_fp32_adapters_on_a_bf16_base_lose_nothing() -> None:
    layer = adapted(linear(torch.bfloat16))
    x, dy = inputs(torch.bfloat16), torch.randn(10, OUT).bfloat16()
    y = layer(x)
    y.backward(dy)
    assert y.dtype == torch.bfloat16
    exact = parts(layer)
    expected = x.double() @ exact_weight(layer, *exact).T + layer.base_layer.bias.double()
    expected.backward(dy.double())
    for own, wanted in ((layer.lora_A.weight, exact[1]), (layer.lora_B.weight, exact[2])):
        assert own.grad.dtype == torch.float32
        assert (own.grad.double() - wanted.grad).norm() <= 1e-6 * wanted.grad.norm()


def saved_bytes(layer: nn.Module, x: Tensor) -> int:
    """What a forward pass keeps for the backward pass besides the layer's own tensors."""
    own = {t.untyped_storage().data_ptr() for t in layer.state_dict().values()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(x)
    return sum(kept.values())


@pytest.mark.parametrize("options", [{}, {"dropout": 0.3}, {"use_dora": True, "dropout": 0.3}], ids=str)
@pytest.mark.parametrize("kind", ["float", "4bit"])
def test_only_the_input_and_its_product_with_a_are_saved(kind: str, options: dict[str, Any]) -> None:
    base = linear(torch.bfloat16).requires_grad_(False)
    base = Linear4bit.from_linear(base, blocksize=64) if kind == "4bit" else base
    rows = 4096  # so that vectors of the layer's size do not count
    x = inputs(torch.bfloat16, rows)
    kept = saved_bytes(adapted(base, **options), x)
    vectors = 8 * 4 * (OUT + 4)
    assert x.nbytes <= kept <= x.nbytes + 4 * rows * R + vectors


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merging_rounds_once_and_unmerging_restores_every_bit(dtype: torch.dtype, options: dict[str, Any]) -> None:
    base = linear(dtype)
    weight, parameter = base.weight.detach().clone(), base.weight
    layer = adapted(base, **options).eval()
    before, state = layer(inputs(dtype)), copy.deepcopy(layer.state_dict())
    layer.merge()
    assert layer.merged and layer.merged_weight.dtype == dtype
    exact = exact_weight(layer, *parts(layer)).detach()
    error = (layer.merged_weight.double() - exact).norm()
    assert error <= 1.001 * (exact.to(dtype).double() - exact).norm()
    assert torch.equal(layer(inputs(dtype)), F.linear(inputs(dtype), layer.merged_weight, base.bias))
    assert layer.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in layer.state_dict().items())
    layer.unmerge()
    assert not layer.merged and torch.equal(layer(inputs(dtype)), before)
    assert base.weight is parameter and torch.equal(base.weight, weight)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=str)
def test_merging_a_4bit_base_decodes_it(options: dict[str, Any]) -> None:
    base = Linear4bit.from_linear(linear(torch.bfloat16), blocksize=32)
    layer = adapted(base, **options).eval()
    codes, before = base.weight.clone(), layer(inputs(torch.bfloat16))
    for dtype in (None, torch.float16):
        layer.merge(dtype)
        assert layer.merged_weight.dtype == (dtype or torch.bfloat16)
        exact = exact_weight(layer, *parts(layer)).detach()
        error = (layer.merged_weight.double() - exact).norm()
        assert error <= 1.001 * (exact.to(layer.merged_weight.dtype).double() - exact).norm()
        assert layer(inputs(dtype or torch.bfloat16)).dtype == (dtype or torch.bfloat16)
        layer.unmerge()
    assert base.weight.dtype == torch.uint8 and torch.equal(base.weight, codes)
    assert torch.equal(layer(inputs(torch.bfloat16)), before)


def test_merging_leaves_a_tied_weight_alone() -> None:
    head, embedding = linear(bias=False), nn.Embedding(OUT, IN)
    head.weight = embedding.weight
    layer = adapted(head)
    before = embedding.weight.detach().clone()
    layer.merge()
    assert torch.equal(embedding.weight, before) and head.weight is embedding.weight


def test_a_merged_layer_moves_copies_and_becomes_a_linear() -> None:
    layer = adapted(linear(), use_dora=True)
    layer.merge()
    plain = layer.merged_linear()
    assert type(plain) is nn.Linear and torch.equal(plain(inputs()), layer(inputs()))
    layer.unmerge()
    assert torch.equal(layer.merged_linear().weight, plain.weight)
    layer.merge()
    other = copy.deepcopy(layer).bfloat16()
    assert other.merged and other(inputs(torch.bfloat16)).dtype == torch.bfloat16
    other.unmerge()
    assert layer.merged
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(inputs()).dtype == torch.bfloat16


def test_wrong_merges_are_errors() -> None:
    layer = adapted(linear())
    with pytest.raises(RuntimeError, match="unmerge: the layer is not merged"):
        layer.unmerge()
    layer.merge()
    with pytest.raises(RuntimeError, match="merge: the layer is merged already"):
        layer.merge()
    with pytest.raises(RuntimeError, match="load_state_dict: the layer is merged"):
        layer.load_state_dict(layer.state_dict())


class Subclass(nn.Linear):
    pass


def lacking_scales() -> Linear4bit:
    base = Linear4bit.from_linear(linear())
    base.absmax = base.absmax[:-1]
    return base


def half_loaded() -> Linear4bit:
    base = Linear4bit.from_linear(linear())
    base.absmax = base.absmax.to("meta")
    return base


def hooked() -> nn.Linear:
    base = linear()
    base.register_forward_pre_hook(lambda module, args: None)
    return base


def only_codes() -> nn.Linear:
    base = linear()
    base.weight = nn.Parameter(quantize_4bit(base.weight).codes, requires_grad=False)
    return base


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (linear, {"r": 0}, ValueError, "r: expected a rank of 1 or more, got 0"),
        (linear, {"r": 2.5}, TypeError, "r: expected an integer, got 2.5"),
        (linear, {"alpha": "16"}, TypeError, "alpha: expected a number, got '16'"),
        (hooked, {}, ValueError, "base_layer: it has forward hooks, which would not be called any more"),
        (linear, {"alpha": 0.0}, ValueError, "alpha: expected a number above 0, got 0.0"),
        (linear, {"dropout": 1.5}, ValueError, "dropout: expected a probability from 0 to 1, got 1.5"),
        (lambda: nn.Embedding(3, 4), {}, TypeError, r"base_layer: expected .*, got torch.nn.modules.sparse.Embedding"),
        (lambda: Subclass(3, 4), {}, TypeError, "base_layer: expected .* got .*Subclass"),
        (only_codes, {}, TypeError, "base_layer: its quantisation is incomplete: expected a floating .* torch.uint8"),
        (lacking_scales, {}, ValueError, r"its quantisation is incomplete: weight.absmax: expected shape \(48,\), got"),
        (half_loaded, {}, ValueError, "its quantisation is incomplete: weight.absmax: expected device cpu"),
    ],
)
def test_what_cannot_be_adapted_is_said(make: Any, options: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        LoRALinear(make(), **options)


def test_adapters_of_another_dtype_or_device_are_named() -> None:
    layer = adapted(linear(torch.bfloat16), dtype=torch.float16)
    with pytest.raises(TypeError, match=r"lora_a: expected dtype torch.bfloat16 or torch.float32, got torch.float16"):
        layer(inputs(torch.bfloat16))
    layer = adapted(linear())
    layer.lora_A.to("meta")
    with pytest.raises(ValueError, match="lora_a: expected device cpu as the input, got meta"):
        layer(inputs())


def test_a_deep_copy_is_a_layer_of_its_own() -> None:
    layer = adapted(Linear4bit.from_linear(linear()), use_dora=True)
    other = copy.deepcopy(layer)
    assert torch.equal(other(inputs()), layer(inputs()))
    with torch.no_grad():
        other.lora_B.weight.zero_()
    assert layer.lora_B.weight.any()


@pytest.mark.parametrize("kind", ["float", "4bit"])
def test_it_compiles_whole(kind: str) -> None:
    base = Linear4bit.from_linear(linear()) if kind == "4bit" else linear()
    layer = adapted(base, use_dora=True)
    expected = layer(inputs())
    expected.sum().backward()
    gradient = layer.lora_A.weight.grad.clone()
    layer.zero_grad()
    torch._dynamo.reset()
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(inputs())
    y.sum().backward()
    torch._dynamo.reset()
    assert (y - expected).norm() <= 1e-6 * expected.norm()
    assert (layer.lora_A.weight.grad - gradient).norm() <= 1e-5 * gradient.norm()


@pytest.mark.parametrize("options", [{}, {"use_dora": True, "dropout": 0.2}], ids=str)
def test_autocast_computes_in_its_dtype(options: dict[str, Any]) -> None:
    for base in (linear(), Linear4bit.from_linear(linear(), blocksize=32)):
        layer = adapted(base, **options)
        x = inputs().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
        assert x.grad.dtype == layer.lora_A.weight.grad.dtype == torch.float32 and layer.lora_B.weight.grad.any()
        layer.eval()
        exact = layer(inputs())
        with torch.autocast("cpu", torch.bfloat16):
            assert 0 < (layer(inputs()) - exact).norm() < 0.02 * exact.norm()


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("kind", ["float", "4bit"])
def test_sharded_training_finds_every_gradient(kind: str) -> None:
    base = Linear4bit.from_linear(linear()) if kind == "4bit" else linear()
    layer = adapted(base.requires_grad_(False), use_dora=True)
    sharded = fully_shard(copy.deepcopy(layer), mesh=dist.init_device_mesh("cpu", (1,)))
    for one in (layer, sharded):
        one(inputs()).square().sum().backward()
    for own, other in zip(layer.parameters(), sharded.parameters(), strict=True):
        assert own.grad is None if not own.requires_grad else torch.equal(own.grad, other.grad.full_tensor())


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("kind", ["float", "4bit"])
def test_data_parallel_training_finds_every_gradient(kind: str) -> None:
    base = Linear4bit.from_linear(linear()) if kind == "4bit" else linear()
    layer = adapted(base.requires_grad_(False), use_dora=True)
    parallel = nn.parallel.DistributedDataParallel(copy.deepcopy(layer))
    for _ in range(2):  # the second pass raises where the first left a gradient out
        parallel(inputs()).square().sum().backward()
    for _ in range(2):
        layer(inputs()).square().sum().backward()
    for own, other in zip(layer.parameters(), parallel.module.parameters(), strict=True):
        assert own.requires_grad == other.requires_grad
        assert own.grad is None if not own.requires_grad else torch.equal(own.grad, other.grad)

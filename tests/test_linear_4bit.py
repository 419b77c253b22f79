"""`pykern.nn.Linear4bit`: nothing but a new weight changes its weight."""

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import pykern
from pykern.nn import Linear4bit
from pykern.ops import Weight4bit, dequantize_4bit, linear_4bit, quantize_4bit

OPTIONS: dict[str, dict[str, Any]] = {
    "nf4": {},
    "fp4 nested": {"quant_type": "fp4", "double_quant": True, "blocksize": 32},
    "int4": {"quant_type": "int4", "blocksize": 16, "symmetric": False, "scale_dtype": torch.bfloat16},
}
every_format = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer(bias: bool = True, seed: int = 0, features: int = 64, out: int = 24, **options: Any) -> Linear4bit:
    linear = nn.Linear(features, out, bias=bias)
    with torch.no_grad():
        linear.weight.copy_(normal(out, features, seed=seed))
        if bias:
            linear.bias.copy_(normal(out, seed=seed + 1))
    return Linear4bit.from_linear(linear, **options)


def act_order_weight() -> Weight4bit:
    g_idx = (torch.arange(64) // 16)[torch.randperm(64, generator=torch.Generator().manual_seed(0))]
    qweight = torch.randint(-(2**31), 2**31, (8, 24), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    return Weight4bit.from_gptq(qweight, torch.full((4, 3), 0x66666666, dtype=torch.int32), normal(4, 24).abs(), g_idx)


def weight_of(module: nn.Module) -> dict[str, Tensor]:
    """All that decides the decoded weight, copied."""
    return {name: tensor.clone() for name, tensor in module.state_dict().items() if not name.endswith("bias")}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]) for name, tensor in one.items()
    )


@every_format
def test_is_the_op_on_a_quantised_weight(options: dict[str, Any]) -> None:
    linear = nn.Linear(64, 24)
    module = Linear4bit.from_linear(linear, **options)
    x, dy = normal(2, 3, 64).requires_grad_(), normal(2, 3, 24, seed=1)
    expected = linear_4bit(x, quantize_4bit(linear.weight, **options), linear.bias)
    y = module(x)
    assert torch.equal(y, expected)
    found = torch.autograd.grad(y, (x, module.bias), dy)
    for got, wanted in zip(found, torch.autograd.grad(expected, (x, linear.bias), dy), strict=True):
        assert torch.equal(got, wanted)
    assert (module.in_features, module.out_features) == (64, 24) and module.bias is linear.bias
    assert module.weight.dtype == torch.uint8 and not module.weight.requires_grad
    assert [name for name, _ in module.named_parameters()] == ["weight", "bias"]


def test_takes_over_from_the_linear_layer() -> None:
    linear = nn.Linear(64, 24, bias=False, dtype=torch.bfloat16).eval()
    module = Linear4bit.from_linear(linear)
    assert module.bias is None and not module.training and module.weight4bit.dtype == torch.bfloat16
    linear = nn.Linear(64, 24).requires_grad_(False)
    assert not Linear4bit.from_linear(linear).bias.requires_grad


CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "to dtype": lambda m: m.to(torch.float16),
    "to device and dtype": lambda m: m.to("cpu", torch.bfloat16),
    "type": lambda m: m.type(torch.float16),
    "there and back": lambda m: m.half().float().bfloat16(),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
@every_format
def test_no_cast_touches_the_weight(options: dict[str, Any], cast: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(layer(**options), nn.LayerNorm(24))
    before, decoded = weight_of(model[0]), dequantize_4bit(model[0].weight4bit)
    cast(model)
    dtype = model[1].weight.dtype
    assert model[0].bias.dtype == dtype != torch.float32, "the rest of the model is cast"
    assert same(weight_of(model[0]), before)
    assert torch.equal(dequantize_4bit(model[0].weight4bit), decoded)
    assert model(normal(3, 64).to(dtype)).dtype == dtype


def test_moves_with_the_model() -> None:
    module = Linear4bit(act_order_weight()).to("meta")
    tensors = [t for t in vars(module.weight4bit).values() if isinstance(t, Tensor)]
    assert len(tensors) == 4 and all(t.is_meta for t in tensors)
    assert module.to_empty(device="cpu").weight.device.type == "cpu"


@every_format
def test_state_dict_and_safetensors_are_exact(options: dict[str, Any], tmp_path: Path) -> None:
    source, target = layer(**options), layer(seed=5, **options)
    state = source.state_dict()
    assert {"weight", "absmax", "bias", "_extra_state"} <= state.keys()
    save_file(state, tmp_path / "layer.safetensors")
    assert not same(weight_of(target), weight_of(source))
    target.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    x = normal(3, 64)
    assert same(weight_of(target), weight_of(source)) and torch.equal(target(x), source(x))
    with torch.device("meta"):
        skeleton = Linear4bit.from_linear(nn.Linear(64, 24), **options)
    assert skeleton.weight.is_meta
    skeleton.load_state_dict(load_file(tmp_path / "layer.safetensors"), assign=True)
    assert same(weight_of(skeleton), weight_of(source)) and torch.equal(skeleton(x), source(x))


def test_an_act_order_layer_keeps_its_order() -> None:
    weight = act_order_weight()
    module, other = Linear4bit(weight), Linear4bit(act_order_weight())
    x = normal(5, 64)
    expected = F.linear(x, dequantize_4bit(weight))
    assert (module(x) - expected).norm() <= 1e-6 * expected.norm()
    other.order.copy_(torch.arange(64))
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), module(x)) and other.order.dtype == torch.int64


def test_a_state_dict_of_another_weight_is_refused() -> None:
    state = layer().state_dict()
    with pytest.raises(ValueError, match="the module is .*'quant_type': 'fp4'.* the state_dict .*'nf4'"):
        layer(quant_type="fp4").load_state_dict(state)
    with pytest.raises(ValueError, match=r"the module is .*\[32, 48\].* the state_dict .*\[24, 64\]"):
        layer(features=48, out=32, bias=False).load_state_dict(layer(bias=False).state_dict())  # as many codes
    with pytest.raises(TypeError, match="absmax: expected dtype torch.float32, got torch.bfloat16"):
        layer().load_state_dict(state | {"absmax": state["absmax"].bfloat16()})
    with pytest.raises(RuntimeError, match='Missing key.*"absmax"'):
        layer().load_state_dict({name: tensor for name, tensor in state.items() if name != "absmax"})
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        layer().load_state_dict(state | {"weight": state["weight"][:-1]})


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match="weight: expected a Weight4bit, got Tensor"):
        Linear4bit(normal(24, 64))
    with pytest.raises(ValueError, match=r"weight: expected a weight of shape \(out, in\), got \(2, 24, 64\)"):
        Linear4bit(quantize_4bit(normal(2, 24, 64)))
    with pytest.raises(ValueError, match=r"bias: expected shape \(24,\), got \(64,\)"):
        Linear4bit(quantize_4bit(normal(24, 64)), normal(64))


@every_format
def test_copies(options: dict[str, Any]) -> None:
    module, file = layer(**options), io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for other in (copy.deepcopy(module), torch.load(file, weights_only=False)):
        assert same(weight_of(other), weight_of(module))
        assert other.weight.data_ptr() != module.weight.data_ptr()


@every_format
def test_compiles_whole(options: dict[str, Any]) -> None:
    model = nn.Sequential(layer(**options), nn.GELU(), layer(features=24, out=64, **options))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for rows in (3, 7):
        results = []
        for call in (compiled, model):
            x = normal(rows, 64).requires_grad_()
            y = call(x)
            results.append((y.detach(), *torch.autograd.grad(y.square().sum(), (x, model[0].bias))))
        for got, expected in zip(*results, strict=True):
            assert torch.equal(got, expected)
    torch._dynamo.reset()


def both_layers(seed: int) -> nn.Sequential:
    """Both quantised, with nested and with grouped scales; one has an odd number of bytes of codes."""
    model = nn.Sequential(nn.Linear(50, 33), nn.GELU(), nn.Linear(33, 8))
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=seed + i))
    model[0] = Linear4bit.from_linear(model[0], double_quant=True)
    model[2] = Linear4bit.from_linear(model[2], quant_type="int4", blocksize=16, symmetric=False)
    return model


def in_each_process(rank: int, meeting: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    try:
        distributed_data_parallel(rank)
        fully_sharded(rank)
    finally:
        dist.destroy_process_group()


def distributed_data_parallel(rank: int) -> None:
    expected = both_layers(seed=0)
    model = both_layers(seed=10 * rank)
    wrapped = DistributedDataParallel(model)  # takes everything from rank 0
    batches = [normal(4, 50, seed=20 + r) for r in range(2)]
    wrapped(batches[rank]).square().sum().backward()
    assert same(weight_of(model), weight_of(expected))
    sum(expected(x).square().sum() for x in batches).div(2).backward()
    for one, other in ((model[0], expected[0]), (model[2], expected[2])):
        assert one.weight.grad is None
        assert (one.bias.grad - other.bias.grad).norm() <= 1e-6 * other.bias.grad.norm()


def fully_sharded(rank: int) -> None:
    plain, model = both_layers(seed=0), both_layers(seed=0)
    before = weight_of(plain)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    mesh = dist.init_device_mesh("cpu", (2,))
    for module in (model[0], model[2], model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    seen = []
    model[0].register_forward_pre_hook(lambda module, args: seen.append((args[0].dtype, module.weight.clone())))
    x = normal(4, 50, seed=30 + rank)
    for _ in range(2):
        y = model(x)
        y.float().square().sum().backward()
    dtype, gathered = seen[1]
    assert dtype == torch.bfloat16 and gathered.dtype == torch.uint8 and torch.equal(gathered, plain[0].weight)
    assert torch.equal(y, plain.bfloat16()(x.bfloat16()))
    for name, tensor in model.state_dict().items():
        if not name.endswith("bias"):
            whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            assert whole.dtype == before[name].dtype and torch.equal(whole, before[name]), name
    assert model[0].weight.to_local().numel() < before["0.weight"].numel()
    assert model[0].bias.grad.full_tensor().any()


def test_distributed_training_leaves_the_weight_exact(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(in_each_process, (str(tmp_path / "meeting"),), nprocs=2)


def test_is_exported() -> None:
    assert pykern.nn.Linear4bit is Linear4bit

"""Quantise the weights of a model in place."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from pykern import ops
from pykern.nn.linear_4bit import Linear4bit, Scales4bit
from pykern.nn.lora_linear import LowRank
from pykern.ops import Weight4bit


class Decode4bit(Scales4bit):
    """The parametrization by which a parameter that is kept in 4 bits reads as the float tensor that it was.

    It decodes at every access; during a forward pass of its module once, for experts that are looked up one by one. It
    reads in the dtype to which the module was cast last, during a forward pass in that of the module's input, which is
    what mixed precision would cast a parameter to.
    """

    def __init__(self, weight: Weight4bit) -> None:
        super().__init__(weight)
        self.dtype = weight.dtype
        self._computing: torch.dtype | None = None  # the dtype of a forward pass, while it runs
        self._decoded: Tensor | None = None

    def forward(self, codes: Tensor) -> Tensor:
        if self._computing is None:
            return ops.dequantize_4bit(self.with_codes(codes), self.dtype)
        if self._decoded is None:
            self._decoded = ops.dequantize_4bit(self.with_codes(codes), self._computing)
        return self._decoded

    def begin(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point()]
        self._computing = tensors[0].dtype if tensors else self.dtype

    def end(self, *_: Any) -> None:
        self._computing = self._decoded = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Decode4bit":
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.absmax.device)).dtype
        return super()._apply(fn, recurse)


# Output heads and routers are small, and what they compute is a choice: their errors cost the most.
SKIP = ("lm_head", "head", "router", "gate")


def quantize_model(model: torch.nn.Module, *, skip: Sequence[str] = SKIP, **options: Any) -> torch.nn.Module:
    """Quantises a model's linear layers and fused expert weights to 4 bits, in place and one weight at a time.

    - Every `torch.nn.Linear` (subclasses are left alone) becomes a `pykern.nn.Linear4bit`, with the same bias; below an
      adapter too, where `pykern.add_lora` came first.
    - Every floating 3-D parameter (experts, out, in), with more than one expert, of a module that is not torch's own
      is kept as frozen codes under `parametrizations.<name>` and decoded where it is read
      (`torch.nn.utils.parametrize`). Decoded weights that a gradient needs live until the backward pass; activation
      checkpointing avoids that.
    - Parameters that several modules share, as tied embeddings do, stay as they are.

    Args:
        model: on any device; on the meta device it becomes a skeleton to load a quantised state_dict into.
        skip: names of modules or parameters to leave alone, whole or in part: "lm_head", "layers.0", "mlp.gate"; by
            default output heads and routers.
        options: of `pykern.ops.quantize_4bit`: quant_type, blocksize, double_quant, …

    Returns:
        The model.

    Raises:
        ValueError: nothing is left to quantise, or an option does not fit.
    """
    found = False
    for names in linears(model, skip):
        found = True
        # No name here keeps the layer, so that its weight is freed before the next one is quantised.
        replace(model, names, Linear4bit.from_linear(model.get_submodule(names[0]), **options))
    for owner, name in experts(model, skip):
        found = True
        weight = getattr(model.get_submodule(owner), name)
        quantize_parameter(model.get_submodule(owner), name, weight, **options)
        del weight
    if not found:
        raise ValueError(f"model: {type(model).__name__} has nothing to quantise; skipped: {', '.join(skip) or 'none'}")
    return model


def dequantize_model(model: torch.nn.Module) -> torch.nn.Module:
    """Decodes what `quantize_model` has quantised, in place, to the dtype that it was of.

    Returns:
        The model, the decoded weights frozen.
    """
    names = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Linear4bit):
            names[id(module)].append(name)
    for aliases in names.values():
        replace(model, aliases, model.get_submodule(aliases[0]).to_linear())
    for module in list(model.modules()):
        chains = module.parametrizations.items() if parametrize.is_parametrized(module) else ()
        for name in [name for name, chain in chains if isinstance(chain[0], Decode4bit)]:
            plain_parameter(module, name)
    return model


def linears(model: torch.nn.Module, skip: Sequence[str]) -> list[list[str]]:
    """The names of each linear layer that is to be quantised; a layer may have several."""
    shared = _shared(model)
    names = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module) is torch.nn.Linear and module.weight.is_floating_point() and id(module.weight) not in shared:
            names[id(module)].append(name)
    if [""] in names.values():
        raise ValueError("model: a Linear cannot be replaced in place, pykern.nn.Linear4bit.from_linear makes another")
    return [aliases for aliases in names.values() if not any(_skipped(alias, skip) for alias in aliases)]


def experts(model: torch.nn.Module, skip: Sequence[str]) -> list[tuple[str, str]]:
    """Module and name of each fused expert weight that is to be quantised."""
    shared = _shared(model)
    found = []
    for owner, module in model.named_modules():
        if type(module).__module__.partition(".")[0] == "torch" or isinstance(module, (LowRank, Scales4bit)):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            fused = parameter.dim() == 3 and parameter.shape[0] > 1 and parameter.is_floating_point()
            if fused and id(parameter) not in shared and not _skipped(f"{owner}.{name}", skip):
                found.append((owner, name))
    return found


def replace(model: torch.nn.Module, names: Sequence[str], module: torch.nn.Module) -> None:
    for name in names:
        model.set_submodule(name, module)


def quantize_parameter(module: torch.nn.Module, name: str, value: Tensor, **options: Any) -> None:
    """Keeps `value` as the module's parameter `name` in 4 bits; it reads as a float tensor as before."""
    weight = ops.quantize_4bit(value, **options)
    decode = Decode4bit(weight)
    delattr(module, name)
    module.register_parameter(name, torch.nn.Parameter(weight.codes, requires_grad=False))
    parametrize.register_parametrization(module, name, decode, unsafe=True)  # it changes shape and dtype
    module.register_forward_pre_hook(decode.begin, with_kwargs=True)
    module.register_forward_hook(decode.end, always_call=True)


def plain_parameter(module: torch.nn.Module, name: str) -> None:
    """Makes a plain, frozen parameter of one with parametrizations, of the value that it reads as."""
    value = getattr(module, name).detach()
    parametrize.remove_parametrizations(module, name, leave_parametrized=False)
    delattr(module, name)
    module.register_parameter(name, torch.nn.Parameter(value, requires_grad=False))


def _shared(model: torch.nn.Module) -> set[int]:
    """The parameters that more than one module has."""
    owners = defaultdict(set)
    for module in model.modules():
        for parameter in module._parameters.values():
            owners[id(parameter)].add(id(module))
    return {parameter for parameter, modules in owners.items() if len(modules) > 1}


def _skipped(name: str, skip: Sequence[str]) -> bool:
    return any(f".{part}." in f".{name}." for part in skip)

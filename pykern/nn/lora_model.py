"""Give the layers of a model low-rank adapters, in place."""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.nn.utils import parametrize

from pykern.nn.linear_4bit import Linear4bit
from pykern.nn.lora_experts import AddLowRank, adapt_parameters, expert_weights
from pykern.nn.lora_linear import LoRALinear, check_base_layer, check_options
from pykern.nn.quantize_model import plain_parameter, replace

ALL_LINEAR = "all-linear"


def add_lora(
    model: torch.nn.Module,
    target_modules: str | Sequence[str] = ALL_LINEAR,
    *,
    r: int = 8,
    alpha: float = 8,
    dropout: float = 0.0,
    use_dora: bool = False,
    use_rslora: bool = False,
    target_parameters: Sequence[str] = (),
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    dtype: torch.dtype | None = None,
) -> torch.nn.Module:
    """Replaces linear layers of a model by `pykern.nn.LoRALinear`s, in place, and freezes all but the adapters.

    Layers are chosen by PEFT's rules. What is chosen has to be a `torch.nn.Linear` or a `pykern.nn.Linear4bit`, so
    that `pykern.quantize_model` before it makes QLoRA of it. Frozen is every parameter that is not an adapter's.

    Args:
        model: on any device.
        target_modules: names of layers, whole or from a dot on to the end ("q_proj", "layers.0.mlp.up_proj"); or a
            regular expression for whole names; or "all-linear": all but the output layer, that is what
            `model.get_output_embeddings()` returns.
        r, alpha, dropout, use_dora, use_rslora, dtype: of `pykern.nn.LoRALinear`.
        target_parameters: names, as above, of fused expert weights (experts, out, in), floating or quantised by
            `pykern.quantize_model`: "experts.gate_up_proj". Each expert gets an adapter of rank r, added to its weight
            where that is read (`pykern.nn.lora_experts.AddLowRank`), without dropout and DoRA.
        rank_pattern, alpha_pattern: r and alpha of the layers whose name ends with what a key, a regular expression,
            matches.

    Returns:
        The model.

    Raises:
        ValueError: nothing matches, a layer has an adapter already, or an option is out of range.
        TypeError: a layer that matches cannot be adapted. In both cases the model is as it was.
    """
    for name, given in (("target_modules", target_modules), ("target_parameters", target_parameters)):
        if not isinstance(given, (str, Sequence)):
            raise TypeError(f"{name}: expected a name, a regular expression or names, got {given!r}")
    layers = _layers(model, target_modules)
    experts = _experts(model, target_parameters)
    check_options(r, alpha, dropout)
    if not layers and not experts:
        raise ValueError(f"target_modules: {_asked(target_modules, target_parameters)}: {_offered(model)}")
    if experts and (dropout or use_dora):
        raise ValueError("target_parameters: adapters of expert weights have neither dropout nor DoRA")

    def options(name: str) -> dict[str, Any]:
        own = {"r": of_pattern(rank_pattern, name, r), "alpha": of_pattern(alpha_pattern, name, alpha)}
        check_options(own["r"], own["alpha"], dropout)
        return {**own, "use_rslora": use_rslora, "dtype": dtype}

    chosen = {names[0]: options(names[0]) for names in layers}
    fused = {owner: [options(f"{owner}.{name}".lstrip(".")) for name in names] for owner, names in experts.items()}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for names in layers:
        base = model.get_submodule(names[0])
        replace(model, names, LoRALinear(base, dropout=dropout, use_dora=use_dora, **chosen[names[0]]))
    for owner, names in experts.items():
        adapt_parameters(model.get_submodule(owner), names, fused[owner])
    for _, adapter in adapters(model):
        for parameter in adapter_parameters(adapter).values():
            parameter.requires_grad_(True)
    return model


def merge_lora(model: torch.nn.Module) -> torch.nn.Module:
    """Makes plain layers of a model's adapted ones, in place: what `LoRALinear.merged_linear` gives.

    4-bit weights that have adapters become floats of the dtype that was quantised. What was frozen stays so.

    Raises:
        ValueError: the model has no adapters.
    """
    found = list(adapters(model))
    if not found:
        raise ValueError(f"model: {type(model).__name__} has no adapters to merge")
    names = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        names[id(module)].append(name)
    for name, adapter in found:
        if isinstance(adapter, LoRALinear):
            replace(model, names[id(adapter)], adapter.merged_linear())
        else:
            owner, _, parameter = name.rpartition(".")
            plain_parameter(model.get_submodule(owner), parameter)
    return model


def adapters(model: torch.nn.Module) -> Iterator[tuple[str, LoRALinear | AddLowRank]]:
    """Every adapter of a model and the name of the layer or the parameter that it belongs to."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield name, module
        elif parametrize.is_parametrized(module):
            for parameter, chain in module.parametrizations.items():
                yield from ((f"{name}.{parameter}".lstrip("."), p) for p in chain if isinstance(p, AddLowRank))


def adapter_parameters(adapter: LoRALinear | AddLowRank) -> dict[str, torch.nn.Parameter]:
    """The adapter's own parameters, under PEFT's names."""
    found = {"lora_A.weight": adapter.lora_A.weight, "lora_B.weight": adapter.lora_B.weight}
    if isinstance(adapter, LoRALinear) and adapter.lora_magnitude_vector is not None:
        found["lora_magnitude_vector"] = adapter.lora_magnitude_vector
    return found


def matches(targets: str | Sequence[str], name: str) -> bool:
    """PEFT's rule for names."""
    if isinstance(targets, str):
        try:
            return re.fullmatch(targets, name) is not None
        except re.error as error:
            raise ValueError(f"target_modules: {targets!r} is no regular expression: {error}") from error
    return any(name == target or name.endswith(f".{target}") for target in targets)


def of_pattern(pattern: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """What PEFT's rank_pattern or alpha_pattern has for a name."""
    found = (value for key, value in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", name))
    return next(found, default)


def linear_layers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The layers that "all-linear" means, by name."""
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return {
        name: module
        for name, module in _outside(model).items()
        if type(module) in (torch.nn.Linear, Linear4bit) and module is not output
    }


def _outside(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The modules by name, without those that an adapted layer is made of."""
    inside = {id(part) for _, adapter in adapters(model) for part in adapter.modules() if part is not adapter}
    return {name: m for name, m in model.named_modules(remove_duplicate=False) if id(m) not in inside}


def _layers(model: torch.nn.Module, targets: str | Sequence[str]) -> list[list[str]]:
    """The names of each layer that is to have an adapter; a layer may have several."""
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        found = linear_layers(model)
    else:
        found = {name: module for name, module in _outside(model).items() if name and matches(targets, name)}
    names = defaultdict(list)
    for name, module in found.items():
        if isinstance(module, LoRALinear):
            raise ValueError(f"target_modules: {name} has an adapter already")
        if not name:
            raise ValueError("model: a Linear cannot be replaced in place, pykern.nn.LoRALinear wraps it")
        try:
            check_base_layer(module)
        except (TypeError, ValueError) as error:
            raise type(error)(f"target_modules: {name}: {error}") from None
        names[id(module)].append(name)
    return list(names.values())


def _experts(model: torch.nn.Module, targets: Sequence[str]) -> dict[str, list[str]]:
    """By module, the names of the parameters that are to have adapters."""
    adapted = {name.rpartition(".")[0] for name, adapter in adapters(model) if isinstance(adapter, AddLowRank)}
    found = defaultdict(list)
    for owner, name in expert_weights(model) if targets else ():
        whole = f"{owner}.{name}".lstrip(".")
        if matches(list(targets), whole):
            if owner in adapted:  # the files know adapters of one module by their order alone
                raise ValueError(f"target_parameters: {owner} has adapters already, give it all of them at once")
            shape = tuple(getattr(model.get_submodule(owner), name).shape)
            if len(shape) != 3:
                raise ValueError(f"target_parameters: {whole}: expected a shape (experts, out, in), got {shape}")
            found[owner].append(name)
    return found


def _asked(modules: str | Sequence[str], parameters: Sequence[str]) -> str:
    asked = ", ".join([modules] if isinstance(modules, str) else [*modules])
    return f"nothing matches {asked or 'an empty list'}" + (f" or {', '.join(parameters)}" if parameters else "")


def _offered(model: torch.nn.Module) -> str:
    endings = dict.fromkeys(name.rpartition(".")[2] for name in linear_layers(model))
    return f"the linear layers of {type(model).__name__} end with {', '.join(endings) or 'nothing, it has none'}"

"""Adapters in the files of PEFT: adapter_model.safetensors and adapter_config.json."""

import copy
import json
import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pykern.nn.linear_4bit import Linear4bit
from pykern.nn.lora_experts import AddLowRank
from pykern.nn.lora_linear import LoRALinear, scaling_of
from pykern.nn.lora_model import adapter_parameters, adapters, add_lora, matches, of_pattern

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."

# What in PEFT's configuration says nothing of what a stored adapter computes. Anything else that is set has to be read
# below, or the adapter would be loaded as another than it is.
_IRRELEVANT = (
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules", "inference_mode",
    "layers_pattern", "layers_to_transform", "loftq_config", "lora_ga_config", "megatron_config",
    "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
)  # fmt: skip
_READ = (
    "alpha_pattern", "init_lora_weights", "lora_alpha", "lora_dropout", "peft_type", "r", "rank_pattern",
    "target_modules", "target_parameters", "use_dora", "use_rslora",
)  # fmt: skip


# Beginnings that leave the base layer as it is. The others take a part of the adapter away from it.
_BEGINNINGS = (True, False, None, "gaussian", "orthogonal", "eva")


def save_adapter(model: torch.nn.Module, folder: Path | str) -> None:
    """Writes a model's adapters to a folder, from which PEFT's `PeftModel.from_pretrained` and `load_adapter` read.

    Raises:
        ValueError: the model has no adapters, or such as PEFT has no configuration for.
    """
    from safetensors.torch import save_file

    found = dict(adapters(model))
    if not found:
        raise ValueError(f"model: {type(model).__name__} has no adapters to save")
    config = _describe(model, found)
    tensors = {
        f"{_PREFIX}{prefix}.{key}": _to_peft(adapter, key, parameter).detach().cpu().contiguous()
        for prefix, adapter in _prefixed(found).items()
        for key, parameter in adapter_parameters(adapter).items()
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_adapter(model: torch.nn.Module, folder: Path | str) -> torch.nn.Module:
    """Reads adapters that PEFT or `save_adapter` wrote into a model; adds them, by `add_lora`, if it has none.

    Args:
        model: the one that was adapted, or the same in 4 bits. Adapters that it has must be those of the files.
        folder: with adapter_model.safetensors and adapter_config.json.

    Returns:
        The model; all but its adapters is frozen if they are new.

    Raises:
        KeyError: an adapter of the model is not in the files.
        ValueError: the files hold what the model has no place for, or what nothing here computes; it is named. In both
            cases the model is as it was.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    config = _read_config(folder / CONFIG)
    tensors = {}
    for key, tensor in load_file(folder / WEIGHTS).items():
        if not key.startswith(_PREFIX):
            raise ValueError(f"{key}: expected a name that begins with {_PREFIX}")
        tensors[key.removeprefix(_PREFIX)] = tensor
    if not any(True for _ in adapters(model)):
        # Tried first where there is no memory, so that what does not fit leaves the model as it is.
        trial = _without_memory(model)
        _add(trial, config, tensors)
        _places(trial, config, tensors, folder)
        _add(model, config, tensors)
    with torch.no_grad():
        for tensor, read, to in _places(model, config, tensors, folder):
            to.copy_(read(tensor))
    return model


def _without_memory(model: torch.nn.Module) -> torch.nn.Module:
    known: dict[int, Any] = {id(b): b.detach().to("meta") for b in model.buffers()}
    known |= {id(p): torch.nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, known)


def _places(
    model: torch.nn.Module, config: dict[str, Any], tensors: dict[str, Tensor], folder: Path
) -> list[tuple[Tensor, Callable[[Tensor], Tensor], Tensor]]:
    """Each tensor of the files, how it is read, and where it belongs."""
    found = dict(adapters(model))
    _require_same(found, _options(config))
    places = {
        f"{prefix}.{key}": (_to_peft(adapter, key, parameter), partial(_from_peft, adapter, key), parameter)
        for prefix, adapter in _prefixed(found).items()
        for key, parameter in adapter_parameters(adapter).items()
    }
    if missing := sorted(places.keys() - tensors.keys()):
        raise KeyError(f"{missing[0]}: missing in {folder / WEIGHTS}")
    # PEFT saves output layers and embeddings beside their adapters, because somebody may have given them new rows.
    for name, adapter in found.items():
        if isinstance(adapter, LoRALinear) and isinstance(adapter.base_layer, torch.nn.Linear):
            for key, parameter in adapter.base_layer.named_parameters():
                if (full := f"{name}.base_layer.{key}") in tensors:
                    places[full] = (parameter, torch.nn.Identity(), parameter)
    if foreign := sorted(tensors.keys() - places.keys()):
        raise ValueError(f"{foreign[0]}: the model has no place for it")
    for name, (shaped, _, _) in places.items():
        if tensors[name].shape != shaped.shape:
            raise ValueError(f"{name}: expected shape {tuple(shaped.shape)}, got {tuple(tensors[name].shape)}")
    return [(tensors[name], read, to) for name, (_, read, to) in places.items()]


def _prefixed(found: dict[str, LoRALinear | AddLowRank]) -> dict[str, LoRALinear | AddLowRank]:
    """Adapters by what their names begin with in the files. PEFT wraps a module once for each of its parameters."""
    return {
        name if isinstance(adapter, LoRALinear) else name.rpartition(".")[0] + ".base_layer" * adapter.depth: adapter
        for name, adapter in found.items()
    }


def _to_peft(adapter: LoRALinear | AddLowRank, key: str, parameter: Tensor) -> Tensor:
    """PEFT keeps the adapters of experts in one matrix, (experts · r, in) and (out, r · experts)."""
    if isinstance(adapter, LoRALinear):
        return parameter
    return parameter.flatten(0, 1) if key == "lora_A.weight" else parameter.permute(1, 2, 0).flatten(1)


def _from_peft(adapter: LoRALinear | AddLowRank, key: str, tensor: Tensor) -> Tensor:
    if isinstance(adapter, LoRALinear):
        return tensor
    if key == "lora_A.weight":
        return tensor.unflatten(0, (-1, adapter.r))
    return tensor.unflatten(1, (adapter.r, -1)).permute(2, 0, 1)


def _describe(model: torch.nn.Module, found: dict[str, LoRALinear | AddLowRank]) -> dict[str, Any]:
    def one(what: str, values: set[Any]) -> Any:
        if len(values) > 1:
            raise ValueError(f"{what}: expected the same in all layers, got {', '.join(map(str, sorted(values)))}")
        return next(iter(values), None)

    linears = {name: adapter for name, adapter in found.items() if isinstance(adapter, LoRALinear)}
    r, alpha = (Counter(getattr(a, key) for a in found.values()).most_common(1)[0][0] for key in ("r", "alpha"))
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "inference_mode": True,
        "r": r,
        "lora_alpha": _integer(alpha),
        "lora_dropout": one("dropout", {a.dropout for a in linears.values()}) or 0.0,
        "use_dora": one("use_dora", {a.use_dora for a in linears.values()}) or False,
        "use_rslora": one("use_rslora", {a.use_rslora for a in found.values()}),
        "target_modules": _targets(model, linears),
        "target_parameters": [name for name in found if name not in linears] or None,
        "rank_pattern": {f"^{re.escape(name)}": a.r for name, a in found.items() if a.r != r},
        "alpha_pattern": {f"^{re.escape(name)}": _integer(a.alpha) for name, a in found.items() if a.alpha != alpha},
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
    }


def _targets(model: torch.nn.Module, linears: dict[str, LoRALinear]) -> str | list[str]:
    """The ends of the names, where they mean these layers and no others, as people write them; else the whole names."""
    endings = sorted({name.rpartition(".")[2] for name in linears})
    names = {name for name, _ in model.named_modules()}
    if {name for name in names if matches(endings, name)} == set(linears):
        return endings
    return _any_of(linears)


def _any_of(names: Any) -> str:
    return "|".join(re.escape(name) for name in names)


def _integer(value: float) -> float:
    return int(value) if value == int(value) else value


def _read_config(path: Path) -> dict[str, Any]:
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type: expected LORA, got {config.get('peft_type')}")
    if (begun := config.get("init_lora_weights", True)) not in _BEGINNINGS:
        raise ValueError(
            f"{path}: init_lora_weights is {begun!r}, which changes the base's weights as well: convert the adapter by"
            " PEFT's save_pretrained(path_initial_model_for_weight_conversion=…)"
        )
    for key, value in config.items():
        if key not in _IRRELEVANT and key not in _READ and value not in (None, False, "none", {}, []):
            raise ValueError(f"{path}: {key} is {value!r}, which no adapter here has")
    return config


def _options(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "r": config["r"],
        "alpha": config["lora_alpha"],
        "dropout": config.get("lora_dropout", 0.0),
        "use_dora": config.get("use_dora", False),
        "use_rslora": config.get("use_rslora", False),
        "rank_pattern": config.get("rank_pattern"),
        "alpha_pattern": config.get("alpha_pattern"),
    }


def _add(model: torch.nn.Module, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Adapters where the files have some: their names say more than the configuration's patterns."""
    fused = config.get("target_parameters") or ()
    modules = dict(model.named_modules())
    names = dict.fromkeys(name.partition(".lora_")[0] for name in tensors)
    layers = [name for name in names if isinstance(modules.get(name), (torch.nn.Linear, Linear4bit))]
    if not layers and not fused:
        raise ValueError(f"{next(iter(tensors), 'no tensor')}: the model has no place for it")
    add_lora(model, _any_of(layers) if layers else [], target_parameters=fused, **_options(config))


def _require_same(found: dict[str, LoRALinear | AddLowRank], options: dict[str, Any]) -> None:
    """Raises where an adapter of the model would compute something else with the files' tensors than they were for."""
    for name, adapter in found.items():
        r = of_pattern(options["rank_pattern"], name, options["r"])
        alpha = of_pattern(options["alpha_pattern"], name, options["alpha"])
        expected = scaling_of(r, alpha, options["use_rslora"])
        if adapter.scaling != expected:
            raise ValueError(f"{name}: expected a scaling of {expected}, as in the files, got {adapter.scaling}")
        if isinstance(adapter, LoRALinear) and adapter.use_dora != options["use_dora"]:
            raise ValueError(
                f"{name}: expected use_dora={options['use_dora']}, as in the files, got {adapter.use_dora}"
            )

"""Which kernel serves which feature of an op, for the README: asked of the declarations, so that it cannot be wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

import pykern
from pykern.ops._spec import OpSpec, Sample
from pykern.ops.lora_samples import lora_features, multi_features
from pykern.ops.moe.grouped_samples import grouped_samples
from pykern.ops.moe.grouped_samples_4bit import grouped_4bit_samples
from pykern.ops.moe.mlp_samples import mlp_samples
from pykern.ops.moe.route_samples import route_features
from pykern.ops.weight4bit_samples import weight_formats
from pykern.testing.inputs import Make, as_tuple

# Each backend's column, and what serves there if its own kernel does not.
_COLUMNS = {"cuda": ("cuda", "triton"), "triton": ("triton",), "cpu": ("cpu",)}


def feature_table(op: str, features: Callable[[Any], Iterable[Sample]]) -> str:
    """Which kernel has which feature of attention; where one has not, what serves the call in its place."""
    spec = pykern.catalogue()[op]
    lines = ["| | " + " | ".join(_COLUMNS) + " |", "|---|" + "---|" * len(_COLUMNS)]
    rows = [(sample.name, sample) for sample in features(Make("cpu", torch.bfloat16))]
    rows += [(str(d)[6:], next(iter(features(Make("cpu", d))))) for d in (torch.float16, torch.float32, torch.float64)]
    for label, sample in rows:
        cells = []
        for name, chain in _COLUMNS.items():
            forward = _first(chain, spec, *sample.args)
            backward = forward
            if spec.gradient.op.backends:
                backward = _first(chain, spec.gradient.op, None, None, *sample.args, None, None, None)
            served = "kernel" if forward == name else forward
            cells.append(served if forward == backward else f"{served}, backward {backward}")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _first(backends: Sequence[str], spec: OpSpec, *args: Any) -> str:
    return next((name for name in backends if _serves(spec, name, args)), "reference")


def _serves(spec: OpSpec, name: str, args: Sequence[Any]) -> bool:
    lacks = spec.supports.get(name)
    return name in spec.backends and (lacks is None or lacks(*args) is None)


def weight_formats_table() -> str:
    """Which kernel reads, writes and multiplies by which format of 4-bit weights; what serves in its place if none."""
    catalogue, make = pykern.catalogue(), Make("cpu", torch.bfloat16)
    ops = ("quantize", "dequantize", "linear", "linear backward")
    lines = ["| | " + " | ".join(f"{op}, {column}" for op in ops for column in _COLUMNS) + " |"]
    lines.append("|---|" + "---|" * (len(ops) * len(_COLUMNS)))
    for label, options, weight in weight_formats(make):
        quantizer = catalogue["quantize_int4" if weight.code is None else "quantize_4bit"]
        calls = {
            "quantize": (quantizer, options),
            "dequantize": (catalogue["dequantize_4bit"], (*weight.arguments, torch.bfloat16)),
        }
        if len(weight.shape) == 2:
            x = make(4, weight.shape[1])
            calls["linear"] = (catalogue["linear_4bit"], (x, *weight.arguments, None))
            backward = catalogue["linear_4bit"].gradient.op
            calls["linear backward"] = (backward, (None, x, *weight.arguments, None, [True, False]))
        cells = []
        for op in ops:
            for name, chain in _COLUMNS.items():
                served = "" if op not in calls else _first(chain, calls[op][0], *calls[op][1])
                cells.append("kernel" if served == name else served)
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def lora_table() -> str:
    """Which backends have a kernel for which feature of a linear layer with adapters, on which format of its weight."""
    catalogue, shape, make = pykern.catalogue(), (16, 128), Make("cpu", torch.bfloat16)
    formats: dict[str, tuple[str, Make, tuple[Any, ...]]] = {}
    for label, dtype in (("fp16, bf16", torch.bfloat16), ("fp32", torch.float32), ("fp64", torch.float64)):
        formats[label] = "", Make("cpu", dtype), (Make("cpu", dtype)(*shape, grad=False),)
    for label, _, packed in weight_formats(make):
        if packed.shape == shape:
            formats[label] = "_4bit", make, packed.arguments
    lines = ["| | " + " | ".join(formats) + " |", "|---|" + "---|" * len(formats)]
    for op, features in (("lora_linear", lora_features), ("multi_lora_linear", multi_features)):
        for row in zip(*(features(own, *shape) for _, own, _ in formats.values()), strict=True):
            cells = [
                _kernels(catalogue[op + suffix], (x, *base, *rest))
                for (suffix, _, base), (_, x, rest) in zip(formats.values(), row, strict=True)
            ]
            lines.append(f"| {row[0][0]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _kernels(spec: OpSpec, args: Sequence[Any], kept: Sequence[Any] = (), gradient: Any = None) -> str:
    """The backends whose own kernel serves the call; its backward gets what the forward `kept`, and a `gradient`."""
    backward = spec.gradient.op
    mask = [True] * len(backward.outputs)
    found = []
    for name in _COLUMNS:
        serves = _serves(spec, name, args)
        returns = _serves(backward, name, (gradient, *args, *kept, mask))
        if serves or returns:
            found.append(name if serves and returns else f"{name} ({'forward' if serves else 'backward'})")
    return ", ".join(found) or "reference"


def routers_table() -> str:
    """Which kernel chooses experts in which way, forward and backward; what serves in its place if none."""
    spec = pykern.catalogue()["moe_route"]
    lines = ["| | " + " | ".join(_COLUMNS) + " |", "|---|" + "---|" * len(_COLUMNS)]
    rows = [(sample.name, sample.args) for sample in route_features(Make("cpu", torch.bfloat16))]
    rows += [
        (str(d)[6:], next(iter(route_features(Make("cpu", d)))).args)
        for d in (torch.float16, torch.float32, torch.float64)
    ]
    for label, args in rows:
        logits, _, _, top_k, score, renormalize, *_, scale = args
        ids = torch.zeros(len(logits), top_k, dtype=torch.int64)
        cells = []
        for name, chain in _COLUMNS.items():
            forward = _first(chain, spec, *args)
            backward = _first(chain, spec.gradient.op, None, logits, ids, score, renormalize, scale, [True])
            served = "kernel" if forward == name else forward
            cells.append(served if forward == backward else f"{served}, backward {backward}")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def experts_table() -> str:
    """Which backends have a kernel for which product of experts, forward and backward."""
    catalogue, lines = pykern.catalogue(), ["| | `grouped_mm` | `moe_mlp` |", "|---|---|---|"]

    def served(op: str, samples: Callable[[str, Any], Iterable[Sample]], name: str, dtype: torch.dtype) -> str:
        args = next(sample.args for sample in samples("smoke", Make("cpu", dtype)) if sample.name == name)
        out, *kept = as_tuple(catalogue[op].fake(*args))
        return _kernels(catalogue[op], args, kept, out)

    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        grouped = served("grouped_mm", grouped_samples, "rows", dtype)
        lines.append(f"| {str(dtype)[6:]} | {grouped} | {served('moe_mlp', mlp_samples, 'small', dtype)} |")
    for label, name, activations in (
        ("biases", "bias of each group", "biases"),
        ("gathered and scattered rows, dropped slots", "both and bias", "dropped slots"),
        ("groups of summands", "summands", None),
        ("groups of columns", "columns", None),
    ):
        grouped = served("grouped_mm", grouped_samples, name, torch.bfloat16)
        gated = served("moe_mlp", mlp_samples, activations, torch.bfloat16) if activations else ""
        lines.append(f"| {label} | {grouped} | {gated} |")
    for label in ("nf4", "fp4 nested", "int4"):
        lines.append(f"| {label} | {served('grouped_mm_4bit', grouped_4bit_samples, label, torch.bfloat16)} | |")
    return "\n".join(lines)


def moe_layers_table() -> str:
    """What `pykern.nn.MoE` takes over from each block of transformers; read off the layer that it makes."""
    from transformers import DeepseekV3Config, MixtralConfig, Qwen3MoeConfig, models

    from pykern.nn import MoE

    made = {
        MixtralConfig: models.mixtral.modeling_mixtral.MixtralSparseMoeBlock,
        Qwen3MoeConfig: models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeSparseMoeBlock,
        DeepseekV3Config: models.deepseek_v3.modeling_deepseek_v3.DeepseekV3MoE,
    }
    with torch.device("meta"):
        layers = {block.__name__: MoE.from_transformers(block(config())) for config, block in made.items()}
    features = {
        "experts, top": lambda layer: f"{len(layer.experts.down_proj)}, {layer.gate.top_k}",
        "score": lambda layer: layer.gate.options.get("score", "softmax"),
        "weights": lambda layer: "renormalised" if layer.gate.options.get("renormalize", True) else "as they are",
        "scale": lambda layer: layer.gate.options.get("scale", 1.0),
        "selection bias": lambda layer: layer.gate.e_score_correction_bias is not None,
        "groups, chosen": lambda layer: "{num_groups}, {top_groups}".format_map(
            {"num_groups": 1, "top_groups": 1, **layer.gate.options}
        ),
        "logits in fp32": lambda layer: layer.gate.fp32,
        "shared experts": lambda layer: layer.shared_experts is not None,
        "activation": lambda layer: layer.experts.activation,
    }
    lines = ["| | " + " | ".join(f"`{name}`" for name in layers) + " |", "|---|" + "---|" * len(layers)]
    for label, read in features.items():
        values = [read(layer) for layer in layers.values()]
        cells = [{True: "yes", False: ""}[value] if isinstance(value, bool) else value for value in values]
        lines.append(f"| {label} | " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)

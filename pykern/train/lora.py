"""Training adapters instead of weights: LoRA, and QLoRA on weights in 4 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from pykern.model import Transformer
from pykern.nn.lora_model import adapters, add_lora, merge_lora
from pykern.nn.quantize_model import dequantize_model, quantize_model
from pykern.train.errors import UserError, first_line


@dataclass(kw_only=True)
class LoraOptions:
    """Which adapters are trained in place of the weights. Raises ValueError naming the field that does not fit."""

    r: int = 0
    """The adapters' rank; 0 trains the weights themselves."""
    alpha: float = 16.0
    """An adapter's part is multiplied by alpha / r."""
    dropout: float = 0.0
    """Of an adapter's input; GRPO has none."""
    target_modules: tuple[str, ...] = ("all-linear",)
    """Ends of the names of linear layers: attention.qkv, attention.output, mlp.gate_up, mlp.up, mlp.down, head; or
    all-linear, which is all but the head."""
    target_parameters: tuple[str, ...] = ()
    """Ends of the names of experts' weights: mlp.gate_up, mlp.down. They take neither dropout nor use_dora."""
    use_dora: bool = False
    use_rslora: bool = False
    """Multiply by alpha / sqrt(r) instead."""
    quantize: Literal["none", "nf4", "fp4", "int4"] = "none"
    """Keep the weights below the adapters in 4 bits (QLoRA)."""

    def __post_init__(self) -> None:
        if self.r < 0:
            raise ValueError(f"lora.r is {self.r}, expected a rank of 1 or more, or 0 for no adapters")
        if self.r == 0 and (given := [name for name, value in vars(self).items() if value != _default(name)]):
            raise ValueError(f"lora.{given[0]} is given and lora.r is 0, expected a rank of 1 or more")
        if not 0 < self.alpha < float("inf"):
            raise ValueError(f"lora.alpha is {self.alpha}, expected a finite number above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout is {self.dropout}, expected a number in [0, 1)")


def _default(name: str) -> object:
    return getattr(LoraOptions, name)


def adapt(model: Transformer, options: LoraOptions, seed: int) -> Transformer:
    """Gives a model on the CPU new adapters, drawn with `seed`, and freezes the rest; does nothing for a rank of 0.

    UserError for names that match nothing in the model.
    """
    if options.r == 0:
        return model
    targets = options.target_modules
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if options.quantize != "none":
                quantize_model(model, quant_type=options.quantize)
            return add_lora(
                model,
                targets[0] if targets == ("all-linear",) else targets,
                r=options.r,
                alpha=options.alpha,
                dropout=options.dropout,
                use_dora=options.use_dora,
                use_rslora=options.use_rslora,
                target_parameters=options.target_parameters,
            )
    except (TypeError, ValueError) as error:
        raise UserError(f"lora.{first_line(error)}") from None


def without_adapters(model: Transformer) -> Transformer:
    """The same policy in plain floating weights, all of which can be trained."""
    if has_adapters(model):
        dequantize_model(merge_lora(model))
    return model.requires_grad_(True)


def has_adapters(model: torch.nn.Module) -> bool:
    return next(adapters(model), None) is not None

"""The ops: drop-in replacements for torch's own, and the engine that declares them."""

from pykern.ops._weight4bit import Weight4bit
from pykern.ops.add_norm import add_layer_norm, add_rms_norm
from pykern.ops.attention import attention
from pykern.ops.attention_decode import attention_decode
from pykern.ops.attention_varlen import attention_varlen
from pykern.ops.dequantize_4bit import dequantize_4bit
from pykern.ops.linear_4bit import linear_4bit
from pykern.ops.lora import lora_linear
from pykern.ops.moe import (
    grouped_mm,
    lora_grouped_mm,
    moe_load,
    moe_load_balancing_loss,
    moe_mlp,
    moe_route,
    moe_sort,
    moe_z_loss,
)
from pykern.ops.multi_lora import multi_lora_linear
from pykern.ops.norm import layer_norm, rms_norm
from pykern.ops.quantize_4bit import quantize_4bit

__all__ = [
    "Weight4bit",
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "attention_decode",
    "attention_varlen",
    "dequantize_4bit",
    "grouped_mm",
    "layer_norm",
    "linear_4bit",
    "lora_grouped_mm",
    "lora_linear",
    "moe_load",
    "moe_load_balancing_loss",
    "moe_mlp",
    "moe_route",
    "moe_sort",
    "moe_z_loss",
    "multi_lora_linear",
    "quantize_4bit",
    "rms_norm",
]

"""Drop-in modules: torch's own classes, with their initialisation and state_dict, computed by pykern's ops."""

from pykern.nn.linear_4bit import Linear4bit
from pykern.nn.lora_linear import LoRALinear
from pykern.nn.moe import MoE
from pykern.nn.norm import LayerNorm, RMSNorm

__all__ = ["LayerNorm", "Linear4bit", "LoRALinear", "MoE", "RMSNorm"]

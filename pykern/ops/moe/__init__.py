"""Mixture of experts: route tokens, sort them by expert, multiply group by group, and keep the load balanced."""

from pykern.ops.moe.grouped import grouped_mm
from pykern.ops.moe.grouped_lora import lora_grouped_mm
from pykern.ops.moe.load import ExpertLoad, moe_load
from pykern.ops.moe.loss import moe_load_balancing_loss, moe_z_loss
from pykern.ops.moe.mlp import moe_mlp
from pykern.ops.moe.route import moe_route
from pykern.ops.moe.sort import moe_sort

__all__ = [
    "ExpertLoad",
    "grouped_mm",
    "lora_grouped_mm",
    "moe_load",
    "moe_load_balancing_loss",
    "moe_mlp",
    "moe_route",
    "moe_sort",
    "moe_z_loss",
]

"""What an op is compared with beyond stock torch: torch.compile, and other libraries where they are installed.

A peer takes the op's arguments, returns what the op returns first (and None for a call that it does not cover), and is
timed only if that is right. What it does once a weight, its `prepare`, is not timed: from the arguments it makes the
function of them that is.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pykern.ops._spec import OpSpec
from pykern.testing.inputs import as_tuple, map_tensors
from pykern.testing.peers import lora, moe
from pykern.testing.peers.attention import flex, sdpa
from pykern.testing.peers.weight4bit import dequantize, filling, float_weight, matmul_4bit, repacked

# The library, and what makes the peer from its module. (x, [residual,] weight, [bias,] eps, …) are the op's arguments.
_Maker = Callable[[Any], Callable[..., Any]]


def _liger_layer_norm(module: Any) -> Callable[..., Any]:
    apply = module.LigerLayerNormFunction.apply
    return lambda x, weight, bias, eps: None if weight is None or bias is None else apply(x, weight, bias, eps)


def _liger_rms_norm(module: Any) -> Callable[..., Any]:
    apply = module.LigerRMSNormFunction.apply

    def peer(x: Tensor, weight: Tensor | None, eps: float, offset: float, round_before_weight: bool) -> Any:
        mode = "llama" if round_before_weight else "gemma"
        # Not in place: that would overwrite the incoming gradient, which the op does not do either.
        return None if weight is None else apply(x, weight, eps, offset, mode, False)

    return peer


def _liger_add_rms_norm(module: Any) -> Callable[..., Any]:
    apply = module.LigerFusedAddRMSNormFunction.apply

    def peer(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float, early: bool) -> Any:
        return None if weight is None else apply(x, residual, weight, eps, offset, "llama" if early else "gemma", False)

    return peer


ANYWHERE: dict[str, dict[str, tuple[str, _Maker]]] = {
    "dequantize_4bit": {"bitsandbytes": ("bitsandbytes", dequantize), "filling the output": ("torch", filling)},
    "linear_4bit": {
        "F.linear": ("torch", float_weight),
        "bnb.matmul_4bit": ("bitsandbytes", matmul_4bit),
        "bnb.Linear4bit, repacked": ("bitsandbytes", repacked),
    },
    "lora_linear": {"PEFT": ("peft", lora.linear)},
    "lora_linear_4bit": {"PEFT": ("peft", lora.linear_4bit)},
    "moe_mlp": {
        "transformers eager": ("transformers.models.mixtral.modeling_mixtral", moe.experts("eager")),
        "transformers grouped_mm": ("transformers.models.mixtral.modeling_mixtral", moe.experts("grouped_mm")),
    },
}
ON_GPUS: dict[str, dict[str, tuple[str, _Maker]]] = {
    "layer_norm": {"liger": ("liger_kernel.ops.layer_norm", _liger_layer_norm)},
    "rms_norm": {"liger": ("liger_kernel.ops.rms_norm", _liger_rms_norm)},
    "add_rms_norm": {"liger": ("liger_kernel.ops.fused_add_rms_norm", _liger_add_rms_norm)},
    "attention": {
        "torch flash": ("torch.nn.attention", sdpa("FLASH_ATTENTION")),
        "torch cuDNN": ("torch.nn.attention", sdpa("CUDNN_ATTENTION")),
        "torch flex": ("torch.nn.attention.flex_attention", flex),
    },
}


def libraries() -> dict[str, str]:
    """Each library's version, or why it is not there."""
    found = {}
    for module, _ in (entry for table in (ANYWHERE, ON_GPUS) for peers in table.values() for entry in peers.values()):
        package = module.partition(".")[0]
        try:
            importlib.import_module(module)
            found[package] = importlib.metadata.version(package.replace("_", "-"))
        except Exception as error:  # a library for another version of torch or Triton may fail in any way
            found[package] = f"not there: {type(error).__name__}: {error}"
    return found


def peers(spec: OpSpec) -> dict[str, Callable[..., Any]]:
    """The op's peers by name; what it declares itself comes first."""
    return {**spec.peers, **_made(spec, ANYWHERE)}


def gpu_peers(spec: OpSpec, compiler: str = "inductor") -> dict[str, Callable[..., Any]]:
    """Besides those torch.compile of the stock op, and kernels for GPUs alone."""
    found = dict(spec.peers)
    if "torch" in found:
        found["torch.compile"] = torch.compile(found["torch"], backend=compiler, dynamic=False)
    return {**found, **_made(spec, ANYWHERE), **_made(spec, ON_GPUS)}


def _made(spec: OpSpec, table: dict[str, dict[str, tuple[str, _Maker]]]) -> dict[str, Callable[..., Any]]:
    found = {}
    for name, (module, make) in table.get(spec.basename, {}).items() if spec.namespace == "pykern" else ():
        try:
            found[name] = make(importlib.import_module(module))
        except Exception:  # `libraries` says why
            continue
    return found


def fault(spec: OpSpec, peer: Callable[..., Any], args: Sequence[Any]) -> str | None:
    """Why a peer is not to be timed on these arguments, or None."""
    if not getattr(peer, "checked", True):
        return None
    frozen = map_tensors(lambda t: t.detach(), args)
    try:
        result = peer(*frozen)
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:500]
    if result is None:
        return "does not cover this call"
    right = as_tuple(spec.reference(*frozen))[0].double()
    error = (as_tuple(result)[0].double() - right).norm() / right.norm()
    # Wide, since how a peer rounds is its own affair: this is to find one that computes something else.
    return None if error <= 0.05 else f"differs from the reference by {error:.2g}"

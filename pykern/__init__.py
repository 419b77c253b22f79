"""Custom-kernel ops for torch: fused attention, norms, LoRA, mixture of experts and 4-bit weights."""

import importlib
import os
from pathlib import Path
from typing import Any

# In a source checkout `pykern.kernels` is the folder `kernels/` at the root. It has no __init__.py, because a
# regular package of that name would shadow the PyPI package `kernels` which transformers imports.
_root = Path(__file__).resolve().parents[1]
if (_root / "kernels").is_dir() and (_root / "setup.py").is_file():
    __path__.append(str(_root))

__version__ = "0.1.0"

# Imported at first use: the command line must set OpenMP's variables before torch loads it, and be quick without torch.
_HOMES = {
    "BackendError": "pykern.ops._backends",
    "add_lora": "pykern.nn.lora_model",
    "backend": "pykern.ops._backends",
    "catalogue": "pykern.ops._spec",
    "explain": "pykern.ops._spec",
    "load_adapter": "pykern.nn.lora_adapter",
    "load_quantized": "pykern.nn.load_quantized",
    "merge_lora": "pykern.nn.lora_model",
    "quantize_model": "pykern.nn.quantize_model",
    "save_adapter": "pykern.nn.lora_adapter",
}
__all__ = [
    "BackendError",
    "add_lora",
    "backend",
    "catalogue",
    "explain",
    "load_adapter",
    "load_quantized",
    "merge_lora",
    "nn",
    "ops",
    "quantize_model",
    "save_adapter",
]


def __getattr__(name: str) -> Any:
    if name in ("nn", "ops"):
        return importlib.import_module(f"pykern.{name}")
    if name in _HOMES:
        importlib.import_module("pykern.ops")  # so that every op is in the catalogue
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'pykern' has no attribute {name!r}")


if os.environ.get("TRITON_INTERPRET") == "1" and os.environ.get("PYKERN_STOCK_INTERPRETER") != "1":
    # The stock interpreter is silently wrong on bf16: no result of it leaves pykern unless that is asked for.
    from pykern.testing import interpreter

    interpreter.install()

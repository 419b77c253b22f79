"""Custom-kernel ops for torch: fused attention, norms, LoRA, mixture of experts and 4-bit weights."""

from pathlib import Path

# In a source checkout `pykern.kernels` is the folder `kernels/` at the root. It has no __init__.py, because a
# regular package of that name would shadow the PyPI package `kernels` which transformers imports.
_root = Path(__file__).resolve().parents[1]
if (_root / "kernels").is_dir() and (_root / "setup.py").is_file():
    __path__.append(str(_root))

__version__ = "0.1.0"

from pykern import nn, ops  # noqa: E402 - `pykern.kernels` must be findable first
from pykern.ops._backends import BackendError, backend  # noqa: E402
from pykern.ops._spec import catalogue, explain  # noqa: E402

__all__ = ["BackendError", "backend", "catalogue", "explain", "nn", "ops"]

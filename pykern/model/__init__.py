"""A thin decoder-only transformer built from pykern's ops."""

from pykern.model.cache import KVCache
from pykern.model.config import TransformerConfig
from pykern.model.generate import generate
from pykern.model.presets import PRESETS
from pykern.model.sequences import Packed
from pykern.model.transformer import Transformer

__all__ = ["PRESETS", "KVCache", "Packed", "Transformer", "TransformerConfig", "generate"]

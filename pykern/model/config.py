"""The one dataclass that describes a transformer."""

from dataclasses import dataclass
from typing import Literal, get_args

Positions = Literal["learned", "sinusoidal", "rotary"]
Norm = Literal["layernorm", "rmsnorm"]
Mlp = Literal["gelu", "swiglu", "moe"]


def _require(condition: bool, field: str, value: object, wanted: str) -> None:
    if not condition:
        raise ValueError(f"{field} is {value!r}, expected {wanted}")


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Shape and flavour of a decoder-only transformer. Raises ValueError naming the field that does not fit."""

    vocab_size: int
    context_length: int
    num_layers: int
    num_heads: int
    width: int
    num_kv_heads: int | None = None
    """Heads of key and value; fewer than num_heads is grouped-query attention. None: num_heads."""
    ffn_width: int | None = None
    """Hidden width of the MLP. None: 4 width for gelu, 8/3 width rounded up to a multiple of 32 for swiglu and moe."""
    positions: Positions = "learned"
    rope_base: float = 10000.0
    norm: Norm = "layernorm"
    mlp: Mlp = "gelu"
    num_experts: int = 0
    experts_per_token: int = 2
    balance_coefficient: float = 0.01
    """Weight of the experts' load-balancing loss (Switch Transformer, arXiv 2101.03961)."""
    router_z_coefficient: float = 0.001
    """Weight of the router's z-loss (ST-MoE, arXiv 2202.08906)."""
    bias: bool = True
    dropout: float = 0.0
    tie_embeddings: bool = True
    sliding_window: int | None = None
    """Number of positions a token sees, its own included. None: all before it."""
    norm_eps: float = 1e-5
    init_std: float = 0.02
    """Standard deviation of the initial weights. GPT-2's 0.02 suits widths of a thousand; 1 / sqrt(width) any."""

    def __post_init__(self) -> None:
        positive = ["vocab_size", "context_length", "num_layers", "num_heads", "width", "kv_heads", "hidden_width"]
        for field in positive + (["sliding_window"] if self.sliding_window is not None else []):
            value = getattr(self, field)
            _require(isinstance(value, int) and value > 0, field, value, "a positive integer")
        for field, choices in {"positions": Positions, "norm": Norm, "mlp": Mlp}.items():
            _require(
                getattr(self, field) in get_args(choices), field, getattr(self, field), f"one of {get_args(choices)}"
            )
        _require(self.width % self.num_heads == 0, "width", self.width, f"a multiple of num_heads = {self.num_heads}")
        divides = self.num_heads % self.kv_heads == 0
        _require(divides, "num_kv_heads", self.num_kv_heads, f"a divisor of num_heads = {self.num_heads}")
        if self.positions == "rotary":
            _require(self.head_width % 2 == 0, "width", self.width, "an even number of features a head for rotary")
            _require(self.rope_base > 0, "rope_base", self.rope_base, "a positive number")
        if self.positions == "sinusoidal":
            _require(self.width % 2 == 0, "width", self.width, "an even number for sinusoidal positions")
        if self.mlp == "moe":
            _require(self.num_experts >= 1, "num_experts", self.num_experts, "at least 1 with mlp='moe'")
            fits = 1 <= self.experts_per_token <= self.num_experts
            _require(fits, "experts_per_token", self.experts_per_token, f"1 to num_experts = {self.num_experts}")
        else:
            _require(self.num_experts == 0, "num_experts", self.num_experts, f"0 with mlp={self.mlp!r}")
        _require(0 <= self.dropout < 1, "dropout", self.dropout, "a probability in [0, 1)")
        for field in ("norm_eps", "init_std"):
            _require(getattr(self, field) > 0, field, getattr(self, field), "a positive number")

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_width(self) -> int:
        return self.width // self.num_heads

    @property
    def hidden_width(self) -> int:
        if self.ffn_width is not None:
            return self.ffn_width
        # Three matrices of 8/3 width hold as many parameters as two of 4 width (GLU variants, arXiv 2002.05202).
        return 4 * self.width if self.mlp == "gelu" else -(-8 * self.width // (3 * 32)) * 32

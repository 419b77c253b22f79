"""A linear layer with a low-rank adapter, under PEFT's parameter names."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pykern import ops
from pykern.nn.linear_4bit import Linear4bit
from pykern.ops import Weight4bit
from pykern.ops.dora_norm import dora_norm
from pykern.ops.weight4bit_checks import check_weight


class LowRank(torch.nn.Module):
    """One matrix of an adapter. A module, because PEFT calls it `lora_A.weight`; no Linear, so that nothing that looks
    for linear layers, to quantise or to adapt them, takes it for one."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight)

    def extra_repr(self) -> str:
        return f"shape={tuple(self.weight.shape)}"


class LoRALinear(torch.nn.Module):
    """A linear layer with a LoRA or DoRA adapter, computed by `pykern.ops.lora_linear`.

    In the state_dict are the adapter by PEFT's names, `lora_A.weight` (r, in), `lora_B.weight` (out, r) and for DoRA
    `lora_magnitude_vector` (out,), and the layer itself under `base_layer`. The adapter starts as PEFT's does, without
    effect: A uniform (Kaiming, a = √5), B zero, the magnitude that of the weight. What of the base layer requires a
    gradient gets one; `pykern.add_lora` freezes it.

    Args:
        base_layer: a `torch.nn.Linear` or a `pykern.nn.Linear4bit`; it is used as it is, not copied.
        r: the adapter's rank.
        alpha: the adapter's part is multiplied by alpha / r, with `use_rslora` by alpha / √r.
        dropout: probability with which, in training, an element of the input does not reach the adapter.
        use_dora: learn the norm of each row of the weight apart from its direction.
        dtype: of the adapter. None: fp32, also on a 16-bit or 4-bit weight, and fp64 on fp64.

    Raises:
        ValueError, TypeError: no such layer can be adapted, its 4-bit weight lacks a part, or an option is out of
            range.
    """

    merged_weight: Tensor | None

    def __init__(
        self,
        base_layer: torch.nn.Linear | Linear4bit,
        r: int = 8,
        alpha: float = 8,
        *,
        dropout: float = 0.0,
        use_dora: bool = False,
        use_rslora: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_base_layer(base_layer)
        check_options(r, alpha, dropout)
        if dtype is None:
            dtype = torch.promote_types(base_layer.weight.dtype, torch.float32)
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.r, self.alpha, self.dropout = r, alpha, dropout
        self.use_dora, self.use_rslora = use_dora, use_rslora
        self.scaling = scaling_of(r, alpha, use_rslora)
        factory = {"dtype": dtype, "device": base_layer.weight.device}
        self.lora_A = LowRank(torch.empty(r, self.in_features, **factory))
        self.lora_B = LowRank(torch.empty(self.out_features, r, **factory))
        magnitude = torch.nn.Parameter(torch.empty(self.out_features, **factory)) if use_dora else None
        self.register_parameter("lora_magnitude_vector", magnitude)
        self.register_buffer("merged_weight", None, persistent=False)
        self.reset_lora_parameters()
        self.train(base_layer.training)

    @torch.no_grad()
    def reset_lora_parameters(self) -> None:
        """Makes a new adapter, one without effect."""
        torch.nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        torch.nn.init.zeros_(self.lora_B.weight)
        if self.lora_magnitude_vector is not None:
            weight = self._float_weight(self.lora_A.weight.dtype)
            norm = dora_norm(weight, self.lora_A.weight, self.lora_B.weight, self.scaling)
            self.lora_magnitude_vector.copy_(norm)

    def forward(self, input: Tensor) -> Tensor:
        bias = self.base_layer.bias
        if self.merged_weight is not None:
            return F.linear(input, self.merged_weight, None if bias is None else bias.to(self.merged_weight.dtype))
        return ops.lora_linear(
            input,
            self._weight(),
            self.lora_A.weight,
            self.lora_B.weight,
            bias,
            scaling=self.scaling,
            dropout_p=self.dropout,
            training=self.training,
            magnitude=self.lora_magnitude_vector,
        )

    @property
    def merged(self) -> bool:
        return self.merged_weight is not None

    def merge(self, dtype: torch.dtype | None = None) -> None:
        """Computes with one weight, that of the layer with its adapter, until `unmerge`.

        The base layer stays untouched beside the merged weight, which is no part of the state_dict: `unmerge` brings
        back every bit, a weight that is tied to another module's is not changed there, and a merged layer is saved as
        it was. The adapter is not trained meanwhile. `merged_linear` gives a layer without it, for less memory.

        Args:
            dtype: of the merged weight, which is computed in more bits and rounded once. None: the base layer's. A
                4-bit weight is decoded and not quantised again, which would cost more than the adapter has learnt; for
                it None is the dtype that was quantised, and inputs have to be of the merged weight's dtype then.

        Raises:
            RuntimeError: the layer is merged already.
        """
        if self.merged:
            raise RuntimeError("merge: the layer is merged already, unmerge it first")
        self.merged_weight = self._merge(dtype)

    def unmerge(self) -> None:
        """Computes with weight and adapter again.

        Raises:
            RuntimeError: the layer is not merged.
        """
        if not self.merged:
            raise RuntimeError("unmerge: the layer is not merged")
        self.merged_weight = None

    def merged_linear(self, dtype: torch.dtype | None = None) -> torch.nn.Linear:
        """A new Linear with the weight that `merge` computes and the base layer's bias, as frozen as that layer is."""
        weight = self._merge(dtype) if self.merged_weight is None else self.merged_weight
        bias = self.base_layer.bias
        with torch.device("meta"):
            linear = torch.nn.Linear(self.in_features, self.out_features, bias=bias is not None)
        linear.weight = torch.nn.Parameter(weight, requires_grad=self.base_layer.weight.requires_grad)
        if bias is not None:
            linear.bias = torch.nn.Parameter(bias.detach().to(weight.dtype), requires_grad=bias.requires_grad)
        return linear.train(self.training)

    def extra_repr(self) -> str:
        options = {"r": self.r, "alpha": self.alpha, "dropout": self.dropout}
        options |= {"use_dora": self.use_dora, "use_rslora": self.use_rslora, "merged": self.merged}
        return ", ".join(f"{name}={value}" for name, value in options.items())

    def _weight(self) -> Tensor | Weight4bit:
        return self.base_layer.weight4bit if isinstance(self.base_layer, Linear4bit) else self.base_layer.weight

    def _float_weight(self, dtype: torch.dtype) -> Tensor:
        """The base layer's weight: a 4-bit one in `dtype`, a float one as it is."""
        weight = self._weight()
        return ops.dequantize_4bit(weight, dtype) if isinstance(weight, Weight4bit) else weight.detach()

    @torch.no_grad()
    def _merge(self, dtype: torch.dtype | None) -> Tensor:
        dtype = dtype or self._weight().dtype
        wide = torch.float32 if dtype.itemsize == 2 else torch.float64
        weight, a, b = (t.to(wide) for t in (self._float_weight(wide), self.lora_A.weight, self.lora_B.weight))
        with torch.autocast(weight.device.type, enabled=False):
            weight = torch.addmm(weight, b, a, alpha=self.scaling)
        if self.lora_magnitude_vector is not None:
            norm = torch.linalg.vector_norm(weight, dim=1, keepdim=True)
            weight = weight * (self.lora_magnitude_vector.to(wide).unsqueeze(1) / torch.where(norm > 0, norm, 1.0))
        return weight.to(dtype)

    def _load_from_state_dict(self, *args: object) -> None:
        if self.merged:
            raise RuntimeError("load_state_dict: the layer is merged, unmerge it first")
        super()._load_from_state_dict(*args)


def check_base_layer(base_layer: torch.nn.Module) -> None:
    """Raises where the layer cannot be adapted. Subclasses of Linear cannot: their forward may compute something else,
    and bitsandbytes' keep bytes in `weight`."""
    kind = type(base_layer)
    if kind not in (torch.nn.Linear, Linear4bit):
        raise TypeError(
            f"base_layer: expected a torch.nn.Linear or a pykern.nn.Linear4bit, got {kind.__module__}.{kind.__name__}"
        )
    if base_layer._forward_hooks or base_layer._forward_pre_hooks:
        raise ValueError("base_layer: it has forward hooks, which would not be called any more: remove them first")
    if kind is torch.nn.Linear and not base_layer.weight.is_floating_point():
        raise TypeError(
            "base_layer: its quantisation is incomplete: expected a floating weight, or a Linear4bit with its scales, "
            f"got {base_layer.weight.dtype}"
        )
    if kind is Linear4bit:
        try:
            check_weight(*base_layer.weight4bit.arguments)
        except (TypeError, ValueError) as error:
            raise type(error)(f"base_layer: its quantisation is incomplete: {error}") from None


def check_options(r: int, alpha: float, dropout: float) -> None:
    for name, number, kind in (("r", r, int), ("alpha", alpha, (int, float)), ("dropout", dropout, (int, float))):
        if not isinstance(number, kind) or isinstance(number, bool):
            raise TypeError(f"{name}: expected {'an integer' if kind is int else 'a number'}, got {number!r}")
    if r < 1:
        raise ValueError(f"r: expected a rank of 1 or more, got {r}")
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha: expected a number above 0, got {alpha}")
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout: expected a probability from 0 to 1, got {dropout}")


def scaling_of(r: int, alpha: float, use_rslora: bool) -> float:
    """What multiplies the adapter's part; rsLoRA is Kalajdzievski, arXiv:2312.03732."""
    return alpha / math.sqrt(r) if use_rslora else alpha / r

"""A linear layer whose weight is kept in 4 bits."""

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pykern import ops
from pykern.ops import Weight4bit

_BUFFERS = ("absmax", "nested_absmax", "nested_code", "nested_offset", "code", "zero_points", "order")


class Scales4bit(torch.nn.Module):
    """A 4-bit weight but for its codes: buffers that move with the module and are never cast.

    Their names are those of `Weight4bit`'s fields; what is no tensor is in the state_dict as JSON, in the uint8 tensor
    `_extra_state`, and has to agree when a state_dict is loaded.
    """

    def __init__(self, weight: Weight4bit) -> None:
        super().__init__()
        self.shape = tuple(weight.shape)
        self.quantized_dtype = weight.dtype
        self.quant_type = weight.quant_type
        self.blocksize = weight.blocksize
        for name in _BUFFERS:
            self.register_buffer(name, getattr(weight, name))

    def with_codes(self, codes: Tensor) -> Weight4bit:
        described = {"shape": self.shape, "dtype": self.quantized_dtype}
        buffers = {name: getattr(self, name) for name in _BUFFERS}
        return Weight4bit(codes, quant_type=self.quant_type, blocksize=self.blocksize, **described, **buffers)

    def get_extra_state(self) -> Tensor:
        text = json.dumps(self._described())
        return torch.tensor(list(text.encode()), dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        found = json.loads(bytes(state.tolist()))
        if found != self._described():
            raise ValueError(f"{type(self).__name__}: the module is {self._described()}, the state_dict {found}")

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self._described().items())

    def _described(self) -> dict[str, Any]:
        dtype = str(self.quantized_dtype).removeprefix("torch.")
        return {
            "quant_type": self.quant_type,
            "blocksize": self.blocksize,
            "dtype": dtype,
            "shape": list(self.shape),
            "nested": self.nested_absmax is not None,
        }

    def _frozen(self) -> list[Tensor]:
        """What neither casts nor gradients touch."""
        return [buffer for buffer in self._buffers.values() if buffer is not None]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Scales4bit":
        frozen = {id(tensor) for tensor in self._frozen()}

        def keeping_dtype(tensor: Tensor) -> Tensor:
            applied = fn(tensor)
            return applied if id(tensor) not in frozen or applied.dtype == tensor.dtype else tensor.to(applied.device)

        return super()._apply(keeping_dtype, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # torch would cast what it copies, and so keep quiet about scales that someone has rounded.
        for name, tensor in (*self._buffers.items(), *self._parameters.items()):
            given = state_dict.get(prefix + name)
            frozen = tensor is not None and any(tensor is one for one in self._frozen())
            if isinstance(given, Tensor) and frozen and given.dtype != tensor.dtype:
                raise TypeError(f"{prefix}{name}: expected dtype {tensor.dtype}, got {given.dtype}")
        super()._load_from_state_dict(state_dict, prefix, *args)


class Linear4bit(Scales4bit):
    """`torch.nn.Linear` with a frozen 4-bit weight, computed by `pykern.ops.linear_4bit`.

    No cast of the module (`.to(dtype)`, `.half()`, FSDP2's mixed precision) changes the weight; the bias is cast as in
    any module. In the state_dict are `weight` (the packed codes, uint8), the scales by the names that `Weight4bit`
    gives them, `bias`, and `_extra_state`.

    Args:
        weight: of shape (out, in), from `quantize_4bit` or from a checkpoint, `Weight4bit.from_bitsandbytes`,
            `.from_gptq`, `.from_awq`. Its tensors are used as they are, not copied.
        bias: (out,), floating. A Parameter is taken as it is, any other tensor is frozen.

    Raises:
        ValueError, TypeError: the weight is no matrix, or the bias does not go with it.
    """

    def __init__(self, weight: Weight4bit, bias: Tensor | None = None) -> None:
        if not isinstance(weight, Weight4bit):
            raise TypeError(f"weight: expected a Weight4bit, got {type(weight).__name__}; see Linear4bit.from_linear")
        if len(weight.shape) != 2:
            raise ValueError(f"weight: expected a weight of shape (out, in), got {tuple(weight.shape)}")
        if bias is not None and tuple(bias.shape) != tuple(weight.shape[:1]):
            raise ValueError(f"bias: expected shape ({weight.shape[0]},), got {tuple(bias.shape)}")
        super().__init__(weight)
        self.out_features, self.in_features = self.shape
        self.weight = torch.nn.Parameter(weight.codes, requires_grad=False)
        if bias is not None and not isinstance(bias, torch.nn.Parameter):
            bias = torch.nn.Parameter(bias, requires_grad=False)
        self.bias = bias

    @classmethod
    def from_linear(cls, linear: torch.nn.Linear, **options: Any) -> "Linear4bit":
        """A linear layer with its weight quantised, and with the same bias.

        Args:
            linear: on any device; on the meta device the result is there too, to load a state_dict into.
            options: of `pykern.ops.quantize_4bit`.
        """
        quantized = cls(ops.quantize_4bit(linear.weight, **options), linear.bias)
        return quantized.train(linear.training)

    def to_linear(self) -> torch.nn.Linear:
        """A linear layer with the decoded weight, frozen and of the dtype that was quantised, and the same bias."""
        with torch.device("meta"):
            linear = torch.nn.Linear(self.in_features, self.out_features, bias=False)
        linear.weight = torch.nn.Parameter(ops.dequantize_4bit(self.weight4bit), requires_grad=False)
        linear.bias = self.bias
        return linear.train(self.training)

    @property
    def weight4bit(self) -> Weight4bit:
        """The weight as ops take it."""
        return self.with_codes(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        return ops.linear_4bit(input, self.weight4bit, self.bias)

    def _frozen(self) -> list[Tensor]:
        return [self.weight, *super()._frozen()]

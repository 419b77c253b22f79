"""Low-rank adapters on the fused weights of experts, (experts, out, in)."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from pykern.nn.linear_4bit import Scales4bit
from pykern.nn.lora_linear import LowRank, check_options, scaling_of


class AddLowRank(torch.nn.Module):
    """The parametrization by which the weights of experts read as what they are plus scaling · B · A, in their dtype.

    Each expert has an adapter of its own: `lora_A.weight` (experts, r, in) and `lora_B.weight` (experts, out, r). So it
    works in whatever a module computes with its weights, also behind `Decode4bit`; but as in PEFT the sum of all
    experts is then in memory from the forward pass to the backward pass, and so is its gradient during the latter. The
    layers of pykern never read it: `pykern.nn.expert_mlp` multiplies by the adapters themselves.

    Args:
        weight: (experts, out, in), or (experts, in, out) if `transposed`.
        depth: how many parameters of the same module were adapted after this one; PEFT nests its wrappers so deep.
    """

    def __init__(
        self,
        weight: Tensor,
        r: int,
        alpha: float,
        *,
        use_rslora: bool = False,
        transposed: bool = False,
        depth: int = 0,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_options(r, alpha, 0.0)
        self.r, self.alpha, self.use_rslora, self.transposed, self.depth = r, alpha, use_rslora, transposed, depth
        self.scaling = scaling_of(r, alpha, use_rslora)
        count, out, n = weight.shape if not transposed else weight.mT.shape
        factory = {"dtype": dtype or torch.promote_types(weight.dtype, torch.float32), "device": weight.device}
        self.lora_A = LowRank(torch.empty(count, r, n, **factory))
        self.lora_B = LowRank(torch.empty(count, out, r, **factory))
        self._computing = False  # whether a forward pass of the module runs, during which the sum is made once
        self._sum: Tensor | None = None
        self._sum_has_graph = False
        self.reset_lora_parameters()

    @torch.no_grad()
    def reset_lora_parameters(self) -> None:
        # As a matrix: of three dimensions torch would count the ranks as inputs too, and draw smaller values.
        torch.nn.init.kaiming_uniform_(self.lora_A.weight.flatten(0, 1), a=math.sqrt(5))
        torch.nn.init.zeros_(self.lora_B.weight)

    def forward(self, weight: Tensor) -> Tensor:
        if self._sum is not None and self._sum_has_graph == torch.is_grad_enabled():
            return self._sum
        a, b = self.lora_A.weight.to(weight.dtype), self.lora_B.weight.to(weight.dtype)
        left, right = (a.mT, b.mT) if self.transposed else (b, a)
        result = torch.baddbmm(weight, left, right, alpha=self.scaling)
        if self._computing:
            self._sum, self._sum_has_graph = result, torch.is_grad_enabled()
        return result

    def begin(self, *_: Any) -> None:
        self._computing = True

    def end(self, *_: Any) -> None:
        self._computing, self._sum = False, None

    def extra_repr(self) -> str:
        return f"r={self.r}, alpha={self.alpha}, use_rslora={self.use_rslora}"


def expert_weights(model: torch.nn.Module) -> Iterator[tuple[str, str]]:
    """Module and name of every parameter of three dimensions, and of every one that has parametrizations."""
    for owner, module in model.named_modules():
        parametrized = parametrize.is_parametrized(module)
        kind = type(module).__base__ if parametrized else type(module)
        if kind.__module__.partition(".")[0] == "torch" or issubclass(kind, (LowRank, Scales4bit)):
            continue
        yield from ((owner, name) for name, p in module._parameters.items() if p is not None and p.dim() == 3)
        yield from ((owner, name) for name in (module.parametrizations if parametrized else ()))


def adapt_parameters(module: torch.nn.Module, names: list[str], options: list[dict[str, Any]]) -> None:
    """Gives these parameters of a module adapters with these options."""
    transposed = bool(getattr(module, "is_transposed", False))  # as transformers marks weights (experts, in, out)
    for i, (name, settings) in enumerate(zip(names, options, strict=True)):
        weight = getattr(module, name).detach()
        low_rank = AddLowRank(weight, depth=len(names) - 1 - i, transposed=transposed, **settings)
        parametrize.register_parametrization(module, name, low_rank)
        module.register_forward_pre_hook(low_rank.begin)
        module.register_forward_hook(low_rank.end, always_call=True)

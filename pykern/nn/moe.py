"""Mixture-of-experts layers: a router, fused expert weights, and experts that every token goes through.

Submodules, parameters and buffers have the names and shapes of transformers' sparse blocks (Mixtral, Qwen3-MoE,
DeepSeek-V3), so that a state_dict fits both.
"""

import contextlib
import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pykern import ops
from pykern.nn.expert_mlp import expert_mlp
from pykern.ops.moe.activations import ACTIVATIONS


class Router(nn.Module):
    """Logits of every expert, and the experts chosen: a linear layer without bias, and `pykern.ops.moe_route`.

    The selection bias is the buffer `e_score_correction_bias`, in fp32 unless it is cast; nothing here updates it.

    Args:
        hidden_size, num_experts, top_k: of the layer.
        selection_bias: whether there is one.
        fp32: computes the logits in fp32, under autocast too, as DeepSeek-V3 does; otherwise they have the input's
            dtype.
        device, dtype: of the weight.
        options: of `pykern.ops.moe_route`: score, renormalize, num_groups, top_groups, group_score, scale.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        selection_bias: bool = False,
        fp32: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.top_k, self.fp32, self.options = top_k, fp32, options
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, device=device, dtype=dtype))
        bias = torch.zeros(num_experts, device=device, dtype=torch.float32) if selection_bias else None
        self.register_buffer("e_score_correction_bias", bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        _uniform(self.weight)

    def forward(self, hidden_states: Tensor, expert_ids: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(…, hidden_size) -> logits (tokens, num_experts), weights (tokens, top_k) and ids (tokens, top_k).

        With `expert_ids`, a recorded choice, the weights are computed for those.
        """
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        with torch.autocast(tokens.device.type, enabled=False) if self.fp32 else contextlib.nullcontext():
            dtype = torch.promote_types(tokens.dtype, torch.float32) if self.fp32 else None
            logits = F.linear(tokens.to(dtype), self.weight.to(dtype)) if self.fp32 else F.linear(tokens, self.weight)
        weights, ids = ops.moe_route(
            logits, self.top_k, selection_bias=self.e_score_correction_bias, expert_ids=expert_ids, **self.options
        )
        return logits, weights, ids

    def extra_repr(self) -> str:
        described = {"top_k": self.top_k, "fp32": self.fp32, **self.options}
        described["selection_bias"] = self.e_score_correction_bias is not None
        return f"{tuple(self.weight.shape)}, " + ", ".join(f"{name}={value}" for name, value in described.items())


class Experts(nn.Module):
    """The routed experts, fused: gate_up_proj (E, 2·I, H), the gate's rows first, and down_proj (E, H, I)."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        *,
        activation: str = "silu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.activation = _known(activation)
        made = {"device": device, "dtype": dtype}
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * intermediate_size, hidden_size, **made))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size, **made))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        _uniform(self.gate_up_proj)
        _uniform(self.down_proj)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(tokens, H) -> (tokens, H), by `pykern.ops.moe_mlp`, or by grouped products of 4-bit or adapted weights."""
        return expert_mlp(
            *(self, "gate_up_proj", "down_proj", hidden_states, top_k_weights, top_k_index), activation=self.activation
        )

    def extra_repr(self) -> str:
        return f"gate_up {tuple(self.gate_up_proj.shape)}, down {tuple(self.down_proj.shape)}, {self.activation}"


class GatedMlp(nn.Module):
    """down(activation(gate(x)) · up(x))"""

    def __init__(self, hidden_size: int, intermediate_size: int, *, activation: str = "silu", **made: Any) -> None:
        super().__init__()
        self.activation = _known(activation)
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False, **made)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False, **made)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False, **made)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(ACTIVATIONS[self.activation](self.gate_proj(x)) * self.up_proj(x))


class MoE(nn.Module):
    """A sparse feed-forward layer: each token through the `top_k` experts that its router chooses, and the shared ones.

    A forward hook on `gate` sees logits, weights and expert ids, which the auxiliary losses and `moe_load` take.

    Args:
        hidden_size, intermediate_size: of an expert.
        num_experts, top_k: how many experts there are, and how many a token gets.
        shared_size: the intermediate size of the shared experts together; None: there are none.
        activation: of the gate: "silu", "gelu", "gelu_tanh" or "relu".
        jitter: in training the input is multiplied by noise uniform in 1 ± jitter.
        device, dtype: of the parameters.
        routing: of `Router`: score, renormalize, selection_bias, num_groups, top_groups, group_score, scale, fp32.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        *,
        shared_size: int | None = None,
        activation: str = "silu",
        jitter: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **routing: Any,
    ) -> None:
        super().__init__()
        made = {"device": device, "dtype": dtype}
        self.jitter = jitter
        self.gate = Router(hidden_size, num_experts, top_k, **routing, **made)
        self.experts = Experts(hidden_size, intermediate_size, num_experts, activation=activation, **made)
        shared = None if shared_size is None else GatedMlp(hidden_size, shared_size, activation=activation, **made)
        self.shared_experts = shared

    @classmethod
    def from_transformers(cls, block: nn.Module) -> "MoE":
        """The layer that computes what transformers' `block` does, with the very parameters and buffers of the block.

        Args:
            block: a MixtralSparseMoeBlock, Qwen3MoeSparseMoeBlock or DeepseekV3MoE.

        Raises:
            TypeError: it is another module.
            ValueError: its activation is none of ours, or its weights are quantised or have adapters.
        """
        kind = type(block).__name__
        if kind not in _ROUTING:
            raise TypeError(f"block: expected one of {', '.join(_ROUTING)}, got {kind}")
        changed = [name for name, part in block.named_modules() if type(part).__module__.startswith(("pykern", "peft"))]
        changed += [name for name, part in block.named_modules() if parametrize.is_parametrized(part)]
        if changed:
            raise ValueError(
                f"block: expected the parameters of transformers, but {changed[0]} was changed: take the"
                " layer over before it is quantised or adapted"
            )
        gate, weight = block.gate, block.experts.gate_up_proj
        shared = getattr(block, "shared_experts", None)
        name = block.experts.config.hidden_act
        layer = cls(
            weight.shape[2],
            weight.shape[1] // 2,
            weight.shape[0],
            gate.top_k,
            shared_size=None if shared is None else shared.up_proj.weight.shape[0],
            activation=_TRANSFORMERS_ACTIVATIONS.get(name, name),
            jitter=getattr(block, "jitter_noise", 0.0),
            device="meta",
            **_ROUTING[kind](gate),
        )
        frozen = [name for name, parameter in block.named_parameters() if not parameter.requires_grad]
        layer.load_state_dict(block.state_dict(keep_vars=True), assign=True)
        layer.gate.__class__ = _recorded(type(gate))
        for hook in gate._forward_hooks.values():  # by which a model that ran already records router_logits
            layer.gate.register_forward_hook(hook)
        for name in frozen:  # the assignment has made them trainable, as those of a new layer are
            layer.get_parameter(name).requires_grad_(False)
        return layer.train(block.training)

    def forward(self, hidden_states: Tensor, *, expert_ids: Tensor | None = None) -> Tensor:
        """(…, hidden_size) -> (…, hidden_size).

        Args:
            hidden_states: any floating dtype and leading dimensions.
            expert_ids: (tokens, top_k), a recorded choice to repeat; −1 drops a slot.
        """
        if self.training and self.jitter > 0:
            noise = torch.empty_like(hidden_states).uniform_(1.0 - self.jitter, 1.0 + self.jitter)
            hidden_states = hidden_states * noise
        _, weights, ids = self.gate(hidden_states, expert_ids)
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        out = self.experts(tokens, ids, weights).view(hidden_states.shape)
        return out if self.shared_experts is None else out + self.shared_experts(hidden_states)


def _deepseek_v3(gate: nn.Module) -> dict[str, Any]:
    return {
        "score": "sigmoid",
        "renormalize": gate.norm_topk_prob,
        "selection_bias": True,
        "num_groups": gate.num_group,
        "top_groups": gate.topk_group,
        "scale": gate.routed_scaling_factor,
        "fp32": True,
    }


@functools.cache
def _recorded(router: type[nn.Module]) -> type[Router]:
    """A `Router` that counts as transformers' own, by whose class a model finds where its router_logits come from."""
    return type("Router", (Router, router), {"__doc__": Router.__doc__})


# What each block's router does, in the words of `Router`.
_ROUTING = {
    "MixtralSparseMoeBlock": lambda gate: {},
    "Qwen3MoeSparseMoeBlock": lambda gate: {"renormalize": gate.norm_topk_prob},
    "DeepseekV3MoE": _deepseek_v3,
}
_TRANSFORMERS_ACTIVATIONS = {"swish": "silu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


def _known(activation: str) -> str:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    return activation


def _uniform(weight: Tensor) -> None:
    """As torch.nn.Linear starts, for each expert's matrix."""
    bound = 1 / math.sqrt(max(weight.shape[-1], 1))
    nn.init.uniform_(weight, -bound, bound)

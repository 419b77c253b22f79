"""Which backend serves each op of a model, seen in the calls that the model really makes."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import pykern
from pykern.model import Packed, Transformer, generate


class _Recorder(TorchDispatchMode):
    """Asks, at each call of an op of ours, which backend takes it."""

    def __init__(self) -> None:
        super().__init__()
        self.backends: dict[str, str] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        namespace, _, name = function.name().partition("::")
        if namespace == "pykern":
            self.backends[name] = pykern.catalogue()[name].explain(args).chosen
        return function(*args, **(kwargs or {}))


def served_by(model: Transformer, prompt: list[int]) -> dict[str, str]:
    """Op -> backend, for training steps on the prompt (token ids), padded and packed, and for two tokens after it."""
    tokens = torch.tensor([prompt], device=model.embedding.weight.device)
    recorder = _Recorder()
    with recorder:
        for inputs, targets, packed in (
            (tokens[:, :-1], tokens[:, 1:], None),
            (tokens[0, :-1], tokens[0, 1:], Packed.of([len(prompt) - 1], tokens.device)),
        ):
            loss = model(inputs, packed=packed, targets=targets) + model.auxiliary_loss()
            torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        generate(model, tokens, 2, temperature=0)
    return dict(sorted(recorder.backends.items()))

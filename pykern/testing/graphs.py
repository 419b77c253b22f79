"""CUDA graphs: what is captured must not wait for the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pykern.ops._backends import backend
from pykern.testing.checks import same_bits
from pykern.testing.inputs import as_tuple, differentiable, fresh

if TYPE_CHECKING:
    from pykern.ops._spec import OpSpec


def check_graph(spec: OpSpec, name: str, args: Sequence[Any]) -> None:
    """Captured with its backward, and replayed on other values: the same bits as a call."""
    ours = fresh(args)
    wanted = [ours[i] for i in differentiable(ours)]

    def step() -> list[Tensor]:
        with backend(name):
            outputs = as_tuple(spec(*ours))
        live = [o for o in outputs if o.requires_grad]
        found = torch.autograd.grad(live, wanted, [torch.ones_like(o) for o in live], allow_unused=True) if live else ()
        return [t for t in (*outputs, *found) if t is not None]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()  # what a first call compiles and loads, a capture could not
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for argument in ours:
            if isinstance(argument, Tensor) and argument.dim():
                argument.copy_(argument.flip(0))  # ids and offsets as well, by which a launcher must not choose
    graph.replay()
    for a, b in zip(captured, step(), strict=True):
        assert same_bits(a, b), "a replay and a call differ"

"""Differentiation of declared ops: everything is read off the names in the two schemas.

The backward op's `d<output>` arguments are incoming gradients, its other arguments are saved arguments or outputs of
the forward, `output_mask` says which gradients are wanted, and it returns `d<argument>`.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._C._functorch import is_legacy_batchedtensor  # what is_grads_batched=True passes: a plain Tensor by type
from torch.autograd import forward_ad

from pykern.ops._op import OpSpec, is_plain, one_or_tuple

_AUTOGRAD_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradOther)
for _key in ("AutogradCPU", "AutogradCUDA", "AutogradXPU", "AutogradMPS", "AutogradPrivateUse1", "AutogradMeta"):
    _AUTOGRAD_KEYS = _AUTOGRAD_KEYS.add(getattr(torch._C.DispatchKey, _key))


def picker(indices: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """A function that takes the values at these places out of a sequence."""
    if len(indices) > 1:
        return operator.itemgetter(*indices)
    return lambda values: tuple(values[i] for i in indices)


def vjp(
    fn: Callable[..., Any],
    args: Sequence[Any],
    wrt: Sequence[int],
    outputs: Sequence[int],
    grads: Sequence[torch.Tensor | None],
    create_graph: bool,
) -> list[torch.Tensor]:
    """Gradients of `fn(*args)[outputs]`, weighted by `grads`, with respect to `args[wrt]`; zeros where none flows."""
    args = list(args)
    with torch.enable_grad():
        for i in wrt:
            # A view gives each argument a node of its own, also when one tensor is passed twice.
            args[i] = args[i].view_as(args[i]) if args[i].requires_grad else args[i].detach().requires_grad_()
        result = fn(*args)
        result = result if isinstance(result, tuple) else (result,)
        pairs = [(result[o], g) for o, g in zip(outputs, grads, strict=True) if g is not None]
        pairs = [(out, g) for out, g in pairs if out.requires_grad]
        inputs = [args[i] for i in wrt]
        if not pairs or not inputs:
            return [torch.zeros_like(x) for x in inputs]
        found = torch.autograd.grad(
            [out for out, _ in pairs], inputs, [g for _, g in pairs], create_graph=create_graph, allow_unused=True
        )
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


def _stand_in(x: torch.Tensor) -> torch.Tensor:
    """A tensor that differs from x in its contents alone, and has no memory to speak of."""
    return x.detach().new_empty(()).expand(x.shape)


class above_autograd:
    """Lets a kernel, which runs below autograd, record a graph of its own."""

    def __enter__(self) -> None:
        include = torch._C._dispatch_tls_local_include_set()
        exclude = torch._C._dispatch_tls_local_exclude_set()
        self._guard = torch._C._ForceDispatchKeyGuard(include, exclude - _AUTOGRAD_KEYS)
        self._guard.__enter__()

    def __exit__(self, *exc: object) -> None:
        self._guard.__exit__(*exc)


class BackwardSpec(OpSpec):
    """A backward op. Its reference is the vjp of its `primal`, its fake gives gradients like what they belong to."""

    def __init__(self, schema: str, unread: Sequence[str] = (), **parts: Any) -> None:
        super().__init__(schema, self._reference, parts.pop("fake", self._fake_gradients), **parts)
        self.unread = unread
        is_gradient = [a.type == "Optional[Tensor]" and a.name[0] == "d" for a in self.arguments]
        self.incoming = is_gradient.index(False)  # how many leading arguments are gradients of the forward's outputs
        self.primal: Callable[..., Any] | None = None

    def differentiate(self, primal: Callable[..., Any], wrt: Sequence[str], outputs: Sequence[int]) -> None:
        """Makes this the backward op of `primal`, a function of the arguments between gradients and mask."""
        names = [a.name for a in self.arguments[self.incoming : -1]]
        self.primal, self.wrt, self.primal_outputs = primal, [names.index(n) for n in wrt], outputs

    def reference_gradients(self, args: Sequence[Any], create_graph: bool) -> list[torch.Tensor | None]:
        """What a backward op computes, for arguments in its own order: the vjp of its primal."""
        count, mask = self.incoming, args[-1]
        wrt = [i for i, wanted in zip(self.wrt, mask, strict=True) if wanted]
        found = iter(vjp(self.primal, args[count:-1], wrt, self.primal_outputs, args[:count], create_graph))
        return [next(found) if wanted else None for wanted in mask]

    def _reference(self, *args: Any) -> tuple[torch.Tensor | None, ...]:
        with above_autograd():
            return tuple(self.reference_gradients(args, create_graph=False))

    def _fake_gradients(self, *args: Any) -> tuple[torch.Tensor | None, ...]:
        inputs = [args[self.incoming + i] for i in self.wrt]
        return one_or_tuple(
            [x.new_empty(x.shape) if wanted else None for x, wanted in zip(inputs, args[-1], strict=True)]
        )


class Gradient:
    """How one op is differentiated: what to save, what to pass to the backward op, where its results go."""

    def __init__(self, forward: OpSpec, backward: BackwardSpec, tied: dict[str, str]) -> None:
        self.forward, self.op = forward, backward
        inputs, outputs = [a.name for a in forward.arguments], forward.outputs
        count = backward.incoming
        self.gradients_in = [outputs.index(a.name[1:]) for a in backward.arguments[:count]]
        self.saved: list[tuple[bool, bool, int]] = []  # (is_tensor, from_outputs, index) up to the mask
        for argument in backward.arguments[count:-1]:
            source = inputs if argument.name in inputs else outputs
            self.saved.append((argument.is_tensor, source is outputs, source.index(argument.name)))
        if backward.primal is None:
            self._differentiate_reference()
        self.targets = []  # for each gradient the backward returns: the forward arguments that receive it
        for name in backward.outputs:
            twins = [a for a, b in tied.items() if b == name[1:]]
            self.targets.append([inputs.index(a) for a in (name[1:], *twins)])
        self.statistics = [i for i in range(len(outputs)) if i not in self.gradients_in]
        self._make_pickers(len(inputs))
        self.function = self._make_function()

    def _make_pickers(self, arguments: int) -> None:
        """What moves between the argument lists, prepared: it runs at every call."""
        places = [(tensor, i + arguments * out) for tensor, out, i in self.saved]  # among arguments, then outputs
        names = [a.name for a in self.op.arguments[self.op.incoming : -1]]
        self._unread = [places[names.index(name)][1] for name in self.op.unread]
        tensors = [n for n, (tensor, _) in enumerate(places) if tensor]
        scalars = [n for n, (tensor, _) in enumerate(places) if not tensor]
        self._tensors = picker([places[n][1] for n in tensors])
        self._scalars = picker([places[n][1] for n in scalars])
        self._saved = picker([(*tensors, *scalars).index(n) for n in range(len(places))])
        self._incoming = picker(self.gradients_in)
        nothing = len(self.targets)  # behind the gradients found stands a None
        receivers = [[n for n, indices in enumerate(self.targets) if i in indices] for i in range(arguments)]
        self._received = picker([r[0] if r else nothing for r in receivers])

    def _differentiate_reference(self) -> None:
        """The default primal: the forward's reference, on the backward's arguments put in the forward's order."""
        reference, count = self.forward.reference, self.op.incoming
        names = [a.name for a in self.op.arguments[count:-1]]
        order = [names.index(a.name) for a in self.forward.arguments]

        def primal(*args: Any) -> Any:
            return reference(*[args[i] for i in order])

        self.op.differentiate(primal, [name[1:] for name in self.op.outputs], self.gradients_in)

    def save(self, ctx: Any, args: Sequence[Any], result: Any, backend: str | None) -> None:
        outputs = result if isinstance(result, tuple) else (result,)
        values = [*args, *outputs]
        for i in self._unread:
            values[i] = _stand_in(values[i])
        ctx.save_for_backward(*self._tensors(values))
        ctx.scalars = self._scalars(values)
        ctx.backend = backend
        ctx.set_materialize_grads(False)
        constant = [outputs[i] for i in self.statistics]
        constant += [outputs[i] for i in self.gradients_in if not outputs[i].is_floating_point()]
        if constant:
            ctx.mark_non_differentiable(*constant)

    def gradients(self, ctx: Any, grads: Sequence[torch.Tensor | None]) -> tuple[torch.Tensor | None, ...]:
        """The gradient of each forward argument; autograd ignores those of arguments that are frozen."""
        needs = ctx.needs_input_grad
        mask = [needs[to[0]] if len(to) == 1 else any(needs[i] for i in to) for to in self.targets]
        incoming = self._incoming(grads)
        if True not in mask or (incoming[0] is None and all(g is None for g in incoming)):
            return (None,) * len(self.forward.arguments)
        args = (*incoming, *self._saved((*ctx.saved_tensors, *ctx.scalars)), mask)
        backend = ctx.backend if self.op.backends else None
        again = torch.is_grad_enabled()
        if again or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
            # Somebody differentiates further (create_graph=True, forward over reverse): only the reference can.
            found = self.op.reference_gradients(args, create_graph=again)
        elif is_plain(args) and not any(g is not None and is_legacy_batchedtensor(g) for g in incoming):
            found = self.op.compute(args, backend)
        else:
            found = self.op.op(*args, backend=backend)
        found = found if isinstance(found, (tuple, list)) else (found,)
        return self._received((*found, None))

    def _make_function(self) -> type[torch.autograd.Function]:
        """The eager path: a classic Function costs half of what a registered autograd kernel does per call."""
        run, save, gradients = self.forward.run, self.save, self.gradients

        def forward(ctx: Any, *args: Any) -> Any:
            backend = args[-1]
            args = args[:-1]
            result = run(*args, backend=backend)
            save(ctx, args, result, backend)
            return result

        def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
            return gradients(ctx, grads) + (None,)

        members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        return type(self.forward.name, (torch.autograd.Function,), members)

    def register(self, library: torch.library.Library) -> None:
        """The same formula for the dispatcher, which compiled code and autocast take."""

        def setup_context(ctx: Any, inputs: Sequence[Any], keyword_only_inputs: dict[str, Any], output: Any) -> None:
            self.save(ctx, inputs, output, keyword_only_inputs["backend"])

        def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
            return self.gradients(ctx, grads)

        torch.library.register_autograd(self.forward.op, backward, setup_context=setup_context, lib=library)


def register_double_backward(spec: BackwardSpec, library: torch.library.Library) -> None:
    """Gives a backward op its own formula, the vjp of the vjp: without one a second derivative is silently wrong."""

    def setup_context(ctx: Any, inputs: Sequence[Any], keyword_only_inputs: dict[str, Any], output: Any) -> None:
        tensors = [i for i, a in enumerate(spec.arguments) if a.is_tensor]
        ctx.save_for_backward(*[inputs[i] for i in tensors])
        ctx.tensors, ctx.inputs = tensors, [None if i in tensors else v for i, v in enumerate(inputs)]
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        args = list(ctx.inputs)
        for i, tensor in zip(ctx.tensors, ctx.saved_tensors, strict=True):
            args[i] = tensor
        wrt = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]
        wanted = [i for i, g in enumerate(grads) if g is not None]
        result: list[torch.Tensor | None] = [None] * len(args)

        def first(*values: Any) -> tuple[torch.Tensor | None, ...]:
            return tuple(spec.reference_gradients(values, create_graph=True))

        found = vjp(first, args, wrt, wanted, [grads[i] for i in wanted], torch.is_grad_enabled())
        for i, gradient in zip(wrt, found, strict=True):
            result[i] = gradient
        return tuple(result)

    torch.library.register_autograd(spec.op, backward, setup_context=setup_context, lib=library)

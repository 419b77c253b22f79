"""What is demanded of every op on every backend; each check raises AssertionError with the reason."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from pykern.ops._backends import backend
from pykern.testing import emulator
from pykern.testing.accuracy import check_close
from pykern.testing.guards import poisoned, unwritten
from pykern.testing.inputs import as_tuple, differentiable, far, fresh, map_tensors, scattered

if TYPE_CHECKING:
    from pykern.ops._spec import OpSpec


def call(spec: OpSpec, name: str | None, args: Sequence[Any]) -> tuple[Any, ...]:
    with backend(name), unwritten(**{a.name: value for a, value in zip(spec.arguments, args, strict=False)}):
        return as_tuple(spec(*args))


def oracle(spec: OpSpec, args: Sequence[Any], wide: torch.dtype) -> tuple[tuple[Any, ...], list[Any]]:
    """The reference's outputs in a wider dtype, statistics cut off from the graph as in the op, and its leaves."""
    leaves = fresh(args, wide)
    dtype = next((a.dtype for a in args if isinstance(a, Tensor) and a.is_floating_point()), None)
    outputs = as_tuple(spec.oracle(dtype, *leaves) if spec.oracle else spec.reference(*leaves))
    return tuple(o if i in spec.gradient.gradients_in else o.detach() for i, o in enumerate(outputs)), leaves


def gradients(
    outputs: Sequence[Tensor], args: Sequence[Any], spread: bool = False, create_graph: bool = False
) -> list[Tensor]:
    """The gradients of the arguments that want one, for the same random incoming gradients whatever the dtype.

    `spread` leaves gaps between the elements of the incoming gradients.
    """
    wanted = [args[i] for i in differentiable(args)]
    pairs = []
    # Drawn where they are needed: on the host, that would take longer than what is checked.
    generator = torch.Generator(outputs[0].device if outputs else "cpu").manual_seed(1)
    for output in outputs:
        incoming = torch.randn(output.shape, generator=generator, device=output.device)
        if output.requires_grad:
            pairs.append((output, incoming))
    if not pairs or not wanted:
        return []
    # Rounded to bf16, so that the incoming gradient has one value in every dtype.
    incoming = [g.bfloat16().to(o.dtype) for o, g in pairs]
    incoming = scattered(incoming) if spread else incoming
    kept = [g.clone() for g in incoming]
    live = [o for o, _ in pairs]
    with unwritten(argument=list(args), output=list(outputs), incoming_gradient=incoming):
        found = torch.autograd.grad(live, wanted, incoming, create_graph=create_graph, allow_unused=True)
    assert all(same_bits(g, k) for g, k in zip(incoming, kept, strict=True)), "an incoming gradient was overwritten"
    return [torch.zeros_like(w) if g is None else g for w, g in zip(wanted, found, strict=True)]


def check_accuracy(spec: OpSpec, name: str, args: Sequence[Any]) -> None:
    """Forward and gradients by the tolerance rule, into poisoned memory; outputs contiguous and of their own."""
    with poisoned():
        ours = fresh(args)
        outputs = call(spec, name, ours)
        found = gradients(outputs, ours)
    check_fake(spec, args, outputs)
    exact, exact_args = oracle(spec, args, torch.float64)
    single, single_args = oracle(spec, args, torch.float32)
    peer: tuple[Any, ...] = ()
    if "torch" in spec.peers:
        peer_args = fresh(args)
        result = spec.peers["torch"](*peer_args)
        peer = () if result is None else as_tuple(result)
    for i, (output, label) in enumerate(zip(outputs, spec.outputs, strict=True)):
        if i in spec.gradient.statistics and output.is_floating_point():
            continue  # judged by the gradients that are computed from it
        theirs = [single[i].detach(), *(p.detach() for p in peer[i : i + 1])]
        check_close(label, output.detach(), exact[i].detach(), theirs, spec.tolerance)
    labels = [f"d{spec.arguments[i].name}" for i in differentiable(args)]
    expected = gradients(exact, exact_args)
    of_single = gradients(single, single_args)
    # Without the peer's every differentiable output its gradient is another one's.
    whole = len(peer) == sum(o.requires_grad for o in outputs)
    of_peer = gradients(peer, peer_args) if whole and found else []
    assert len(found) == len(expected), "gradients flow where the reference has none, or the other way round"
    for i, (label, gradient) in enumerate(zip(labels, found, strict=False)):
        theirs = [of_single[i], *of_peer[i : i + 1]]
        check_close(label, gradient, expected[i], theirs, spec.tolerance)


def check_fake(spec: OpSpec, args: Sequence[Any], outputs: Sequence[Tensor]) -> None:
    """The outputs are what the fake promises, and contiguous."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        promised = as_tuple(spec.fake(*map_tensors(lambda t: mode.from_tensor(t.detach()), args)))
    for label, output, fake in zip(spec.outputs, outputs, promised, strict=True):
        assert output.dtype == fake.dtype, f"{label}: {output.dtype}, the fake promises {fake.dtype}"
        assert output.shape == fake.shape, f"{label}: {tuple(output.shape)}, the fake promises {tuple(fake.shape)}"
        assert output.is_contiguous(), f"{label} is not contiguous"


def check_repeat(spec: OpSpec, name: str, args: Sequence[Any]) -> None:
    """Twice the same bits, forward and backward, and the arguments are not written to."""
    ours = fresh(args)
    before = [(a.detach().clone(), a._version) if isinstance(a, Tensor) else None for a in ours]
    with poisoned():
        first = call(spec, name, ours)
        first_gradients = gradients(first, ours)
        second = call(spec, name, ours)
        second_gradients = gradients(second, ours)
    for a, b in zip((*first, *first_gradients), (*second, *second_gradients), strict=True):
        assert same_bits(a, b), "two runs differ"
    for tensor, state in zip(ours, before, strict=True):
        if state is not None:
            assert tensor._version == state[1] and same_bits(tensor, state[0]), "an argument was overwritten"


def check_orders(spec: OpSpec, name: str, args: Sequence[Any]) -> None:
    """On the emulator: the same bits in whichever order threads and blocks run."""
    results = []
    for setting in ({"order": "ascending"}, {"order": "descending"}, {"seed": 1}, {"seed": 2}):
        ours = fresh(args)
        with emulator.configured(**setting):
            outputs = call(spec, name, ours)
            results.append((setting, (*outputs, *gradients(outputs, ours))))
    for setting, found in results[1:]:
        for one, other in zip(results[0][1], found, strict=True):
            assert same_bits(one, other), f"with {setting} the result differs from that with {results[0][0]}"


def check_strides(spec: OpSpec, name: str, args: Sequence[Any]) -> None:
    """Arguments with gaps between their elements give the same bits as contiguous ones."""
    _check_layout(spec, name, args, scattered(args), spread=True)


def check_far(spec: OpSpec, name: str, args: Sequence[Any]) -> None:
    """So does an argument whose last row lies more than 2³¹ elements behind its first."""
    apart = far(args)
    if apart is not None:
        _check_layout(spec, name, args, apart)


def _check_layout(spec: OpSpec, name: str, args: Sequence[Any], other: list[Any], spread: bool = False) -> None:
    packed = map_tensors(lambda t: t.detach().contiguous().requires_grad_(t.requires_grad), args)
    a, b = call(spec, name, packed), call(spec, name, other)
    results = (*a, *gradients(a, packed)), (*b, *gradients(b, other, spread=spread))
    for one, two in zip(*results, strict=True):
        assert same_bits(one, two), "strided arguments change the result"
        assert one.stride() == two.stride(), "strided arguments change the strides of the result"


def check_frozen(spec: OpSpec, name: str, args: Sequence[Any]) -> None:
    """Each gradient alone is as right as among all, and frozen arguments make frozen outputs."""
    for i in differentiable(args):
        alone = map_tensors(lambda t: t.detach(), args)
        alone[i] = args[i]
        exact, exact_args = oracle(spec, alone, torch.float64)
        single, single_args = oracle(spec, alone, torch.float32)
        ours = fresh(alone)
        triples = ((call(spec, name, ours), ours), (exact, exact_args), (single, single_args))
        for found, expected, of_torch in zip(*(gradients(o, a) for o, a in triples), strict=True):
            label = f"d{spec.arguments[i].name} alone"
            check_close(label, found, expected, [of_torch], spec.tolerance)
    frozen = map_tensors(lambda t: t.detach(), args)
    assert not any(o.requires_grad for o in call(spec, name, frozen)), "an output of frozen arguments wants a gradient"


def backward_args(spec: OpSpec, name: str | None, args: Sequence[Any]) -> list[Any]:
    """The arguments that the backward op gets for a call whose floating outputs all receive a gradient."""
    binding = spec.gradient
    ours = map_tensors(lambda t: t.detach(), args)
    outputs = call(spec, name, ours)
    incoming = [torch.ones_like(outputs[i]) if outputs[i].is_floating_point() else None for i in binding.gradients_in]
    saved = [(outputs if out else ours)[i] for _, out, i in binding.saved]
    wanted = set(differentiable(args))
    return [*incoming, *saved, [any(i in wanted for i in indices) for indices in binding.targets]]


def check_opcheck(spec: OpSpec, name: str, args: Sequence[Any]) -> None:
    """torch's own checks: schema, autograd registration, fake tensors, AOT dispatch; for the backward op too."""
    torch.library.opcheck(spec.op, tuple(fresh(args)), {"backend": name})
    binding = spec.gradient
    *values, mask = backward_args(spec, name, args)
    incoming = values[: len(binding.gradients_in)]
    if not any(g is not None for g in incoming) or not any(mask):
        return
    keyword = {"backend": name if name in binding.op.backends or name == "reference" else None}
    torch.library.opcheck(binding.op.op, (*values, mask), keyword)
    single = [[i == j for j in range(len(mask))] for i in range(len(mask)) if mask[i]]
    for chosen in (mask, [False] * len(mask), *single):
        found = as_tuple(binding.op.op(*values, chosen, **keyword))
        assert [g is not None for g in found] == chosen, f"for the mask {chosen} the backward op returns others"


def check_compile(spec: OpSpec, name: str, many: Sequence[Sequence[Any]]) -> None:
    """torch.compile(fullgraph=True) over changing shapes: the same bits, gradients too, and the forced backend runs."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: spec(*a), fullgraph=True, backend="aot_eager")
    for args in many:
        one, other = fresh(args), fresh(args)
        with backend(name):
            spec.served.clear()
            got = as_tuple(compiled(*one))
            assert set(spec.served) == {name}, f"compiled code ran {set(spec.served)} instead of {name}"
            expected = as_tuple(spec(*other))
        backward = spec.gradient.op
        backward.served.clear()
        got_gradients = gradients(got, one)
        if name in backward.backends:
            assert set(backward.served) <= {name}, f"the compiled backward ran {set(backward.served)}, not {name}"
        expected_gradients = gradients(expected, other)
        for a, b in zip((*got, *got_gradients), (*expected, *expected_gradients), strict=True):
            assert same_bits(a, b), "compiled and eager differ"
    torch._dynamo.reset()


def check_thread(spec: OpSpec, name: str, args: Sequence[Any]) -> None:
    """The backward inherits the forward's backend, also where another thread runs it after the force is lifted."""
    backward = spec.gradient.op
    if name not in backward.backends:
        return
    ours = fresh(args)
    outputs = [o for o in call(spec, name, ours) if o.requires_grad]
    if not outputs:
        return
    backward.served.clear()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(torch.autograd.backward, outputs, [torch.ones_like(o) for o in outputs]).result()
    assert set(backward.served) == {name}, f"the backward ran on {set(backward.served)} instead of {name}"


def check_statistics(spec: OpSpec, name: str, args: Sequence[Any]) -> None:
    """Statistics and integers carry no gradient, and a gradient that is missing counts as zero."""
    ours = fresh(args)
    outputs = call(spec, name, ours)
    if not differentiable(args):
        assert not any(o.requires_grad for o in outputs), "an output of frozen arguments wants a gradient"
        return
    for i, output in enumerate(outputs):
        constant = i in spec.gradient.statistics or not output.is_floating_point()
        assert output.requires_grad != constant, f"{spec.outputs[i]}: requires_grad is {output.requires_grad}"
    for i in spec.gradient.gradients_in:
        if not outputs[i].is_floating_point():
            continue
        alone = fresh(args)
        exact, exact_args = oracle(spec, args, torch.float64)
        single, single_args = oracle(spec, args, torch.float32)
        triples = (
            gradients([o[i]], a)
            for o, a in ((call(spec, name, alone), alone), (exact, exact_args), (single, single_args))
        )
        for ours, theirs, of_torch in zip(*triples, strict=True):
            check_close(f"gradient through {spec.outputs[i]} alone", ours, theirs, [of_torch], spec.tolerance)


def check_autocast(spec: OpSpec, name: str, args: Sequence[Any]) -> None:
    """Under autocast the op runs, differentiates, and gives the dtype that torch's twin gives."""
    device_type = next(a.device.type for a in args if isinstance(a, Tensor))
    ours = fresh(args)
    with torch.autocast(device_type, torch.bfloat16):
        outputs = call(spec, name, ours)
        peer = spec.peers["torch"](*fresh(args)) if "torch" in spec.peers else None
    if peer is not None:
        for ours_out, theirs in zip(outputs, as_tuple(peer), strict=False):
            assert ours_out.dtype == theirs.dtype, f"autocast gives {ours_out.dtype}, torch gives {theirs.dtype}"
    exact = as_tuple(spec.reference(*fresh(args, torch.float64)))
    for label, output, right in zip(spec.outputs, outputs, exact, strict=True):
        if output.is_floating_point():
            right = right.detach().where(right.isfinite(), 0.0)
            error = (output.detach().double().where(output.isfinite(), 0.0) - right).norm()
            assert error <= 0.05 * right.norm(), f"{label} under autocast is off by {error / right.norm():.3g}"
    for i, gradient in zip(differentiable(ours), gradients(outputs, ours), strict=False):
        assert gradient.dtype == ours[i].dtype and gradient.isfinite().all(), "a gradient under autocast is wrong"


def check_second(spec: OpSpec, name: str, args: Sequence[Any]) -> None:
    """The second derivative of a call that a kernel served, by the tolerance rule; batched gradients equal a loop."""
    results = []
    ours = fresh(args)
    triples = ((call(spec, name, ours), ours), oracle(spec, args, torch.float64), oracle(spec, args, torch.float32))
    for outputs, leaves in triples:
        first = gradients(outputs, leaves, create_graph=True)
        live = [
            (g, torch.sin(torch.arange(g.numel(), device=g.device)).view(g.shape)) for g in first if g.requires_grad
        ]
        total = sum(((g * weights.to(g.dtype)).sum() for g, weights in live), torch.zeros(()))
        wanted = [leaves[i] for i in differentiable(leaves)]
        found = torch.autograd.grad(total, wanted, allow_unused=True) if total.requires_grad else [None] * len(wanted)
        results.append([torch.zeros_like(w) if g is None else g for w, g in zip(wanted, found, strict=True)])
    for i, (mine, exact, single) in zip(differentiable(args), zip(*results, strict=True), strict=True):
        check_close(f"second derivative by {spec.arguments[i].name}", mine, exact, [single], spec.tolerance)
    output = next((o for o in call(spec, name, ours) if o.requires_grad), None)
    if output is not None:
        wanted = [ours[i] for i in differentiable(ours)]
        rows = torch.stack([torch.ones_like(output), torch.linspace(-1, 1, output.numel()).to(output).view_as(output)])
        batched = torch.autograd.grad(output, wanted, rows, is_grads_batched=True, retain_graph=True, allow_unused=True)
        for row in range(2):
            alone = torch.autograd.grad(output, wanted, rows[row], retain_graph=True, allow_unused=True)
            for together, one in zip(batched, alone, strict=True):
                assert one is None or (together[row] - one).norm() <= 1e-6 * one.norm(), "batched gradients differ"


def check_derivatives(spec: OpSpec, args: Sequence[Any]) -> None:
    """First and second derivatives and forward mode against finite differences, in fp64."""
    double = fresh(args, torch.float64)
    chosen = differentiable(double)

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        full = list(double)
        for i, value in zip(chosen, values, strict=True):
            full[i] = value
        # Statistics are constants of the op, but functions of its input to forward mode.
        return tuple(as_tuple(spec(*full))[i] for i in spec.gradient.gradients_in if _floating(spec, full)[i])

    values = [double[i] for i in chosen]
    torch.autograd.gradcheck(function, values, check_forward_ad=True, fast_mode=True)
    torch.autograd.gradgradcheck(function, values, fast_mode=True)


def check_transforms(spec: OpSpec, args: Sequence[Any]) -> None:
    """torch.func: jvp equals a finite difference, vmap(grad) equals a loop."""
    double = map_tensors(lambda t: t.detach(), fresh(args, torch.float64))
    chosen = differentiable(args)
    outputs = [i for i in spec.gradient.gradients_in if _floating(spec, double)[i]]

    def function(*values: Tensor) -> Tensor:
        full = list(double)
        for i, value in zip(chosen, values, strict=True):
            full[i] = value
        result = as_tuple(spec(*full))
        return sum((result[i].double().square().sum() for i in outputs), torch.zeros((), dtype=torch.float64))

    values = tuple(double[i] for i in chosen)
    generator = torch.Generator().manual_seed(2)
    tangents = tuple(torch.randn(v.shape, dtype=v.dtype, generator=generator).to(v.device) for v in values)
    _, slope = torch.func.jvp(function, values, tangents)
    step = 1e-6
    ahead = function(*[v + step * t for v, t in zip(values, tangents, strict=True)])
    behind = function(*[v - step * t for v, t in zip(values, tangents, strict=True)])
    difference = (ahead - behind) / (2 * step)
    assert abs(slope - difference) <= 1e-5 * max(abs(slope), abs(difference)), f"jvp {slope}, difference {difference}"
    batch = tuple(torch.stack([v, 0.5 * v]) for v in values)
    every = tuple(range(len(values)))
    mapped = torch.func.vmap(torch.func.grad(function, argnums=every))(*batch)
    for row in range(2):
        leaves = [b[row].clone().requires_grad_() for b in batch]
        for got, expected in zip(mapped, torch.autograd.grad(function(*leaves), leaves), strict=True):
            error = (got[row] - expected).norm()
            assert error <= 1e-10 * expected.norm(), f"vmap(grad) differs from a loop by {error}"


def check_checkpoint(spec: OpSpec, name: str, args: Sequence[Any]) -> None:
    """Recomputed under activation checkpointing, the op gives the same gradients."""
    one, other = fresh(args), fresh(args)
    plain = call(spec, name, one)
    with backend(name):
        recomputed = as_tuple(checkpoint(spec, *other, use_reentrant=False))
        found = gradients(recomputed, other)
    for a, b in zip((*plain, *gradients(plain, one)), (*recomputed, *found), strict=True):
        assert same_bits(a, b), "with checkpointing the results differ"


def _floating(spec: OpSpec, args: Sequence[Any]) -> list[bool]:
    return [o.is_floating_point() for o in as_tuple(spec.reference(*map_tensors(lambda t: t.detach(), args)))]


def same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = (t.detach().clone(memory_format=torch.contiguous_format) for t in (a, b))
    return a.numel() == 0 or torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8))

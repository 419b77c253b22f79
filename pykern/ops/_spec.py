"""One declaration per op: `define` registers it with torch and keeps what tests, benchmarks and docs are made from."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from pykern.ops._backends import native, triton
from pykern.ops._backward import BackwardSpec, Gradient, register_double_backward
from pykern.ops._op import AUTOCAST_KEYS, Explanation, OpSpec, Sample, probe

__all__ = ["OpSpec", "Sample", "catalogue", "define", "define_backward", "explain", "native", "triton"]

_libraries: dict[str, torch.library.Library] = {}
_specs: dict[str, OpSpec] = {}


def define(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    backward: BackwardSpec | None = None,
    tied: dict[str, str] | None = None,
    **parts: Any,
) -> OpSpec:
    """Declares an op and registers it with torch; from the declaration come its tests, benchmark and gradient.

    Args:
        schema: `ns::name(arguments, *, str? backend=None) -> (Tensor named, …)`.
        reference: plain torch on the op's arguments, any device and float dtype: oracle, fallback and documentation.
        fake: empty outputs of the shapes, dtypes and strides that every backend returns: contiguous ones.
        check: raises ValueError or TypeError for bad arguments, through torch._check_value and torch._check_type.
        backends: kernels by name, in order of preference; each takes the op's arguments without `backend`.
        supports: per backend, why a call cannot be served, or None.
        backward: the op that computes the gradients, from `define_backward`; without one, it is made from the
            vjp of the reference.
        tied: forward arguments that receive the same gradient as another one.
        autocast: per argument a dtype, which applies on CUDA as torch's own list of fp32 ops does, or "lower" for the
            autocast dtype on every device.
        samples: yields `Sample`s for "smoke", "full", "bench" and "traffic", or for kinds of its own, from a factory of
            random tensors.
        bad: yields (name, args, exception type, pattern) of calls that must be refused.
        cost: (flops, bytes) that a call needs at the least.
        peers: stock torch ("torch") and other libraries on the op's arguments.
        tolerance: factor over torch's own error.
        traffic: (backend, *args) -> how many times the bytes of `cost` a kernel may move; by default 1.0, for a
            backward op 1.1.
        oracle: for an op that rounds on its way: (dtype, *args) -> the results for arguments of that dtype, of which
            `args` are wider copies. By default the reference on the wider copies.
    """
    spec = OpSpec(schema, reference, fake, **parts)
    _register(spec)
    spec.gradient = Gradient(spec, backward or _derive_backward(spec), tied or {})
    spec.gradient.register(_libraries[spec.namespace])
    return spec


def define_backward(
    schema: str,
    *,
    primal: Callable[..., Any] | None = None,
    wrt: Sequence[str] = (),
    unread: Sequence[str] = (),
    **parts: Any,
) -> BackwardSpec:
    """Declares the backward op that a later `define(…, backward=…)` takes.

    Its arguments bind by name: first `Tensor? d<output>` of the forward, then arguments and outputs of the forward,
    then `bool[n] output_mask`; it returns `d<argument>`, None where the mask says so. Its reference and its own
    gradient are the vjp of `primal` and the vjp of that.

    Args:
        primal: the function of the arguments between gradients and mask that is differentiated; the forward's
            reference by default, and then every forward argument must be among them.
        unread: tensors among the arguments of which it needs shape, dtype and device alone, never the values: stand-ins
            without memory are saved for them.
        wrt: the arguments of `primal` that the returns belong to, by default those the returns are named after.
        parts: `check`, `fake`, `backends`, `supports`, `cost`, `tolerance`, `traffic` as for `define`.
    """
    spec = BackwardSpec(schema, unread, **parts)
    if primal is not None:
        spec.differentiate(primal, wrt, range(spec.incoming))
    _register(spec)
    register_double_backward(spec, _libraries[spec.namespace])
    return spec


def catalogue() -> dict[str, OpSpec]:
    """Every declared op; pykern's own by their bare names, others as `namespace::name`."""
    return {s.basename if s.namespace == "pykern" else s.name: s for s in _specs.values()}


def explain(op: str, /, *args: Any, **kwargs: Any) -> Explanation:
    """Which backend would serve `op` called with these arguments, and why each other one would not; runs nothing.

    Args:
        op: a name in `catalogue()`.
        args, kwargs: what the public function takes (for an op without one, the op's own arguments).
    """
    if op not in catalogue():
        raise ValueError(f"op: expected one of {', '.join(catalogue())}, got {op!r}")
    spec = catalogue()[op]
    return spec.explain(args) if spec.function is None else probe(spec.function, args, kwargs)


def _derive_backward(forward: OpSpec) -> BackwardSpec:
    incoming = [f"Tensor? d{name}" for name in forward.outputs]
    tensors = [a.name for a in forward.arguments if a.is_tensor]
    arguments = [*incoming, *(a.declaration for a in forward.arguments), f"bool[{len(tensors)}] output_mask"]
    returns = ", ".join(f"Tensor d{name}" for name in tensors)
    return define_backward(f"{forward.name}_backward({', '.join(arguments)}, *, str? backend=None) -> ({returns})")


def _register(spec: OpSpec) -> None:
    if spec.name in _specs:
        raise ValueError(f"{spec.name} is declared already")
    library = _libraries.setdefault(spec.namespace, torch.library.Library(spec.namespace, "FRAGMENT"))
    library.define(spec.schema[len(spec.namespace) + 2 :], tags=[torch.Tag.pt2_compliant_tag])
    spec.op = getattr(getattr(torch.ops, spec.namespace), spec.basename).default
    library.impl(spec.basename, spec.run, "CompositeExplicitAutograd")

    def fake(*args: Any, backend: str | None = None) -> Any:
        if spec.check is not None:
            spec.check(*args)
        return spec.fake(*args)

    torch.library.register_fake(spec.name, fake, lib=library)

    def cast_and_call(*args: Any, backend: str | None = None) -> Any:
        args = spec.autocast_args(args)
        with torch._C._ExcludeDispatchKeyGuard(AUTOCAST_KEYS):
            return spec.op(*args, backend=backend)

    for key in ("AutocastCPU", "AutocastCUDA") if spec.autocast else ():
        library.impl(spec.basename, cast_and_call, key)
    if spec.cost is not None:
        packet = getattr(getattr(torch.ops, spec.namespace), spec.basename)
        register_flop_formula(packet, get_raw=True)(lambda *args, out_val=None, **_: int(spec.cost(*args)[0]))
    _specs[spec.name] = spec

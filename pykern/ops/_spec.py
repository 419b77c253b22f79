"""One declaration per op: `define` registers it with torch and keeps what tests, benchmarks and docs are made from."""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from pykern.ops import _backends
from pykern.ops._autograd import Backward, above_autograd, is_plain, register_double_backward, vjp
from pykern.ops._backends import BackendError, is_emulation, native, triton, unavailable

__all__ = ["BackendError", "Explanation", "OpSpec", "Sample", "catalogue", "define", "explain", "native", "triton"]

_AUTOCAST_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU).add(torch._C.DispatchKey.AutocastCUDA)
_libraries: dict[str, torch.library.Library] = {}
_specs: dict[str, "OpSpec"] = {}
_probing: int | None = None  # the thread in which `explain` is asking


@dataclass
class Sample:
    """Arguments of an op, in the schema's order, for a test or a benchmark."""

    name: str
    args: tuple[Any, ...]


@dataclass
class Argument:
    name: str
    type: str
    declaration: str

    @property
    def is_tensor(self) -> bool:
        return self.type in ("Tensor", "Optional[Tensor]")


@dataclass
class Explanation:
    """Which backend serves a call, and why each other one does not."""

    op: str
    chosen: str
    reasons: dict[str, str | None]

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.chosen}"]
        for name, reason in self.reasons.items():
            if name != self.chosen:
                lines.append(f"  not {name}: {reason or 'another one comes first'}")
        return "\n".join(lines)


class _Probed(Exception):
    def __init__(self, spec: "OpSpec", args: tuple[Any, ...]) -> None:
        self.spec, self.call_args = spec, args


@dataclass(eq=False)
class OpSpec:
    """A declared op; calling it with the op's arguments (no backend) runs it the cheapest way that is right.

    The dispatcher, and a registered autograd kernel above all, cost more than a small kernel does. So plain tensors in
    plain eager mode go straight to the backend; whatever else looks at a call (compile, autocast, dispatch modes,
    tensor subclasses) sees the registered op.
    """

    schema: str
    reference: Callable[..., Any] | None
    fake: Callable[..., Any] | None
    check: Callable[..., None] | None = None
    backends: dict[str, Callable[..., Any]] = field(default_factory=dict)
    supports: dict[str, Callable[..., str | None]] = field(default_factory=dict)
    autocast: dict[str, torch.dtype | str] = field(default_factory=dict)
    samples: Callable[[str, Any], Iterator[Sample]] | None = None
    bad: Callable[[Any], Iterator[tuple[str, tuple[Any, ...], type[Exception], str]]] | None = None
    cost: Callable[..., tuple[float, float]] | None = None
    peers: dict[str, Callable[..., Any]] = field(default_factory=dict)
    tolerance: float = 2.0
    oracle: Callable[..., Any] | None = None
    function: Callable[..., Any] | None = None
    gradient: Backward | None = None

    def __post_init__(self) -> None:
        parsed = torch._C.parse_schema(self.schema)
        self.name = parsed.name
        self.namespace, self.basename = parsed.name.split("::")
        declarations = _split(self.schema[self.schema.index("(") + 1 : self.schema.rindex("->")].rstrip()[:-1])
        declarations = [d for d in declarations if d != "*"]
        kinds = [Argument(a.name, str(a.type), d) for a, d in zip(parsed.arguments, declarations, strict=True)]
        if not kinds or kinds[-1].declaration.replace(" ", "") != "str?backend=None":
            raise ValueError(f"{self.name}: the schema must end in '*, str? backend=None'")
        self.arguments, self.outputs = kinds[:-1], [r.name for r in parsed.returns]
        self.served: dict[str, int] = {}
        self._candidates: dict[str, list[tuple[str, Callable[..., Any], Callable[..., str | None] | None]]] = {}
        self._device_index = next((i for i, a in enumerate(self.arguments) if a.type == "Tensor"), None)
        self.primal: Callable[..., Any] | None = None

    # --- what a user calls

    def __call__(self, *args: Any) -> Any:
        if _probing is not None and _probing == threading.get_ident():
            raise _Probed(self, args)
        if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
            if self.check is not None:
                self.check(*args)
            return self.reference(*args)
        if torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled() or not is_plain(args):
            return self.op(*args, backend=_backends.forced)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return self.gradient.function.apply(*args, _backends.forced)
        return self.run(*args, backend=_backends.forced)

    def public(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Decorator: names the function through which users call the op."""
        self.function = function
        return function

    # --- what the dispatcher calls

    def run(self, *args: Any, backend: str | None = None) -> Any:
        if self.check is not None:
            self.check(*args)
        return self.compute(args, backend)

    def compute(self, args: Sequence[Any], backend: str | None) -> Any:
        """`run` for arguments known to be right."""
        name, kernel = self.select(args, backend)
        self.served[name] = self.served.get(name, 0) + 1
        return kernel(*args)

    def select(self, args: Sequence[Any], backend: str | None = None) -> tuple[str, Callable[..., Any]]:
        """The first backend that supports the call, or the forced one."""
        if backend is not None:
            if backend != "reference":
                reason = self.why_not(backend, args)
                if reason is not None:
                    raise BackendError(f"{self.name}: backend {backend!r} cannot serve this call: {reason}")
                return backend, self.backends[backend]
            return backend, self._run_reference
        device_type = self._device_type(args)
        candidates = self._candidates.get(device_type)
        if candidates is None:
            candidates = self._candidates[device_type] = [
                (name, kernel, self.supports.get(name))
                for name, kernel in self.backends.items()
                if not is_emulation(name, device_type) and unavailable(name, kernel, device_type) is None
            ]
        for name, kernel, supports in candidates:
            if supports is None or supports(*args) is None:
                return name, kernel
        return "reference", self._run_reference

    def why_not(self, backend: str, args: Sequence[Any]) -> str | None:
        """Why the backend cannot serve the call, or None."""
        if backend not in self.backends:
            return f"{self.basename} has no such backend, only {', '.join([*self.backends, 'reference'])}"
        supports = self.supports.get(backend)
        reason = unavailable(backend, self.backends[backend], self._device_type(args))
        return reason or (supports(*args) if supports else None)

    def explain(self, args: Sequence[Any]) -> Explanation:
        """Which backend the op's arguments lead to."""
        device_type = self._device_type(args)
        reasons = {}
        for name in self.backends:
            reasons[name] = self.why_not(name, args)
            if reasons[name] is None and is_emulation(name, device_type) and name != _backends.forced:
                reasons[name] = f"emulated on {device_type} tensors, slow: runs only when forced"
        return Explanation(self.name, self.select(args, _backends.forced)[0], {**reasons, "reference": None})

    def _device_type(self, args: Sequence[Any]) -> str:
        return "cpu" if self._device_index is None else args[self._device_index].device.type

    def _run_reference(self, *args: Any) -> Any:
        result = self.reference(*args)
        return _tuple(_own(result if isinstance(result, tuple) else (result,), args))

    # --- gradients through the reference (of a backward op)

    def differentiate(self, primal: Callable[..., Any], wrt: Sequence[str], outputs: Sequence[int]) -> None:
        """Makes this the backward op of `primal`, a function of the arguments between gradients and mask."""
        names = [a.name for a in self.arguments[self.incoming : -1]]
        self.primal, self.wrt, self.primal_outputs = primal, [names.index(n) for n in wrt], outputs

    @property
    def incoming(self) -> int:
        """How many leading arguments are gradients of the forward's outputs."""
        is_gradient = [a.type == "Optional[Tensor]" and a.name[0] == "d" for a in self.arguments]
        return is_gradient.index(False)

    def reference_gradients(self, args: Sequence[Any], create_graph: bool) -> list[torch.Tensor | None]:
        """What a backward op computes, for arguments in its own order: the vjp of its primal."""
        count, mask = self.incoming, args[-1]
        wrt = [i for i, wanted in zip(self.wrt, mask, strict=True) if wanted]
        found = iter(vjp(self.primal, args[count:-1], wrt, self.primal_outputs, args[:count], create_graph))
        return [next(found) if wanted else None for wanted in mask]

    def reference_backward(self, *args: Any) -> tuple[torch.Tensor | None, ...]:
        with above_autograd():
            return tuple(self.reference_gradients(args, create_graph=False))

    def fake_backward(self, *args: Any) -> tuple[torch.Tensor | None, ...]:
        inputs = [args[self.incoming + i] for i in self.wrt]
        return _tuple([x.new_empty(x.shape) if wanted else None for x, wanted in zip(inputs, args[-1], strict=True)])


def define(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    backward: OpSpec | None = None,
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
        samples: yields `Sample`s for "smoke", "full" and "bench" from a factory of random tensors.
        bad: yields (name, args, exception type, pattern) of calls that must be refused.
        cost: (flops, bytes) that a call needs at the least.
        peers: stock torch ("torch") and other libraries on the op's arguments.
        tolerance: factor over torch's own error.
        oracle: for an op that rounds on its way: (dtype, *args) -> the results for arguments of that dtype, of which
            `args` are wider copies. By default the reference on the wider copies.
    """
    spec = OpSpec(schema, reference, fake, **parts)
    _register(spec)
    spec.gradient = Backward(spec, backward or _derive_backward(spec), tied or {})
    spec.gradient.register(_libraries[spec.namespace])
    return spec


def define_backward(
    schema: str,
    *,
    primal: Callable[..., Any] | None = None,
    wrt: Sequence[str] = (),
    **parts: Any,
) -> OpSpec:
    """Declares the backward op that a later `define(…, backward=…)` takes.

    Its arguments bind by name: first `Tensor? d<output>` of the forward, then arguments and outputs of the forward,
    then `bool[n] output_mask`; it returns `d<argument>`, None where the mask says so. Its reference and its own
    gradient are the vjp of `primal` and the vjp of that.

    Args:
        primal: the function of the arguments between gradients and mask that is differentiated; the forward's
            reference by default, and then every forward argument must be among them.
        wrt: the arguments of `primal` that the returns belong to, by default those the returns are named after.
        parts: `check`, `fake`, `backends`, `supports`, `cost`, `tolerance` as for `define`.
    """
    spec = OpSpec(schema, None, parts.pop("fake", None), **parts)
    spec.reference, spec.fake = spec.reference_backward, spec.fake or spec.fake_backward
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
    global _probing
    if op not in catalogue():
        raise ValueError(f"op: expected one of {', '.join(catalogue())}, got {op!r}")
    spec = catalogue()[op]
    if spec.function is None:
        return spec.explain(args)
    _probing = threading.get_ident()
    try:
        spec.function(*args, **kwargs)
    except _Probed as probed:
        return probed.spec.explain(probed.call_args)
    finally:
        _probing = None
    raise RuntimeError(f"{op}: these arguments never reach the op")


def _derive_backward(forward: OpSpec) -> OpSpec:
    incoming = [f"Tensor? d{name}" for name in forward.outputs]
    tensors = [a.name for a in forward.arguments if a.is_tensor]
    arguments = [*incoming, *(a.declaration for a in forward.arguments), f"bool[{len(tensors)}] output_mask"]
    returns = ", ".join(f"Tensor d{name}" for name in tensors)
    spec = define_backward(f"{forward.name}_backward({', '.join(arguments)}, *, str? backend=None) -> ({returns})")
    return spec


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
    for device_type in ("cpu", "cuda") if spec.autocast else ():
        library.impl(spec.basename, _autocast(spec, device_type), f"Autocast{device_type.upper()}")
    if spec.cost is not None:
        packet = getattr(getattr(torch.ops, spec.namespace), spec.basename)
        register_flop_formula(packet, get_raw=True)(lambda *args, out_val=None, **_: int(spec.cost(*args)[0]))
    _specs[spec.name] = spec


def _autocast(spec: OpSpec, device_type: str) -> Callable[..., Any]:
    def cast(value: Any, policy: torch.dtype | str | None) -> Any:
        if not isinstance(value, torch.Tensor) or policy is None or not value.is_floating_point():
            return value
        if policy == "lower":
            policy = torch.get_autocast_dtype(device_type)
        elif device_type == "cpu":
            return value  # torch's CPU autocast leaves norms in the dtype they are given
        return value if value.dtype == torch.float64 else value.to(policy)

    policies = [spec.autocast.get(a.name) for a in spec.arguments]

    def cast_and_call(*args: Any, backend: str | None = None) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
            return spec.op(*[cast(v, p) for v, p in zip(args, policies, strict=False)], backend=backend)

    return cast_and_call


def _split(declarations: str) -> list[str]:
    return [d.strip() for d in declarations.split(",")]


def _tuple(values: list[Any]) -> Any:
    return values[0] if len(values) == 1 else tuple(values)


def _own(results: Sequence[torch.Tensor | None], args: Sequence[Any]) -> list[torch.Tensor | None]:
    """Contiguous tensors that share memory with no argument and with no other result, as every kernel returns them."""
    taken = {a.untyped_storage()._cdata for a in args if isinstance(a, torch.Tensor)}
    owned = []
    for tensor in results:
        if tensor is not None:
            tensor = tensor.contiguous()
            if tensor.untyped_storage()._cdata in taken:
                tensor = tensor.clone()
            taken.add(tensor.untyped_storage()._cdata)
        owned.append(tensor)
    return owned

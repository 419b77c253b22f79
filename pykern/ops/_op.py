"""What a declared op is: its parts, its call, and the choice of a backend."""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd import forward_ad

from pykern.ops import _backends
from pykern.ops._backends import BackendError, is_emulation, resolved, unavailable

AUTOCAST_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU).add(torch._C.DispatchKey.AutocastCUDA)
_PLAIN = frozenset(
    (torch.Tensor, torch.nn.Parameter, torch.Size, torch.dtype, type(None), bool, int, float, str, list, tuple)
)
_probing: int | None = None  # the thread in which `probe` is asking


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
    traffic: Callable[..., float] | None = None  # (backend, *args) -> how many times `cost` a kernel may move
    oracle: Callable[..., Any] | None = None
    function: Callable[..., Any] | None = None
    gradient: Any = None  # how the op is differentiated: a `_backward.Gradient`; None for a backward op

    def __post_init__(self) -> None:
        parsed = torch._C.parse_schema(self.schema)
        self.name = parsed.name
        self.namespace, self.basename = parsed.name.split("::")
        declarations = self.schema[self.schema.index("(") + 1 : self.schema.rindex("->")].rstrip()[:-1].split(",")
        declarations = [d.strip() for d in declarations if d.strip() != "*"]
        kinds = [Argument(a.name, str(a.type), d) for a, d in zip(parsed.arguments, declarations, strict=True)]
        if not kinds or kinds[-1].declaration.replace(" ", "") != "str?backend=None":
            raise ValueError(f"{self.name}: the schema must end in '*, str? backend=None'")
        self.arguments, self.outputs = kinds[:-1], [r.name for r in parsed.returns]
        self.served: dict[str, int] = {}
        self._candidates: dict[str, list[tuple[str, Callable[..., Any], Callable[..., str | None] | None]]] = {}
        self._device_index = next((i for i, a in enumerate(self.arguments) if a.type == "Tensor"), None)

    def __call__(self, *args: Any) -> Any:
        if _probing is not None and _probing == threading.get_ident():
            raise _Probed(self, args)
        if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
            args = self.autocast_args(args)
            if self.check is not None:
                self.check(*args)
            with torch._C._ExcludeDispatchKeyGuard(AUTOCAST_KEYS):
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

    def add_backend(
        self, name: str, kernel: Callable[..., Any], supports: Callable[..., str | None] | None = None
    ) -> None:
        """Gives the op one more backend, after those it has; `supports` says why a call cannot be served, or None."""
        if name in self.backends:
            raise ValueError(f"{self.name} has a backend {name!r} already")
        self.backends[name] = kernel
        if supports is not None:
            self.supports[name] = supports
        self._candidates.clear()

    def autocast_args(self, args: Sequence[Any]) -> Sequence[Any]:
        """The arguments as declared for autocast, where it is enabled for their device."""
        device_type = self._device_type(args)
        if not self.autocast or not torch.is_autocast_enabled(device_type):
            return args
        policies = [self.autocast.get(a.name) for a in self.arguments]
        return [_cast(v, p, device_type) for v, p in zip(args, policies, strict=False)]

    def run(self, *args: Any, backend: str | None = None) -> Any:
        if self.check is not None:
            self.check(*args)
        return self.compute(args, backend)

    def compute(self, args: Sequence[Any], backend: str | None) -> Any:
        """`run` for arguments known to be right."""
        name, kernel = self.select(args, backend)
        self.served[name] = self.served.get(name, 0) + 1
        if torch._C._is_any_autocast_enabled():
            with torch._C._ExcludeDispatchKeyGuard(AUTOCAST_KEYS):  # the op was cast as declared, nothing inside it is
                return kernel(*args)
        return kernel(*args)

    def select(self, args: Sequence[Any], backend: str | None = None) -> tuple[str, Callable[..., Any]]:
        """The first backend that supports the call, or the forced one."""
        if backend is not None:
            if backend != "reference":
                reason = self.why_not(backend, args)
                if reason is not None:
                    raise BackendError(f"{self.name}: backend {backend!r} cannot serve this call: {reason}")
                return backend, resolved(self.backends[backend], self._device_type(args))
            return backend, self._run_reference
        device_type = self._device_type(args)
        candidates = self._candidates.get(device_type)
        if candidates is None:
            candidates = self._candidates[device_type] = [
                (name, resolved(kernel, device_type), self.supports.get(name))
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
        return one_or_tuple(_own(result if isinstance(result, tuple) else (result,), args))


def probe(function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Explanation:
    """The explanation of the first op that `function` reaches; nothing runs."""
    global _probing
    _probing = threading.get_ident()
    try:
        function(*args, **kwargs)
    except _Probed as probed:
        return probed.spec.explain(probed.call_args)
    finally:
        _probing = None
    raise RuntimeError(f"{function.__name__}: these arguments never reach an op")


def is_plain(args: Sequence[Any]) -> bool:
    """Whether nothing between the caller and the kernel wants to see the call: no subclass of Tensor, no mode."""
    return _PLAIN.issuperset(map(type, args)) and not torch._C._len_torch_dispatch_stack()


def _cast(value: Any, policy: torch.dtype | str | None, device_type: str) -> Any:
    if not isinstance(value, torch.Tensor) or policy is None or not value.is_floating_point():
        return value
    if policy == "lower":
        policy = torch.get_autocast_dtype(device_type)
    elif device_type == "cpu":
        return value  # torch's CPU autocast leaves norms in the dtype they are given
    return value if value.dtype == torch.float64 else value.to(policy)


def one_or_tuple(values: list[Any]) -> Any:
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

"""The Triton kernels that an op's launchers start, compiled for GPUs that are not here.

The launchers run as they are, on tensors without memory that claim to be on such a GPU: they choose a configuration
from shapes, strides and the device's properties, and Triton specialises on dtypes and addresses. What they start is
written down instead of compiled, and compiled later where the ledger asks for it.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.util
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from pykern.ops._backends import resolved
from pykern.ops._spec import OpSpec, Sample
from pykern.testing import sass
from pykern.testing.cases import DTYPES
from pykern.testing.checks import backward_args
from pykern.testing.inputs import differentiable, map_tensors, samples

# Triton 3.10 stops fusing unless asked to; whatever the version, the ledger is about fused code.
_ENVIRONMENT = {"TRITON_DEFAULT_FP_FUSION": "1"}
# Multiprocessors of the chips that the architectures stand for: A100, H200, B200, and their smaller relatives.
_MULTIPROCESSORS = {80: 108, 86: 84, 89: 142, 90: 132, 100: 148, 120: 170}


@dataclass(eq=False)
class Launch:
    """A kernel in one specialization and configuration."""

    arch: str
    kernel: Any  # triton's JITFunction
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: Any
    of: str = ""  # the first sample that starts it

    @property
    def key(self) -> str:
        """Architecture, kernel, and whatever the compiler is told; unmarked 32-bit numbers are left out."""
        words = [f"sm_{self.arch}", self.kernel.__name__]
        for place, (name, kind) in enumerate(self.signature.items()):
            if kind == "constexpr":
                words.append(f"{name}={_spelled(self.constants.get((place,)))}")
            elif self.attributes.get((place,)):
                words.append(f"{name}={kind}:16")
            elif kind not in ("i32", "fp32"):
                words.append(f"{name}={kind}")
        words.append(f"warps={self.options.num_warps}")
        usual = type(self.options)
        for option in ("num_stages", "num_ctas", "maxnreg"):
            value = getattr(self.options, option)
            if value != getattr(usual, option):
                words.append(f"{option}={value}")
        return " ".join(words)

    def compiled(self, target: Any = None) -> Any:
        """Triton's CompiledKernel, for the GPU that is there by default."""
        import triton
        from triton.compiler import ASTSource

        source = ASTSource(self.kernel, self.signature, self.constants, self.attributes)
        return triton.compile(source, target=target, options=vars(self.options))

    def compile(self) -> sass.Cost:
        from triton.backends.compiler import GPUTarget

        compiled = self.compiled(GPUTarget("cuda", capability(self.arch), 32))
        (cost,) = sass.costs(compiled.asm["cubin"], self.arch).values()
        return replace(cost, shared=compiled.metadata.shared)


def capability(arch: str) -> int:
    return int(arch.rstrip("af"))


def installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def compiler() -> str:
    """The version that decides what comes out; raises where there is none to use."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 makes every Triton kernel an interpreted one: unset it for the ledger")
    if not installed():
        raise RuntimeError("triton is not installed: pip install triton")
    import triton

    return triton.__version__


def launches(specs: Sequence[OpSpec], archs: Sequence[str]) -> tuple[list[Launch], list[str]]:
    """Every kernel that the ops' launchers start on the ops' samples, once each, and which samples could not be run.

    Benchmark samples in every dtype and with every set of gradients, all others in bf16 as they are.
    """
    found: dict[str, Launch] = {}
    problems: list[str] = []
    for arch in archs:
        with _pretended_gpu(arch) as gpu:
            for spec in specs:
                for label, launcher, args in _calls(spec, gpu):
                    gpu.write = lambda launch, label=label: found.setdefault(launch.key, replace(launch, of=label))
                    try:
                        with gpu:
                            launcher(*args)
                    except Exception as error:
                        problems.append(f"sm_{arch} {label}: the launcher failed: {type(error).__name__}: {error}")
    return list(found.values()), problems


def compile_all(chosen: Sequence[Launch]) -> list[sass.Cost | Exception]:
    """The costs in the same order; an exception where the compiler refuses."""

    def attempt(launch: Launch) -> sass.Cost | Exception:
        try:
            return launch.compile()
        except Exception as error:
            return error

    with mock.patch.dict(os.environ, _ENVIRONMENT), ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(attempt, chosen))


def source_hash(kernel: Any) -> str:
    """Of the kernel's source and of the functions and constants it uses; where in its file it stands does not count.

    Triton's own functions come with its version.
    """
    parts: dict[str, str] = {}
    pending = [kernel]
    while pending:
        function = pending.pop()
        name = f"{function.__module__}.{function.__qualname__}"
        if name in parts:
            continue
        parts[name] = function.src
        known = {**function.__globals__, **inspect.getclosurevars(function.fn).nonlocals}
        for node in ast.walk(ast.parse(function.src)):
            value = _lookup(node, known)
            if hasattr(value, "src") and hasattr(value, "cache_key"):
                if not value.__module__.startswith("triton."):
                    pending.append(value)
            elif type(value).__name__ == "constexpr":
                parts[ast.unparse(node)] = repr(value)
    # By their text alone: a function may move to another module.
    return hashlib.sha256("\n".join(sorted(parts.values())).encode()).hexdigest()


def _lookup(node: ast.AST, known: dict[str, Any]) -> Any:
    """What a name or a dotted name in a kernel stands for outside of it."""
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if isinstance(node, ast.Attribute):
        return getattr(_lookup(node.value, known), node.attr, None)
    return None


def _spelled(value: Any) -> str:
    return str(getattr(value, "__name__", getattr(value, "value", value)))


def _calls(spec: OpSpec, gpu: _GPU) -> Iterator[tuple[str, Any, list[Any]]]:
    """(label, launcher, arguments): forward and backward of every sample that the pretended GPU serves."""
    binding = spec.gradient
    for kind, dtypes in (("bench", DTYPES), ("full", (torch.bfloat16,))):
        for dtype in dtypes:
            for sample, backward in _fake_samples(spec, kind, dtype):
                label = f"{spec.basename} {sample.name} {str(dtype)[6:]}"
                yield from _served(spec, map_tensors(_without_memory, sample.args), f"{label} forward", gpu)
                if not backward:
                    continue
                *values, mask = map_tensors(_without_memory, backward)
                masks = [mask]
                if kind == "bench" and sum(mask) > 1:
                    masks += [[i == j for j in range(len(mask))] for i in range(len(mask)) if mask[i]]
                for wanted in masks:
                    names = " ".join(n for n, w in zip(binding.op.outputs, wanted, strict=True) if w)
                    yield from _served(binding.op, [*values, wanted], f"{label} backward {names}", gpu)


def _served(spec: OpSpec, args: list[Any], label: str, gpu: _GPU) -> Iterator[tuple[str, Any, list[Any]]]:
    for name, kernel in spec.backends.items():
        with gpu:
            served = name not in ("cpu", "cuda") and spec.why_not(name, args) is None
        if served:
            yield label, resolved(kernel, "cuda"), args


def _fake_samples(spec: OpSpec, kind: str, dtype: torch.dtype) -> list[tuple[Sample, list[Any] | None]]:
    """The samples and the arguments of their backward op, of CPU tensors that hold nothing.

    They come from the CPU because autograd, through which they say what wants a gradient, needs a device that exists.
    """
    with FakeTensorMode():
        made = list(samples(spec, kind, "cpu", dtype))
        return [(s, backward_args(spec, None, s.args) if differentiable(s.args) else None) for s in made]


def _without_memory(tensor: Tensor) -> Tensor:
    """The same dtype, shape, strides and place in its memory."""
    elements = tensor.untyped_storage().nbytes() // tensor.element_size()
    whole = torch.empty(elements, dtype=tensor.dtype, device="meta")
    return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


class _Device:
    """Stands for `torch.cuda.device`: there is nothing to switch to."""

    def __init__(self, device: Any) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exc: object) -> None:
        pass


class _Driver:
    """What Triton asks of a driver before it launches. Each architecture is a device of its own to its caches."""

    def __init__(self, arch: str) -> None:
        self.number = capability(arch)
        self.multiprocessors = _MULTIPROCESSORS.get(self.number, 132)
        properties = {"max_shared_mem": sass.shared_limit(arch), "multiprocessor_count": self.multiprocessors}
        self.utils = SimpleNamespace(get_device_properties=lambda device: {"warpSize": 32, **properties})

    def get_current_device(self) -> int:
        return self.number

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.number, 32)

    def get_device_interface(self) -> Any:
        return torch.cuda

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", self.number)


class _GPU(TorchFunctionMode):
    """Makes tensors without memory claim to be on a GPU.

    Fake tensors would do, but torch refuses to slice those of a device that it was not built for.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.device = torch.device("cuda", number)
        self.write: Callable[[Launch], object] = lambda launch: None
        self.answers = {
            Tensor.device.__get__: lambda tensor: self.device,
            Tensor.is_cuda.__get__: lambda tensor: True,
            Tensor.is_meta.__get__: lambda tensor: False,
            Tensor.get_device: lambda tensor: number,
            # Allocators align to 256 bytes and more.
            Tensor.data_ptr: lambda tensor: 4096 + tensor.storage_offset() * tensor.element_size(),
            Tensor.cuda: lambda tensor, *args, **kwargs: tensor,
        }

    def __torch_function__(self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        answer = self.answers.get(function)
        if answer is not None and Tensor.is_meta.__get__(args[0]):
            return answer(*args, **(kwargs or {}))
        kwargs = {name: self._place(value) if name == "device" else value for name, value in (kwargs or {}).items()}
        return function(*[self._place(a) if isinstance(a, torch.device) else a for a in args], **kwargs)

    @staticmethod
    def _place(device: Any) -> Any:
        return torch.device("meta") if device is not None and torch.device(device).type == "cuda" else device


@contextlib.contextmanager
def _pretended_gpu(arch: str) -> Iterator[_GPU]:
    """Makes Triton and torch believe in a GPU; its `write` gets what is launched there.

    The device's number is its architecture's, so that whatever a launcher remembers of a device stays right.
    """
    from triton.runtime import driver
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    pretended = _Driver(arch)
    gpu = _GPU(pretended.number)
    properties = SimpleNamespace(
        name=f"sm_{arch}",
        major=pretended.number // 10,
        minor=pretended.number % 10,
        multi_processor_count=pretended.multiprocessors,
        shared_memory_per_block_optin=sass.shared_limit(arch),
        max_threads_per_multi_processor=2048,
        regs_per_multiprocessor=65536,
        warp_size=32,
    )

    def write_down(
        kernel: Any, key: Any, signature: Any, device: Any, constants: Any, options: Any, attributes: Any, warmup: Any
    ) -> None:
        gpu.write(Launch(arch, kernel, signature, constants, attributes, options))

    def every_configuration(tuner: Any, *args: Any, **kwargs: Any) -> None:
        tuner.nargs = dict(zip(tuner.arg_names, args, strict=False))
        for config in tuner.prune_configs(kwargs):
            if config.pre_hook is not None:
                config.pre_hook({**tuner.nargs, **kwargs, **config.all_kwargs()})
            tuner.fn.run(*args, **kwargs, **config.all_kwargs())

    patches = [
        mock.patch.object(driver, "_active", pretended),
        mock.patch.object(JITFunction, "_do_compile", write_down),
        mock.patch.object(Autotuner, "run", every_configuration),
        mock.patch.object(torch.cuda, "device", _Device),
        mock.patch.object(torch.cuda, "current_device", lambda: pretended.number),
        mock.patch.object(torch.cuda, "get_device_properties", lambda *_: properties),
        mock.patch.object(torch.cuda, "get_device_capability", lambda *_: (properties.major, properties.minor)),
        mock.patch.dict(os.environ, _ENVIRONMENT),
    ]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield gpu

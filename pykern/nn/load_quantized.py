"""Load a checkpoint into a model that has no memory yet, quantising what comes or taking what is quantised."""

import contextlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pykern.nn.linear_4bit import Linear4bit
from pykern.nn.quantize_model import SKIP, experts, linears, quantize_parameter, replace
from pykern.ops import Weight4bit, quantize_4bit

_BITSANDBYTES = ".weight.quant_state.bitsandbytes__"
_WORDS = ("qweight", "qzeros", "scales", "g_idx")


def load_quantized(
    model: torch.nn.Module,
    files: Path | str | Iterable[Path | str],
    *,
    skip: Sequence[str] = SKIP,
    device: torch.device | str = "cpu",
    checkpoint_format: str = "gptq",
    strict: bool = True,
    **options: Any,
) -> torch.nn.Module:
    """Fills a model on the meta device from safetensors files, one tensor after the other, with 4-bit weights.

    A float checkpoint gives what `load_state_dict` and `quantize_model` would, but only one tensor of it is in memory
    at a time. In a checkpoint of bitsandbytes (as transformers saves it), GPTQ or AWQ every linear layer that is stored
    in 4 bits becomes a `pykern.nn.Linear4bit` with that very weight, and what is stored as floats stays so.

    Args:
        model: its parameters on the meta device; their dtypes are those of the loaded ones. Names must be the
            checkpoint's. Buffers that the checkpoint lacks must be real: `accelerate.init_empty_weights` makes such
            a model.
        files: the safetensors files, or the folder that holds them.
        skip: names of modules or parameters that are not to be quantised, as for `quantize_model`.
        device: where the loaded tensors go.
        checkpoint_format: of GPTQ's zero points, as for `Weight4bit.from_gptq`.
        strict: False ignores tensors that the model has no place for.
        options: of `pykern.ops.quantize_4bit`, for a float checkpoint.

    Returns:
        The model.

    Raises:
        KeyError: the checkpoint lacks a tensor; the model is then loaded in part.
        ValueError, TypeError: a tensor does not fit, or the model has no place for it.
    """
    with contextlib.ExitStack() as stack:
        stored = _Stored(files, stack)
        loading = _Loading(model, stored, torch.device(device), checkpoint_format)
        if not loading.packed_linears():
            loading.quantizing(skip, options)
        loading.rest(strict)
    return model


class _Stored(Mapping[str, Tensor]):
    """The tensors of all the files by name, each read when it is asked for."""

    def __init__(self, files: Path | str | Iterable[Path | str], stack: contextlib.ExitStack) -> None:
        from safetensors import safe_open

        paths = [Path(files)] if isinstance(files, (str, Path)) else [Path(file) for file in files]
        if len(paths) == 1 and paths[0].is_dir():
            paths = sorted(paths[0].glob("*.safetensors"))
        if not paths:
            raise ValueError(f"files: expected safetensors files or a folder of them, got {files}")
        self._homes: dict[str, Any] = {}
        for path in paths:
            handle = stack.enter_context(safe_open(path, "pt"))
            names = dict.fromkeys(handle.keys(), handle)
            if twice := sorted(names.keys() & self._homes.keys()):
                raise ValueError(f"files: {_few(twice)} is in {path} and in another file")
            self._homes |= names

    def __getitem__(self, name: str) -> Tensor:
        return self._homes[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._homes)

    def __len__(self) -> int:
        return len(self._homes)


class _Loading:
    """What a model still waits for, and what is left of the checkpoint."""

    def __init__(self, model: torch.nn.Module, stored: _Stored, device: torch.device, checkpoint_format: str) -> None:
        self.model, self.stored, self.device, self.checkpoint_format = model, stored, device, checkpoint_format
        self.left = dict.fromkeys(stored)  # in the order of the files, so that each is read once from end to end
        self.names = defaultdict(list)  # of every linear layer: it may have several
        for name, module in model.named_modules(remove_duplicate=False):
            if isinstance(module, torch.nn.Linear):
                self.names[id(module)].append(name)
        self.tied = defaultdict(list)  # of every parameter and buffer
        for name, module in model.named_modules():
            for key, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    self.tied[id(tensor)].append((name, key))
        real = [name for name, parameter in model.named_parameters() if not parameter.is_meta]
        if real:
            raise ValueError(f"model: expected its parameters on the meta device, {_few(real)} are not")

    def packed_linears(self) -> bool:
        """Takes every linear layer that is stored in 4 bits; whether there are any."""
        found = False
        for key in list(self.left):
            name, suffix, _ = key.partition(_BITSANDBYTES)
            if suffix:
                weight = Weight4bit.from_bitsandbytes(self.stored, f"{name}.weight")
                used = [entry for entry in self.left if entry.startswith(f"{name}.weight.")]
                self._place(name, weight, [f"{name}.weight", *used])
            elif key.endswith(".qweight"):
                name = key.removesuffix(".qweight")
                self._place(name, self._words(name), [f"{name}.{part}" for part in _WORDS])
            else:
                continue
            found = True
        return found

    def quantizing(self, skip: Sequence[str], options: dict[str, Any]) -> None:
        """Quantises the weights of a float checkpoint as they come."""
        layers = {f"{name}.weight": name for names in linears(self.model, skip) for name in names}
        fused = {f"{owner}.{name}".lstrip("."): (owner, name) for owner, name in experts(self.model, skip)}
        if not layers and not fused:
            raise ValueError(f"model: {type(self.model).__name__} has nothing to quantise; skipped: {', '.join(skip)}")
        for key in list(self.left):
            if key in layers:
                linear = self.model.get_submodule(layers[key])
                self._place(layers[key], quantize_4bit(self._like(key, linear.weight), **options), [key])
            elif key in fused:
                module, name = self.model.get_submodule(fused[key][0]), fused[key][1]
                quantize_parameter(module, name, self._like(key, getattr(module, name)), **options)
                del self.left[key]

    def rest(self, strict: bool) -> None:
        """Takes every other parameter and buffer."""
        state = self.model.state_dict(keep_vars=True)
        for key in list(self.left):
            owner, _, name = key.rpartition(".")
            old = state.get(key)
            if not isinstance(old, Tensor):
                continue
            new = self._like(key, old, copy=True)  # its memory may be the file's
            if isinstance(old, torch.nn.Parameter):
                new = torch.nn.Parameter(new, requires_grad=old.requires_grad)
            for module, alias in self.tied.get(id(old), [(owner, name)]):
                setattr(self.model.get_submodule(module), alias, new)
            del self.left[key]
        if self._missing() and hasattr(self.model, "tie_weights"):
            self.model.tie_weights()  # of transformers, where what makes a model without memory unties it
        if missing := self._missing():
            raise KeyError(f"{_few(missing)}: missing in the checkpoint")
        if strict and self.left:
            raise ValueError(f"{_few(list(self.left))}: the model has no place for what the checkpoint holds")

    def _missing(self) -> list[str]:
        tensors = (*self.model.named_parameters(), *self.model.named_buffers())
        return [name for name, tensor in tensors if tensor.is_meta]

    def _words(self, name: str) -> Weight4bit:
        parts = [f"{name}.{part}" for part in _WORDS]
        for part in parts[:3]:
            if part not in self.stored:
                raise KeyError(f"{part}: missing, of a 4-bit weight of GPTQ or AWQ")
        qweight, qzeros, scales = (self.stored[part] for part in parts[:3])
        if qweight.shape[1:] == scales.shape[1:]:  # a column for each output, where AWQ packs outputs into words
            g_idx = self.stored.get(parts[3])
            return Weight4bit.from_gptq(qweight, qzeros, scales, g_idx, checkpoint_format=self.checkpoint_format)
        return Weight4bit.from_awq(qweight, qzeros, scales)

    def _place(self, name: str, weight: Weight4bit, used: list[str]) -> None:
        linear = self.model.get_submodule(name)
        if not isinstance(linear, torch.nn.Linear):
            raise ValueError(f"{name}: stored in 4 bits, expected a Linear in the model, got {type(linear).__name__}")
        if tuple(weight.shape) != tuple(linear.weight.shape):
            raise ValueError(f"{name}: expected shape {tuple(linear.weight.shape)}, got {tuple(weight.shape)}")
        tensors = {k: v.to(self.device, copy=True) for k, v in vars(weight).items() if isinstance(v, Tensor)}
        quantized = Linear4bit(Weight4bit(**(vars(weight) | tensors)), linear.bias)
        replace(self.model, self.names[id(linear)], quantized.train(linear.training))
        for key in used:
            self.left.pop(key, None)

    def _like(self, key: str, old: Tensor, copy: bool = False) -> Tensor:
        tensor = self.stored[key]
        if tensor.shape != old.shape:
            raise ValueError(f"{key}: expected shape {tuple(old.shape)}, got {tuple(tensor.shape)}")
        return tensor.to(self.device, old.dtype, copy=copy)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")

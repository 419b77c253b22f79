"""Checkpoints: one folder each, of safetensors and JSON, that appears whole or not at all. Nothing is ever unpickled.

    RUN/checkpoints/step-00002000/model.safetensors     the model's weights, by their names in its state_dict
                                  state.safetensors     tensors of the optimiser, of random generators, …
                                  checkpoint.json       everything else, and the size and SHA-256 of the other files
                                  adapter_model.safetensors, adapter_config.json   adapters once more, as PEFT has them

A checkpoint is written to a hidden folder beside its place, synchronised with the disk, and renamed as the last act:
a kill or a full disk at any moment leaves the checkpoints that were there before, untouched.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pykern.nn import lora_adapter
from pykern.nn.lora_adapter import save_adapter
from pykern.train.errors import UserError, first_line, writing
from pykern.train.lora import LoraOptions, adapt, has_adapters

FORMAT = "pykern-checkpoint-1"
WEIGHTS, STATE, MANIFEST = "model.safetensors", "state.safetensors", "checkpoint.json"
_TENSOR = "__tensor__"
_PARTIAL = ".partial-"


def save_checkpoint(
    run: Path | str,
    step: int,
    model: nn.Module,
    optimizer_state: Mapping[str, Any] | None,
    extra: Mapping[str, Any] | None = None,
    *,
    keep: int | None = None,
) -> Path:
    """Write RUN/checkpoints/step-<step> and return its path; `keep` then removes all but the newest that many.

    `optimizer_state` (a state_dict) and `extra` may nest dicts, lists, numbers, strings and tensors at will.
    UserError when it cannot be written; the run's other checkpoints are intact then.
    """
    folder = Path(run, "checkpoints")
    final, partial = folder / f"step-{step:08d}", folder / f"{_PARTIAL}{step:08d}"
    with writing(final):
        _write_checkpoint(final, partial, step, model, {"optimizer": optimizer_state, **(extra or {})})
    if keep is not None:
        for old in checkpoints(run)[: -max(keep, 1)]:
            _remove(old)
    return final


def _write_checkpoint(final: Path, partial: Path, step: int, model: nn.Module, state: Mapping[str, Any]) -> None:
    folder = final.parent
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob(f"{_PARTIAL}*"):  # what a killed process left half written
        shutil.rmtree(path)
    partial.mkdir()
    try:
        tensors: dict[str, Tensor] = {}
        packed = _pack(state, "", tensors)
        files = {
            WEIGHTS: _write_tensors(partial / WEIGHTS, _unshared(model.state_dict())),
            STATE: _write_tensors(partial / STATE, tensors),
        }
        if has_adapters(model):
            with _safetensors_errors():
                save_adapter(model, partial)
            files |= {name: _written(partial / name) for name in (lora_adapter.WEIGHTS, lora_adapter.CONFIG)}
        manifest = {"format": FORMAT, "step": step, "files": files, "state": packed}
        _write_text(partial / MANIFEST, json.dumps(manifest))
        if final.exists():  # a run that was resumed from an older checkpoint comes past this step again
            _remove(final)
        partial.rename(final)
        _synchronise(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def checkpoints(run: Path | str) -> list[Path]:
    """The run's checkpoint folders, oldest first."""
    found = [path for path in Path(run, "checkpoints").glob("step-*") if path.is_dir() and path.name[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def latest_checkpoint(run: Path | str) -> Path:
    """The run's newest checkpoint; UserError when there is none."""
    if not Path(run).is_dir():
        raise UserError(f"there is no run folder {run}")
    found = checkpoints(run)
    if not found:
        raise UserError(f"the run {run} has no checkpoint")
    return found[-1]


def load_checkpoint(folder: Path | str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights, and the state: `step`, `optimizer` and the entries of `extra`, all on the CPU.

    UserError when the folder is no checkpoint of ours, or one whose files are not the bytes that were written.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
    try:
        for name, expected in manifest["files"].items():
            _verify(folder / name, expected)
        weights, tensors = load_file(folder / WEIGHTS), load_file(folder / STATE)
        state = _unpack(manifest["state"], tensors)
        return weights, {"step": int(manifest["step"]), **state}
    except OSError as error:
        raise _damaged(folder, f"{Path(error.filename or '').name}: {error.strerror or first_line(error)}") from None
    except (safetensors.SafetensorError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise _damaged(folder, first_line(error)) from None


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], source: Path | str) -> None:
    """Copy `weights` into `model`; UserError naming `source` when names or shapes are not the model's."""
    own = _unshared(model.state_dict())
    missing, foreign = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    if missing or foreign:
        what = f"no {missing[0]!r}" if missing else f"{foreign[0]!r}, which the model does not have"
        raise UserError(f"the weights in {source} are not this model's: they have {what}")
    for name, tensor in own.items():
        if tensor.shape != weights[name].shape:
            raise UserError(
                f"the weights in {source} are not this model's: {name} has shape {tuple(weights[name].shape)} there "
                f"and {tuple(tensor.shape)} in the model"
            )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(weights[name])


def load_model(run: Path | str):
    """(model, tokenizer, TransformerConfig) of a run's newest checkpoint; the model is on the CPU, in eval mode."""
    from pykern.model import Transformer, TransformerConfig
    from pykern.train.config import from_dict, read_config
    from pykern.train.tokenizer import load_tokenizer

    checkpoint = latest_checkpoint(run)
    weights, _ = load_checkpoint(checkpoint)
    path = Path(run, "config.json")
    data = read_config(path)
    if not isinstance(data.get("model"), dict):
        raise UserError(f"{path} describes no model")
    config = from_dict(TransformerConfig, data["model"], str(path))
    tokenizer = load_tokenizer(run)
    require_vocabulary(tokenizer.vocab_size, config.vocab_size, str(run))
    lora = from_dict(LoraOptions, data.get("lora", {}), f"{path}: lora")
    model = adapt(Transformer(config), lora, seed=0)
    load_weights(model, weights, checkpoint)
    return model.eval(), tokenizer, config


def require_vocabulary(tokenizer_size: int, model_size: int, where: str) -> None:
    """A model may have spare rows (a padded vocabulary), never fewer than the tokenizer has entries."""
    if tokenizer_size > model_size:
        raise UserError(
            f"{where}: the vocabularies do not match: the tokenizer has {tokenizer_size}, the model {model_size}"
        )


def _unshared(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A tied weight once, under the first of its names: safetensors refuses tensors that share memory."""
    seen: dict[tuple[int, torch.Size], str] = {}
    return {
        name: tensor
        for name, tensor in state.items()
        if tensor.numel() == 0 or seen.setdefault((tensor.data_ptr(), tensor.shape), name) == name
    }


def _pack(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON; each tensor goes to `tensors` under its path, and a reference to it takes its place."""
    if isinstance(value, Tensor):
        tensors[path] = value
        return {_TENSOR: path}
    if isinstance(value, Mapping):
        # Integer keys, as in an optimiser's state, are marked, because JSON has none.
        return {_key(key): _pack(item, f"{path}/{key}", tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_pack(item, f"{path}/{i}", tensors) for i, item in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(
        f"a checkpoint holds dicts, lists, numbers, strings and tensors, but {path} is a {type(value).__name__}"
    )


def _key(key: Any) -> str:
    return f"int:{key}" if isinstance(key, int) else str(key)


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if set(value) == {_TENSOR}:
            return tensors[value[_TENSOR]]
        return {int(key[4:]) if key.startswith("int:") else key: _unpack(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    return value


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} is not a checkpoint of pykern: it has no {MANIFEST}") from None
    except (OSError, ValueError) as error:
        raise _damaged(folder, f"{MANIFEST}: {first_line(error)}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{folder} is not a checkpoint of pykern: {MANIFEST} does not say {FORMAT!r}")
    return manifest


def _damaged(folder: Path, why: str) -> UserError:
    older = [path for path in checkpoints(folder.parent.parent) if path.name < folder.name]
    hint = f"; remove it to go on from {older[-1].name}" if older else ""
    return UserError(f"the checkpoint {folder} is damaged: {why}{hint}")


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    with _safetensors_errors():
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    return _written(path)


@contextmanager
def _safetensors_errors() -> Iterator[None]:
    try:
        yield
    except safetensors.SafetensorError as error:
        raise OSError(None, first_line(error)) from None  # the file system's refusal, in the library's clothes


def _written(path: Path) -> dict[str, Any]:
    """A file's size and hash, once it is on the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _verify(path: Path, expected: Mapping[str, Any]) -> None:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size != expected["bytes"]:
            raise ValueError(f"{path.name} has {size} bytes of {expected['bytes']}")
        if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
            raise ValueError(f"{path.name} is not what was written")


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _remove(folder: Path) -> None:
    """Out of sight first: half a checkpoint must not look like one, whenever we are killed."""
    hidden = folder.with_name(f"{_PARTIAL}old-{folder.name}")
    folder.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _synchronise(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

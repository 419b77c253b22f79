"""Configurations: a dataclass is the preset, a file lays its values over it, and flags lay theirs over both."""

from __future__ import annotations

import dataclasses
import json
import tomllib
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from pykern.train.errors import UserError, first_line

T = TypeVar("T")


def to_dict(config: Any) -> dict[str, Any]:
    """The dataclass as JSON can hold it."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return plain(config)


def from_dict(cls: type[T], data: dict[str, Any], where: str, base: T | None = None) -> T:
    """A `cls` with the values of `data` over those of `base`; UserError naming `where` for what does not fit."""
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    if unknown := sorted(data.keys() - fields.keys()):
        raise UserError(f"{where}: there is no setting {unknown[0]!r}; there are {', '.join(fields)}")
    hints = typing.get_type_hints(cls)
    values = {} if base is None else {name: getattr(base, name) for name in fields}
    for name, value in data.items():
        values[name] = _convert(hints[name], value, f"{where}: {name}", values.get(name))
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {first_line(error)}") from None


def read_config(path: Path | str) -> dict[str, Any]:
    """The settings in a JSON or TOML file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        data = tomllib.loads(text) if Path(path).suffix == ".toml" else json.loads(text)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is not a configuration: {first_line(error)}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} is not a configuration: it holds no table of settings")
    return data


def _convert(hint: Any, value: Any, where: str, base: Any) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _convert(arguments[0], value, where, base)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, where, base)
    if origin is typing.Literal:
        if value not in arguments:
            raise UserError(f"{where} is one of {', '.join(map(str, arguments))}, not {value!r}")
        return value
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return from_dict(hint, value, where, base)
    if origin in (tuple, list) and isinstance(value, list):
        return origin(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if not isinstance(hint, type):
        return value
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise UserError(f"{where} is {value!r}; it should be {'an' if hint is int else 'a'} {hint.__name__}")
    return value

"""Calls that every op must refuse, with a message that helps; each check raises AssertionError with the reason."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pykern.ops._backends import BackendError
from pykern.testing.checks import call
from pykern.testing.inputs import map_tensors

if TYPE_CHECKING:
    from pykern.ops._spec import OpSpec


def check_bad_input(spec: OpSpec, args: Sequence[Any], error: type[Exception], pattern: str) -> None:
    """A call that must be refused is, with a message that names the argument; by fake tensors too."""
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # it reports refusals as faults
    fake_mode = FakeTensorMode()
    _check_refusal(spec, args, error, pattern)
    with fake_mode:
        _check_refusal(spec, map_tensors(fake_mode.from_tensor, args), error, pattern)


def _check_refusal(spec: OpSpec, args: Sequence[Any], error: type[Exception], pattern: str) -> None:
    try:
        spec(*args)
    except error as refusal:
        assert re.search(pattern, str(refusal)), f"the message {str(refusal)!r} does not match {pattern!r}"
    else:
        raise AssertionError(f"accepted; expected {error.__name__} matching {pattern!r}")


def check_device(spec: OpSpec, args: Sequence[Any]) -> None:
    """A tensor on another device than the first one is refused, with a message that says so."""
    first, *others = [i for i, a in enumerate(args) if isinstance(a, Tensor)]
    for i in others:
        apart = map_tensors(lambda t: t.detach(), args)
        apart[i] = apart[i].to("meta")
        _check_refusal(spec, apart, ValueError, "expected device (meta|cpu|cuda)")


def check_forced(spec: OpSpec, args: Sequence[Any]) -> None:
    """A backend that does not exist is refused by name, with the ones that do."""
    try:
        call(spec, "nonesuch", args)
    except BackendError as refusal:
        assert "nonesuch" in str(refusal) and "reference" in str(refusal)
    else:
        raise AssertionError("a backend that does not exist was accepted")

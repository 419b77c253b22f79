"""The one exception that a command reports as a single line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """Something that the user can put right: the command prints `error: …` and exits with 1, without a traceback."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))  # libraries below us put line breaks into their messages


def first_line(error: BaseException) -> str:
    """What went wrong in one line: the message's first line, or the exception's name when it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Turns what the file system refuses inside the block, a full disk for one, into a UserError that names `path`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or first_line(error)}") from None

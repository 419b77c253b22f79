"""Where training text comes from: a file, a folder of files, Python's own library, or a data set of `datasets`.

A corpus is a sequence of documents, each given in pieces so that a text larger than memory can pass through. Folders
and the standard library are read in the order of a hash of their paths: whatever tail is held out is then a random
choice of files, and the same one on every machine.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pykern.train.errors import UserError, first_line

STDLIB = "stdlib"
PIECE = 1 << 20  # characters: large enough that the overhead a piece vanishes, small beside any memory

# Tests, and what a Python installation may lack or have removed, so that two machines with one Python agree.
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3"}


@dataclass(frozen=True)
class Corpus:
    """`documents()` starts over at each call and yields each document as an iterator of pieces of text."""

    name: str
    documents: Callable[[], Iterator[Iterator[str]]]

    def pieces(self) -> Iterator[str]:
        for document in self.documents():
            yield from document


def open_corpus(data: str) -> Corpus:
    """The corpus that `--data` names: a file, a folder, `stdlib`, or `NAME[:CONFIGURATION]` of the datasets library."""
    if not data:
        raise UserError("--data is needed: a text file, a folder, 'stdlib', or the name of a data set")
    path = Path(data).expanduser()
    try:
        if path.is_dir():
            saved = (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()
            return _saved_dataset(path) if saved else _folder(path)
        if path.exists():
            return Corpus(str(path), lambda: iter([_read(path)]))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if data == STDLIB:
        return _stdlib()
    if data[0] in "./~" or path.suffix == ".txt" or len(path.parts) > 2:
        raise UserError(f"no such file or folder: {data}")
    return _named_dataset(data)


def stdlib_text() -> str:
    """The standard library's sources in one string, as `--data stdlib` gives them: printable ASCII and line breaks."""
    return "".join(_stdlib().pieces())


def _read(path: Path) -> Iterator[str]:
    """A UTF-8 file in pieces that end where a line ends; line breaks of other systems become \\n."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            while piece := file.read(PIECE):
                yield piece + file.readline(PIECE)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _by_hash(root: Path, paths: Iterator[Path]) -> list[Path]:
    return sorted(paths, key=lambda path: hashlib.sha256(path.relative_to(root).as_posix().encode()).digest())


def _folder(root: Path) -> Corpus:
    def is_text(path: Path) -> bool:
        """Decodes the first kilobytes: a folder of text may hold an image or a cache beside it."""
        if not path.is_file() or any(part.startswith(".") for part in path.relative_to(root).parts):
            return False
        with path.open("rb") as file:
            head = file.read(8192)
        try:
            head.decode("utf-8")
        except UnicodeDecodeError as error:
            return error.reason == "unexpected end of data"  # a character was cut at the end of the head
        return b"\0" not in head

    paths = _by_hash(root, (path for path in root.rglob("*") if is_text(path)))
    if not paths:
        raise UserError(f"the folder {root} holds no UTF-8 text file")
    return Corpus(str(root), lambda: (_read(path) for path in paths))


def _stdlib() -> Corpus:
    root = Path(sysconfig.get_path("stdlib"))
    paths = _by_hash(root, (p for p in root.rglob("*.py") if not _NOT_LIBRARY & set(p.relative_to(root).parts)))
    if not paths:
        raise UserError(f"this Python has no library sources in {root}: give a text file with --data")

    def ascii_only(path: Path) -> Iterator[str]:
        # A few names and examples are not ASCII, 0.01 % of the text; each would be a vocabulary entry seen a few times.
        for piece in _read(path):
            yield piece.encode("ascii", "ignore").decode("ascii")

    return Corpus(STDLIB, lambda: (ascii_only(path) for path in paths))


def _named_dataset(data: str) -> Corpus:
    name, _, configuration = data.partition(":")
    datasets = _datasets_library(f"{data!r} is neither a file nor a folder")
    try:
        rows = datasets.load_dataset(name, configuration or None, split="train")
    except Exception as error:  # the library raises many kinds: no network, no such name, a choice of configurations
        raise UserError(
            f"{data!r} is neither a file nor a folder, and the datasets library cannot load it: {first_line(error)}"
        ) from None
    return _rows(data, rows)


def _saved_dataset(path: Path) -> Corpus:
    datasets = _datasets_library(f"{path} is a saved data set")
    try:
        rows = datasets.load_from_disk(str(path))
    except Exception as error:
        raise UserError(f"the datasets library cannot load {path}: {first_line(error)}") from None
    if isinstance(rows, dict):
        if "train" not in rows:
            raise UserError(f"{path} has no split named 'train', only {', '.join(rows)}")
        rows = rows["train"]
    return _rows(str(path), rows)


def _datasets_library(why: str):
    try:
        import datasets
    except ImportError:
        raise UserError(f"{why}, and the datasets library is not installed: pip install datasets") from None
    datasets.disable_progress_bars()
    return datasets


def _rows(name: str, rows) -> Corpus:
    strings = [column for column, feature in rows.features.items() if getattr(feature, "dtype", None) == "string"]
    if "text" not in strings and len(strings) != 1:
        raise UserError(
            f"{name} needs a column 'text' or a single column of strings; it has {', '.join(rows.features)}"
        )
    column = "text" if "text" in strings else strings[0]

    def documents() -> Iterator[Iterator[str]]:
        for row in rows.select_columns([column]):
            text = row[column] or ""
            yield iter([text if text.endswith("\n") else text + "\n"])

    return Corpus(name, documents)

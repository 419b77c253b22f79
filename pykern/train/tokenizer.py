"""Text to token ids and back: one token a character, or byte-level BPE. Both are saved as `tokenizer.json`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from pykern.train.errors import UserError, first_line

FILE_NAME = "tokenizer.json"
END_OF_TEXT = "<|endoftext|>"


class CharTokenizer:
    """One token per character of the training text, numbered in code point order."""

    def __init__(self, characters: Iterable[str]) -> None:
        self.characters = "".join(sorted(set(characters)))
        if not self.characters:
            raise UserError("a character tokenizer needs text with at least one character")
        codes = np.array([ord(c) for c in self.characters], dtype=np.int64)
        self._ids = np.full(codes[-1] + 1, -1, dtype=np.int64)  # code point -> id, -1 where there is none
        self._ids[codes] = np.arange(len(codes))

    @classmethod
    def train(cls, text: str | Iterable[str]) -> CharTokenizer:
        """A tokenizer of every character in `text`, a string or an iterable of pieces."""
        characters: set[str] = set()
        for piece in [text] if isinstance(text, str) else text:
            characters.update(piece)
        return cls(characters)

    @property
    def vocab_size(self) -> int:
        return len(self.characters)

    @property
    def end_of_text(self) -> int | None:
        """A character vocabulary has no id that marks the end of a document."""
        return None

    def encode_array(self, text: str) -> np.ndarray:
        """Ids of `text`, int64 (len(text),)."""
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        ids = np.where(codes < len(self._ids), self._ids[np.minimum(codes, len(self._ids) - 1)], -1)
        if ids.size and ids.min() < 0:
            unknown = text[int(np.argmin(ids))]
            raise UserError(f"{unknown!r} is not among the {self.vocab_size} characters of the vocabulary")
        return ids

    def encode(self, text: str) -> list[int]:
        return self.encode_array(text).tolist()

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.characters[i] for i in ids)

    @property
    def text(self) -> str:
        """What is saved, which is all there is of it."""
        return json.dumps({"type": "char", "characters": self.characters})

    def save(self, folder: Path | str) -> None:
        Path(folder, FILE_NAME).write_text(self.text, encoding="utf-8")


class BPETokenizer:
    """Byte-level byte-pair encoding: any text can be encoded; id 0 marks the end of a document."""

    def __init__(self, tokenizer: object) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def train(cls, text: str | Iterable[str], vocab_size: int = 4096) -> BPETokenizer:
        """Merges learnt from `text`, a string or an iterable of pieces; 257 ids at the least: the bytes and a mark."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        if vocab_size < 257:
            raise UserError(f"a byte-level vocabulary has 257 entries at the least, not {vocab_size}")
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator([text] if isinstance(text, str) else text, trainer)
        return cls(tokenizer)

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size()

    @property
    def end_of_text(self) -> int | None:
        return self._tokenizer.token_to_id(END_OF_TEXT)

    def encode_array(self, text: str) -> np.ndarray:
        """Ids of `text`, int64 (tokens,)."""
        return np.array(self._tokenizer.encode(text).ids, dtype=np.int64)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text).ids

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    @property
    def text(self) -> str:
        """What is saved, which is all there is of it."""
        return self._tokenizer.to_str()

    def save(self, folder: Path | str) -> None:
        Path(folder, FILE_NAME).write_text(self.text, encoding="utf-8")


def load_tokenizer(folder: Path | str) -> CharTokenizer | BPETokenizer:
    """Read `tokenizer.json` in `folder`: ours for characters, the `tokenizers` library's own format for BPE."""
    path = Path(folder, FILE_NAME)
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text)
    except OSError as error:
        raise UserError(f"cannot read the tokenizer {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is not a tokenizer: {first_line(error)}") from None
    if isinstance(data, dict) and data.get("type") == "char" and isinstance(data.get("characters"), str):
        return CharTokenizer(data["characters"])
    if isinstance(data, dict) and "model" in data:
        from tokenizers import Tokenizer

        try:
            return BPETokenizer(Tokenizer.from_str(text))
        except Exception as error:  # the Rust library raises plain Exception
            raise UserError(f"{path} is not a tokenizer: {first_line(error)}") from None
    raise UserError(f"{path} is neither a character tokenizer of pykern nor a tokenizer of the tokenizers library")

"""Tokens on disk: a corpus is tokenised once into one memory-mapped file, and context windows are cut from it.

A folder of tokens holds `tokens.bin` (uint16, or uint32 for vocabularies beyond 65,536), `meta.json` and
`tokenizer.json`. The first 90 % are for training, the rest for validation, as in nanoGPT.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pykern.train.corpus import Corpus, open_corpus
from pykern.train.errors import UserError, first_line, writing
from pykern.train.tokenizer import BPETokenizer, CharTokenizer, load_tokenizer

TRAIN_SHARE = 0.9
BPE_SAMPLE = 1 << 28  # characters of text that merges are learnt from; more changes them little and costs memory
TOKENS, META = "tokens.bin", "meta.json"


@dataclass(frozen=True)
class TokenData:
    """A tokenised corpus: `train` and `validation` are memory-mapped (tokens,) arrays."""

    folder: Path
    tokenizer: CharTokenizer | BPETokenizer
    train: np.ndarray
    validation: np.ndarray

    def require(self, context_length: int) -> None:
        """Both parts must hold one context window and the token that follows it."""
        for name, part in (("training", self.train), ("validation", self.validation)):
            if len(part) <= context_length:
                raise UserError(
                    f"the {name} part has {len(part)} tokens, and a context of {context_length} needs "
                    f"{context_length + 1}: use more text or a shorter context"
                )


def prepare(
    data: str, tokenizer: str | CharTokenizer | BPETokenizer, folder: Path, bpe_vocab_size: int = 4096
) -> TokenData:
    """The tokens of what `data` names, written to `folder`; a folder that holds tokens already is used in place.

    `tokenizer` is one to use, or the kind of one to train on the text.
    """
    if data and (Path(data) / TOKENS).is_file():
        tokens = load(Path(data))
        if not isinstance(tokenizer, str) and tokens.tokenizer.text != tokenizer.text:
            raise UserError(f"the tokens in {data} are of another tokenizer than the model's")
        return tokens
    corpus = open_corpus(data)
    trained = _train_tokenizer(corpus, tokenizer, bpe_vocab_size) if isinstance(tokenizer, str) else tokenizer
    dtype = np.dtype(np.uint16 if trained.vocab_size <= 1 << 16 else np.uint32)
    count = 0
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / TOKENS).open("wb") as file:
            for ids in _encode(corpus, trained):
                file.write(ids.astype(dtype).tobytes())
                count += len(ids)
        trained.save(folder)
        meta = {"dtype": dtype.name, "tokens": count, "source": corpus.name}
        (folder / META).write_text(json.dumps(meta), encoding="utf-8")  # last: a folder without it is not complete
    return load(folder)


def load(folder: Path) -> TokenData:
    """Map a folder of tokens; every id is checked against the vocabulary."""
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        dtype, count = np.dtype(meta["dtype"]), int(meta["tokens"])
        tokens = np.memmap(folder / TOKENS, dtype=dtype, mode="r")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder} does not hold a whole tokenised corpus: {first_line(error)}") from None
    if dtype not in (np.uint16, np.uint32) or len(tokens) != count:
        raise UserError(f"{folder / TOKENS} has {len(tokens)} tokens of {dtype}, {META} says {count}")
    tokenizer = load_tokenizer(folder)
    if (largest := int(tokens.max())) >= tokenizer.vocab_size:
        raise UserError(
            f"{folder / TOKENS} has token {largest}, the vocabulary beside it {tokenizer.vocab_size} entries"
        )
    split = int(count * TRAIN_SHARE)
    return TokenData(folder, tokenizer, tokens[:split], tokens[split:])


def _train_tokenizer(corpus: Corpus, kind: str, bpe_vocab_size: int) -> CharTokenizer | BPETokenizer:
    characters: set[str] = set()
    total = 0
    for piece in corpus.pieces():
        characters.update(piece)
        total += len(piece)
    if not total:
        raise UserError(f"{corpus.name} is empty")
    if kind == "char":
        return CharTokenizer(characters)
    if kind == "bpe":
        # From the training part only, so that validation text has no say in the vocabulary.
        return BPETokenizer.train(_limit(corpus.pieces(), min(int(total * TRAIN_SHARE), BPE_SAMPLE)), bpe_vocab_size)
    raise UserError(f"there is no tokenizer {kind!r}, only 'char' and 'bpe'")


def _limit(pieces: Iterator[str], characters: int) -> Iterator[str]:
    for piece in pieces:
        if characters <= 0:
            return
        yield piece[:characters]
        characters -= len(piece)


def _encode(corpus: Corpus, tokenizer: CharTokenizer | BPETokenizer) -> Iterator[np.ndarray]:
    for document in corpus.documents():
        for piece in document:
            yield tokenizer.encode_array(piece)
        if tokenizer.end_of_text is not None:
            yield np.array([tokenizer.end_of_text])


def sample_windows(
    tokens: np.ndarray, batch_size: int, context_length: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """`batch_size` windows at random places, with the tokens that follow: two int64 (batch_size, context_length)."""
    starts = torch.randint(len(tokens) - context_length, (batch_size,), generator=generator).numpy()
    return _windows(tokens, starts, context_length)


def whole_windows(
    tokens: np.ndarray, batch_size: int, context_length: int, limit: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """The windows that lie end to end from the first token on, in batches; `limit` takes that many, evenly spread.

    What is left at the end and fills no window comes as a last, shorter one, unless a limit left windows out.
    """
    count = (len(tokens) - 1) // context_length
    chosen = np.arange(count)
    if limit is not None and limit < count:
        chosen = np.linspace(0, count - 1, limit).round().astype(np.int64)
    for i in range(0, len(chosen), batch_size):
        yield _windows(tokens, chosen[i : i + batch_size] * context_length, context_length)
    if len(chosen) == count and (rest := len(tokens) - 1 - count * context_length):
        yield _windows(tokens, np.array([count * context_length]), rest)


def document_lengths(inputs: Tensor, end_of_text: int) -> Tensor:
    """Of windows (batch, length) that lie end to end, the lengths of the pieces of documents in them, (pieces,).

    A piece ends with the window, or with the end-of-text token, which belongs to the document before it.
    """
    first = torch.ones_like(inputs, dtype=torch.bool)
    first[:, 1:] = inputs[:, :-1] == end_of_text
    starts = first.flatten().nonzero()[:, 0]
    return torch.diff(starts, append=starts.new_tensor([inputs.numel()]))


def _windows(tokens: np.ndarray, starts: np.ndarray, length: int) -> tuple[Tensor, Tensor]:
    window = tokens[starts[:, None] + np.arange(length + 1)]  # (batch, length + 1)
    window = torch.from_numpy(window.astype(np.int64))
    return window[:, :-1].contiguous(), window[:, 1:].contiguous()

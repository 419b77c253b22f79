"""Text, tokens and windows: pykern/train/{corpus,tokenizer,data}.py."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pykern.train import corpus, data
from pykern.train.errors import UserError
from pykern.train.tokenizer import BPETokenizer, CharTokenizer, load_tokenizer

TEXT = "To be, or not to be: that is the question.\n" * 40


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def read(name: str) -> str:
    return "".join(corpus.open_corpus(str(name)).pieces())


# Tokenizers


def test_char_tokenizer_numbers_characters_in_order_and_survives_saving(tmp_path):
    tokenizer = CharTokenizer.train("hello Δ🙂")
    assert tokenizer.characters == "".join(sorted(set("hello Δ🙂")))
    assert tokenizer.encode("leo") == [tokenizer.characters.index(c) for c in "leo"]
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert isinstance(loaded, CharTokenizer)
    assert loaded.decode(loaded.encode("🙂Δhello")) == "🙂Δhello"


@pytest.mark.parametrize("unknown", ["é", "\0", "🙂", "z"])
def test_char_tokenizer_names_what_it_does_not_know(unknown):
    with pytest.raises(UserError, match=f"{unknown!r} is not among the 3 characters".replace("\\", r"\\")):
        CharTokenizer.train("abc").encode("ab" + unknown)


@given(st.text(max_size=60))
@settings(max_examples=60, deadline=None)
def test_bpe_encodes_any_text(bpe, text):
    assert bpe.decode(bpe.encode(text)) == text


@pytest.fixture(scope="module")
def bpe():
    return BPETokenizer.train(TEXT, vocab_size=300)


def test_bpe_learns_merges_and_survives_saving(bpe, tmp_path):
    assert 257 < bpe.vocab_size <= 300
    assert len(bpe.encode("question")) < len("question")
    assert bpe.end_of_text == 0
    bpe.save(tmp_path)
    assert load_tokenizer(tmp_path).encode(TEXT) == bpe.encode(TEXT)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"type": "char"}', '{"model": {"type": "nonsense"}}', "\xff{"])
def test_a_file_that_is_no_tokenizer(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match="tokenizer"):
        load_tokenizer(tmp_path)


# Corpora


def test_file_is_read_in_pieces_with_line_breaks_made_plain(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "PIECE", 10)
    (tmp_path / "a.txt").write_bytes("one\r\ntwo é\n".encode() * 9)
    pieces = list(corpus.open_corpus(str(tmp_path / "a.txt")).pieces())
    assert "".join(pieces) == "one\ntwo é\n" * 9
    assert len(pieces) > 3
    assert all(piece.endswith("\n") for piece in pieces)


def test_folder_takes_text_files_in_an_order_that_the_names_decide(tmp_path):
    names = [f"{i}.txt" for i in range(8)]
    for folder in ("a", "b/c"):
        (tmp_path / folder / "sub").mkdir(parents=True)
        for name in names:
            (tmp_path / folder / "sub" / name).write_text(name)
        (tmp_path / folder / "picture.png").write_bytes(b"\x89PNG\0\0\xff")
        (tmp_path / folder / ".hidden").write_text("hidden")
    text = read(tmp_path / "a")
    assert text == read(tmp_path / "b/c")
    assert sorted(text.split(".txt")) == sorted(["", *(name[:-4] for name in names)])
    assert text != "".join(names)


def test_stdlib_is_plain_source_without_tests():
    text = read("stdlib")
    assert len(text) > 5_000_000
    assert set(text) <= {"\n", "\t", "\f", *map(chr, range(32, 127))}
    assert "class OrderedDict(dict):" in text
    assert "class TestOrderedDict" not in text


def test_saved_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": ["first", "second\n"], "label": ["a", "b"]})
    rows.save_to_disk(str(tmp_path / "rows"))
    assert read(tmp_path / "rows") == "first\nsecond\n"
    datasets.DatasetDict(train=rows.select([1])).save_to_disk(str(tmp_path / "splits"))
    assert read(tmp_path / "splits") == "second\n"
    datasets.DatasetDict(test=rows).save_to_disk(str(tmp_path / "foreign"))
    with pytest.raises(UserError, match="no split named 'train', only test"):
        read(tmp_path / "foreign")
    rows.rename_column("text", "body").save_to_disk(str(tmp_path / "columns"))
    with pytest.raises(UserError, match="needs a column 'text'"):
        read(tmp_path / "columns")


def test_named_dataset(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(name, configuration, split):
        asked.append((name, configuration, split))
        return datasets.Dataset.from_dict({"story": ["once", "twice"]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read("some/stories:small") == "once\ntwice\n"
    assert asked == [("some/stories", "small", "train")]


def test_dataset_that_cannot_be_had(monkeypatch):
    datasets = pytest.importorskip("datasets")
    for module in ("datasets.config", "huggingface_hub.constants"):
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", True)
    assert datasets.config.HF_HUB_OFFLINE
    with pytest.raises(
        UserError, match="'no_such/data' is neither a file nor a folder, and .*cannot load it"
    ) as raised:
        read("no_such/data")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["/no/such", "./missing", "missing.txt", "a/b/c", "~/nothing-here"])
def test_missing_file(name):
    with pytest.raises(UserError, match="no such file or folder"):
        read(name)


def test_unreadable_and_empty(tmp_path):
    (tmp_path / "image").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(UserError, match="not UTF-8 text"):
        read(tmp_path / "image")
    with pytest.raises(UserError, match="holds no UTF-8 text file"):
        read(tmp_path)
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UserError, match=r"empty\.txt is empty"):
        data.prepare(str(tmp_path / "empty.txt"), "char", tmp_path / "tokens")
    with pytest.raises(UserError, match="--data is needed"):
        read("")


# Tokens


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_prepare_splits_nine_to_one_and_maps_the_file(text_file, tmp_path, kind):
    tokens = data.prepare(str(text_file), kind, tmp_path / "tokens", 300)
    total = len(tokens.train) + len(tokens.validation)
    assert len(tokens.train) == int(0.9 * total)
    assert isinstance(tokens.train, np.memmap)
    assert tokens.train.dtype == np.uint16
    text = tokens.tokenizer.decode(np.concatenate([tokens.train, tokens.validation]))
    assert text == TEXT + ("<|endoftext|>" if kind == "bpe" else "")


def test_a_large_vocabulary_is_stored_in_32_bits(tmp_path):
    # 70,000 different characters beyond the surrogates
    (tmp_path / "wide.txt").write_text("".join(chr(0x10000 + i) for i in range(70_000)), encoding="utf-8")
    tokens = data.prepare(str(tmp_path / "wide.txt"), "char", tmp_path / "tokens")
    assert tokens.train.dtype == np.uint32
    assert int(tokens.validation[-1]) == 69_999


def test_bpe_merges_come_from_the_training_part(tmp_path):
    (tmp_path / "text.txt").write_text("ab " * 300 + "zq" * 50, encoding="utf-8")
    tokens = data.prepare(str(tmp_path / "text.txt"), "bpe", tmp_path / "tokens", 400)
    assert len(tokens.tokenizer.encode("zq")) == 2
    assert len(tokens.tokenizer.encode("ab")) == 1


def test_prepared_tokens_are_used_in_place(text_file, tmp_path):
    first = data.prepare(str(text_file), "char", tmp_path / "tokens")
    again = data.prepare(str(tmp_path / "tokens"), "bpe", tmp_path / "elsewhere")
    assert np.array_equal(first.train, again.train)
    assert again.folder == tmp_path / "tokens"
    assert not (tmp_path / "elsewhere").exists()


def test_damaged_tokens(text_file, tmp_path):
    folder = tmp_path / "tokens"
    data.prepare(str(text_file), "char", folder)
    whole = (folder / data.TOKENS).read_bytes()
    (folder / data.TOKENS).write_bytes(whole[:-2])
    with pytest.raises(UserError, match="has 1719 tokens of uint16, meta.json says 1720"):
        data.load(folder)
    (folder / data.TOKENS).write_bytes(whole[:-2] + b"\xff\xff")
    with pytest.raises(UserError, match="token 65535, the vocabulary beside it 18"):
        data.load(folder)
    (folder / data.TOKENS).write_bytes(whole)
    (folder / data.META).write_text(json.dumps({"dtype": "object", "tokens": 1720}))
    with pytest.raises(UserError, match="whole tokenised corpus|tokens of"):
        data.load(folder)
    (folder / data.META).unlink()
    with pytest.raises(UserError, match="whole tokenised corpus"):
        data.load(folder)


def test_too_little_text_for_the_context(text_file, tmp_path):
    tokens = data.prepare(str(text_file), "char", tmp_path / "tokens")
    tokens.require(171)
    with pytest.raises(UserError, match="validation part has 172 tokens, and a context of 172 needs 173"):
        tokens.require(172)


# Windows


def test_sampled_windows_are_slices_and_the_generator_repeats_them():
    tokens = np.arange(500, dtype=np.uint16)
    generator = torch.Generator().manual_seed(3)
    state = generator.get_state()
    inputs, targets = data.sample_windows(tokens, 64, 7, generator)
    assert inputs.shape == targets.shape == (64, 7)
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(inputs, inputs[:, :1] + torch.arange(7))
    assert torch.equal(targets, inputs + 1)
    assert len(inputs[:, 0].unique()) > 40
    generator.set_state(state)
    assert torch.equal(data.sample_windows(tokens, 64, 7, generator)[0], inputs)


def test_sampled_windows_reach_both_ends():
    starts = data.sample_windows(np.arange(10), 500, 7, torch.Generator().manual_seed(0))[0][:, 0]
    assert starts.unique().tolist() == [0, 1, 2]


@given(st.integers(2, 60), st.integers(1, 9), st.integers(1, 5))
@settings(deadline=None)
def test_whole_windows_predict_every_token_once(length, context, batch):
    tokens = np.arange(length, dtype=np.uint16)
    windows = list(data.whole_windows(tokens, batch, context))
    assert torch.cat([targets.flatten() for _, targets in windows]).tolist() == list(range(1, length))
    assert all(torch.equal(targets, inputs + 1) for inputs, targets in windows)
    assert max(inputs.shape[0] for inputs, _ in windows) <= batch
    assert max(inputs.shape[1] for inputs, _ in windows) <= context


def test_limited_windows_are_spread_over_the_tokens():
    tokens = np.arange(1001, dtype=np.uint16)
    starts = torch.cat([inputs[:, 0] for inputs, _ in data.whole_windows(tokens, 3, 10, limit=5)])
    assert starts.tolist() == [0, 250, 500, 740, 990]
    whole = [inputs.tolist() for inputs, _ in data.whole_windows(tokens, 3, 10, limit=1000)]
    assert whole == [inputs.tolist() for inputs, _ in data.whole_windows(tokens, 3, 10)]


def test_windows_are_cut_behind_each_end_of_text():
    windows = torch.tensor([[5, 0, 6, 7, 0, 8], [0, 0, 1, 2, 3, 0], [4, 4, 4, 4, 4, 4]])
    assert data.document_lengths(windows, 0).tolist() == [2, 3, 1, 1, 1, 4, 6]
    assert data.document_lengths(windows, 9).tolist() == [6, 6, 6]


@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 99))
@settings(deadline=None)
def test_pieces_of_documents_hold_one_end_of_text_at_most_and_stay_in_their_window(batch, context, seed):
    windows = torch.randint(3, (batch, context), generator=torch.Generator().manual_seed(seed))
    lengths = data.document_lengths(windows, 0)
    assert lengths.sum() == windows.numel() and lengths.min() > 0
    starts = set((lengths.cumsum(0) - lengths).tolist())
    assert starts >= set(range(0, windows.numel(), context))
    for piece in windows.flatten().split(lengths.tolist()):
        assert 0 not in piece[:-1]

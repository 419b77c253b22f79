"""The command line: what users type, and what they read when it is wrong."""

import json
import pickle
import shutil
import subprocess
import sys

import pytest

from pykern import cli
from pykern.train import checkpoint
from pykern.train.run import read_log

TEXT = "the quick brown fox jumps over the lazy dog. " * 40
SMALL = [
    *("--model.num-layers", "1", "--model.num-heads", "2", "--model.width", "16", "--model.context-length", "16"),
    *("--batch-size", "2", "--threads", "1"),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that the command line has made; tests copy it before they harm it."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "text.txt").write_text(TEXT)
    data = ["--preset", "nanogpt-cpu", "--data", str(folder / "text.txt"), "--tokenizer", "char"]
    args = [*data, "--steps", "4", "--seed", "3", "--out", str(folder / "run"), "--checkpoint-interval", "2", *SMALL]
    assert cli.main(["pretrain", *args]) == 0
    return folder


@pytest.fixture
def run(trained, tmp_path):
    shutil.copytree(trained / "run", tmp_path / "run")
    return tmp_path / "run"


def fails(capsys, *args: str) -> str:
    """Runs a command that must fail as promised; returns its one line."""
    assert cli.main([str(arg) for arg in args]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_pretrain_makes_a_run(trained):
    assert [int(row["step"]) for row in read_log(trained / "run")] == [1, 2, 3, 4]
    config = json.loads((trained / "run" / "config.json").read_text())
    assert (config["seed"], config["steps"], config["model"]["width"]) == (3, 4, 16)
    assert config["model"]["vocab_size"] == len(set(TEXT))


def test_resume_goes_on_with_the_runs_own_settings(run):
    assert cli.main(["pretrain", "--resume", str(run), "--steps", "6"]) == 0
    assert [int(row["step"]) for row in read_log(run)] == [1, 2, 3, 4, 5, 6]
    assert json.loads((run / "config.json").read_text())["seed"] == 3


def test_config_file_lies_over_the_preset_and_flags_over_both(trained, tmp_path):
    toml = 'preset = "nanogpt-char"\nsteps = 2\nbatch_size = 3\nthreads = 1\n[model]\nnum_layers = 1\nwidth = 24\n'
    (tmp_path / "config.toml").write_text(toml + "context_length = 8\n")
    given = ["--config", str(tmp_path / "config.toml"), "--data", str(trained / "text.txt"), "--batch-size", "5"]
    assert cli.main(["pretrain", *given, "--batch-size", "2", "--out", str(tmp_path / "run")]) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["steps"], config["batch_size"]) == (2, 2)
    model = config["model"]
    assert (model["num_layers"], model["width"], model["num_heads"], model["dropout"]) == (1, 24, 6, 0.2)
    # a run's own config.json is a config file
    again = ["--config", str(tmp_path / "run" / "config.json"), "--out", str(tmp_path / "again")]
    assert cli.main(["pretrain", *again]) == 0
    losses = [[row["train_loss"] for row in read_log(tmp_path / name)] for name in ("run", "again")]
    assert losses[0] == losses[1]


def test_generate(run, capsys):
    args = ["generate", str(run), "--prompt", "the ", "--max-new-tokens", "40", "--seed", "1"]
    outputs = []
    for _ in range(2):
        assert cli.main(args) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    assert outputs[0].startswith("the ")
    assert len(outputs[0]) == 4 + 40 + 1  # beyond the context of 16
    assert set(outputs[0]) <= set(TEXT + "\n")
    assert cli.main([*args[:-1], "2", "--samples", "2"]) == 0
    assert outputs[0] not in capsys.readouterr().out


def test_help_names_every_command(capsys):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    for name in ("doctor", "ops", "check", "bench", "pretrain", "grpo", "generate", "demo"):
        assert f"\n  {name} " in out
    assert cli.main([]) == 2
    assert cli.main(["fly"]) == 2
    assert "there is no command 'fly'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--no-such-flag", "1"], "no-such-flag"),
        (["--steps", "many"], "steps"),
        (["--steps", "0"], "steps is 0, expected a positive integer"),
        (["--model.width", "30"], "width is 30, expected a multiple of num_heads = 4"),
    ],
)
def test_wrong_usage_exits_with_2(capsys, flags, message):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["pretrain", *flags])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


# Bad input: one line, exit code 1, no traceback


def test_bad_data(capsys, tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "binary.txt").write_bytes(b"\x89PNG\xff\xfe\x00")
    (tmp_path / "short.txt").write_text("abc")
    (tmp_path / "folder").mkdir()
    start = ["pretrain", "--out", tmp_path / "run", *SMALL, "--data"]
    assert "no such file" in fails(capsys, *start, tmp_path / "none.txt")
    # a file that may be opened but not read, for root as well
    assert "cannot read /proc/self/mem" in fails(capsys, *start, "/proc/self/mem")
    assert "is empty" in fails(capsys, *start, tmp_path / "empty.txt")
    assert "not UTF-8" in fails(capsys, *start, tmp_path / "binary.txt")
    assert "no UTF-8 text file" in fails(capsys, *start, tmp_path / "folder")
    assert "tokens, and a context of 16 needs 17" in fails(capsys, *start, tmp_path / "short.txt")
    assert "--data is needed" in fails(capsys, *start[:-1])
    assert not (tmp_path / "run" / "config.json").exists()
    assert "--out is needed" in fails(capsys, "pretrain", "--data", tmp_path / "short.txt")


def test_bad_configuration(capsys, trained, tmp_path):
    data = ["--data", trained / "text.txt", "--out", tmp_path / "run"]
    for content, expected in {
        "{": "is not a configuration",
        "[1]": "holds no table of settings",
        '{"stepz": 3}': "there is no setting 'stepz'",
        '{"steps": "many"}': "steps is 'many'; it should be an int",
        '{"steps": 0}': "steps is 0, expected a positive integer",
        '{"tokenizer": "word"}': "tokenizer is one of char, bpe, not 'word'",
        '{"model": {"width": 30, "num_heads": 4}}': "width is 30, expected a multiple of num_heads",
        '{"preset": "gpt-9"}': "there is no preset 'gpt-9'",
    }.items():
        (tmp_path / "config.json").write_text(content)
        assert expected in fails(capsys, "pretrain", "--config", tmp_path / "config.json", *data)
    assert "cannot read" in fails(capsys, "pretrain", "--config", tmp_path / "none.json", *data)


def test_context_longer_than_the_models(capsys, trained, tmp_path, run):
    data = ["--data", trained / "text.txt", "--out", tmp_path / "new", *SMALL]
    assert "longer than the model's 16" in fails(capsys, "pretrain", *data, "--context-length", "99")
    assert "the model's context 16" in fails(capsys, "generate", run, "--prompt", "the quick brown fox")
    assert "longer than the model's 16" in fails(capsys, "pretrain", "--resume", run, "--context-length", "17")


def test_vocabulary_that_does_not_match(capsys, trained, tmp_path, run):
    data = ["--data", trained / "text.txt", "--out", tmp_path / "new", *SMALL]
    assert "vocabularies do not match" in fails(capsys, "pretrain", *data, "--model.vocab-size", "5")
    assert "'Z' is not among the" in fails(capsys, "generate", run, "--prompt", "Zebra")
    characters = json.loads((run / "tokenizer.json").read_text())["characters"]
    (run / "tokenizer.json").write_text(json.dumps({"type": "char", "characters": characters + "αβγ"}))
    assert "vocabularies do not match" in fails(capsys, "generate", run)


def test_corrupt_and_foreign_checkpoints(capsys, run, tmp_path):
    newest = checkpoint.latest_checkpoint(run) / "model.safetensors"
    content = newest.read_bytes()
    for damaged in (content[:-10], content[:-1] + bytes([content[-1] ^ 1]), pickle.dumps({"a": 1}), b""):
        newest.write_bytes(damaged)
        for command in (["generate", run], ["pretrain", "--resume", run, "--steps", "9"]):
            error = fails(capsys, *command)
            assert "step-00000004 is damaged" in error
            assert "go on from step-00000002" in error
    shutil.rmtree(newest.parent)
    assert cli.main(["generate", str(run)]) == 0
    capsys.readouterr()
    (run / "checkpoints" / "step-00000009").mkdir()
    (run / "checkpoints" / "step-00000009" / "pytorch_model.bin").write_bytes(content)
    assert "is not a checkpoint of pykern" in fails(capsys, "generate", run)
    (tmp_path / "elsewhere").mkdir()
    assert "no checkpoint" in fails(capsys, "generate", tmp_path / "elsewhere")
    assert "no run folder" in fails(capsys, "generate", tmp_path / "nowhere")
    assert "is not a run" in fails(capsys, "pretrain", "--resume", tmp_path / "elsewhere")


def test_a_run_is_not_overwritten(capsys, trained, run):
    before = sorted(path.relative_to(run) for path in run.rglob("*"))
    assert "holds a run already" in fails(capsys, "pretrain", "--data", trained / "text.txt", "--out", run, *SMALL)
    assert sorted(path.relative_to(run) for path in run.rglob("*")) == before
    assert "--resume takes the settings" in fails(capsys, "pretrain", "--resume", run, "--preset", "nanogpt")
    assert "seed cannot change" in fails(capsys, "pretrain", "--resume", run, "--seed", "4")


def test_grpo_needs_a_run_to_begin_with(capsys, tmp_path, run):
    assert "--from is needed" in fails(capsys, "grpo", "--out", tmp_path / "new")
    assert "no run folder" in fails(capsys, "grpo", "--from", tmp_path / "nowhere", "--out", tmp_path / "new")
    assert "holds a run already" in fails(capsys, "grpo", "--from", run, "--out", run)
    assert "is not a run" in fails(capsys, "grpo", "--resume", tmp_path)


def test_nan_loss(capsys, trained, tmp_path):
    args = ["--data", trained / "text.txt", "--out", tmp_path / "run", *SMALL, "--steps", "9", "--warmup-steps", "0"]
    error = fails(capsys, "pretrain", *args, "--learning-rate", "3e38")
    assert "lower the learning rate" in error


def test_full_disk_ends_in_one_line_and_keeps_the_checkpoint(run):
    """A limit on file sizes stands for the disk: the write fails in the kernel, in the middle of a file."""
    room = (run / "log.csv").stat().st_size + 4000  # for some lines of the log; a checkpoint is larger
    before = {path: path.read_bytes() for path in (run / "checkpoints").rglob("*") if path.is_file()}
    code = (
        "import resource, sys; from pykern.cli import main\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))\n"
        f"sys.exit(main(['pretrain', '--resume', {str(run)!r}, '--steps', '8']))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 1, result.stderr
    assert result.stderr.startswith("error: cannot write ")
    assert "File too large" in result.stderr
    assert result.stderr.count("\n") == 1
    assert all(path.read_bytes() == content for path, content in before.items())
    assert not list((run / "checkpoints").glob(".*"))
    checkpoint.load_checkpoint(checkpoint.latest_checkpoint(run))


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (OSError(28, "No space left on device", "run/log.csv"), 1, "error: No space left on device: run/log.csv\n"),
        (ImportError("No module named 'tokenizers'", name="tokenizers"), 1, "error: tokenizers is not installed: pip"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_what_the_system_does_becomes_a_line(monkeypatch, capsys, error, code, line):
    def command(args):
        raise error

    monkeypatch.setitem(cli.COMMANDS, "generate", command)
    assert cli.main(["generate"]) == code
    assert capsys.readouterr().err.startswith(line)


def test_our_own_mistakes_keep_their_traceback(monkeypatch):
    def command(args):
        raise ZeroDivisionError

    monkeypatch.setitem(cli.COMMANDS, "generate", command)
    with pytest.raises(ZeroDivisionError):
        cli.main(["generate"])

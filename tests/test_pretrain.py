"""The pretraining loop: what it learns, and that stopping it anywhere changes nothing."""

import dataclasses
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from pykern.model import TransformerConfig
from pykern.train import checkpoint, data, pretrain, throughput
from pykern.train.config import from_dict, to_dict
from pykern.train.errors import UserError
from pykern.train.interrupt import Interrupt
from pykern.train.pretrain_config import PretrainConfig, preset
from pykern.train.run import Run, read_log
from pykern.train.schedule import warmup_cosine

TEXT = "the quick brown fox jumps over the lazy dog. " * 60


@pytest.fixture(autouse=True)
def one_thread():
    """Sums in another order are other losses: bit equality holds for one number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    (folder / "text.txt").write_text(TEXT)
    data.prepare(str(folder / "text.txt"), "char", folder / "data")
    return folder / "data"


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    """Tokens of documents of many lengths."""
    folder = tmp_path_factory.mktemp("stories")
    (folder / "text").mkdir()
    for i in range(60):
        (folder / "text" / f"{i}.txt").write_text("once upon a time there was a fox. " * (i % 4) + f"the {i}. end")
    data.prepare(str(folder / "text"), "bpe", folder / "data", bpe_vocab_size=300)
    return folder / "data"


def tiny(tokens: Path, out: Path, **changes) -> PretrainConfig:
    model = TransformerConfig(
        vocab_size=1, context_length=16, num_layers=1, num_heads=2, width=16, dropout=changes.pop("dropout", 0.0)
    )
    settings = {
        "data": str(tokens),
        "out": out,
        "model": model,
        "steps": 12,
        "batch_size": 4,
        "warmup_steps": 4,
        "eval_interval": 5,
        "eval_windows": 6,
        "checkpoint_interval": 4,
        "keep_checkpoints": 10,
        "threads": 1,
    }
    return PretrainConfig(**{**settings, **changes})


def losses(run: Path) -> list[tuple[str, str, str, str]]:
    return [(row["step"], row["train_loss"], row["val_loss"], row["lr"]) for row in read_log(run)]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load_checkpoint(checkpoint.latest_checkpoint(run))[0]


def assert_same_run(one: Path, other: Path) -> None:
    assert losses(one) == losses(other)
    for name, tensor in weights(one).items():
        assert torch.equal(tensor, weights(other)[name]), name
    one_state, other_state = (
        checkpoint.load_checkpoint(checkpoint.latest_checkpoint(run))[1]["optimizer"]["state"] for run in (one, other)
    )
    for i, entry in one_state.items():
        assert all(torch.equal(entry[name], other_state[i][name]) for name in entry)


def test_run_folder(tokens, tmp_path):
    summary = pretrain.pretrain(tiny(tokens, tmp_path / "run"))
    run = tmp_path / "run"
    names = {path.name for path in run.iterdir()}
    assert names >= {"config.json", "log.csv", "loss.png", "summary.json", "tokenizer.json", "tensorboard"}
    assert [path.name for path in checkpoint.checkpoints(run)] == [f"step-{step:08d}" for step in (4, 8, 12)]

    lines = (run / "log.csv").read_text().splitlines()
    assert lines[0] == "step,train_loss,val_loss,lr,tokens_per_s"
    rows = read_log(run)
    assert [int(row["step"]) for row in rows] == list(range(1, 13))
    assert [row["step"] for row in rows if row["val_loss"]] == ["5", "10", "12"]
    assert all(float(row["tokens_per_s"]) > 0 for row in rows)
    # full precision: the text reads back as the very float
    assert rows[-1]["train_loss"] == repr(summary["train_loss"])
    assert rows[-1]["val_loss"] == repr(summary["val_loss"])
    assert json.loads((run / "summary.json").read_text()) == summary

    config = from_dict(PretrainConfig, json.loads((run / "config.json").read_text()), "config.json")
    assert config.model.vocab_size == len(set(TEXT))
    assert to_dict(config)["out"] == str(run)


def test_tensorboard_events_are_the_log(tokens, tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    pretrain.pretrain(tiny(tokens, tmp_path / "run"))
    events = event_accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    rows = read_log(tmp_path / "run")
    for name in ("train_loss", "val_loss", "lr"):
        expected = [(int(row["step"]), float(row[name])) for row in rows if row[name]]
        got = [(event.step, event.value) for event in events.Scalars(name)]
        assert [step for step, _ in got] == [step for step, _ in expected]
        assert [value for _, value in got] == pytest.approx([value for _, value in expected], rel=1e-6)


def test_it_learns(tokens, tmp_path):
    summary = pretrain.pretrain(tiny(tokens, tmp_path / "run", steps=250, learning_rate=1e-2, eval_interval=1000))
    first = float(read_log(tmp_path / "run")[0]["train_loss"])
    assert first == pytest.approx(math.log(len(set(TEXT))), rel=0.05)
    assert summary["val_loss"] < 0.5 * first
    assert summary["parameters"] > 0
    assert summary["mfu"] is None or 0 < summary["mfu"] < 1


@pytest.mark.parametrize(
    "changes",
    [{}, {"dropout": 0.2, "accumulation": 2}, {"precision": "bfloat16"}, {"dropout": 0.2, "documents": True}],
)
def test_resume_is_bit_for_bit(tokens, stories, tmp_path, changes):
    config = tiny(stories if "documents" in changes else tokens, tmp_path / "whole", **changes)
    pretrain.pretrain(config)
    stopped = tmp_path / "stopped"
    (tmp_path / "whole").rename(stopped)
    pretrain.pretrain(config)
    for later in checkpoint.checkpoints(stopped)[1:]:  # as if it had been killed after step 7, say
        checkpoint._remove(later)
    with (stopped / "log.csv").open("a") as log:
        log.write("13,2.5")  # a line that the kill cut off
    torch.manual_seed(99)
    pretrain.pretrain(dataclasses.replace(config, out=stopped), resume=True)
    assert_same_run(tmp_path / "whole", stopped)


def test_another_seed_is_another_run(tokens, tmp_path):
    for seed in (1, 2):
        pretrain.pretrain(tiny(tokens, tmp_path / str(seed), seed=seed, steps=3))
    assert losses(tmp_path / "1")[2] != losses(tmp_path / "2")[2]


def test_accumulation_averages_batches(tokens, tmp_path):
    """Two batches of four windows are one of eight: the sampler draws the same windows for both."""
    trainers = []
    for batch, accumulation in ((4, 2), (8, 1)):
        torch.manual_seed(0)
        config = tiny(tokens, tmp_path, batch_size=batch, accumulation=accumulation)
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=len(set(TEXT))))
        trainers.append(pretrain.Trainer(config, data.load(tokens)))
        trainers[-1].update()
    assert trainers[0].train_loss == pytest.approx(trainers[1].train_loss, rel=1e-6)
    for one, other in zip(trainers[0].model.parameters(), trainers[1].model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def trainer_of(tokens, tmp_path, **changes) -> pretrain.Trainer:
    config = tiny(tokens, tmp_path, **changes)
    model = dataclasses.replace(config.model, vocab_size=len(set(TEXT)))
    return pretrain.Trainer(dataclasses.replace(config, model=model), data.load(tokens))


def test_validation_covers_the_whole_split(tokens, tmp_path):
    trainer = trainer_of(tokens, tmp_path)
    split = torch.from_numpy(trainer.tokens.validation.astype("int64"))
    total = 0.0
    for start in range(0, len(split) - 1, 16):
        end = min(start + 16, len(split) - 1)
        logits = trainer.model(split[None, start:end])[0]
        total += F.cross_entropy(logits.double(), split[start + 1 : end + 1], reduction="sum").item()
    assert trainer.validate(None) == pytest.approx(total / (len(split) - 1), rel=1e-6)
    assert trainer.validate(3) != trainer.validate(None)
    assert trainer.model.training


def story_trainer(stories, tmp_path, **changes) -> pretrain.Trainer:
    config = tiny(stories, tmp_path, documents=True, **changes)
    tokens = data.load(stories)
    model = dataclasses.replace(config.model, vocab_size=tokens.tokenizer.vocab_size)
    return pretrain.Trainer(dataclasses.replace(config, model=model), tokens)


def test_a_document_is_trained_on_as_if_it_were_alone(stories, tmp_path):
    trainer = story_trainer(stories, tmp_path)
    end = trainer.tokens.tokenizer.end_of_text
    inputs, targets = data.sample_windows(trainer.tokens.train, 6, 16, trainer.sampler)
    assert (inputs == end).sum() > 3

    def gradients(loss):
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(trainer.model.parameters()))])

    pieces = data.document_lengths(inputs, end).tolist()
    losses = [
        F.cross_entropy(trainer.model(row[None])[0], wanted, reduction="sum")
        for row, wanted in zip(inputs.flatten().split(pieces), targets.flatten().split(pieces), strict=True)
    ]
    expected = sum(losses) / inputs.numel()
    loss = trainer._loss(inputs, targets)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(gradients(loss), gradients(expected), rtol=1e-4, atol=1e-6)
    whole = trainer.model(inputs, targets=targets)  # documents see those before them
    assert abs(whole.item() - loss.item()) > 1e-4


def test_validation_keeps_documents_apart_too(stories, tmp_path):
    trainer = story_trainer(stories, tmp_path)
    split = torch.from_numpy(trainer.tokens.validation.astype("int64"))
    end, total = trainer.tokens.tokenizer.end_of_text, 0.0
    for start in range(0, len(split) - 1, 16):
        window = split[start : min(start + 17, len(split))]
        for piece, wanted in zip(
            *(x.split(data.document_lengths(window[None, :-1], end).tolist()) for x in (window[:-1], window[1:])),
            strict=True,
        ):
            total += F.cross_entropy(trainer.model(piece[None])[0].double(), wanted, reduction="sum").item()
    assert trainer.validate(None) == pytest.approx(total / (len(split) - 1), rel=1e-6)


def test_a_run_on_documents(stories, tokens, tmp_path):
    summary = pretrain.pretrain(tiny(stories, tmp_path / "run", documents=True, precision="bfloat16", dropout=0.1))
    assert math.isfinite(summary["val_loss"])
    with pytest.raises(UserError, match="--documents needs a tokenizer with an end-of-text token"):
        pretrain.pretrain(tiny(tokens, tmp_path / "other", documents=True))


def test_validation_draws_nothing(tokens, tmp_path):
    trainer = trainer_of(tokens, tmp_path, dropout=0.5)
    rng, sampler = torch.get_rng_state(), trainer.sampler.get_state()
    assert trainer.validate(4) == trainer.validate(4)
    assert torch.equal(rng, torch.get_rng_state())
    assert torch.equal(sampler, trainer.sampler.get_state())


def test_only_matrices_decay(tokens, tmp_path):
    trainer = trainer_of(tokens, tmp_path, weight_decay=0.3)
    decaying, plain = trainer.optimizer.param_groups
    assert (decaying["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert {p.dim() for p in decaying["params"]} == {2}
    assert {p.dim() for p in plain["params"]} == {1}
    count = sum(p.numel() for group in trainer.optimizer.param_groups for p in group["params"])
    assert count == trainer.model.num_parameters()


def test_gradient_is_clipped(tokens, tmp_path, monkeypatch):
    seen = []
    clip = torch.nn.utils.clip_grad_norm_

    def spy(parameters, limit):
        parameters = list(parameters)
        norm = clip(parameters, limit)
        seen.append(torch.cat([p.grad.flatten() for p in parameters]).norm().item())
        return norm

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
    trainer_of(tokens, tmp_path, grad_clip=0.01).update()
    trainer_of(tokens, tmp_path, grad_clip=0).update()
    assert seen[0] == pytest.approx(0.01, rel=1e-3)
    assert seen[1] > 0.1


def test_schedule_is_nanogpts():
    rates = {"peak": 1e-3, "floor": 1e-4, "warmup_steps": 100, "decay_steps": 2000}
    assert warmup_cosine(1, **rates) == pytest.approx(1e-3 / 101)
    assert warmup_cosine(100, **rates) == pytest.approx(1e-3 * 100 / 101)
    assert warmup_cosine(101, **rates) == 1e-3
    assert warmup_cosine(1051, **rates) == pytest.approx(5.5e-4)
    assert warmup_cosine(2001, **rates) == warmup_cosine(9999, **rates) == 1e-4
    lrs = [warmup_cosine(step, **rates) for step in range(101, 2002)]
    assert lrs == sorted(lrs, reverse=True)
    assert warmup_cosine(1, peak=1.0, floor=0.5, warmup_steps=5, decay_steps=3) == pytest.approx(1 / 6)


def test_peak_of_a_device(monkeypatch):
    assert throughput.peak_flops(torch.device("cpu"), torch.float32) > 1e8
    assert throughput.peak_flops(torch.device("meta"), torch.float32) is None
    for name, expected in {
        "NVIDIA H100 80GB HBM3": 989.4e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA H200": 989.4e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA L40S": 362e12,
        "NVIDIA Unheard Of 9000": None,
    }.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert throughput.peak_flops(torch.device("cuda"), torch.bfloat16) == expected, name


# What goes wrong


def test_nan_loss_stops_and_keeps_the_last_good_checkpoint(tokens, tmp_path, monkeypatch):
    update = pretrain.Trainer.update

    def poisoned(trainer):
        if trainer.step == 6:
            with torch.no_grad():
                trainer.model.embedding.weight[:] = math.nan
        return update(trainer)

    monkeypatch.setattr(pretrain.Trainer, "update", poisoned)
    with pytest.raises(UserError, match="the loss is nan at step 7: the last good checkpoint is .*step-00000004"):
        pretrain.pretrain(tiny(tokens, tmp_path / "run"))
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "run").values())


def test_an_update_that_ruins_the_weights_is_not_saved(tokens, tmp_path):
    with pytest.raises(UserError, match="not finite at step|is (nan|inf) at step"):
        pretrain.pretrain(tiny(tokens, tmp_path / "run", learning_rate=3e38, warmup_steps=0, checkpoint_interval=1))
    for folder in checkpoint.checkpoints(tmp_path / "run"):
        assert all(tensor.isfinite().all() for tensor in checkpoint.load_checkpoint(folder)[0].values())


def test_settings_that_cannot_be(tokens, tmp_path):
    for field, value in {"steps": 0, "learning_rate": -1.0, "beta2": 1.0, "grad_clip": math.nan}.items():
        with pytest.raises(ValueError, match=field):
            tiny(tokens, tmp_path, **{field: value})
    with pytest.raises(UserError, match="context_length is 17, longer than the model's 16"):
        pretrain.pretrain(tiny(tokens, tmp_path / "run", context_length=17))
    assert not (tmp_path / "run").exists()
    config = tiny(tokens, tmp_path / "run")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=5))
    with pytest.raises(UserError, match=f"the tokenizer has {len(set(TEXT))}, the model 5"):
        pretrain.pretrain(config)
    with pytest.raises(UserError, match="device 'abacus' cannot be used"):
        pretrain.pretrain(tiny(tokens, tmp_path / "run", device="abacus"))
    with pytest.raises(UserError, match="there is no preset 'gpt-9'; there are nanogpt-cpu"):
        preset("gpt-9")


def test_a_run_is_not_overwritten_nor_resumed_as_another(tokens, tmp_path):
    config = tiny(tokens, tmp_path / "run", steps=4)
    pretrain.pretrain(config)
    with pytest.raises(UserError, match="holds a run already"):
        pretrain.pretrain(config)
    with pytest.raises(UserError, match="seed cannot change"):
        pretrain.pretrain(dataclasses.replace(config, seed=5), resume=True)
    (tmp_path / "run" / "log.csv").write_text("step,reward\n1,0.5\n")
    started = from_dict(PretrainConfig, json.loads((tmp_path / "run" / "config.json").read_text()), "config.json")
    with pytest.raises(UserError, match="has the columns step, reward"):
        pretrain.pretrain(started, resume=True)


def test_a_checkpoint_of_something_else(tokens, tmp_path):
    config = tiny(tokens, tmp_path / "run", steps=4)
    pretrain.pretrain(config)
    started = from_dict(PretrainConfig, json.loads((tmp_path / "run" / "config.json").read_text()), "config.json")
    model, _, _ = checkpoint.load_model(tmp_path / "run")
    checkpoint.save_checkpoint(tmp_path / "run", 5, model, None, {"reward": 1.0})
    with pytest.raises(UserError, match="step-00000005 is not a checkpoint of this run's pretraining"):
        pretrain.pretrain(started, resume=True)
    checkpoint.save_checkpoint(tmp_path / "run", 6, torch.nn.Linear(2, 2), None)
    with pytest.raises(UserError, match="step-00000006 are not this model's"):
        pretrain.pretrain(started, resume=True)


def test_a_full_disk_is_told_in_one_line(tokens, tmp_path, monkeypatch):
    class Full:
        def write(self, text):
            raise OSError(28, "No space left on device")

        def close(self):
            raise OSError(28, "No space left on device")

    with Run.create(tmp_path / "other", {}, ["loss"]) as run:
        monkeypatch.setattr(run, "_log", Full())
        with pytest.raises(UserError, match="cannot write .*other: No space left on device"):
            run.log(1, loss=0.5)
        monkeypatch.undo()


def test_log_refuses_columns_it_does_not_have(tmp_path):
    with Run.create(tmp_path / "run", {}, ["reward", "kl"]) as run:
        run.log(1, reward=0.1)
        with pytest.raises(ValueError, match="rewrad"):
            run.log(2, rewrad=0.1)
    assert (tmp_path / "run" / "log.csv").read_text() == "step,reward,kl\n1,0.1,\n"


def test_first_interrupt_is_noted_and_the_second_raises():
    before = signal.getsignal(signal.SIGINT)
    with Interrupt() as interrupt:
        assert not interrupt.requested
        signal.raise_signal(signal.SIGINT)
        assert interrupt.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_stopped_from_outside_and_resumed(tokens, tmp_path, number):
    """Ctrl-C saves at the step it strikes; kill -9 falls back to a checkpoint; either way the same run comes out."""
    config = tiny(tokens, tmp_path / "stopped", steps=3000, checkpoint_interval=10, eval_interval=100)
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    command = [sys.executable, "-m", "pykern", "pretrain", "--config", str(tmp_path / "config.json")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        log = tmp_path / "stopped" / "log.csv"
        while process.poll() is None and not (log.exists() and log.read_text().count("\n") > 30):
            time.sleep(0.01)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    stopped_at = int(read_log(tmp_path / "stopped")[-1]["step"])
    assert 30 <= stopped_at < 3000
    assert "Traceback" not in err
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert checkpoint.latest_checkpoint(tmp_path / "stopped").name == f"step-{stopped_at:08d}"
        assert f"go on with: pykern pretrain --resume {tmp_path / 'stopped'}" in out
    else:
        assert process.returncode == -signal.SIGKILL
    # Going on for a few steps is enough; the schedule must not notice that the run is shorter now.
    end = stopped_at + 15
    started = json.loads((tmp_path / "stopped" / "config.json").read_text())
    config = from_dict(PretrainConfig, {**started, "steps": end, "decay_steps": 3000}, "config.json")
    pretrain.pretrain(config, resume=True)
    pretrain.pretrain(dataclasses.replace(config, out=tmp_path / "whole"))
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")

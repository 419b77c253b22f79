"""The demo's whole path in miniature: text, pretraining, GRPO from that checkpoint, figures."""

import dataclasses
import json
from pathlib import Path

import pytest

import pykern
from pykern.model import PRESETS, Transformer
from pykern.train.checkpoint import load_model
from pykern.train.demo import DemoConfig, demo, mixed_text
from pykern.train.errors import UserError
from pykern.train.run import read_log
from pykern.train.served import served_by
from pykern.train.tasks import REWARD_BUCKETS, TEST_BUCKETS, additions

SMALL = DemoConfig(characters=40_000, pretrain_steps=12, grpo_steps=2, threads=1)


def test_from_text_to_rewards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = dataclasses.replace(SMALL, out=tmp_path / "demo")
    figures = demo(config)
    assert json.loads((config.out / "demo.json").read_text(encoding="utf-8")) == figures
    assert 0 <= figures["pass_at_1_before"] <= 1 and 0 <= figures["pass_at_1_after"] <= 1
    losses = [float(row["train_loss"]) for row in read_log(config.out / "pretrain")]
    assert len(losses) == 12 and losses[-1] < losses[0] - 0.5
    assert figures["val_loss"] < losses[0]
    rewards = read_log(config.out / "grpo")
    assert float(rewards[0]["test_pass_rate"]) == figures["pass_at_1_before"] and len(rewards) == 3
    for run, plot in (("pretrain", "loss.png"), ("grpo", "reward.png")):
        assert (config.out / run / plot).stat().st_size > 0
        load_model(config.out / run)
    source = json.loads((config.out / "grpo" / "config.json").read_text(encoding="utf-8"))["source"]
    assert source == str(config.out / "pretrain")
    assert {"rms_norm", "add_rms_norm", "attention", "attention_varlen", "attention_decode"} <= figures[
        "backends"
    ].keys()
    printed = capsys.readouterr().out
    for expected in (
        "pass@1",
        "the pretrained model",
        "after GRPO",
        "served by",
        "demo.json",
        "loss.png",
        "checkpoints",
    ):
        assert expected in printed

    (config.out / "notes.txt").write_text("mine", encoding="utf-8")
    demo(dataclasses.replace(config, pretrain_steps=2, grpo_steps=1))  # a second demo takes the first one's place
    assert len(read_log(config.out / "pretrain")) == 2
    assert (config.out / "notes.txt").exists()


def test_runs_of_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "grpo").mkdir()
    (tmp_path / "grpo" / "precious").touch()
    with pytest.raises(UserError, match="holds runs that are not a demo's"):
        demo(dataclasses.replace(SMALL, out=tmp_path))
    assert (tmp_path / "grpo" / "precious").exists()


def test_the_text_holds_no_sum_that_is_rewarded_or_tested() -> None:
    text = mixed_text(dataclasses.replace(SMALL, characters=200_000))
    lines = text.split("\n")
    held_out = {p.prompt for part in (TEST_BUCKETS, REWARD_BUCKETS) for p in additions(part)}
    sums = [line.partition("=") for line in lines if line.replace("+", "").replace("=", "").isdigit() and "+" in line]
    assert not {left + "=" for left, _, _ in sums} & held_out
    characters = sum(len("".join(parts)) + 1 for parts in sums)
    assert characters / len(text) == pytest.approx(SMALL.sums, abs=0.02)
    exact = sum(sum(map(int, left.split("+"))) == int(right) for left, _, right in sums)
    rounded = sum(sum(map(int, left.split("+"))) // 10 * 10 == int(right) for left, _, right in sums)
    assert exact / len(sums) == pytest.approx(1 - 0.9 * SMALL.rounded, abs=0.02)  # a tenth are round anyway
    assert rounded / len(sums) == pytest.approx(SMALL.rounded + 0.1 * (1 - SMALL.rounded), abs=0.02)
    assert text == mixed_text(dataclasses.replace(SMALL, characters=200_000))
    assert text != mixed_text(dataclasses.replace(SMALL, characters=200_000, seed=1))


@pytest.mark.parametrize("change", [{"sums": -0.1}, {"rounded": 1.0}, {"characters": 10}])
def test_a_config_names_the_field_that_does_not_fit(change: dict) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(change))} is "):
        DemoConfig(**change)


def test_who_served_an_op_is_what_was_asked_for() -> None:
    model = Transformer(PRESETS["mixtral-tiny"](vocab_size=32, num_layers=1))
    usual = served_by(model, [1, 2, 3])
    attention = {f"attention{kind}" for kind in ("", "_backward", "_varlen", "_varlen_backward", "_decode")}
    assert {"moe_route", "moe_mlp", "moe_mlp_backward", *attention} <= usual.keys()
    with pykern.backend("reference"):
        forced = served_by(model, [1, 2, 3])
    assert forced.keys() == usual.keys() and set(forced.values()) == {"reference"}

"""A small Mixtral in the trainers: its experts stay balanced, the log says so, and GRPO takes it on."""

import json
from pathlib import Path

import pytest
import torch

from pykern.model import PRESETS, Transformer, TransformerConfig
from pykern.train.checkpoint import load_model
from pykern.train.grpo import GRPOConfig, grpo
from pykern.train.pretrain import EXPERT_COLUMNS, PretrainConfig, pretrain
from pykern.train.run import read_log
from pykern.train.tasks import ADDITION

SIZES = {"num_layers": 2, "num_heads": 4, "width": 32, "ffn_width": 32, "context_length": 32}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The preset at a smaller size, on sums of all the digits."""
    folder = tmp_path_factory.mktemp("moe")
    sums = [f"{a}+{b}={a + b}\n" for a in range(10, 60) for b in range(10, 60)]
    order = torch.randperm(len(sums), generator=torch.Generator().manual_seed(0))
    (folder / "text.txt").write_text("".join(sums[i] for i in order))
    model = PRESETS["mixtral-tiny"](vocab_size=1, **SIZES)
    settings = {"steps": 40, "batch_size": 16, "warmup_steps": 10, "eval_interval": 20, "eval_windows": 8}
    pretrain(PretrainConfig(data=str(folder / "text.txt"), out=folder / "run", model=model, threads=1, **settings))
    return folder / "run"


def test_experts_stay_balanced_and_the_log_says_so(run: Path) -> None:
    rows = read_log(run)
    assert set(EXPERT_COLUMNS) <= rows[0].keys()
    least, most = ([float(row[name]) for row in rows] for name in EXPERT_COLUMNS)
    assert all(0 <= a <= 1 <= b <= 4 for a, b in zip(least, most, strict=True))  # 8 experts, top 2
    assert sum(least[-10:]) / 10 > 0.25
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"]) - 0.15


def test_a_dense_model_has_no_such_columns(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the quick brown fox " * 50)
    model = TransformerConfig(vocab_size=1, context_length=8, num_layers=1, num_heads=2, width=8)
    pretrain(PretrainConfig(data=str(tmp_path / "text.txt"), out=tmp_path / "run", model=model, steps=1, threads=1))
    assert not set(EXPERT_COLUMNS) & read_log(tmp_path / "run")[0].keys()
    assert Transformer(model).expert_load() is None


def test_the_load_is_that_of_the_last_forward_pass(run: Path) -> None:
    model, tokenizer, _ = load_model(run)
    tokens = torch.tensor([tokenizer.encode("12+34=46\n")])
    model(tokens)
    load = model.expert_load()
    assert load.shape == (2, 8)
    torch.testing.assert_close(load.mean(1), torch.ones(2))
    _, ids = model.blocks[1].mlp.routing
    assert load[1].argmax() in ids and (load[1] * ids.numel() / 8).round().sum() == ids.numel()


def test_grpo_trains_routers_and_experts(run: Path, tmp_path: Path) -> None:
    before = load_model(run)[0].state_dict()
    settings = {"steps": 2, "prompts_per_step": 4, "group_size": 4, "learning_rate": 1e-3, "eval_problems": 8}
    reward = {"reward": "number_format", "max_completion_length": 4}
    grpo(GRPOConfig(source=run, out=tmp_path / "rl", task=ADDITION, threads=1, **settings, **reward))
    after = load_model(tmp_path / "rl")[0].state_dict()
    for part in ("router.weight", "gate_up", "down"):
        names = [name for name in before if name.endswith(part)]
        assert names and all(not torch.equal(before[name], after[name]) for name in names)
    assert all(tensor.isfinite().all() for tensor in after.values())
    assert json.loads((tmp_path / "rl" / "config.json").read_text())["task"] == ADDITION

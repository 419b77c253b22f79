"""Training on the kernels loses what training on the references loses, to rounding; and it does run on the kernels."""

import json
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import pykern
from pykern.model import Transformer, TransformerConfig
from pykern.train import data, pretrain
from pykern.train.checkpoint import save_checkpoint
from pykern.train.config import to_dict
from pykern.train.grpo import GRPOConfig, grpo
from pykern.train.pretrain_config import PretrainConfig
from pykern.train.run import read_log
from pykern.train.tokenizer import CharTokenizer

MODELS = {
    "gpt2": {},
    "gpt2 with dropout": {"dropout": 0.2},
    "llama": {"num_heads": 4, "num_kv_heads": 2, "norm": "rmsnorm", "mlp": "swiglu", "positions": "rotary"},
    "mistral": {"num_heads": 4, "num_kv_heads": 1, "positions": "rotary", "sliding_window": 5},
}


@contextmanager
def served(op: str):
    """Yields the calls by backend that the block will have made."""
    spec, calls = pykern.catalogue()[op], {}
    before = dict(spec.served)
    yield calls
    calls.update({name: n - before.get(name, 0) for name, n in spec.served.items() if n > before.get(name, 0)})


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("model", MODELS)
def test_pretraining(model: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    data.prepare(str(tmp_path / "text.txt"), "char", tmp_path / "data")

    def run(name: str) -> list[float]:
        config = {"vocab_size": 1, "context_length": 24, "num_layers": 2, "num_heads": 2, "width": 32}
        settings = {"steps": 30, "batch_size": 4, "warmup_steps": 4, "eval_interval": 10, "threads": 1}
        out = tmp_path / name
        transformer = TransformerConfig(**{**config, **MODELS[model]})
        pretrain.pretrain(PretrainConfig(data=str(tmp_path / "data"), out=out, model=transformer, **settings))
        return [float(row[key]) for row in read_log(out) for key in ("train_loss", "val_loss") if row[key]]

    with served("attention") as forward, served("attention_backward") as backward:
        ours = run("kernels")
    assert forward and backward and "reference" not in {*forward, *backward}
    with pykern.backend("reference"):
        reference = run("references")
    assert ours[-1] < 0.95 * ours[0]
    assert ours == pytest.approx(reference, rel=1e-4)


def test_grpo(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = CharTokenizer("abcdef=\n")
    config = TransformerConfig(vocab_size=8, context_length=16, num_layers=1, num_heads=2, width=16, positions="rotary")
    save_checkpoint(tmp_path / "policy", 1, Transformer(config), None)
    (tmp_path / "policy/config.json").write_text(json.dumps({"model": to_dict(config)}))
    tokenizer.save(tmp_path / "policy")
    rows = [{"prompt": prompt + letter + "=", "answer": letter} for letter in "abcdef" for prompt in ("", "f", "ab")]
    (tmp_path / "task.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def run(name: str) -> list[float]:
        settings = {"steps": 4, "prompts_per_step": 5, "group_size": 16, "max_completion_length": 3}
        settings |= {"learning_rate": 3e-3, "device": "cpu", "eval_interval": 4, "kl_coefficient": 0.05}
        task = str(tmp_path / "task.jsonl")
        grpo(GRPOConfig(source=tmp_path / "policy", out=tmp_path / name, task=task, **settings))
        keys = ("loss", "reward", "entropy", "grad_norm", "kl")
        return [float(row[key]) for row in read_log(tmp_path / name) for key in keys if row.get(key)]

    ops = "attention_varlen", "attention_varlen_backward", "attention_decode"
    with served(ops[0]) as forward, served(ops[1]) as backward, served(ops[2]) as decode:
        ours = run("kernels")
    assert forward and backward and decode and "reference" not in {*forward, *backward, *decode}
    with pykern.backend("reference"):
        reference = run("references")
    assert any(ours) and ours == pytest.approx(reference, rel=1e-3, abs=1e-6)

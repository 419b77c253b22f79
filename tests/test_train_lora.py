"""Training adapters in place of weights: GRPO and fine-tuning, with LoRA and QLoRA."""

import json
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import pykern
from pykern import cli
from pykern.model import Transformer, TransformerConfig
from pykern.nn import Linear4bit
from pykern.nn.lora_model import adapter_parameters, adapters
from pykern.train.checkpoint import latest_checkpoint, load_checkpoint, load_model, save_checkpoint
from pykern.train.config import to_dict
from pykern.train.errors import UserError
from pykern.train.grpo import Trainer, grpo
from pykern.train.grpo_config import GRPOConfig
from pykern.train.lora import LoraOptions, adapt
from pykern.train.pretrain import pretrain
from pykern.train.pretrain_config import PretrainConfig
from pykern.train.rewards import REWARDS
from pykern.train.run import read_log
from pykern.train.tasks import load_task
from pykern.train.tokenizer import CharTokenizer

TOKENIZER = CharTokenizer("abcdef=\n")
LORA = LoraOptions(r=4)
OPTIONS = [
    LORA,
    LoraOptions(r=4, use_dora=True, quantize="nf4", target_modules=("attention.qkv", "mlp.down")),
    LoraOptions(r=2, use_rslora=True, alpha=3.0, target_parameters=("mlp.gate_up", "mlp.down"), quantize="int4"),
]
IDS = ["LoRA", "QLoRA", "experts"]


def source(folder: Path, mlp: str = "swiglu") -> Path:
    """A run folder as pretraining leaves it, of an untrained model."""
    torch.manual_seed(0)
    experts = {"num_experts": 4} if mlp == "moe" else {}
    shape = {"vocab_size": 8, "context_length": 16, "num_layers": 2, "num_heads": 2, "width": 32}
    config = TransformerConfig(**shape, positions="rotary", mlp=mlp, init_std=0.3, **experts)
    save_checkpoint(folder, 1, Transformer(config), None)
    (folder / "config.json").write_text(json.dumps({"model": to_dict(config)}), encoding="utf-8")
    TOKENIZER.save(folder)
    return folder


def grpo_config(folder: Path, lora: LoraOptions) -> GRPOConfig:
    rows = [{"prompt": prompt + letter + "=", "answer": letter} for letter in "abcdef" for prompt in ("", "f", "ab")]
    (folder / "task.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return GRPOConfig(
        source=source(folder / "source", "moe" if lora.target_parameters else "swiglu"),
        out=folder / "run",
        task=str(folder / "task.jsonl"),
        lora=lora,
        steps=4,
        prompts_per_step=5,
        group_size=32,
        max_completion_length=3,
        learning_rate=3e-3,
        device="cpu",
        eval_interval=10,
        eval_samples=1,
        checkpoint_interval=2,
    )


def tune_config(folder: Path, lora: LoraOptions) -> PretrainConfig:
    (folder / "text.txt").write_text("abc=def\nfed=cba\n" * 80)
    return PretrainConfig(
        data=str(folder / "text.txt"),
        source=source(folder / "source", "moe" if lora.target_parameters else "swiglu"),
        out=folder / "run",
        lora=lora,
        steps=4,
        batch_size=4,
        learning_rate=1e-2,
        min_learning_rate=1e-3,
        warmup_steps=0,
        eval_interval=10,
        eval_windows=4,
        checkpoint_interval=2,
        threads=1,
        device="cpu",
    )


def trained(folder: Path) -> dict[str, Tensor]:
    """The run's adapters, as PEFT has them."""
    return load_file(latest_checkpoint(folder) / "adapter_model.safetensors")


def weights(folder: Path) -> dict[str, Tensor]:
    return load_checkpoint(latest_checkpoint(folder))[0]


@pytest.mark.parametrize("lora", OPTIONS, ids=IDS)
def test_a_step_moves_every_adapter_and_nothing_else(
    lora: LoraOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(REWARDS, "exact_match", lambda prompt, completion, answer: float(completion.count("a")))
    config = grpo_config(tmp_path, lora)
    model, tokenizer, _ = load_model(config.source)
    learner = Trainer(config, adapt(model, lora, config.seed), tokenizer, load_task(config.task))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = dict(adapters(model))
    count = {1: 4 * 2, 2: 2 * 2, 3: 5 * 2}[OPTIONS.index(lora) + 1]
    assert len(found) == count and not any(a.lora_B.weight.any() for a in found.values())
    optimised = {id(p) for group in learner.optimizer.param_groups for p in group["params"]}
    own = [parameter for adapter in found.values() for parameter in adapter_parameters(adapter).values()]
    assert optimised == {id(parameter) for parameter in own}
    learner.update()
    assert all(adapter.lora_B.weight.any() for adapter in found.values())
    learner.update()  # as long as B is zero, A has no gradient
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if "lora_" in name}
    assert any(isinstance(m, Linear4bit) for m in model.modules()) == (lora.quantize != "none")


@pytest.mark.parametrize("lora", OPTIONS, ids=IDS)
@pytest.mark.parametrize("kind", ["grpo", "tune"])
def test_a_resumed_run_takes_the_same_steps(kind: str, lora: LoraOptions, tmp_path: Path) -> None:
    run, make = {"grpo": (grpo, grpo_config), "tune": (pretrain, tune_config)}[kind]
    config = make(tmp_path, lora)
    run(config)
    halfway = replace(config, out=tmp_path / "halfway")
    run(replace(halfway, steps=2) if kind == "grpo" else replace(halfway, steps=2, decay_steps=4))
    run(halfway, resume=True)
    assert all(torch.equal(tensor, weights(halfway.out)[name]) for name, tensor in weights(config.out).items())
    assert all(torch.equal(tensor, trained(halfway.out)[name]) for name, tensor in trained(config.out).items())
    with pytest.raises(UserError, match="lora cannot change when a run is resumed"):
        run(replace(halfway, lora=replace(lora, r=8)), resume=True)


@pytest.mark.parametrize("lora", OPTIONS, ids=IDS)
def test_a_tuned_model_has_learnt_and_is_loaded_with_its_adapters(lora: LoraOptions, tmp_path: Path) -> None:
    config = tune_config(tmp_path, lora)
    pretrain(config)
    losses = [float(row["train_loss"]) for row in read_log(config.out)]
    assert losses[-1] < losses[0]
    model, _, _ = load_model(config.out)
    found = dict(adapters(model))
    assert all(adapter.lora_B.weight.any() for adapter in found.values())
    base = adapt(load_model(config.source)[0], replace(lora, alpha=1.0), seed=3)
    for adapter in dict(adapters(base)).values():
        adapter.scaling = next(iter(found.values())).scaling
    pykern.load_adapter(base, latest_checkpoint(config.out))
    tokens = torch.arange(8)[None]
    assert torch.equal(base.eval()(tokens), model(tokens))


def test_peft_reads_the_adapters_of_a_checkpoint_and_damage_to_them_is_noticed(tmp_path: Path) -> None:
    config = tune_config(tmp_path, LORA)
    pretrain(config)
    checkpoint = latest_checkpoint(config.out)
    base, tokens = load_model(config.source)[0], torch.arange(8)[None]
    shape, base.config = base.config, {"model_type": "custom"}  # PEFT asks for one as transformers has it
    read = peft.PeftModel.from_pretrained(base, checkpoint).eval()
    base.config = shape
    expected = load_model(config.out)[0](tokens)
    assert torch.allclose(read(tokens), expected, atol=1e-5)
    assert not torch.allclose(load_model(config.source)[0](tokens), expected, atol=1e-2)
    with (checkpoint / "adapter_model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match="is damaged: adapter_model.safetensors has"):
        load_checkpoint(checkpoint)


def test_what_was_tuned_is_trained_on_in_plain_weights(tmp_path: Path) -> None:
    first = tune_config(tmp_path, OPTIONS[1])
    pretrain(first)
    second = replace(grpo_config(tmp_path, LoraOptions()), source=first.out, out=tmp_path / "second", steps=1)
    grpo(second)
    model, expected = load_model(second.out)[0], load_model(first.out)[0]
    assert not list(adapters(model)) and all(parameter.requires_grad for parameter in model.parameters())
    tokens = torch.arange(8)[None]
    assert torch.allclose(model(tokens), expected(tokens), atol=0.2) and not torch.equal(
        model(tokens), expected(tokens)
    )
    third = replace(second, source=first.out, out=tmp_path / "third", lora=LORA)
    grpo(third)
    assert len(list(adapters(load_model(third.out)[0]))) == 8


def test_a_run_goes_on_from_a_model_without_adapters_too(tmp_path: Path) -> None:
    config = tune_config(tmp_path, LoraOptions())
    pretrain(config)
    before, after = weights(config.source), weights(config.out)
    assert before.keys() == after.keys() and not torch.equal(before["embedding.weight"], after["embedding.weight"])
    assert (after["embedding.weight"] - before["embedding.weight"]).abs().max() < 0.1
    assert (config.out / "tokenizer.json").read_text() == (config.source / "tokenizer.json").read_text()
    with pytest.raises(UserError, match="source cannot change when a run is resumed"):
        pretrain(replace(config, source=config.out), resume=True)


def test_tokens_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    config = tune_config(tmp_path, LORA)
    own = replace(config, source=None, lora=LoraOptions(), out=tmp_path / "own", steps=1)
    (tmp_path / "text.txt").write_text("other letters " * 80)
    pretrain(replace(own, model=replace(own.model, context_length=8, num_layers=1)))
    with pytest.raises(UserError, match="are of another tokenizer than the model's"):
        pretrain(replace(config, data=str(tmp_path / "own/data")))


def test_the_command_line_takes_the_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = grpo_config(tmp_path, LORA)
    command = ["grpo", "--from", str(config.source), "--out", str(config.out), "--task", config.task, "--steps", "1"]
    command += ["--prompts-per-step", "2", "--group-size", "4", "--max-completion-length", "2", "--device", "cpu"]
    chosen = ["--lora.r", "2", "--lora.target-modules", "attention.qkv", "--lora.quantize", "nf4", "--lora.use-dora"]
    assert cli.main([*command, *chosen]) == 0
    model, _, _ = load_model(config.out)
    assert [name for name, _ in adapters(model)] == [f"blocks.{i}.attention.qkv" for i in range(2)]
    assert isinstance(model.blocks[0].attention.qkv.base_layer, Linear4bit)
    assert isinstance(model.blocks[0].mlp.down, Linear4bit)
    assert cli.main(["grpo", "--resume", str(config.out), "--steps", "2"]) == 0
    assert latest_checkpoint(config.out).name == "step-00000002"
    capsys.readouterr()
    assert cli.main(["pretrain", "--out", str(tmp_path / "x"), "--lora.r", "2"]) == 1
    assert "--from is needed with --lora.r" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"target_modules": ("attention.query",)},
            "lora.target_modules: nothing matches attention.query: .* end with qkv",
        ),
        ({"target_modules": ("mlp",)}, "lora.target_modules: blocks.0.mlp: base_layer: expected a torch.nn.Linear"),
        (
            {"target_parameters": ("mlp.up",), "use_dora": True, "target_modules": ()},
            "nothing matches an empty list or",
        ),
    ],
)
def test_layers_that_are_not_there_are_named(options: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        grpo(grpo_config(tmp_path, LoraOptions(r=2, **options)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": -1}, "lora.r is -1, expected a rank of 1 or more"),
        ({"alpha": 8.0}, "lora.alpha is given and lora.r is 0"),
        ({"quantize": "nf4"}, "lora.quantize is given and lora.r is 0"),
        ({"r": 2, "alpha": 0.0}, "lora.alpha is 0.0, expected a finite number above 0"),
        ({"r": 2, "dropout": 1.0}, "lora.dropout is 1.0, expected a number in"),
    ],
)
def test_options_name_the_field_that_does_not_fit(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoraOptions(**options)

"""`pykern demo`: a language model from nothing, and reinforcement learning on top, in minutes on two CPU cores.

The text is what every Python installation has, the sources of its standard library, with written-out sums between
them. As sums in the wild are, they are sloppy: some are rounded down to the ten. Pretraining imitates that, roundings
included; GRPO then rewards exact answers alone, on sums that the text never had, and is tested on sums that neither
phase ever saw.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from pykern.model import Transformer, TransformerConfig, generate
from pykern.train.checkpoint import load_model
from pykern.train.corpus import stdlib_text
from pykern.train.errors import UserError
from pykern.train.grpo import grpo
from pykern.train.grpo_config import GRPOConfig
from pykern.train.pretrain import pretrain
from pykern.train.pretrain_config import FROM_TOKENIZER, PretrainConfig
from pykern.train.served import served_by
from pykern.train.tasks import TEXT_BUCKETS, additions, load_task
from pykern.train.tokenizer import BPETokenizer, CharTokenizer

_BLOCK = 512  # characters of source text, or of sums, at a stretch: several context windows


@dataclass(kw_only=True)
class DemoConfig:
    """The defaults end in under five minutes on two cores."""

    out: Path = Path("runs/demo")
    """Folder for both runs and demo.json; an earlier demo there is replaced."""
    seed: int = 1337
    characters: int = 1_600_000
    """Length of the text."""
    sums: float = 0.67
    """Share of sums in it."""
    rounded: float = 0.4
    """Share of the sums whose result is rounded down to the ten."""
    pretrain_steps: int = 2200
    grpo_steps: int = 120
    threads: int | None = None
    """CPU threads. None: two, or one on a single core; a model so small gains nothing from more."""

    def __post_init__(self) -> None:
        for name in ("sums", "rounded"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a share of 0 or more and below 1")
        if self.characters < 10 * _BLOCK:
            raise ValueError(f"characters is {self.characters}, expected at least {10 * _BLOCK}")


def demo(config: DemoConfig) -> dict[str, Any]:
    """Runs the demo, prints what it finds, and returns the figures of demo.json: pass_at_1_before, pass_at_1_after,
    val_loss, seconds, pretrain_seconds, grpo_seconds and backends (op -> backend).
    """
    console, start = Console(highlight=False, soft_wrap=True), time.perf_counter()
    threads = config.threads or min(2, torch.get_num_threads())
    text_run, policy_run = _prepare_folders(config.out)
    text = config.out / "text.txt"
    text.write_text(mixed_text(config), encoding="utf-8")

    console.rule("1  pretraining on Python's standard library and sloppy sums")
    learnt = pretrain(_pretrain_config(config, text, text_run, threads))
    model, tokenizer, _ = load_model(text_run)
    pretrained = time.perf_counter()
    before = _samples(model, tokenizer, config.seed)
    _show(console, before, "the pretrained model")

    console.rule("2  GRPO: a reward for the exact sum")
    improved = grpo(_grpo_config(config, text_run, policy_run, threads))
    model, tokenizer, _ = load_model(policy_run)
    after = _samples(model, tokenizer, config.seed)
    _show(console, after, "the same prompts after GRPO")

    backends = served_by(model, tokenizer.encode(text.read_text(encoding="utf-8")[: model.config.context_length - 2]))
    end = time.perf_counter()
    figures = {
        "pass_at_1_before": improved["pass_at_1_before"],
        "pass_at_1_after": improved["pass_at_1"],
        "val_loss": learnt["val_loss"],
        "seconds": end - start,
        "pretrain_seconds": pretrained - start,
        "grpo_seconds": end - pretrained,
        "backends": backends,
    }
    (config.out / "demo.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    console.rule("3  figures")
    _report(console, figures, config, text_run, policy_run)
    return figures


def mixed_text(config: DemoConfig) -> str:
    """Blocks of standard library, each followed by its share of sums, one a line."""
    library = stdlib_text()[: int(config.characters * (1 - config.sums))]
    problems = list(additions(TEXT_BUCKETS))
    rng = random.Random(config.seed)
    pieces = []
    size = int(_BLOCK * config.sums / (1 - config.sums))
    for start in range(0, len(library), _BLOCK):
        pieces.append(library[start : start + _BLOCK] + "\n")
        length = 0
        while length < size:
            problem = rng.choice(problems)
            answer = problem.answer[:-1] + "0" if rng.random() < config.rounded else problem.answer
            pieces.append(f"{problem.prompt}{answer}\n")
            length += len(pieces[-1])
    return "".join(pieces)


def _pretrain_config(config: DemoConfig, text: Path, out: Path, threads: int) -> PretrainConfig:
    # Llama's positions and norm. At GPT-2's base and initial scale so small a model takes far longer to find out which
    # digits belong together.
    model = TransformerConfig(
        vocab_size=FROM_TOKENIZER,
        context_length=64,
        num_layers=2,
        num_heads=4,
        width=128,
        positions="rotary",
        rope_base=100.0,
        norm="rmsnorm",
        bias=False,
        init_std=0.08,
    )
    return PretrainConfig(
        data=str(text),
        out=out,
        tokenizer="char",
        model=model,
        seed=config.seed,
        steps=config.pretrain_steps,
        batch_size=24,
        learning_rate=3e-3,
        min_learning_rate=3e-4,
        warmup_steps=min(100, config.pretrain_steps // 10),
        eval_windows=96,
        checkpoint_interval=config.pretrain_steps,
        device="cpu",
        threads=threads,
    )


def _grpo_config(config: DemoConfig, source: Path, out: Path, threads: int) -> GRPOConfig:
    return GRPOConfig(
        source=source,
        out=out,
        seed=config.seed,
        steps=config.grpo_steps,
        max_completion_length=4,
        learning_rate=2e-4,
        min_learning_rate=0.0,
        eval_interval=25,
        checkpoint_interval=config.grpo_steps,
        device="cpu",
        threads=threads,
    )


def _prepare_folders(out: Path) -> tuple[Path, Path]:
    """The folders of the two runs, free of an earlier demo's; nothing else is removed."""
    runs = out / "pretrain", out / "grpo"
    if any(run.exists() for run in runs) and not (out / "text.txt").is_file():
        raise UserError(f"{out} holds runs that are not a demo's: give another --out")
    for run in runs:
        shutil.rmtree(run, ignore_errors=True)
    (out / "demo.json").unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    return runs


def _problems(count: int = 4) -> list[Any]:
    return random.Random(0).sample(load_task("addition").test, count)


def _samples(model: Transformer, tokenizer: CharTokenizer | BPETokenizer, seed: int) -> list[tuple[str, str]]:
    """(prompt, continuation): a piece of code, and four answers to each of a few held-out sums."""
    samples = []
    code = torch.tensor([tokenizer.encode("    def ")])
    tokens = generate(model, code, model.config.context_length - code.shape[1], temperature=0.7, seed=seed)
    samples.append(("    def ", tokenizer.decode(tokens[0, code.shape[1] :].tolist())))
    for problem in _problems():
        prompts = torch.tensor([tokenizer.encode(problem.prompt)] * 4)
        tokens = generate(model, prompts, 4, seed=seed)[:, prompts.shape[1] :].tolist()
        answers = [tokenizer.decode(row).split("\n")[0] for row in tokens]
        marked = [f"{answer} {'✓' if answer == problem.answer else '✗'}" for answer in answers]
        samples.append((problem.prompt, "   ".join(marked)))
    return samples


def _show(console: Console, samples: list[tuple[str, str]], title: str) -> None:
    console.print(f"\n[bold]{title}[/]")
    for prompt, text in samples:
        console.print(f"{prompt}{text}", markup=False)
    console.print()


def _report(console: Console, figures: dict[str, Any], config: DemoConfig, text_run: Path, policy_run: Path) -> None:
    table = Table("", "before GRPO", "after GRPO", title="held-out sums")
    table.add_row("pass@1", f"{figures['pass_at_1_before']:.3f}", f"{figures['pass_at_1_after']:.3f}")
    console.print(table)
    table = Table("op", "served by", title="what ran the ops")
    for op, backend in figures["backends"].items():
        table.add_row(op, backend)
    console.print(table)
    console.print(f"validation loss {figures['val_loss']:.4f}, {figures['seconds']:.0f} s in all")
    for run, plot in ((text_run, "loss.png"), (policy_run, "reward.png")):
        console.print(f"{run}: log.csv, {plot}, tensorboard/, checkpoints/")
    console.print(f"figures: {config.out / 'demo.json'}")
    console.print(f'try: pykern generate {policy_run} --prompt "37+85=" --max-new-tokens 4', markup=False)

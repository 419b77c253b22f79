"""Pretraining: next-token prediction on context windows, in one readable loop.

A checkpoint holds all that the next step depends on (weights, optimiser, both random generators, the step), so a run
that was stopped anywhere and resumed takes the very same steps as one that never stopped, bit for bit.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pykern.model import Packed, Transformer
from pykern.train import checkpoint, data
from pykern.train.config import from_dict, read_config, to_dict
from pykern.train.errors import UserError, first_line, writing
from pykern.train.interrupt import Interrupt
from pykern.train.lora import adapt, without_adapters
from pykern.train.pretrain_config import FROM_TOKENIZER, PretrainConfig
from pykern.train.run import CONFIG, Run
from pykern.train.schedule import warmup_cosine
from pykern.train.throughput import peak_flops

COLUMNS = ("train_loss", "val_loss", "lr", "tokens_per_s")
EXPERT_COLUMNS = ("expert_load_min", "expert_load_max")  # of any layer's experts, over the layer's mean
FIXED = ("data", "source", "tokenizer", "bpe_vocab_size", "model", "lora", "seed")  # what a resumed run cannot change


def pretrain(config: PretrainConfig, resume: bool = False) -> dict[str, Any]:
    """Train a model in the folder `config.out`, from the start or on from its newest checkpoint.

    Returns the figures of summary.json: step, val_loss (over the whole validation split), train_loss, seconds,
    tokens_per_s, mfu (None on a device whose peak is not known) and parameters.

    UserError for what the user can put right; KeyboardInterrupt after Ctrl-C, once the run is saved.
    """
    if config.out is None:
        raise UserError("--out is needed: the folder to put the run in")
    if config.lora.r and config.source is None:
        raise UserError("--from is needed with --lora.r: the run whose model the adapters are for")
    model = None
    if resume:
        config = _as_started(config)
        newest = checkpoint.latest_checkpoint(config.out)
        weights, state = checkpoint.load_checkpoint(newest)
        own = config.out / "data"
        tokens = data.load(own if own.is_dir() else Path(config.data))
    else:
        Run.require_unused(config.out)
        tokenizer = config.tokenizer
        if config.source is not None:
            model, tokenizer, shape = checkpoint.load_model(config.source)
            model, config = without_adapters(model).train(), dataclasses.replace(config, model=shape)
        _ = config.window  # before the work of tokenising
        weights, state = None, None
        tokens = data.prepare(config.data, tokenizer, config.out / "data", config.bpe_vocab_size)
        if config.model.vocab_size == FROM_TOKENIZER:
            config = _with_vocabulary(config, tokens.tokenizer.vocab_size)
    checkpoint.require_vocabulary(tokens.tokenizer.vocab_size, config.model.vocab_size, str(config.out))
    tokens.require(config.window)
    if config.documents and tokens.tokenizer.end_of_text is None:
        raise UserError("--documents needs a tokenizer with an end-of-text token: use --tokenizer bpe")
    trainer = Trainer(config, tokens, model)
    if resume:
        trainer.restore(weights, state, newest)
        run = Run.resume(config.out, to_dict(config), trainer.columns, trainer.step)
    else:
        run = Run.create(config.out, to_dict(config), trainer.columns)
        with writing(config.out):
            tokens.tokenizer.save(config.out)
    with run, Interrupt() as interrupt:
        return trainer.train(run, interrupt)


def _as_started(config: PretrainConfig) -> PretrainConfig:
    """`config`, if it agrees with the run in `config.out` on what cannot change in the middle of a run."""
    path = config.out / CONFIG
    started = from_dict(PretrainConfig, read_config(path), str(path))
    if config.source is not None:
        config = dataclasses.replace(config, model=started.model)
    elif config.model.vocab_size == FROM_TOKENIZER:
        config = _with_vocabulary(config, started.model.vocab_size)
    for name in FIXED:
        if getattr(config, name) != getattr(started, name):
            raise UserError(f"{name} cannot change when a run is resumed: {config.out} was started with another")
    return config


def _with_vocabulary(config: PretrainConfig, size: int) -> PretrainConfig:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))


class Trainer:
    """Model, optimiser and position of one pretraining run."""

    def __init__(self, config: PretrainConfig, tokens: data.TokenData, model: Transformer | None = None) -> None:
        self.config, self.tokens = config, tokens
        self.device = choose_device(config.device)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)
        model = Transformer(config.model) if model is None else model
        self.model = adapt(model, config.lora, config.seed).to(self.device)
        self.forward = torch.compile(self.model) if config.compile else self.model
        self.optimizer = make_optimizer(self.model, config)
        self.sampler = torch.Generator().manual_seed(config.seed)  # of training windows, apart from dropout's generator
        self.step, self.seconds, self.train_loss = 0, 0.0, math.nan
        self.columns = COLUMNS + (EXPERT_COLUMNS if config.model.mlp == "moe" else ())
        self.expert_load: dict[str, float] = {}  # of the last batch, by EXPERT_COLUMNS

    def restore(self, weights: dict[str, Tensor], state: dict[str, Any], source: Path) -> None:
        """Put everything where the checkpoint `source` was taken; the settings of the optimiser are the config's."""
        checkpoint.load_weights(self.model, weights, source)
        try:
            settings = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": settings})
            self.sampler.set_state(state["sampler"])
            torch.set_rng_state(state["rng"])
            if self.device.type == "cuda" and state["cuda_rng"] is not None:
                torch.cuda.set_rng_state(state["cuda_rng"], self.device)
            self.step, self.seconds, self.train_loss = state["step"], state["seconds"], state["train_loss"]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{source} is not a checkpoint of this run's pretraining: {first_line(error)}") from None

    def save(self, run: Run) -> Path:
        """A checkpoint of this moment; UserError when the last update ruined the weights."""
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            raise self._diverged("a weight is not finite")
        extra = {
            "sampler": self.sampler.get_state(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "seconds": self.seconds,
            "train_loss": self.train_loss,
        }
        return run.save(self.step, self.model, self.optimizer.state_dict(), extra, keep=self.config.keep_checkpoints)

    def train(self, run: Run, interrupt: Interrupt) -> dict[str, Any]:
        """Take the steps that are left, and put the figures of the whole run into summary.json."""
        config = self.config
        self._introduce(run)
        run.track(config.steps, self.step)
        peak = peak_flops(self.device, getattr(torch, config.precision))
        val_loss = None
        saved = self.step or None  # the step of the newest checkpoint
        while self.step < config.steps and not interrupt.requested:
            start = time.perf_counter()
            lr = self.update()
            took = time.perf_counter() - start
            self.seconds += took
            last = self.step == config.steps
            val_loss = None
            if last or self.step % config.eval_interval == 0:
                val_loss = self.validate(None if last else config.eval_windows, interrupt)
            speed = self._tokens_per_step() / took
            figures = {"train_loss": self.train_loss, "val_loss": val_loss, "lr": lr, "tokens_per_s": speed}
            run.log(self.step, **figures, **self.expert_load)
            if val_loss is not None:
                run.say(self._line(val_loss, lr, peak))
            if last or self.step % config.checkpoint_interval == 0:
                self.save(run)
                saved = self.step
        if not interrupt.requested and val_loss is None:  # resumed after its last step
            val_loss = self.validate(None, interrupt)
        if interrupt.requested:
            if saved != self.step:
                self.save(run)
            run.say(f"interrupted at step {self.step}; go on with: pykern pretrain --resume {run.folder}")
            raise KeyboardInterrupt
        return self._finish(run, val_loss, peak)

    def update(self) -> float:
        """One step of the optimiser; returns the learning rate it took. UserError when the loss is not finite."""
        config = self.config
        self.step += 1
        lr = warmup_cosine(
            self.step,
            peak=config.learning_rate,
            floor=config.min_learning_rate,
            warmup_steps=config.warmup_steps,
            decay_steps=config.decay_steps or config.steps,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        total = torch.zeros((), device=self.device)
        for _ in range(config.accumulation):
            inputs, targets = data.sample_windows(self.tokens.train, config.batch_size, config.window, self.sampler)
            loss = self._loss(inputs, targets)
            ((loss + self.model.auxiliary_loss()) / config.accumulation).backward()
            total += loss.detach() / config.accumulation
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        load = self.model.expert_load()
        extremes = () if load is None else (load.min(), load.max())
        # The one moment when the host waits for the device.
        self.train_loss, norm, *loads = torch.stack([total, norm, *extremes]).tolist()
        self.expert_load = dict(zip(EXPERT_COLUMNS, loads, strict=False))  # none in a dense model
        if not math.isfinite(self.train_loss):
            raise self._diverged(f"the loss is {self.train_loss}")
        if not math.isfinite(norm):
            raise self._diverged(f"the norm of the gradient is {norm}")
        return lr

    def validate(self, limit: int | None, interrupt: Interrupt | None = None) -> float | None:
        """Mean loss over `limit` windows of the validation split, None: all of it. None if Ctrl-C came meanwhile."""
        total, count = 0.0, 0
        self.model.eval()
        windows = data.whole_windows(self.tokens.validation, self.config.batch_size, self.config.window, limit)
        with torch.no_grad():
            for inputs, targets in windows:
                total += self._loss(inputs, targets).item() * targets.numel()
                count += targets.numel()
                if limit is None and interrupt is not None and interrupt.requested:
                    return None
        self.model.train()
        return total / count

    def _loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        packed = None
        if self.config.documents:
            packed = Packed.of(data.document_lengths(inputs, self.tokens.tokenizer.end_of_text), self.device)
            inputs, targets = inputs.flatten(), targets.flatten()
        inputs, targets = inputs.to(self.device, non_blocking=True), targets.to(self.device, non_blocking=True)
        if self.config.precision == "float32":
            return self.forward(inputs, packed=packed, targets=targets)
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            return self.forward(inputs, packed=packed, targets=targets)

    def _tokens_per_step(self) -> int:
        return self.config.accumulation * self.config.batch_size * self.config.window

    def _speed(self, peak: float | None) -> tuple[float, float | None]:
        """Tokens a second over the whole run, evaluations and checkpoints not counted, and the share of `peak`."""
        rate = self.step * self._tokens_per_step() / self.seconds if self.seconds else 0.0
        return rate, rate * self.model.flops_per_token() / peak if peak else None

    def _introduce(self, run: Run) -> None:
        where = f"{torch.get_num_threads()} CPU threads" if self.device.type == "cpu" else str(self.device)
        run.say(
            f"{self.model.num_parameters():,} parameters, vocabulary {self.config.model.vocab_size}, "
            f"{len(self.tokens.train):,} + {len(self.tokens.validation):,} tokens, {where}, in {run.folder}"
        )

    def _line(self, val_loss: float, lr: float, peak: float | None) -> str:
        rate, mfu = self._speed(peak)
        share = "" if mfu is None else f"  MFU {mfu:.1%}"
        losses = f"train {self.train_loss:.4f}  val {val_loss:.4f}"
        return f"step {self.step}/{self.config.steps}  {losses}  lr {lr:.2e}  {rate:,.0f} tokens/s{share}"

    def _finish(self, run: Run, val_loss: float, peak: float | None) -> dict[str, Any]:
        rate, mfu = self._speed(peak)
        summary = {
            "step": self.step,
            "val_loss": val_loss,
            "train_loss": self.train_loss,
            "seconds": self.seconds,
            "tokens_per_s": rate,
            "mfu": mfu,
            "parameters": self.model.num_parameters(),
        }
        with writing(run.folder / "summary.json"):
            (run.folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        plot = run.plot(["train_loss", "val_loss"])
        run.say(f"validation loss over the whole split: {val_loss:.4f}; loss curve: {plot}")
        return summary

    def _diverged(self, what: str) -> UserError:
        good = checkpoint.checkpoints(self.config.out)
        kept = f"the last good checkpoint is {good[-1]}" if good else "there is no checkpoint yet"
        return UserError(f"{what} at step {self.step}: {kept}; lower the learning rate or lengthen the warm-up")


def make_optimizer(model: torch.nn.Module, config: PretrainConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) in two groups: matrices decay, vectors do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)


def choose_device(name: str) -> torch.device:
    """The device of that name; "auto" is the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        raise UserError(f"device {name!r} cannot be used: {error}") from None
    return device

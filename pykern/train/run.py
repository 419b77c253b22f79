"""A run folder: config.json, log.csv, TensorBoard events, plots, checkpoints; and the progress a person sees.

Nothing here knows what is trained: pretraining and GRPO differ in the columns they log.
"""

from __future__ import annotations

import csv
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pykern.train.checkpoint import checkpoints, save_checkpoint
from pykern.train.errors import UserError, writing

CONFIG, LOG = "config.json", "log.csv"


class Run:
    """An open run folder. Use it as a context manager: leaving it closes the files and the progress bar.

    `columns` are the names that `log` accepts besides `step`, in the order of log.csv.
    """

    def __init__(self, folder: Path, columns: Sequence[str], after_step: int) -> None:
        self.folder = folder
        self.columns = list(columns)
        self.console = Console(highlight=False, soft_wrap=True)
        self._progress: Progress | None = None
        self._events = _Events(folder / "tensorboard", after_step)
        self._log: TextIO = (folder / LOG).open("a", encoding="utf-8", newline="")

    @classmethod
    def create(cls, folder: Path | str, config: Mapping[str, Any], columns: Sequence[str]) -> Run:
        """Start a run in `folder`; UserError when a run with checkpoints is there already."""
        folder = Path(folder)
        cls.require_unused(folder)
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            _replace_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")
            _replace_text(folder / LOG, ",".join(["step", *columns]) + "\n")
            for events in (folder / "tensorboard").glob("events.out.*"):
                events.unlink()  # of an attempt that never came to a checkpoint
            return cls(folder, columns, after_step=0)

    @classmethod
    def resume(cls, folder: Path | str, config: Mapping[str, Any], columns: Sequence[str], step: int) -> Run:
        """Go on in `folder` behind `step`: what was logged after it is dropped, for it will be logged again."""
        folder = Path(folder)
        rows = read_log(folder)
        header = ["step", *columns]
        if rows and list(rows[0]) != header:
            raise UserError(f"{folder / LOG} has the columns {', '.join(rows[0])}, expected {', '.join(header)}")
        lines = [",".join(row.values()) for row in rows if int(row["step"]) <= step]
        with writing(folder):
            _replace_text(folder / LOG, "\n".join([",".join(header), *lines]) + "\n")
            _replace_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")
            return cls(folder, columns, after_step=step)

    @staticmethod
    def require_unused(folder: Path | str) -> None:
        """UserError when `folder` is a file, or holds a run that has checkpoints."""
        folder = Path(folder)
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is not a folder")
        if checkpoints(folder):
            raise UserError(f"{folder} holds a run already: give another --out, or --resume {folder}")

    def track(self, total: int, done: int = 0) -> None:
        """Show progress towards `total` steps: a bar on a terminal, otherwise the lines of `say` alone."""
        if self.console.is_terminal:
            self._progress = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
                console=self.console,
                refresh_per_second=2,  # the model needs the processor more than the bar does
            )
            self._progress.add_task("", total=total, completed=done)
            self._progress.start()

    def log(self, step: int, **values: float | None) -> None:
        """A line of log.csv, flushed, and the same values to TensorBoard; a column without a value stays empty."""
        if unknown := values.keys() - set(self.columns):
            raise ValueError(f"no such columns: {sorted(unknown)}; the run has {self.columns}")
        # repr gives the shortest digits that read back as the same float
        cells = ["" if values.get(name) is None else repr(values[name]) for name in self.columns]
        with writing(self.folder):
            self._log.write(",".join([str(step), *cells]) + "\n")
            self._log.flush()
            self._events.write(step, {name: value for name, value in values.items() if value is not None})
        if self._progress is not None:
            first = self.columns[0]
            shown = "" if values.get(first) is None else f"{first} {values[first]:.4g}"
            self._progress.update(self._progress.task_ids[0], completed=step, description=shown)

    def say(self, text: str) -> None:
        """A line for the person who watches; it scrolls above the progress bar."""
        self.console.print(text, markup=False)

    def save(
        self,
        step: int,
        model: Any,
        optimizer_state: Mapping[str, Any] | None,
        extra: Mapping[str, Any] | None = None,
        *,
        keep: int | None = None,
    ) -> Path:
        """A checkpoint of this run (`save_checkpoint`), with the log on the disk before it."""
        with writing(self.folder / LOG):
            os.fsync(self._log.fileno())
        return save_checkpoint(self.folder, step, model, optimizer_state, extra, keep=keep)

    def plot(self, columns: Sequence[str], name: str = "loss.png") -> Path:
        """Draw columns of the log over the step into one picture."""
        from matplotlib.figure import Figure

        rows = read_log(self.folder)
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.add_subplot(xlabel="step")
        for column in columns:
            points = [(int(row["step"]), float(row[column])) for row in rows if row[column]]
            if points:
                few = len(points) * 4 < len(rows)
                axes.plot(*zip(*points, strict=True), label=column, linewidth=1, marker="o" if few else None)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
        with writing(self.folder / name):
            figure.savefig(self.folder / name, dpi=120)
        return self.folder / name

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        self._log.close()
        self._events.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            with suppress(OSError):  # a full disk was reported once; closing files would report it again
                self.close()


def read_log(folder: Path | str) -> list[dict[str, str]]:
    """The whole rows of a run's log.csv; a last line that was cut off by a kill is left out."""
    path = Path(folder, LOG)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    rows = list(csv.DictReader(text[: text.rfind("\n") + 1].splitlines()))
    if any(None in row or None in row.values() or not row.get("step", "").isdigit() for row in rows):
        raise UserError(f"{path} is not the log of a run")
    return rows


class _Events:
    """TensorBoard events, one a step. Written here and not by a SummaryWriter: that one's import takes seconds, and
    its thread reports a full disk where nobody catches it."""

    def __init__(self, folder: Path, after_step: int) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        folder.mkdir(parents=True, exist_ok=True)
        now = time.time()
        self._file = (folder / f"events.out.tfevents.{int(now):010d}.{os.getpid()}.{after_step}").open("wb")
        self._records = RecordWriter(self._file)
        self._write(wall_time=now, file_version="brain.Event:2")
        if after_step:
            # TensorBoard drops what earlier files of this run logged from this step on.
            session = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._write(wall_time=now, step=after_step + 1, session_log=session)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        finite = [(name, value) for name, value in values.items() if math.isfinite(value)]
        summary = self._summary(value=[self._summary.Value(tag=name, simple_value=value) for name, value in finite])
        self._write(wall_time=time.time(), step=step, summary=summary)

    def _write(self, **fields: Any) -> None:
        self._records.write(self._event(**fields).SerializeToString())
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _replace_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)

"""A process that works through the units of one part, and writes down each result as soon as it is there.

`python -m pykern.testing.gpu.child MODULE:FUNCTION JOURNAL CONFIG`: the function yields the units, each a name and what
to call for its result: a dict whose "ok" is True, False, or None where something is not there ("reason" says what).
Whatever ends the process early, a crash included, loses the unit in progress and no other.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Unit = tuple[str, Callable[[], dict[str, Any]]]

BROKEN_DEVICE = 75  # exit code: after an illegal access no later launch of the process works


@dataclass(frozen=True)
class Config:
    """What a run is about; the same for all of its parts but for the deadline."""

    device: str = "cuda"
    dry: bool = False  # a rehearsal on the CPU: tiny inputs, and stand-ins for tools that are not there
    ops: tuple[str, ...] = ()  # all by default
    seed: int = 0
    peers: str | None = None  # a folder of wheels
    scratch: str = "."
    deadline: float = float("inf")  # by time.time(); no unit is begun after it

    @property
    def remaining(self) -> float:
        return self.deadline - time.time()


class Journal:
    """Lines of JSON: {"begin": unit}, {"unit": unit, "result": …}, {"left": unit}, and {"end": true} at the last."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, **entry: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def read(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        lines = self.path.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]  # a killed process may leave half a line


def work(units: Iterator[Unit], journal: Journal, config: Config) -> int:
    done = {entry["unit"] for entry in journal.read() if "unit" in entry}
    for name, run in units:
        if name in done:
            continue
        if config.remaining <= 0:
            journal.write(left=name)
            continue
        journal.write(begin=name)
        start = time.perf_counter()
        try:
            result = run()
        except Exception as error:
            text = traceback.format_exception_only(error)[-1].strip()
            result = {"ok": False, "error": text[:2000], "traceback": traceback.format_exc()[-4000:]}
        result["seconds"] = round(time.perf_counter() - start, 3)
        journal.write(unit=name, result=result)
        if result["ok"] is False and config.device == "cuda" and _device_is_broken():
            return BROKEN_DEVICE
    journal.write(end=True)
    return 0


def _device_is_broken() -> bool:
    import torch

    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def main() -> int:
    function, journal, config = sys.argv[1:]
    module, _, name = function.partition(":")
    values = json.loads(config)
    config = Config(**{**values, "ops": tuple(values["ops"])})
    return work(getattr(importlib.import_module(module), name)(config), Journal(Path(journal)), config)


if __name__ == "__main__":
    sys.exit(main())

"""Problems to train on with rewards, and others, never trained on, to test with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pykern.train.errors import UserError, first_line

ADDITION = "addition"
BUCKETS = 10


@dataclass(frozen=True)
class Problem:
    prompt: str
    answer: str


@dataclass(frozen=True)
class Task:
    train: list[Problem]
    test: list[Problem]


def bucket(text: str) -> int:
    """0 to 9, by a hash of the whole problem: a hold-out by its last digits, say, shares every carry with the rest."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % BUCKETS


def additions(buckets: range) -> Iterator[Problem]:
    """The sums of two two-digit numbers whose hash falls into `buckets`: "37+85=" and "122".

    37+85 and 85+37 are one problem to the hash, so neither gives the other away.
    """
    for a in range(10, 100):
        for b in range(10, 100):
            if bucket(f"{min(a, b)}+{max(a, b)}") in buckets:
                yield Problem(f"{a}+{b}=", str(a + b))


# A tenth of the sums tests; three tenths are for rewards; the demo writes the rest into its pretraining text.
TEST_BUCKETS, REWARD_BUCKETS, TEXT_BUCKETS = range(1), range(1, 4), range(4, BUCKETS)


def load_task(name: str) -> Task:
    """ "addition", or a file of JSON lines {"prompt": …, "answer": …}, a tenth of which is held out by a hash."""
    if name == ADDITION:
        return Task(list(additions(REWARD_BUCKETS)), list(additions(TEST_BUCKETS)))
    path = Path(name)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the task {name!r} is neither {ADDITION!r} nor a readable file: {first_line(error)}") from None
    problems = list(dict.fromkeys(_problem(line, f"{name}:{n}") for n, line in enumerate(lines, 1) if line.strip()))
    held_out = [bucket(problem.prompt) in TEST_BUCKETS for problem in problems]
    task = Task(
        [problem for problem, held in zip(problems, held_out, strict=True) if not held],
        [problem for problem, held in zip(problems, held_out, strict=True) if held],
    )
    if not task.train or not task.test:
        raise UserError(f"{name} has {len(problems)} problems: too few to train on some and test with others")
    return task


def _problem(line: str, where: str) -> Problem:
    try:
        data = json.loads(line)
        prompt, answer = data["prompt"], data["answer"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f'{where} is not JSON with "prompt" and "answer"') from None
    if not isinstance(prompt, str) or not isinstance(answer, str) or not prompt:
        raise UserError(f"{where}: prompt and answer are strings, the prompt not empty")
    return Problem(prompt, answer)

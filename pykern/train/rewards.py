"""Reward functions: what a completion is worth. Any callable (prompt, completion, answer) -> float will do.

The completion is text without its end-of-sequence token; None is for a completion that cannot be judged.
"""

from __future__ import annotations

import re
from collections.abc import Callable

Reward = Callable[[str, str, str], float | None]


def exact_match(prompt: str, completion: str, answer: str) -> float:
    """1 for the answer itself, white space around it aside."""
    return float(completion.strip() == answer.strip())


def number_format(prompt: str, completion: str, answer: str) -> float:
    """1 for any whole number: the form of an answer, right or wrong."""
    return float(re.fullmatch(r"\s*-?\d+\s*", completion) is not None)


def format_and_match(prompt: str, completion: str, answer: str) -> float:
    """0.1 for the form and 1 for the answer, which gives a policy that is never right something to climb."""
    return 0.1 * number_format(prompt, completion, answer) + exact_match(prompt, completion, answer)


REWARDS: dict[str, Reward] = {
    "exact_match": exact_match,
    "number_format": number_format,
    "format_and_match": format_and_match,
}

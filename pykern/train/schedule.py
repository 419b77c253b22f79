"""Learning rates over the course of a run."""

from __future__ import annotations

import math


def warmup_cosine(step: int, *, peak: float, floor: float, warmup_steps: int, decay_steps: int) -> float:
    """Learning rate of update `step` (counted from 1): a linear rise to `peak`, then half a cosine down to `floor`.

    The rise reaches `peak` at update `warmup_steps + 1`, the cosine reaches `floor` at update `decay_steps + 1`, and
    the rate stays there (SGDR without restarts, Loshchilov and Hutter 2017).
    """
    done = step - 1
    if done < warmup_steps:
        return peak * step / (warmup_steps + 1)
    if done >= decay_steps:
        return floor
    progress = (done - warmup_steps) / (decay_steps - warmup_steps)
    return floor + 0.5 * (peak - floor) * (1.0 + math.cos(math.pi * progress))

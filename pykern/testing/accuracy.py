"""The tolerance rule: as close to fp64 as torch itself comes in the same dtype, within a factor."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def check_close(
    name: str, result: Tensor, exact: Tensor, torch_results: Sequence[Tensor], factor: float = 2.0
) -> float:
    """Compares a result with the fp64 reference and with what torch achieves; returns our error over the allowed one.

    The relative error in the 2-norm must be at most `factor` times the smallest among `torch_results` (torch in the
    same dtype, torch in fp32 rounded once), none of which counts as closer than the exact result rounded once; and one
    fp32 epsilon is always allowed, since accumulation is in fp32. The largest elementwise error must be at most
    `factor` times torch's largest plus 4 ulp of max|exact|.

    Raises:
        AssertionError: with both errors, or because NaN and infinity stand elsewhere, or because the comparison could
            not tell the result from zeros.
    """
    if result.shape != exact.shape:
        raise AssertionError(f"{name}: shape {tuple(result.shape)}, expected {tuple(exact.shape)}")
    if not result.is_floating_point():
        if not torch.equal(result, exact.to(result.dtype)):
            wrong = (result != exact).sum().item()
            raise AssertionError(f"{name}: {wrong} of {exact.numel()} integers differ from the reference")
        return 0.0
    dtype = result.dtype
    rounded = exact.to(dtype).double()
    finite = rounded.isfinite()
    # Where either is not finite, both must be alike: the same infinity, or NaN and NaN.
    values = result.double()
    both_nan = values.isnan() & rounded.isnan()
    wrong = ((values != rounded) & ~both_nan & ~(finite & values.isfinite())).sum().item()
    if wrong:
        raise AssertionError(f"{name}: {wrong} values are finite and not in the reference, or the reverse")
    exact = exact[finite].double()
    scale = exact.norm().item()
    ours = result[finite].double() - exact
    if scale == 0.0:
        if ours.any():
            raise AssertionError(f"{name}: expected zeros, the largest is {ours.abs().max().item():.3g}")
        return 0.0
    theirs = [t.to(dtype)[finite].double() - exact for t in torch_results]
    theirs = [t for t in theirs if t.isfinite().all()]
    if not theirs:
        raise AssertionError(f"{name}: torch's own result is not finite where the exact one is; other inputs!")
    floor = (rounded[finite] - exact).norm().item()
    closest = max(min(t.norm().item() for t in theirs), floor)
    allowed = max(factor * closest, torch.finfo(torch.float32).eps * scale)
    if allowed >= 0.5 * scale:
        raise AssertionError(f"{name}: torch's own error is {closest / scale:.3g}, so zeros would pass; other inputs!")
    if ours.norm().item() > allowed:
        raise AssertionError(f"{name}: relative error {ours.norm().item() / scale:.3g}, allowed {allowed / scale:.3g}")
    ulp = math.ldexp(torch.finfo(dtype).eps, math.frexp(exact.abs().max().item())[1] - 1)
    most = factor * min(t.abs().max().item() for t in theirs) + 4 * ulp
    if ours.abs().max().item() > most:
        raise AssertionError(f"{name}: largest error {ours.abs().max().item():.3g}, allowed {most:.3g}")
    return ours.norm().item() / allowed if allowed else 0.0

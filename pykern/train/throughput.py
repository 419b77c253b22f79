"""How fast a device can multiply matrices at best: the denominator of model flops utilisation (MFU)."""

from __future__ import annotations

import time

import torch

# Dense rates from the makers' data sheets, in Tflop/s: (fp32 without tf32, bf16). Looked up by a part of the name that
# the driver reports; the longest match counts, because "H100 PCIe" is not "H100".
_GPU_TFLOPS = {
    "A10": (31.2, 125.0),
    "A10G": (35.0, 70.0),
    "A100": (19.5, 312.0),
    "A40": (37.4, 149.7),
    "B200": (75.0, 2250.0),
    "GeForce RTX 3090": (35.6, 71.0),
    "GeForce RTX 4090": (82.6, 165.2),
    "H100": (66.9, 989.4),
    "H100 PCIe": (51.2, 756.0),
    "H20": (44.0, 148.0),
    "H200": (66.9, 989.4),
    "L4": (30.3, 121.0),
    "L40S": (91.6, 362.0),
    "V100": (15.7, None),
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Flop/s of matrix products in `dtype` (float32 or bfloat16); None for a device that is not known.

    A GPU's rate is its data sheet's. A CPU's is measured, with the threads that torch uses now, in a fraction of a
    second: no table holds the rate of the cores that a container was given.
    """
    if device.type == "cpu":
        return _measure(dtype)
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    words = name.replace("-", " ").split()
    known = [key for key in _GPU_TFLOPS if _contains(words, key.split())]
    if not known:
        return None
    rate = _GPU_TFLOPS[max(known, key=len)][0 if dtype == torch.float32 else 1]
    return None if rate is None else rate * 1e12


def _contains(words: list[str], key: list[str]) -> bool:
    return any(words[i : i + len(key)] == key for i in range(len(words)))


def _measure(dtype: torch.dtype, size: int = 768, repeats: int = 8) -> float:
    a, b = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    out = torch.empty(size, size, dtype=dtype)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best

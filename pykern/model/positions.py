"""Sinusoidal and rotary positions, computed where they are used.

Neither is kept as a buffer: `model.to(torch.bfloat16)` would round the angles, and a checkpoint would carry constants.
"""

import torch
from torch import Tensor


def _angles(positions: Tensor, count: int, base: float) -> Tensor:
    """(…) positions and `count` frequencies falling geometrically from 1 towards 1 / base: (…, count), fp32."""
    exponents = torch.arange(count, device=positions.device, dtype=torch.float32) / count
    return positions[..., None].float() * base**-exponents


def sinusoidal(positions: Tensor, width: int) -> Tensor:
    """(…) positions -> (…, width) fp32: sines, then cosines (Attention Is All You Need, section 3.5)."""
    angles = _angles(positions, width // 2, 10000.0)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def rotation(positions: Tensor, head_width: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine, each (…, head_width / 2) fp32, by which `rotate` turns queries and keys."""
    angles = _angles(positions, head_width // 2, base)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary positions (RoFormer, arXiv 2104.09864) on x (…, H, E), feature i paired with i + E/2 as in Llama."""
    cosine, sine = cosine[..., None, :], sine[..., None, :]  # (…, 1, E/2)
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1).to(x.dtype)

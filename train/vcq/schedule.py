"""Codebook size of each position (arXiv:2605.06207, equation 3), and the bits per pixel of a schedule.

Rounding: docs/vcq.md, choices D1-D4. The position at which information runs out: `pipeline.analysis.estimates`.
"""

import math

import torch
from torch import Tensor

KINDS = ("constant", "linear", "cosine", "power")


def codebook_sizes(kind: str, length: int = 256, k_min: int = 2, k_max: int = 16384, power: float = 2.5) -> Tensor:
    """(length,) int64 codebook sizes K_t = round(k_min + (k_max - k_min) f(t / (length - 1))), equation 3.

    f is 1 (constant), u (linear), 1 - cos(pi u / 2) (cosine) or u^power (power); halves round up.
    Raises ValueError for an unknown kind or sizes out of order.
    """
    if kind not in KINDS:
        raise ValueError(f"schedule {kind!r} is unknown; known: {', '.join(KINDS)}")
    if not 1 <= k_min <= k_max:
        raise ValueError(f"codebook sizes need 1 <= k_min <= k_max, not k_min {k_min}, k_max {k_max}")
    if length < 1 or power <= 0:
        raise ValueError(f"a schedule needs length >= 1 and power > 0, not length {length}, power {power}")
    u_L = torch.arange(length, dtype=torch.float64, device="cpu") / max(length - 1, 1)
    growth_L = {
        "constant": torch.ones_like(u_L),
        "linear": u_L,
        "cosine": 1 - torch.cos(math.pi / 2 * u_L),
        "power": u_L**power,
    }[kind]
    return torch.floor(k_min + (k_max - k_min) * growth_L + 0.5).long()


def bits_per_pixel(sizes_L: Tensor, pixels: int = 256 * 256) -> float:
    """Bits of one token sequence, the sum of log2 K_t, divided by the pixels of its image (table 2, column BPP)."""
    return float(sizes_L.double().log2().sum()) / pixels

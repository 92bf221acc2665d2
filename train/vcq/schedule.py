"""Codebook size of each position, and derived numbers: bits per pixel, capacity, the entropy cliff t*.

Paper: arXiv:2605.06207, equations 1-3. Rounding and t*: see docs/vcq.md, choices D1-D4.
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


def bits_per_position(sizes_L: Tensor) -> Tensor:
    """(L,) float64: log2 K_t, the most that position t can carry."""
    return torch.as_tensor(sizes_L).double().log2()


def bits_per_pixel(sizes_L: Tensor, pixels: int = 256 * 256) -> float:
    """Bits of one token sequence divided by the pixels of its image (table 2, column BPP)."""
    return float(bits_per_position(sizes_L).sum()) / pixels


def capacity(sizes_L: Tensor) -> Tensor:
    """(L + 1,) float64 bits: I(t) = sum of log2 K_i over i < t, for t = 0..L (equation 2)."""
    return torch.cat([torch.zeros(1, dtype=torch.float64), bits_per_position(sizes_L).cumsum(0)])


def cliff(samples: int, sizes_L: Tensor) -> int | None:
    """t*: the smallest t with I(t) >= log2(samples) (equation 2); None when the sequence never gets there."""
    reached = torch.nonzero(capacity(sizes_L) >= math.log2(samples))
    return int(reached[0]) if len(reached) else None


def cliff_uniform(samples: int, k: int) -> int:
    """t* = ceil(log2 N / log2 K) of a codebook of one size `k` >= 2 (equation 1)."""
    return math.ceil(math.log2(samples) / math.log2(k))

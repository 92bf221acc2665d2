"""Classifier-free guidance whose strength follows the codebook size (arXiv:2605.06207, equation 4) or the position."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

MODES = ("ramp_ratio", "ramp", "ratio", "ratio_power", "constant")


@dataclass(frozen=True)
class Guidance:
    """Strength of guidance by position; scale is the paper's s, 0 = none (others write g = 1 + s).

    ramp_ratio: r_t (start + (scale - start) ramp_t), the default reading of table 7 (choice O14). ramp: without r_t,
    vanilla cosine guidance. ratio: scale r_t, equation 4 alone. ratio_power: scale r_t^power. constant: plain guidance.
    """

    scale: float = 0.0
    power: float = 1.0
    start: float = 0.0
    mode: str = "ramp_ratio"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"guidance mode {self.mode!r} is unknown; known: {', '.join(MODES)}")


def size_ratio(sizes: tuple[int, ...]) -> Tensor:
    """(L,) float64 r_t = (log2 K_t - log2 K_min) / (log2 K_max - log2 K_min); 1 for a single size (choice O15)."""
    bits_L = torch.tensor(sizes, dtype=torch.float64).log2()
    span = bits_L.max() - bits_L.min()
    return torch.ones_like(bits_L) if span == 0 else (bits_L - bits_L.min()) / span


def cosine_ramp(length: int, power: float) -> Tensor:
    """(L,) float64 (1 - cos(pi (t / L)^power)) / 2 for t = 0..L-1, as RAR and AliTok count it."""
    u_L = (torch.arange(length, dtype=torch.float64) / length) ** power
    return (1 - torch.cos(math.pi * u_L)) / 2


def scales(guidance: Guidance, sizes: tuple[int, ...]) -> Tensor:
    """(L,) float64 s_t, to be used as (1 + s_t) conditional - s_t unconditional."""
    ratio_L = size_ratio(sizes)
    ramp_L = guidance.start + (guidance.scale - guidance.start) * cosine_ramp(len(sizes), guidance.power)
    return {
        "ramp_ratio": ratio_L * ramp_L,
        "ramp": ramp_L,
        "ratio": guidance.scale * ratio_L,
        "ratio_power": guidance.scale * ratio_L**guidance.power,
        "constant": torch.full_like(ratio_L, guidance.scale),
    }[guidance.mode]


def combine(conditional_BV: Tensor, unconditional_BV: Tensor, scale: float) -> Tensor:
    """(1 + s) conditional - s unconditional, exactly the conditional at s = 0.

    Mask forbidden codes after this, never before: inf - inf is NaN.
    """
    return conditional_BV + scale * (conditional_BV - unconditional_BV)

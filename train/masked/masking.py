"""Masking: which cells are hidden (replaced by the mask id), and which of these the encoder does not receive."""

import math

import torch
from torch import Tensor

from semdict.train.engine.rng import rand_rows


def draw_ratio(
    rng: torch.Generator,
    mode: float = 0.55,
    std: float = 0.25,
    low: float = 0.5,
    high: float = 1.0,
    rows: int | None = None,
) -> float | Tensor:
    """Mask ratio from normal(mode, std) truncated to [low, high]: one float, or (rows,) float64, one per sample.

    Inverse of the cumulative distribution at a uniform number. One ratio per batch is the same for equal generators;
    ratios per sample follow the rows of a `engine.rng.BatchGenerator`. MAGE, arXiv:2211.09117, section 3.1.
    """
    if not low <= high or std <= 0:
        raise ValueError(f"mask ratio needs low <= high and std > 0, got low {low}, high {high}, std {std}")
    if rows is None:
        uniform = torch.rand(1, generator=rng, device=rng.device, dtype=torch.float64)
    else:
        uniform = rand_rows(rows, rng=rng).double()
    below, above = (torch.special.ndtr(uniform.new_tensor((edge - mode) / std)) for edge in (low, high))
    ratio = (mode + std * torch.special.ndtri(below + uniform * (above - below))).clamp(low, high)
    return ratio.item() if rows is None else ratio


def hidden_count(ratio: float, length: int) -> int:
    """Number of masked positions, ceil(ratio * length), at least the dropped half and at most all."""
    return min(length, max(length // 2, math.ceil(ratio * length)))


def draw_masks(batch: int, length: int, ratio: float | Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """keep_idx (B, L - L/2) int64 ascending, masked (B, L) bool, dropped (B, L) bool, on the generator's device.

    One random order per sample: its first half is dropped (the encoder never sees it), its first ceil(ratio L) masked,
    so every dropped position is masked and the encoder keeps some masked ones. `ratio` is one number for the batch or
    (B,) one per sample, in [0.5, 1]. With a `engine.rng.BatchGenerator` the order belongs to the row of the global
    batch, so that any number of processes hides the same cells.
    """
    check_ratio(ratio)
    order_BL = rand_rows(batch, length, rng=rng).argsort(dim=1)
    rank_BL = torch.empty_like(order_BL).scatter_(
        1, order_BL, torch.arange(length, device=rng.device).expand(batch, -1)
    )
    half = length // 2
    if isinstance(ratio, Tensor):
        count = (ratio.to(rng.device) * length).ceil().clamp(half, length)[:, None]
    else:
        count = hidden_count(ratio, length)
    keep_idx = order_BL[:, half:].sort(dim=1).values
    return keep_idx, rank_BL < count, rank_BL < half


def check_ratio(ratio: float | Tensor) -> None:
    """Refuse a ratio that would drop cells that are not masked."""
    low, high = (float(ratio.min()), float(ratio.max())) if isinstance(ratio, Tensor) else (ratio, ratio)
    if not 0.5 <= low <= high <= 1.0:
        raise ValueError(f"mask ratio must lie in [0.5, 1] (half of the cells are dropped), got {low} to {high}")

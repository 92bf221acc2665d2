"""Masking: which cells are hidden (replaced by the mask id), and which of these the encoder does not receive."""

import torch
from torch import Tensor

from semdict.train.engine.rng import rand_groups, rand_rows


def draw_ratios(
    rows: int,
    rng: torch.Generator,
    mode: float = 0.55,
    std: float = 0.25,
    low: float = 0.5,
    high: float = 1.0,
    group: int = 64,
) -> Tensor:
    """(rows,) float64 mask ratios from normal(mode, std) truncated to [low, high]; every `group` rows share one.

    Inverse of the cumulative distribution at a uniform number. The published trainings draw one ratio per process,
    which has 64 rows: groups of 64 of the global batch repeat that on any number of processes. group = 1: one per
    sample. MAGE, arXiv:2211.09117, section 3.1.
    """
    if not low <= high or std <= 0:
        raise ValueError(f"mask ratio needs low <= high and std > 0, got low {low}, high {high}, std {std}")
    uniform_B = rand_groups(rows, group, rng)
    below, above = (torch.special.ndtr(uniform_B.new_tensor((edge - mode) / std)) for edge in (low, high))
    return (mode + std * torch.special.ndtri(below + uniform_B * (above - below))).clamp(low, high)


def hidden_counts(ratio_B: Tensor, length: int) -> Tensor:
    """(B,) masked positions, ceil(ratio * length), at least the dropped half and at most all."""
    return (ratio_B * length).ceil().clamp(length // 2, length)


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
    ratio_B = (
        ratio.to(rng.device) if isinstance(ratio, Tensor) else rank_BL.new_full((batch,), ratio, dtype=torch.float64)
    )
    count_B1 = hidden_counts(ratio_B, length)[:, None]
    keep_idx = order_BL[:, half:].sort(dim=1).values
    return keep_idx, rank_BL < count_B1, rank_BL < half


def check_ratio(ratio: float | Tensor) -> None:
    """Refuse a ratio that would drop cells that are not masked."""
    low, high = (float(ratio.min()), float(ratio.max())) if isinstance(ratio, Tensor) else (ratio, ratio)
    if not 0.5 <= low <= high <= 1.0:
        raise ValueError(f"mask ratio must lie in [0.5, 1] (half of the cells are dropped), got {low} to {high}")


def row_shares(selected_BL: Tensor) -> Tensor:
    """(N,) float32 weight of each selected cell in a mean over rows of the means over a row's cells.

    The rows of a group have equal counts, so this is also the mean over groups of the means over a group's cells: what
    the published trainings compute, one group a process. Unlike the mean over all cells it does not depend on how the
    batch is split. A row without selected cells counts as 0.
    """
    share_B1 = 1 / (len(selected_BL) * selected_BL.sum(dim=1, keepdim=True).clamp_min(1)).float()
    return share_B1.expand(selected_BL.shape)[selected_BL]

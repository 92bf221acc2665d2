"""Averaged copies of parts of a model: moved by the training loop after a step, never by a forward pass."""

import copy
import math
from collections.abc import Iterable

import torch
from torch import nn

from semdict.train.engine.layers import init_weights


def beta(epoch: float, epochs: float, start: float = 0.996) -> float:
    """Share of itself that the average keeps: 1 - (1 - start)(1 + cos(pi epoch / epochs)) / 2, from `start` up to 1.

    BYOL, arXiv:2006.07733; the published Sorcen fixes epochs = 1600 whatever the run's length.
    """
    return 1 - (1 - start) * (1 + math.cos(math.pi * epoch / epochs)) / 2


class Ema(nn.Module):
    """Copies of the named parts of `model` (attribute names), moved by `update`; they take no gradient.

    Starts as a copy of the parts as they are now; with `seed` from its own random initialisation instead (as the
    published Sorcen does). Buffers, such as BatchNorm's running statistics, are the copy's own and never averaged.
    """

    def __init__(self, model: nn.Module, parts: Iterable[str], seed: int | None = None) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({name: copy.deepcopy(getattr(model, name)) for name in parts})
        if seed is not None:
            init_weights(self.parts, torch.Generator().manual_seed(seed))
        self.requires_grad_(False)

    def __getitem__(self, part: str) -> nn.Module:
        return self.parts[part]

    @torch.no_grad()
    def update(self, model: nn.Module, beta: float) -> None:
        """Every averaged parameter becomes beta * itself + (1 - beta) * the model's."""
        for name, part in self.parts.items():
            for mine, theirs in zip(part.parameters(), getattr(model, name).parameters(), strict=True):
                mine.lerp_(theirs.to(mine.dtype), 1 - beta)

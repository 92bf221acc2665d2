"""Exponential moving averages of parts of a model, updated by hooks of the loop, not by forward passes."""

import copy
import math
from collections.abc import Iterable

import torch
from torch import nn

from semdict.train.engine.layers import init_weights


def beta(epoch: float, epochs: float, start: float = 0.996) -> float:
    """Share of the old average in the new one: 1 - (1 - start)(1 + cos(pi epoch / epochs)) / 2, from `start` up to 1.

    BYOL, arXiv:2006.07733; the published Sorcen fixes epochs = 1600 whatever the run's length.
    """
    return 1 - (1 - start) * (1 + math.cos(math.pi * epoch / epochs)) / 2


class Ema(nn.Module):
    """Averages of the named parts of `model` (attribute names); they take no gradient.

    They start as copies of the parts, or with `seed` from a random initialisation of their own, as the published Sorcen
    does. Buffers, such as BatchNorm's running statistics, are not averaged.
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
            for average, current in zip(part.parameters(), getattr(model, name).parameters(), strict=True):
                average.lerp_(current.to(average.dtype), 1 - beta)

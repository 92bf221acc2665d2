"""An online classifier on detached latents: the encoder's accuracy as a curve, without influence on the training."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semdict.train.engine.layers import init_weights
from semdict.train.engine.loop import START, Batch, Clock

if TYPE_CHECKING:
    from semdict.train.masked.objectives.mage import Mage

HIDDEN = 512  # as released: width -> 512 -> classes


class WithClassifier(nn.Module):
    """An objective with a classifier width -> 512 -> classes on the mean of the encoder's kept latents (without CLS).

    The latents are taken from a hook on the encoder's final norm (`model.norm`) and detached, so no gradient reaches
    the encoder; the classifier's cross-entropy is added to the loss that is differentiated, and reported separately.
    Images without a label (-1) do not count.
    """

    def __init__(self, objective: "Mage", model: nn.Module, width: int, classes: int, seed: int) -> None:
        super().__init__()
        self.objective = objective
        self.classifier = nn.Sequential(nn.Linear(width, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, classes))
        init_weights(self.classifier, torch.Generator().manual_seed(seed))
        self._latents: list[Tensor] = []
        model.norm.register_forward_hook(self._remember)

    def _remember(self, _norm: nn.Module, _inputs: tuple, latents_BNE: Tensor) -> None:
        if latents_BNE.requires_grad:  # the student's pass; a teacher's has no gradient
            self._latents.append(latents_BNE.detach())

    def forward(
        self, model: nn.Module, batch: Batch, rng: torch.Generator, clock: Clock = START
    ) -> tuple[Tensor, dict[str, Tensor]]:
        self._latents.clear()
        loss, scalars = self.objective(model, batch, rng, clock)
        logits_BC = self.classifier(self._latents[0][:, 1:].float().mean(dim=1))
        self._latents.clear()
        label_B, known_B = batch["label"], batch["label"] >= 0
        count = known_B.sum().clamp_min(1)
        nats = F.cross_entropy(logits_BC, label_B, ignore_index=-1, reduction="sum") / count
        right = ((logits_BC.argmax(dim=1) == label_B) & known_B).sum() / count
        online = {"loss": loss.detach(), "online_loss": nats.detach(), "online_accuracy": right.detach()}
        return loss + nats, {**scalars, **online}

    def after_step(self, model: nn.Module, clock: Clock, epochs: float) -> None:
        """The objective's own hook."""
        self.objective.after_step(model, clock, epochs)

    def chance(self, codebook_size: int, rows: int) -> dict[str, float]:
        """Losses at chance of the objective."""
        return self.objective.chance(codebook_size, rows)

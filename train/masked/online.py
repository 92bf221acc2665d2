"""An online linear classifier on detached latents: a curve of what the encoder knows, with no influence on it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semdict.train.engine.batch import Batch
from semdict.train.engine.layers import init_weights

HIDDEN = 512  # as released: width -> 512 -> classes


class WithClassifier(nn.Module):
    """An objective, and beside it width -> 512 -> classes on the mean of the encoder's kept latents (CLS left out).

    The latents are caught at the output of the encoder's final norm and detached, so no gradient reaches the encoder;
    the classifier's cross-entropy is added to the loss that is differentiated, but reported on its own.
    Images without a label (-1) do not count. Needs a model with an attribute `norm`.
    """

    def __init__(self, objective: nn.Module, model: nn.Module, width: int, classes: int, seed: int) -> None:
        super().__init__()
        self.objective = objective
        self.classifier = nn.Sequential(nn.Linear(width, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, classes))
        init_weights(self.classifier, torch.Generator().manual_seed(seed))
        self._caught: list[Tensor] = []
        model.norm.register_forward_hook(self._catch)

    def _catch(self, _norm: nn.Module, _inputs: tuple, latents_BNE: Tensor) -> None:
        if latents_BNE.requires_grad:  # the student's pass; a teacher's has no gradient
            self._caught.append(latents_BNE.detach())

    def forward(
        self, model: nn.Module, batch: Batch, rng: torch.Generator, epoch: float = 0.0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        self._caught.clear()
        loss, scalars = self.objective(model, batch, rng, epoch)
        logits_BC = self.classifier(self._caught[0][:, 1:].float().mean(dim=1))
        self._caught.clear()
        label_B, known_B = batch["label"], batch["label"] >= 0
        count = known_B.sum().clamp_min(1)
        nats = F.cross_entropy(logits_BC, label_B, ignore_index=-1, reduction="sum") / count
        right = ((logits_BC.argmax(dim=1) == label_B) & known_B).sum() / count
        online = {"loss": loss.detach(), "online_loss": nats.detach(), "online_accuracy": right.detach()}
        return loss + nats, {**scalars, **online}

    def after_step(self, model: nn.Module, epoch: float, epochs: float) -> None:
        """What the objective itself does after a step."""
        self.objective.after_step(model, epoch, epochs)

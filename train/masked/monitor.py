"""How a pretraining run is watched: an online classifier's accuracy as a curve, and pictures of reconstructions.

Neither changes what the model learns.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semdict.train.engine.layers import init_weights
from semdict.train.engine.logging import RunLog
from semdict.train.engine.loop import START, Batch, Clock, Hook
from semdict.train.engine.rng import Stream, torch_generator
from semdict.train.masked.masking import draw_masks

if TYPE_CHECKING:
    from semdict.train.masked.objectives.mage import Mage

HIDDEN = 512  # as released: width -> 512 -> classes
RATIO = 0.75  # of the cells are hidden in a picture


class WithClassifier(nn.Module):
    """An objective with a classifier width -> 512 -> classes on the mean of the encoder's kept latents.

    As released: ReLU between the layers, and the CLS latent in the mean for Sorcen only.

    The latents are taken from a hook on the encoder's final norm (`model.norm`) and detached, so no gradient reaches
    the encoder; the classifier's cross-entropy is added to the loss that is differentiated, and reported separately.
    Images without a label (-1) do not count.
    """

    def __init__(self, objective: "Mage", model: nn.Module, width: int, classes: int, seed: int) -> None:
        super().__init__()
        self.objective = objective
        self.classifier = nn.Sequential(nn.Linear(width, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, classes))
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
        first = 0 if self.objective.online_pools_cls else 1
        logits_BC = self.classifier(self._latents[0][:, first:].float().mean(dim=1))
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


class Pictures:
    """The same images with the same hidden cells every time, so that a run's pictures can be compared.

    tokens_BL: (B, L) int64 to reconstruct. vqgan: a module with decode((B, L)) -> (B, 3, H, W) in [0, 1]. folder: gets
    step-00000123.png.
    """

    def __init__(self, vqgan: nn.Module, tokens_BL: Tensor, seed: int, folder: Path) -> None:
        self.folder = folder
        rng = torch_generator(seed, Stream.PICTURE_MASKS)
        self.vqgan, self.tokens_BL = vqgan, tokens_BL
        self.masked_BL = draw_masks(*tokens_BL.shape, RATIO, rng)[1].to(tokens_BL.device)
        self.whole = self._pixels(tokens_BL)

    def hook(self, model: nn.Module, every: int) -> Hook:
        """A hook of the loop that saves the grid after every `every` steps, and shows it in TensorBoard."""

        def save_picture(clock: Clock, log: RunLog | None) -> None:
            if (clock.step + 1) % every == 0:
                image_HW3 = self.save(model, self.folder / f"step-{clock.step + 1:08d}.png")
                if log is not None:
                    log.picture(clock.step + 1, "reconstruction", image_HW3)

        return save_picture

    @torch.no_grad()
    def save(self, model: nn.Module, path: Path) -> np.ndarray:
        """Write the grid as PNG: decoded tokens, hidden cells grey, most likely codes in the hidden cells.

        Returns the grid without labels, (H, W, 3) uint8.
        """
        from semdict.pipeline.images.visualize import save_grid

        training = model.training
        model.eval()
        logits_BLK = model.logits(self.tokens_BL.masked_fill(self.masked_BL, model.mask_token))
        model.train(training)
        filled = self._pixels(torch.where(self.masked_BL, logits_BLK.argmax(dim=-1), self.tokens_BL))
        rows = [self.whole, self._hidden(), filled]
        path.parent.mkdir(parents=True, exist_ok=True)
        save_grid(path, rows, ["tokens", f"{RATIO:.0%} hidden", "filled in"], columns=len(self.tokens_BL))
        return np.concatenate([np.concatenate(list(images), axis=1) for images in rows], axis=0)

    def _pixels(self, tokens_BL: Tensor) -> np.ndarray:
        from semdict.pipeline.images.visualize import to_uint8

        with torch.no_grad():
            return to_uint8(self.vqgan.decode(tokens_BL))

    def _hidden(self) -> np.ndarray:
        """The decoded images with hidden cells painted grey."""
        B, H, W, _ = self.whole.shape
        side = int(self.masked_BL.shape[1] ** 0.5)
        cells = self.masked_BL.reshape(B, side, side).cpu().numpy()
        hidden = cells.repeat(H // side, axis=1).repeat(W // side, axis=2)
        return np.where(hidden[..., None], np.uint8(128), self.whole)

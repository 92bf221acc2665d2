"""Losses of the tokenizer and its discriminator: the paper's four terms and weights, each logged by name.

L = 1.0 L1 + 1.0 perceptual + 0.1 adversarial + VQ (codebook and commitment, weighted in the quantizer): appendix A of
arXiv:2605.06207. Images (B, 3, H, W): targets in [0, 1], reconstructions nominally so.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from semdict.train.engine.lr_schedule import ramp
from semdict.train.vcq.discriminator import LeCam, diff_augment, frozen, hinge_discriminator, hinge_generator
from semdict.train.vcq.perceptual import PerceptualLoss
from semdict.train.vcq.tokenizer import Reconstruction


@dataclass(frozen=True)
class LossWeights:
    """Weights of the terms, and when the adversarial part begins (choice O4)."""

    l1: float = 1.0
    perceptual: float = 1.0
    adversarial: float = 0.1
    discriminator: float = 1.0
    augment: float = 1.0  # probability of DiffAug before the discriminator
    start: int = 20_000  # step at which the discriminator begins
    ramp: int = 2_000  # steps over which the generator's adversarial term grows to full weight
    lecam: float = 0.0  # of the discriminator's regulariser (choice O7)


class TokenizerObjective:
    """Both losses of one training step; holds no parameters of the tokenizer and changes none.

    perceptual: the loss to use, or None only when its weight is 0. warm_perceptual replaces it before step
    `warm_steps`: logits alone give no signal at the start (AliTok keeps VGG-LPIPS for its first 50k steps).
    """

    def __init__(
        self,
        weights: LossWeights,
        perceptual: PerceptualLoss | None,
        warm_perceptual: PerceptualLoss | None = None,
        warm_steps: int = 0,
    ) -> None:
        if weights.perceptual and perceptual is None:
            raise ValueError(
                f"the perceptual weight is {weights.perceptual}, but there is no perceptual loss; set it to 0"
            )
        if warm_steps and warm_perceptual is None:
            raise ValueError(f"warm_steps is {warm_steps}, but there is no perceptual loss to warm up with")
        self.weights, self.perceptual = weights, perceptual
        self.warm_perceptual, self.warm_steps = warm_perceptual, warm_steps
        self.lecam = LeCam()

    def perceptual_at(self, step: int) -> PerceptualLoss | None:
        """The perceptual loss used at a step; None where its weight is 0."""
        if not self.weights.perceptual:
            return None
        return self.warm_perceptual if step < self.warm_steps else self.perceptual

    def generator(
        self, out: Reconstruction, images: Tensor, discriminator: nn.Module | None, step: int, rng: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, terms before their weights) of the tokenizer; the discriminator's parameters get no gradient."""
        weights = self.weights
        terms = {"l1": (out.images.float() - images).abs().mean(), "vq": out.vq_loss}
        loss = weights.l1 * terms["l1"] + terms["vq"]
        perceptual = self.perceptual_at(step)
        if perceptual is not None:
            terms["perceptual"] = perceptual(out.images, images)
            loss = loss + weights.perceptual * terms["perceptual"]
        strength = weights.adversarial * ramp(step, weights.start, weights.ramp)
        if discriminator is not None and strength > 0:
            with frozen(discriminator):
                fake = discriminator(diff_augment(out.images * 2 - 1, rng, weights.augment))
            terms["adversarial"] = hinge_generator(fake)
            loss = loss + strength * terms["adversarial"]
        return loss, terms

    def discriminator(
        self, fakes: Tensor, images: Tensor, discriminator: nn.Module, step: int, rng: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]] | None:
        """(loss, terms) of the discriminator from the reconstructions of the same step; None before it starts."""
        if step < self.weights.start or not self.weights.adversarial:
            return None
        p = self.weights.augment
        real = discriminator(diff_augment(images * 2 - 1, rng, p))
        fake = discriminator(diff_augment(fakes.detach() * 2 - 1, rng, p))
        loss = hinge_discriminator(real, fake)
        terms = {"discriminator": loss, "real": real.float().mean(), "fake": fake.float().mean()}
        loss = self.weights.discriminator * loss
        if self.weights.lecam:
            terms["lecam"] = self.lecam(real, fake)
            loss = loss + self.weights.lecam * terms["lecam"]
        return loss, terms

    def describe(self) -> dict[str, str | float]:
        """For logs and the run's identity: the perceptual loss and its weights file, and the weight of every term."""
        names = {"perceptual": self.perceptual.name if self.weights.perceptual else "off (weight 0)"}
        if self.warm_steps:
            names["warm_perceptual"] = f"{self.warm_perceptual.name} until step {self.warm_steps}"
        return names | {f"weight_{key}": value for key, value in vars(self.weights).items()}

"""The three pretraining objectives over one model, with one signature.

`objective(model, batch, rng, epoch)` -> (loss, scalars): batch = {"gen": (B, L) integers, "disc": (B, L) integers or
None}, rng a torch.Generator that draws masks and echoes, epoch the (fractional) epoch; scalars are detached 0-d
tensors by name. With a `engine.rng.BatchGenerator` every draw belongs to its row of the global batch. After an
optimiser step the loop calls `objective.after_step(model, epoch, epochs)`, which moves what is averaged.
Objectives are modules: their state belongs in checkpoints, and where they have parameters that require a gradient
(only `as_released`) the optimiser takes those too. Shapes: B batch, L cells, M kept, E encoder width, F decoder width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from semdict.pipeline.common.errors import UsageError
from semdict.train.engine.ema import Ema, beta
from semdict.train.masked.echo import draw_square, echo_tokens, sample_codes
from semdict.train.masked.losses import (
    Gather,
    dictionary_loss,
    info_nce,
    local,
    masked_dictionary,
    neighbour_table,
    reconstruction_loss,
    uniformity,
)
from semdict.train.masked.masking import draw_masks, draw_ratio
from semdict.train.masked.model import MaskedTokenTransformer

Batch = dict[str, Tensor | None]
Scalars = dict[str, Tensor]


@dataclass(frozen=True)
class Masking:
    """Mask ratio: normal(mode, std) truncated to [low, high]; one draw per batch, as published, or one per sample."""

    mode: float = 0.55
    std: float = 0.25
    low: float = 0.5
    high: float = 1.0
    per_sample: bool = False


@dataclass
class Pass:
    """One masked pass."""

    tokens: Tensor  # (B, L) int64
    masked: Tensor  # (B, L) bool
    keep_idx: Tensor  # (B, M) int64
    latents: Tensor  # (B, 1 + M, E)
    features: Tensor  # (B, 1 + L, F)


class Mage(nn.Module):
    """Reconstruction only, L = L_R. MAGE, arXiv:2211.09117, without its optional contrast."""

    def __init__(self, masking: Masking | None = None, smoothing: float = 0.1) -> None:
        super().__init__()
        self.masking, self.smoothing = masking or Masking(), smoothing

    def forward(
        self, model: MaskedTokenTransformer, batch: Batch, rng: torch.Generator, epoch: float = 0.0
    ) -> tuple[Tensor, Scalars]:
        loss = self.reconstruction(model, self.masked_pass(model, batch, rng))
        return loss, {"loss": loss.detach(), "reconstruction": loss.detach()}

    def after_step(self, model: MaskedTokenTransformer, epoch: float, epochs: float) -> None:
        """Called by the loop after every optimiser step; nothing to move here."""

    def masked_pass(self, model: MaskedTokenTransformer, batch: Batch, rng: torch.Generator) -> Pass:
        """Draw masks, encode the kept cells, decode the whole grid; the batch itself is not changed."""
        self.train(model.training)
        tokens_BL = batch["gen"].long()
        B, L = tokens_BL.shape
        m = self.masking
        ratio = draw_ratio(rng, m.mode, m.std, m.low, m.high, B if m.per_sample else None)
        keep_idx, masked_BL, _ = draw_masks(B, L, ratio, rng)
        return self.given_masks(model, tokens_BL, masked_BL.to(tokens_BL.device), keep_idx.to(tokens_BL.device))

    @staticmethod
    def given_masks(model: MaskedTokenTransformer, tokens_BL: Tensor, masked_BL: Tensor, keep_idx: Tensor) -> Pass:
        """The pass under masks that are already drawn."""
        latents_BNE = model.encode(tokens_BL, masked_BL, keep_idx)
        return Pass(tokens_BL, masked_BL, keep_idx, latents_BNE, model.decode(latents_BNE, masked_BL, keep_idx))

    def reconstruction(self, model: MaskedTokenTransformer, p: Pass) -> Tensor:
        """L_R over the masked cells of the batch; the head runs on those only."""
        logits_NK = model.token_logits(p.features[:, 1:][p.masked])
        return reconstruction_loss(logits_NK, p.tokens[p.masked], self.smoothing)


class Lease(Mage):
    """L = L_R + weight * L_C: reconstruction and codebook contrast. LEASE (CVPR 2026), section 3.

    centroids: (K, D) float, normalised here; contrast: which side is held against the dictionary: "encoder" (kept and
    unmasked latents, neighbours as positives; the paper), "decoder" (masked positions, the word alone) or "both".
    neighbours: nearest words besides the word itself; weight: lambda; tau: temperature of the neighbours' weights,
    alpha: of the logits. `as_released` does not change this objective: the published class evaluates the decoder side
    and multiplies it by zero, which contrast="encoder" leaves out.
    """

    def __init__(
        self,
        centroids: Tensor,
        contrast: str = "encoder",
        neighbours: int = 5,
        weight: float = 0.1,
        tau: float = 0.1,
        alpha: float = 0.1,
        masking: Masking | None = None,
        smoothing: float = 0.1,
    ) -> None:
        super().__init__(masking, smoothing)
        if contrast not in ("encoder", "decoder", "both"):
            raise UsageError(f"contrast {contrast!r} is not known; choose encoder, decoder or both")
        if not 0 <= neighbours < len(centroids):
            raise UsageError(f"{neighbours} neighbours do not exist in a dictionary of {len(centroids)} words")
        self.contrast, self.weight, self.alpha = contrast, weight, alpha
        unit_KD = nn.functional.normalize(centroids.detach().float(), dim=1)
        ids, weights = neighbour_table(unit_KD, neighbours + 1, tau)
        # made from the centroids, so not part of a checkpoint's state
        for name, value in (("centroids", unit_KD), ("neighbour_ids", ids), ("neighbour_weights", weights)):
            self.register_buffer(name, value, persistent=False)

    def forward(
        self, model: MaskedTokenTransformer, batch: Batch, rng: torch.Generator, epoch: float = 0.0
    ) -> tuple[Tensor, Scalars]:
        if batch.get("disc") is None:
            raise UsageError("LEASE needs discriminative words, the shards hold none; encode with a k-means dictionary")
        self.check(model)
        return self.losses(model, self.masked_pass(model, batch, rng), batch["disc"].long())

    def check(self, model: MaskedTokenTransformer) -> None:
        """The model must project to the dictionary's width on every side that is used."""
        want = self.centroids.shape[1]
        for side, got in (("encoder", model.config.encoder_words), ("decoder", model.config.decoder_words)):
            if self.contrast in (side, "both") and got != want:
                raise UsageError(f"the model's {side} projects to {got} dimensions, the dictionary has {want}")

    def losses(self, model: MaskedTokenTransformer, p: Pass, words_BL: Tensor) -> tuple[Tensor, Scalars]:
        """Total and parts for one pass."""
        parts = {"reconstruction": self.reconstruction(model, p)}
        if self.contrast in ("encoder", "both"):
            parts["contrast_encoder"] = self.encoder_side(model, p, words_BL)
        if self.contrast in ("decoder", "both"):
            projected = model.dec_to_dino(p.features[:, 1:][p.masked])
            parts["contrast_decoder"] = masked_dictionary(projected, words_BL[p.masked], self.centroids, self.alpha)
        loss = parts["reconstruction"] + self.weight * sum(v for k, v in parts.items() if k.startswith("contrast"))
        return loss, {"loss": loss.detach(), **{name: value.detach() for name, value in parts.items()}}

    def encoder_side(self, model: MaskedTokenTransformer, p: Pass, words_BL: Tensor) -> Tensor:
        """L_C over all visible (kept and unmasked) latents of the batch; 0 where nothing is visible."""
        visible_BM = ~p.masked.gather(1, p.keep_idx)
        projected_ND = model.proj_to_dino(p.latents[:, 1:][visible_BM])
        words_N = words_BL.gather(1, p.keep_idx)[visible_BM]
        return dictionary_loss(
            projected_ND, words_N, self.centroids, self.neighbour_ids, self.neighbour_weights, self.alpha
        )


class Sorcen(Mage):
    """L = L_R + uniform_weight * L_U + weight * L_E: reconstruction, uniformity and echo contrast.

    Sorcen, arXiv:2503.15060. The teacher (`self.teacher`: encoder blocks and projector; token embedding and final norm
    are the student's) sees an echo: codes sampled from the `top` most likely after the most likely one, kept inside a
    random square; in the first `echo_warmup` epochs (40 in the paper) the true codes instead. L_E is InfoNCE at
    `temperature`. Heads run on the rows that `gather` joins from all ranks, so BatchNorm and InfoNCE see the global
    batch; its backward sums what the ranks' losses say of a row, as `engine.dist.gather` does (gradients are averaged
    over ranks afterwards).

    as_released=True repeats the published training where it departs from the paper: the teacher starts from its own
    random initialisation, its projector also takes gradients, it is averaged inside every forward pass (so in
    evaluation too) on a schedule of 1600 epochs whatever the run, and the echo warm-up lasts through epoch 10.
    The default does what the paper says: teacher = copy of the student at the start, no gradient, moved once per
    training step by `after_step`, schedule as long as the run. `teacher` resumes or continues an existing average.
    """

    PARTS = ("blocks", "projector")
    RELEASED_EPOCHS, RELEASED_WARMUP, RELEASED_SEED = 1600, 11, 1

    def __init__(
        self,
        model: MaskedTokenTransformer,
        weight: float = 0.1,
        temperature: float = 0.3,
        top: int = 15,
        echo_warmup: float | None = None,
        uniform_weight: float = 0.01,
        beta_start: float = 0.996,
        as_released: bool = False,
        teacher: Ema | None = None,
        masking: Masking | None = None,
        smoothing: float = 0.1,
        gather: Gather = local,
    ) -> None:
        super().__init__(masking, smoothing)
        if model.projector is None or model.predictor is None:
            raise UsageError("Sorcen needs a model with projector and predictor heads, this one has none")
        self.weight, self.temperature, self.top, self.uniform_weight = weight, temperature, top, uniform_weight
        self.beta_start, self.as_released, self.gather = beta_start, as_released, gather
        self.echo_warmup = (self.RELEASED_WARMUP if as_released else 40) if echo_warmup is None else echo_warmup
        self.teacher = teacher or Ema(model, self.PARTS, seed=self.RELEASED_SEED if as_released else None)
        self.teacher["projector"].requires_grad_(as_released)

    def forward(
        self, model: MaskedTokenTransformer, batch: Batch, rng: torch.Generator, epoch: float = 0.0
    ) -> tuple[Tensor, Scalars]:
        if self.as_released:
            self.teacher.update(model, beta(epoch, self.RELEASED_EPOCHS, self.beta_start))
        p = self.masked_pass(model, batch, rng)
        return self.losses(model, p, self.draw_echo(model, p, rng, epoch))

    def after_step(self, model: MaskedTokenTransformer, epoch: float, epochs: float) -> None:
        """Move the teacher after an optimiser step; `epoch` of `epochs` decides how far."""
        if not self.as_released:
            self.teacher.update(model, beta(epoch, epochs, self.beta_start))

    def draw_echo(self, model: MaskedTokenTransformer, p: Pass, rng: torch.Generator, epoch: float) -> Tensor:
        """(B, L) int64 echo of the batch: true or sampled codes inside a square, the mask id elsewhere.

        Logits are made for the square's cells only, without gradient.
        """
        B, L = p.tokens.shape
        _, cells_BQ = draw_square(B, model.config.grid, rng)
        cells_BQ = cells_BQ.to(p.tokens.device)
        if int(epoch) < self.echo_warmup:
            codes_BQ = p.tokens.gather(1, cells_BQ)
        else:
            with torch.no_grad():
                features_BLF = p.features[:, 1:]
                square_BQF = features_BLF.gather(1, cells_BQ[..., None].expand(-1, -1, features_BLF.shape[-1]))
                codes_BQ = sample_codes(model.token_logits(square_BQF), rng, self.top)
        return echo_tokens(codes_BQ, cells_BQ, L, model.mask_token)

    def losses(self, model: MaskedTokenTransformer, p: Pass, echo_BL: Tensor) -> tuple[Tensor, Scalars]:
        """Total and parts for one pass and one echo."""
        parts = {
            "reconstruction": self.reconstruction(model, p),
            "uniformity": self.uniform_weight * uniformity(p.latents.mean(dim=1), self.gather),
            "echo_contrast": info_nce(
                self.teacher_side(model, echo_BL), self.student_side(model, p.latents), self.temperature
            ),
        }
        loss = parts["reconstruction"] + parts["uniformity"] + self.weight * parts["echo_contrast"]
        return loss, {"loss": loss.detach(), **{name: value.detach() for name, value in parts.items()}}

    def teacher_side(self, model: MaskedTokenTransformer, echo_BL: Tensor) -> Tensor:
        """(B of all ranks, P) teacher projections of the echo, CLS left out of the mean."""
        with torch.no_grad():
            latents_BNE = model.encode(echo_BL, blocks=self.teacher["blocks"])
            pooled_BE = self.gather(latents_BNE[:, 1:].mean(dim=1))
        with torch.set_grad_enabled(self.as_released and torch.is_grad_enabled()):
            return self.teacher["projector"](pooled_BE)

    def student_side(self, model: MaskedTokenTransformer, latents_BNE: Tensor) -> Tensor:
        """(B of all ranks, P) predictions from the student's kept latents, CLS left out of the mean."""
        return model.predictor(model.projector(self.gather(latents_BNE[:, 1:].mean(dim=1))))

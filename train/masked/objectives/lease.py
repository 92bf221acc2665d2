"""LEASE: reconstruction and codebook contrast (CVPR 2026, section 3).

Shapes: B batch, L cells, M kept, K words of the discriminative codebook, D its width.
"""

import hashlib
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from semdict.pipeline.common.errors import UsageError
from semdict.train.data.token_set import TokenSet
from semdict.train.engine.loop import START, Batch, Clock
from semdict.train.masked.losses import masked_contrast, neighbour_table, projection_contrast
from semdict.train.masked.masking import row_shares
from semdict.train.masked.model import MaskedTokenTransformer
from semdict.train.masked.objectives.mage import Mage, Masking, Pass, Scalars

if TYPE_CHECKING:
    from semdict.pipeline.config.schema.base import Section
    from semdict.pipeline.config.schema.masked import Pretrain


class Lease(Mage):
    """L = L_R + weight * L_C: reconstruction and codebook contrast. LEASE (CVPR 2026), section 3.

    centroids: (K, D) float, normalised here; a discriminative id names an entry of this codebook, a word.
    contrast: the side that is compared with the codebook: "encoder" (kept, unmasked latents, neighbours as positives;
    the paper), "decoder" (masked positions, the word as the only positive) or "both". neighbours: nearest words besides
    the word itself; weight: lambda; tau: temperature of the neighbours' weights, alpha: of the logits. The published
    class evaluates the decoder side too and multiplies it by zero, which contrast="encoder" leaves out.
    """

    last_step = "argmax"

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
            raise UsageError(f"{neighbours} neighbours do not exist in a codebook of {len(centroids)} words")
        self.contrast, self.weight, self.alpha = contrast, weight, alpha
        unit_KD = nn.functional.normalize(centroids.detach().float(), dim=1)
        ids, weights = neighbour_table(unit_KD, neighbours + 1, tau)
        # computed from the centroids, so not part of a checkpoint
        for name, value in (("centroids", unit_KD), ("neighbour_ids", ids), ("neighbour_weights", weights)):
            self.register_buffer(name, value, persistent=False)

    @classmethod
    def architecture(cls, width: int, contrast: str = "encoder") -> dict[str, Any]:
        """A model whose encoder, decoder or both project to the centroids' width."""
        sides = {"encoder": (width, 0), "decoder": (0, width), "both": (width, width)}[contrast]
        return {"grid_code": True, "visible": "add", "encoder_projection": sides[0], "decoder_projection": sides[1]}

    @classmethod
    def architecture_from(cls, own: "Section", token_set: TokenSet) -> dict[str, Any]:
        return cls.architecture(token_set.centroid_tensor().shape[1], own.contrast)

    @classmethod
    def from_cfg(cls, cfg: "Pretrain", own: "Section", model: MaskedTokenTransformer, token_set: TokenSet) -> "Lease":
        masking = Masking.from_cfg(cfg)
        return cls(
            token_set.centroid_tensor(), own.contrast, own.neighbours, cfg.contrast_weight, own.tau, own.alpha, masking,
            cfg.label_smoothing,
        )  # fmt: skip

    @classmethod
    def settings(cls, token_set: TokenSet) -> dict[str, Any]:
        """The centroids, which may come from a file of their own."""
        return {"centroids": hashlib.sha256(token_set.centroid_tensor().numpy().tobytes()).hexdigest()[:16]}

    def chance(self, codebook_size: int, rows: int) -> dict[str, float]:
        sides = ("encoder", "decoder") if self.contrast == "both" else (self.contrast,)
        guess = math.log(len(self.centroids))
        return {**super().chance(codebook_size, rows), **{f"contrast_{side}": guess for side in sides}}

    def forward(
        self, model: MaskedTokenTransformer, batch: Batch, rng: torch.Generator, clock: Clock = START
    ) -> tuple[Tensor, Scalars]:
        if batch.get("disc") is None:
            raise UsageError("lease needs discriminative tokens, the shards have none; encode with a k-means codebook")
        self.check(model)
        return self.losses(model, self.masked_pass(model, batch, rng), batch["disc"].long())

    def check(self, model: MaskedTokenTransformer) -> None:
        """The model must project to the codebook's width on every side that is used."""
        width = self.centroids.shape[1]
        for side, own in (("encoder", model.config.encoder_projection), ("decoder", model.config.decoder_projection)):
            if self.contrast in (side, "both") and own != width:
                raise UsageError(f"the model's {side} projects to {own} dimensions, the codebook has {width}")

    def losses(self, model: MaskedTokenTransformer, p: Pass, words_BL: Tensor) -> tuple[Tensor, Scalars]:
        """Total and parts for one pass."""
        parts = {"reconstruction": self.reconstruction(model, p)}
        if self.contrast in ("encoder", "both"):
            parts["contrast_encoder"] = self.encoder_side(model, p, words_BL)
        if self.contrast in ("decoder", "both"):
            projected = model.dec_to_dino(p.features[:, 1:][p.masked])
            parts["contrast_decoder"] = masked_contrast(
                projected, words_BL[p.masked], self.centroids, self.alpha, row_shares(p.masked)
            )
        loss = parts["reconstruction"] + self.weight * sum(v for k, v in parts.items() if k.startswith("contrast"))
        return loss, {"loss": loss.detach(), **{name: value.detach() for name, value in parts.items()}}

    def encoder_side(self, model: MaskedTokenTransformer, p: Pass, words_BL: Tensor) -> Tensor:
        """L_C over all visible (kept and unmasked) latents of the batch; 0 where nothing is visible."""
        visible_BM = ~p.masked.gather(1, p.keep_idx)
        projected_ND = model.proj_to_dino(p.latents[:, 1:][visible_BM])
        words_N = words_BL.gather(1, p.keep_idx)[visible_BM]
        return projection_contrast(
            projected_ND, words_N, self.centroids, self.neighbour_ids, self.neighbour_weights, self.alpha,
            row_shares(visible_BM),
        )  # fmt: skip

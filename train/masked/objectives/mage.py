"""MAGE: reconstruction of masked tokens, the base of every objective (arXiv:2211.09117).

Shapes: B batch, L cells, M kept, E encoder width, F decoder width.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from semdict.train.data.token_set import TokenSet
from semdict.train.engine.loop import START, Batch, Clock
from semdict.train.masked.losses import reconstruction_loss
from semdict.train.masked.masking import draw_masks, draw_ratios, row_shares
from semdict.train.masked.model import MaskedTokenTransformer

if TYPE_CHECKING:
    from semdict.pipeline.config.schema.base import Section
    from semdict.pipeline.config.schema.masked import Condition, Pretrain

Scalars = dict[str, Tensor]  # detached, 0-d


@dataclass(frozen=True)
class Masking:
    """Mask ratio: normal(mode, std) truncated to [low, high]; one for every `group` rows of the global batch."""

    mode: float = 0.55
    std: float = 0.25
    low: float = 0.5
    high: float = 1.0
    group: int = 64

    @classmethod
    def from_cfg(cls, cfg: "Pretrain | Condition") -> "Masking":
        """The masking of section pretrain or condition of params.yaml: its `mask` and `mask_group`."""
        return cls(cfg.mask.mode, cfg.mask.std, cfg.mask.min, cfg.mask.max, cfg.mask_group)


@dataclass
class Pass:
    """One masked pass."""

    tokens: Tensor  # (B, L) int64
    masked: Tensor  # (B, L) bool
    keep_idx: Tensor  # (B, M) int64
    latents: Tensor  # (B, 1 + M, E)
    features: Tensor  # (B, 1 + L, F)


class Mage(nn.Module):
    """Reconstruction only, L = L_R; MAGE without its optional contrast.

    Other objectives derive from it and override some of `architecture` and `architecture_from` (fields of ModelConfig),
    `from_cfg`, `settings` (further parts of the run's identity), `forward`, `after_step`, `chance`, `online_pools_cls`,
    and `last_step` (how iterative decoding fills the last cell, see sampling.Decoding).

    objective(model, batch, rng, clock) -> (loss, scalars): batch has gen (B, L) integers and disc (B, L) or None; rng
    is a torch.Generator, and if it is an engine.rng.BatchGenerator, numbers belong to rows of the global batch. An
    objective is a module: its state is stored in checkpoints, its parameters with a gradient are optimised too.
    """

    last_step = "sampled"
    online_pools_cls = False  # whether the online classifier's mean includes the CLS latent

    def __init__(self, masking: Masking | None = None, smoothing: float = 0.1) -> None:
        super().__init__()
        self.masking, self.smoothing = masking or Masking(), smoothing

    @classmethod
    def architecture(cls) -> dict[str, Any]:
        """The fields of ModelConfig in which a model of this objective differs from the default."""
        return {}

    @classmethod
    def architecture_from(cls, own: "Section", token_set: TokenSet) -> dict[str, Any]:
        """`architecture` for the objective's own section of params.yaml and the tokens to train on."""
        return cls.architecture()

    @classmethod
    def from_cfg(cls, cfg: "Pretrain", own: "Section", model: MaskedTokenTransformer, token_set: TokenSet) -> "Mage":
        """The objective for section pretrain of params.yaml, of which `own` is the objective's own section."""
        return cls(Masking.from_cfg(cfg), cfg.label_smoothing)

    @classmethod
    def settings(cls, token_set: TokenSet) -> dict[str, Any]:
        """What shapes the result besides section pretrain and the tokens, for the run's identity."""
        return {}

    def forward(
        self, model: MaskedTokenTransformer, batch: Batch, rng: torch.Generator, clock: Clock = START
    ) -> tuple[Tensor, Scalars]:
        loss = self.reconstruction(model, self.masked_pass(model, batch, rng))
        return loss, {"loss": loss.detach(), "reconstruction": loss.detach()}

    def after_step(self, model: MaskedTokenTransformer, clock: Clock, epochs: float) -> None:
        """Called after every optimiser step of a run of `epochs`: moves averages. Nothing by default."""

    def chance(self, codebook_size: int, rows: int) -> dict[str, float]:
        """Each loss in nats for a model without knowledge, a uniform guess; rows: images that are compared at once."""
        return {"reconstruction": math.log(codebook_size)}

    def masked_pass(self, model: MaskedTokenTransformer, batch: Batch, rng: torch.Generator) -> Pass:
        """Sample masks, encode the kept cells, decode the whole grid; the batch itself is not changed."""
        self.train(model.training)
        tokens_BL = batch["gen"].long()
        B, L = tokens_BL.shape
        m = self.masking
        ratio_B = draw_ratios(B, rng, m.mode, m.std, m.low, m.high, m.group)
        keep_idx, masked_BL, _ = draw_masks(B, L, ratio_B, rng)
        return self.pass_with(model, tokens_BL, masked_BL.to(tokens_BL.device), keep_idx.to(tokens_BL.device))

    @staticmethod
    def pass_with(model: MaskedTokenTransformer, tokens_BL: Tensor, masked_BL: Tensor, keep_idx: Tensor) -> Pass:
        """The pass under these masks."""
        latents_BNE = model.encode(tokens_BL, masked_BL, keep_idx)
        return Pass(tokens_BL, masked_BL, keep_idx, latents_BNE, model.decode(latents_BNE, masked_BL, keep_idx))

    def reconstruction(self, model: MaskedTokenTransformer, p: Pass) -> Tensor:
        """L_R over the masked cells of the batch, a mean of means (`row_shares`); the head runs on those only."""
        logits_NK = model.token_logits(p.features[:, 1:][p.masked])
        return reconstruction_loss(logits_NK, p.tokens[p.masked], self.smoothing, row_shares(p.masked))

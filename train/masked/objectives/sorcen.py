"""Sorcen: reconstruction, uniformity and echo contrast (arXiv:2503.15060).

An echo is a second view of an image: codes sampled from the decoder's predictions inside a random square. Shapes: B
batch, L = grid^2 cells, Q = cells inside the squares of the batch, T codes to sample from, E encoder width, P width of
the projections, K image codes.
"""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from semdict.pipeline.common.errors import UsageError
from semdict.train.data.token_set import TokenSet
from semdict.train.engine import dist
from semdict.train.engine.ema import Ema, beta
from semdict.train.engine.loop import START, Batch, Clock
from semdict.train.engine.rng import rand_groups, rand_rows
from semdict.train.masked.losses import Gather, info_nce, local, uniformity
from semdict.train.masked.model import MaskedTokenTransformer
from semdict.train.masked.objectives.mage import Mage, Masking, Pass, Scalars

if TYPE_CHECKING:
    from semdict.pipeline.config.schema.base import Section
    from semdict.pipeline.config.schema.masked import Pretrain

PROJECTOR, PREDICTOR = (4096, 512), (2048, 512)  # published widths; the paper's projector size is 512
SMALLEST_SHARE = 0.5  # the square's side is uniform between half of the grid and all of it


class Sorcen(Mage):
    """L = L_R + uniform_weight * L_U + weight * L_E: reconstruction, uniformity and echo contrast.

    Sorcen, arXiv:2503.15060. The teacher (`self.teacher`: encoder blocks and projector; token embedding and final norm
    are the student's) sees an echo: codes sampled from the `top` most likely after the most likely one, kept inside a
    random square; in the first `echo_warmup` epochs (40 in the paper) the true codes instead. L_E is InfoNCE at
    `temperature`. Heads run on the rows that `gather` joins from all ranks, so BatchNorm and InfoNCE see the global
    batch; its backward pass sums the gradients of all ranks' losses, as `engine.dist.gather` does (gradients are
    averaged over ranks afterwards).

    as_released=True repeats the published training where it departs from the paper: the teacher starts from its own
    random initialisation, its projector also takes gradients, it is averaged inside every forward pass (so in
    evaluation too) on a schedule of 1600 epochs whatever the run, the echo warm-up lasts through epoch 10, and
    BatchNorm sees the rows of one process.
    The default follows the paper: teacher = copy of the student at the start, no gradient, moved once per
    training step by `after_step`, schedule as long as the run. `teacher` resumes or continues an existing average.
    """

    online_pools_cls = True
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

    @classmethod
    def architecture(
        cls, projector: tuple[int, int] = PROJECTOR, predictor: tuple[int, int] = PREDICTOR
    ) -> dict[str, Any]:
        """A model with the two heads, each (hidden, output) width."""
        return {"projector": projector, "predictor": predictor}

    @classmethod
    def architecture_from(cls, own: "Section", token_set: TokenSet) -> dict[str, Any]:
        return cls.architecture(tuple(own.projector), tuple(own.predictor))

    @classmethod
    def from_cfg(cls, cfg: "Pretrain", own: "Section", model: MaskedTokenTransformer, token_set: TokenSet) -> "Sorcen":
        return cls(
            model, cfg.contrast_weight, own.temperature, own.top, None if own.as_released else own.echo_warmup_epochs,
            own.uniform_weight, own.momentum, own.as_released, masking=Masking.from_cfg(cfg),
            smoothing=cfg.label_smoothing, gather=dist.gather,
        )  # fmt: skip

    def forward(
        self, model: MaskedTokenTransformer, batch: Batch, rng: torch.Generator, clock: Clock = START
    ) -> tuple[Tensor, Scalars]:
        if self.as_released:
            self.teacher.update(model, beta(clock.epoch, self.RELEASED_EPOCHS, self.beta_start))
        p = self.masked_pass(model, batch, rng)
        return self.losses(model, p, self.sample_echo(model, p, rng, clock.epoch))

    def after_step(self, model: MaskedTokenTransformer, clock: Clock, epochs: float) -> None:
        """Move the teacher; the share that it keeps grows with the epoch."""
        if not self.as_released:
            self.teacher.update(model, beta(clock.epoch, epochs, self.beta_start))

    def chance(self, codebook_size: int, rows: int) -> dict[str, float]:
        return {**super().chance(codebook_size, rows), "echo_contrast": math.log(rows)}

    def sample_echo(self, model: MaskedTokenTransformer, p: Pass, rng: torch.Generator, epoch: float) -> Tensor:
        """(B, L) int64 echo of the batch: true or sampled codes inside a square, the mask id elsewhere.

        Logits are computed for the squares' cells only, without gradient.
        """
        B, L = p.tokens.shape
        inside_BL = draw_squares(B, model.config.grid, rng, self.masking.group).to(p.tokens.device)
        echo_BL = p.tokens.masked_fill(~inside_BL, model.mask_token)
        if int(epoch) >= self.echo_warmup:
            uniform_BLT = rand_rows(B, L, min(self.top, model.config.vocab.codes - 1), rng=rng).to(p.tokens.device)
            with torch.no_grad():
                logits_QK = model.token_logits(p.features[:, 1:][inside_BL])
                echo_BL[inside_BL] = sample_codes(logits_QK, uniform_BLT[inside_BL])
        return echo_BL

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
        with torch.set_grad_enabled(self.as_released and torch.is_grad_enabled()):
            return self.joined(self.teacher["projector"], latents_BNE)

    def student_side(self, model: MaskedTokenTransformer, latents_BNE: Tensor) -> Tensor:
        """(B of all ranks, P) predictions from the student's kept latents, CLS left out of the mean."""
        return self.joined(nn.Sequential(model.projector, model.predictor), latents_BNE)

    def joined(self, head: nn.Module, latents_BNE: Tensor) -> Tensor:
        """(B of all ranks, P) a head on the mean of the latents: BatchNorm over all ranks, as released over each."""
        pooled_BE = latents_BNE[:, 1:].mean(dim=1)
        return self.gather(head(pooled_BE)) if self.as_released else head(self.gather(pooled_BE))


def draw_squares(batch: int, grid: int, rng: torch.Generator, group: int = 64) -> Tensor:
    """(B, L) bool: the cells inside each row's square.

    The side is uniform on grid/2 .. grid, one for every `group` rows of the global batch; the corner is each row's own.
    """
    low = max(1, int(grid * SMALLEST_SHARE))
    side_B1 = low + (rand_groups(batch, group, rng) * (grid + 1 - low)).long()[:, None]
    corner_B2 = (rand_rows(batch, 2, rng=rng).double() * (grid - side_B1 + 1)).long()
    return square_mask(side_B1, corner_B2, grid)


def square_mask(side_B1: Tensor, corner_B2: Tensor, grid: int) -> Tensor:
    """(B, L) bool: the row-major cells of the squares with top-left (row, column) `corner_B2`."""
    step = torch.arange(grid, device=corner_B2.device)
    row_BG, column_BG = ((step >= edge_B1) & (step < edge_B1 + side_B1) for edge_B1 in corner_B2.split(1, dim=1))
    return (row_BG[:, :, None] & column_BG[:, None, :]).flatten(1)


@torch.no_grad()
def sample_codes(logits_QK: Tensor, uniform_QT: Tensor) -> Tensor:
    """(Q,) int64 codes sampled by their probability from the T most likely ones after the single most likely.

    The sample is the maximum of logit + Gumbel noise, which comes from uniform numbers in [0, 1).
    """
    best = logits_QK.float().topk(uniform_QT.shape[-1] + 1, dim=-1)
    gumbel_QT = -(-uniform_QT.clamp_min(1e-20).log()).log()  # moved off 0, whose double logarithm is infinite
    pick_Q1 = (best.values[..., 1:] + gumbel_QT).argmax(dim=-1, keepdim=True)
    return best.indices[..., 1:].gather(-1, pick_Q1)[..., 0]

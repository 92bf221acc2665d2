"""The VQGAN in training: straight-through quantization, and a codebook that follows the latents as moving averages."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semdict.pipeline.common.nearest import nearest
from semdict.pipeline.tokenizers.base import ConvTokenizer
from semdict.train.engine import dist
from semdict.train.engine.logging import RunLog
from semdict.train.engine.loop import Clock
from semdict.train.engine.rng import Stream, torch_generator
from semdict.train.vcq.tokenizer import Reconstruction

# B images, D latent channels, N latents (cells of a batch), K codes
VAR_MIN = 1e-6


class Vqgan(nn.Module):
    """A convolutional tokenizer with a training pass; its codebook takes no gradient."""

    def __init__(self, tokenizer: ConvTokenizer, commitment: float) -> None:
        super().__init__()
        self.tokenizer, self.commitment = tokenizer, commitment
        tokenizer.quantize.requires_grad_(False)

    def forward(self, images: Tensor, strength: float = 1.0) -> Reconstruction:
        """Images (B, 3, H, W) in [0, 1] -> their reconstruction, ids and latents.

        strength: 0 decodes the latents themselves, 1 their codes; between, and the commitment term with it, in
        proportion. The commitment is relative to the variance of the codes, so the scale of the latents is free.
        """
        z = self.tokenizer.encode_features(images).float()
        z_BLD = z.flatten(2).mT
        table_KD = self.tokenizer.codebook.detach().float()
        ids_BL = nearest(z_BLD.detach().flatten(0, 1), table_KD).view(z_BLD.shape[:2])
        codes_BLD = F.embedding(ids_BL, table_KD)
        vq_loss = z_BLD.new_zeros(())
        if strength:
            distance = F.mse_loss(z_BLD, codes_BLD) / table_KD.var(dim=0).mean().clamp_min(VAR_MIN)
            vq_loss = strength * self.commitment * distance
        straight_BLD = z_BLD + strength * (codes_BLD - z_BLD).detach()
        decoded = self.tokenizer.decode_features(straight_BLD.mT.unflatten(2, z.shape[2:]))
        return Reconstruction(decoded, ids_BL, z_BLD, vq_loss)

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, L) int64."""
        return self.tokenizer.encode(images)

    def decode(self, tokens: Tensor) -> Tensor:
        """(B, L) int64 -> (B, 3, H, W), nominally in [0, 1], not clipped."""
        return self.tokenizer.decode(tokens)


class MovingCodebook:
    """The codebook as a hook of the loop: moving averages of the latents assigned to each code.

    VQ-VAE, arXiv:1711.00937, appendix A.1; initialised by k-means at step `start` and, after it, rarely used codes are
    replaced by recent latents. The results do not depend on the number of ranks but for the order of sums.

    decay: of the averages. below: a code is replaced when its share of the assignments is below this fraction of an
    even share. every: steps between replacements. keep: recent latents that are stored.
    """

    def __init__(
        self, table_KD: Tensor, average_KD: Tensor, start: int, stop: int, decay: float, seed: int,
        below: float = 0.03, every: int = 20, keep: int = 16384,
    ) -> None:  # fmt: skip
        self.table_KD, self.average_KD = table_KD.data, average_KD.data
        self.start, self.stop, self.decay, self.seed = start, stop, decay, seed
        self.below, self.every, self.keep = below, every, keep
        self.hits_K = torch.ones(len(table_KD), device=table_KD.device)
        self.sums_KD = self.table_KD.clone()
        self.recent_ND = self.table_KD[:0]
        self.outputs: list[Tensor] = []
        self.done = 0  # codes replaced so far

    def add(self, latents_BLD: Tensor) -> None:
        """Latents of one micro-batch of the step."""
        self.outputs.append(latents_BLD.detach().flatten(0, 1))

    @torch.no_grad()
    def __call__(self, clock: Clock, _log: RunLog | None = None) -> None:
        latents_ND = torch.cat(self.outputs)
        self.outputs.clear()
        self.recent_ND = torch.cat([self.recent_ND, latents_ND])[-self.keep :]
        rng = torch_generator(self.seed, Stream.CODE_RESET, clock.step)
        if clock.step + 1 == self.start:
            self._begin(rng)
        elif clock.step >= self.start:
            self._update(latents_ND)
            if (clock.step + 1) % self.every == 0 and clock.step < self.stop:
                self._replace(rng)

    def state_dict(self) -> dict[str, Any]:
        """Averages, recent latents and the number of replaced codes, for a checkpoint."""
        return {"hits": self.hits_K, "sums": self.sums_KD, "recent": self.recent_ND, "done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.hits_K.copy_(state["hits"])
        self.sums_KD.copy_(state["sums"])
        self.recent_ND = state["recent"].to(self.table_KD)
        self.done = state["done"]

    def _begin(self, rng: torch.Generator, rounds: int = 10) -> None:
        """Lloyd's k-means on the stored latents, from distinct random ones; rank 0's result is taken."""
        pool_ND, codes = self.recent_ND, len(self.table_KD)
        order_N = torch.randperm(max(len(pool_ND), codes), generator=rng)[:codes]
        table_KD = pool_ND[order_N.to(pool_ND.device) % len(pool_ND)].clone()
        for _ in range(rounds):
            ids_N = nearest(pool_ND, table_KD)
            hits_K = torch.bincount(ids_N, minlength=codes)
            sums_KD = torch.zeros_like(table_KD).index_add_(0, ids_N, pool_ND)
            used = hits_K > 0
            table_KD[used] = sums_KD[used] / hits_K[used, None]
        self.table_KD.copy_(table_KD)
        dist.broadcast(self.table_KD)
        self.average_KD.copy_(self.table_KD)
        self.hits_K.fill_(1)
        self.sums_KD.copy_(self.table_KD)

    def _update(self, latents_ND: Tensor) -> None:
        """One step of the averages; hits are assignments per step relative to an even share."""
        codes = len(self.table_KD)
        ids_N = nearest(latents_ND, self.table_KD)
        hits_K = dist.total(torch.bincount(ids_N, minlength=codes).float())
        sums_KD = dist.total(torch.zeros_like(self.sums_KD).index_add_(0, ids_N, latents_ND))
        share = hits_K.sum() / codes
        self.hits_K.lerp_(hits_K / share, 1 - self.decay)
        self.sums_KD.lerp_(sums_KD / share, 1 - self.decay)
        self.table_KD.copy_(self.sums_KD / self.hits_K.clamp_min(1e-4)[:, None])

    def _replace(self, rng: torch.Generator) -> None:
        """Put recent latents in the place of rarely used codes; rank 0's choice is taken."""
        dead_M = (self.hits_K < self.below).nonzero()[:, 0]
        if not len(dead_M):
            return
        rows_M = torch.randint(len(self.recent_ND), (len(dead_M),), generator=rng)
        self.table_KD[dead_M] = self.recent_ND[rows_M.to(self.recent_ND.device)]
        dist.broadcast(self.table_KD)
        self.hits_K[dead_M] = 0.3
        self.sums_KD[dead_M] = self.table_KD[dead_M] * 0.3
        self.average_KD[dead_M] = self.table_KD[dead_M]
        self.done += len(dead_M)

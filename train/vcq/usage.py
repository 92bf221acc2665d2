"""Use of the codebook by position, and the optional re-seeding of codes that are no longer used.

Under a growing codebook a tail code is rare even in ideal use: code k is reachable only from the positions with
K_t > k, so its expected hits per image are the sum of 1 / K_t over those. Both counts here are relative to that,
never to 1 / K.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from semdict.train.engine import dist
from semdict.train.engine.logging import RunLog
from semdict.train.engine.loop import Clock
from semdict.train.engine.rng import Stream, torch_generator
from semdict.train.vcq.quantizer import VariableQuantizer


class CodeUsage:
    """Counts of code k at position t over a window that `clear` opens; (L, K) int32 on the device of the sizes."""

    def __init__(self, sizes_L: Tensor) -> None:
        self.sizes_L = sizes_L.detach()
        self.counts_LK = torch.zeros(len(sizes_L), int(sizes_L.max()), dtype=torch.int32, device=sizes_L.device)

    def add(self, ids_BL: Tensor) -> None:
        """Count one batch of (B, L) int64 ids."""
        length, k = self.counts_LK.shape
        flat = (ids_BL + torch.arange(length, device=ids_BL.device) * k).flatten()
        self.counts_LK.view(-1).index_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))

    def clear(self) -> None:
        """Open a new window."""
        self.counts_LK.zero_()

    def state_dict(self) -> dict[str, Any]:
        """The counts of the open window, for a checkpoint."""
        return {"counts": self.counts_LK}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the window of `state_dict`."""
        self.counts_LK.copy_(state["counts"])

    def per_position(self) -> tuple[Tensor, Tensor]:
        """(L,) float64 each: exp(entropy in nats) / K_t, and the share of the K_t codes that occurred at all.

        Both are bounded by samples / K_t, so a window should hold several times max K_t images.
        """
        counts_LK = self.counts_LK.double()
        p_LK = counts_LK / counts_LK.sum(1, keepdim=True).clamp_min(1)
        nats_L = -torch.xlogy(p_LK, p_LK).sum(1)
        sizes_L = self.sizes_L.to(nats_L)
        return nats_L.exp() / sizes_L, (counts_LK > 0).sum(1) / sizes_L

    def summary(self) -> dict[str, float]:
        """Means over positions, the share of the whole codebook that occurred, and the images in the window."""
        utilisation_L, used_L = self.per_position()
        return {
            "utilisation": float(utilisation_L.mean()),
            "used_per_position": float(used_L.mean()),
            "used_codes": float((self.counts_LK.sum(0) > 0).double().mean()),
            "images": int(self.counts_LK[0].sum()),
        }


def expected_hits(sizes_L: Tensor) -> Tensor:
    """(K,) float64: hits of code k per image under even use, the sum over {t: K_t > k} of 1 / K_t."""
    sizes_L = sizes_L.double()
    reachable_LK = torch.arange(int(sizes_L.max()), device=sizes_L.device) < sizes_L[:, None]
    return (reachable_LK / sizes_L[:, None]).sum(0)


class CodeReset:
    """Re-seeds codes that were expected `patience` times since they last occurred; off unless a trainer asks for it.

    The first `protected` codes serve every position and are never touched. A code is re-seeded from an encoder output
    at a position that can reach it. A code in even use is re-seeded with probability exp(-patience).
    """

    def __init__(self, sizes_L: Tensor, protected: int = 16, patience: float = 20.0) -> None:
        self.protected, self.patience = protected, patience
        self.rate_K = expected_hits(sizes_L)
        self.missed_K = torch.zeros_like(self.rate_K)  # expected hits since the last real one
        self.done = 0  # codes re-seeded so far
        self.order_L = torch.argsort(sizes_L, descending=True, stable=True)  # positions, largest codebook first
        self.reach_K = (torch.arange(len(self.rate_K), device=sizes_L.device)[:, None] < sizes_L).sum(1)

    @torch.no_grad()
    def step(self, quantizer: VariableQuantizer, z_BLD: Tensor, ids_BL: Tensor, rng: torch.Generator) -> Tensor:
        """Count one batch, re-seed dead codes; (M,) int64 codes that were changed (their optimiser moments are stale).

        z_BLD: encoder outputs that gave ids_BL. Over several ranks the hits are summed and rank 0's codes win.
        """
        hit_K = torch.bincount(ids_BL.flatten(), minlength=len(self.rate_K)).double()
        images = torch.tensor(float(len(ids_BL)), dtype=torch.float64, device=hit_K.device)
        hit_K, images = dist.total(hit_K), dist.total(images)
        self.missed_K = torch.where(hit_K > 0, 0.0, self.missed_K + images * self.rate_K)
        dead_M = torch.nonzero(self.missed_K > self.patience).flatten()
        dead_M = dead_M[dead_M >= self.protected]
        if len(dead_M):
            quantizer.codebook[dead_M] = quantizer.project(self._draw(z_BLD, dead_M, rng)).to(quantizer.codebook.dtype)
            self.missed_K[dead_M] = 0
            self.done += len(dead_M)
            dist.broadcast(quantizer.codebook.data)
        return dead_M

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint."""
        return {"missed": self.missed_K, "done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.missed_K.copy_(state["missed"])
        self.done = state["done"]

    def _draw(self, z_BLD: Tensor, dead_M: Tensor, rng: torch.Generator) -> Tensor:
        """(M, D): for each dead code one output of a random image at a random position that can reach it."""
        uniform_2M = torch.rand(2, len(dead_M), generator=rng, device=rng.device).to(z_BLD.device)
        rows_M = (uniform_2M[0] * len(z_BLD)).long().clamp_max(len(z_BLD) - 1)
        reach_M = self.reach_K[dead_M]
        positions_M = self.order_L[torch.minimum((uniform_2M[1] * reach_M).long(), reach_M - 1)]
        return F.embedding(rows_M * z_BLD.shape[1] + positions_M, z_BLD.flatten(0, 1))


class CodeResetStep:
    """`CodeReset` as a hook of the loop: once a step, on all outputs of the step.

    The averaged code of a re-seeded code becomes the code itself, its optimiser moments zero.
    """

    def __init__(
        self, reset: CodeReset, quantizer: VariableQuantizer, average: VariableQuantizer,
        optimiser: torch.optim.Optimizer, seed: int,
    ) -> None:  # fmt: skip
        self.reset, self.quantizer, self.average = reset, quantizer, average
        self.optimiser, self.seed = optimiser, seed
        self.outputs: list[tuple[Tensor, Tensor]] = []

    def add(self, z_BLD: Tensor, ids_BL: Tensor) -> None:
        """Encoder outputs and ids of one micro-batch of the step."""
        self.outputs.append((z_BLD.detach(), ids_BL))

    @torch.no_grad()
    def __call__(self, clock: Clock, _log: RunLog | None = None) -> None:
        z_BLD, ids_BL = (torch.cat(parts) for parts in zip(*self.outputs, strict=True))
        self.outputs.clear()
        rng = torch_generator(self.seed, Stream.CODE_RESET, clock.step)
        dead_M = self.reset.step(self.quantizer, z_BLD, ids_BL, rng)
        if not len(dead_M):
            return
        codebook = self.quantizer.codebook
        self.average.codebook[dead_M] = codebook[dead_M]
        for moments in self.optimiser.state[codebook].values():
            if moments.shape == codebook.shape:
                moments[dead_M] = 0

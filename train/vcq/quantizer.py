"""Variable codebook size quantization: one codebook, and position t may only use its first K_t entries.

A constant schedule is plain VQ. Paper: arXiv:2605.06207, section 3. Shapes: B images, L positions, D code width,
K codebook entries, G position groups.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK = {"cpu": 1 << 20, "cuda": 1 << 26}  # largest distance block at once, in float32 elements: cache, memory


class Quantized(NamedTuple):
    """Result of one pass through the quantizer."""

    codes: Tensor  # (B, L, D) float32, nearest codes; the gradient goes straight through to the input
    ids: Tensor  # (B, L) int64, ids[:, t] < K_t
    loss: Tensor  # codebook and commitment terms, weighted, a scalar


class VariableQuantizer(nn.Module):
    """Nearest of the first K_t codes at each position t, with a straight-through gradient.

    sizes_L: (L,) int64 from codebook_sizes. l2: inputs and codes are normalised first. beta weighs the commitment term,
    codebook_weight the codebook term. groups: position groups of the search; the result does not depend on it.
    The parameters are one (max K_t, dim) codebook whatever the schedule.
    """

    def __init__(
        self,
        sizes_L: Tensor,
        dim: int = 8,
        l2: bool = True,
        beta: float = 1.0,
        codebook_weight: float = 1.0,
        groups: int = 16,
    ) -> None:
        super().__init__()
        if int(sizes_L.min()) < 1:
            raise ValueError(f"every position needs at least one code, not {int(sizes_L.min())}")
        self.sizes = tuple(int(k) for k in sizes_L)  # plain numbers: slicing by them never waits for a device
        self.register_buffer("sizes_L", sizes_L.clone(), persistent=False)
        self.l2, self.beta, self.codebook_weight, self.groups = l2, beta, codebook_weight, groups
        self.codebook = nn.Parameter(torch.empty(max(self.sizes), dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, rng: torch.Generator | None = None) -> None:
        """Codes even on the sphere (l2), or uniform in +-1/K as VQ-VAE implementations do, drawn from `rng`."""
        if self.l2:
            nn.init.normal_(self.codebook, generator=rng)
            self.codebook.copy_(F.normalize(self.codebook, dim=-1))
        else:
            nn.init.uniform_(self.codebook, -1 / len(self.codebook), 1 / len(self.codebook), generator=rng)

    def forward(self, z_BLD: Tensor, strength: float = 1.0) -> Quantized:
        """(B, L, D) of any float type -> Quantized in float32; autocast is off inside.

        strength 1 is the paper's quantizer. Below 1 it interpolates between input and code and scales the commitment
        term: a small model that is quantized from its first step commits before its codes differ by image.
        """
        with torch.autocast(z_BLD.device.type, enabled=False):
            z_BLD = self.project(z_BLD)
            ids_BL = self.search(z_BLD)
            e_BLD = self.lookup(ids_BL)
            codebook_term = (e_BLD - z_BLD.detach()).square().mean()
            commitment = (z_BLD - e_BLD.detach()).square().mean()
            codes_BLD = z_BLD + strength * (e_BLD - z_BLD).detach()
            loss = self.codebook_weight * codebook_term + strength * self.beta * commitment
            return Quantized(codes_BLD, ids_BL, loss)

    def project(self, z_BLD: Tensor) -> Tensor:
        """Inputs as they are compared with the codes: float32, on the unit sphere if l2."""
        return F.normalize(z_BLD.float(), dim=-1) if self.l2 else z_BLD.float()

    @torch.no_grad()
    def search(self, z_BLD: Tensor) -> Tensor:
        """(B, L, D) projected inputs -> (B, L) int64 nearest allowed codes."""
        codes_KD = self.project(self.codebook)
        return nearest_codes(z_BLD, codes_KD, self.sizes, self.groups)

    def lookup(self, ids_BL: Tensor) -> Tensor:
        """(B, L) int64 -> (B, L, D) float32 codes; the gradient reaches the gathered rows only."""
        return self.project(F.embedding(ids_BL, self.codebook))


@torch.compiler.disable
@torch.no_grad()
def nearest_codes(z_BLD: Tensor, codes_KD: Tensor, sizes: tuple[int, ...], groups: int = 16) -> Tensor:
    """(B, L) int64: argmin over k < sizes[t] of |z(b, t) - codes_k|^2, ties to the lowest k.

    Positions are cut into `groups` runs. A run is compared with the codes that any of its positions may use, so the
    work is near D * sum of K_t, not D * L * K; only the strip between its smallest and largest K_t is masked.
    Float32 without TF32: bfloat16 inputs would change 3 to 7 % of the ids.
    """
    z_LBD = z_BLD.detach().float().transpose(0, 1).contiguous()
    codes_KD = codes_KD.detach().float()
    half_norms_K = codes_KD.square().sum(-1) / 2
    length, batch, _ = z_LBD.shape
    ids_LB = torch.empty(length, batch, dtype=torch.int64, device=z_LBD.device)
    with full_precision(z_LBD.device):
        for start, stop in position_groups(length, groups):
            limit_S = torch.tensor(sizes[start:stop], device=z_LBD.device)
            low, high = min(sizes[start:stop]), max(sizes[start:stop])
            rows = max(1, BLOCK.get(z_LBD.device.type, 1 << 26) // ((stop - start) * high))
            for first in range(0, batch, rows):
                z_SBD = z_LBD[start:stop, first : first + rows]
                scores = torch.addmm(half_norms_K[:high], z_SBD.flatten(0, 1), codes_KD[:high].T, alpha=-1)
                scores_SBK = scores.view(*z_SBD.shape[:2], high)
                if low < high:
                    excluded_SK = torch.arange(low, high, device=z_LBD.device) >= limit_S[:, None]
                    scores_SBK[:, :, low:].masked_fill_(excluded_SK[:, None], torch.inf)
                ids_LB[start:stop, first : first + rows] = scores_SBK.argmin(-1)
    return ids_LB.T.contiguous()


def position_groups(length: int, groups: int) -> Iterator[tuple[int, int]]:
    """At most `groups` contiguous, non-empty, nearly equal runs of range(length), as (start, stop)."""
    groups = min(groups, length)
    for group in range(groups):
        yield length * group // groups, length * (group + 1) // groups


def search_flops(sizes: tuple[int, ...], dim: int, groups: int = 16) -> int:
    """FLOPs of `nearest_codes` for one image: 2 d times the sum over runs of (positions * largest K_t)."""
    runs = position_groups(len(sizes), groups)
    return 2 * dim * sum((stop - start) * max(sizes[start:stop]) for start, stop in runs)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Float32 matrix products without TF32 and without autocast, independent of the process's settings."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)

"""Lloyd's iteration in torch, on a CPU or on any number of GPUs; the same bits for the same kind of device.

Legend: N points of the sample, K centroids, D width.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from semdict.pipeline.common.nearest import rows_per_chunk, search_chunk

SPLIT_SEED, SPLIT_SHIFT = 1234, 1 / 1024  # FAISS's constants for splitting a large cluster
PEAK_ROWS = 1 << 16  # rows whose largest value is looked for at once


@dataclass(frozen=True)
class Curves:
    """The course of a training, one entry per iteration."""

    objective: list[float] = field(default_factory=list)  # mean squared distance to the nearest centroid
    splits: list[int] = field(default_factory=list)  # empty clusters that took half of a large one
    imbalance: list[float] = field(default_factory=list)  # K sum n_k^2 / N^2; 1 = all clusters of equal size


def lloyd(
    sample_ND: np.ndarray, start_KD: np.ndarray, iterations: int, devices: Sequence[str]
) -> tuple[np.ndarray, Curves]:
    """Centroids (K, D) float32 and the curves of a sample (N, D), float32 or float16, cut over the devices.

    Sums are kept in 64-bit fixed point: their order, which a GPU does not promise, then changes nothing, and neither
    does the number of devices.
    """
    points, k = len(sample_ND), len(start_KD)
    parts = [
        _near(part, torch.device(device))
        for part, device in zip(torch.from_numpy(sample_ND).chunk(len(devices)), devices, strict=False)
    ]
    centroids_KD = torch.from_numpy(start_KD).to(devices[0])
    unit = 2.0 ** (61 - math.ceil(math.log2(_peak(parts))) - math.ceil(math.log2(points)))
    curves = Curves()
    for _ in range(iterations):
        sums_KD, counts_K, objective = _total(
            [one_pass(part, centroids_KD.to(device), unit) for part, device in zip(parts, devices, strict=False)]
        )
        means_KD = (sums_KD.double() / unit / counts_K.clamp(min=1)[:, None]).float()
        centroids_KD = torch.where(counts_K[:, None] > 0, means_KD, centroids_KD)
        sizes = counts_K.double().cpu().numpy()  # the one place of an iteration where the host waits
        curves.objective.append(float(objective) / points)
        curves.imbalance.append(float(k * np.square(sizes).sum() / points**2))
        curves.splits.append(_split_empty(centroids_KD, sizes, points))
    return centroids_KD.cpu().numpy(), curves


def one_pass(sample_ND: Tensor, centroids_KD: Tensor, unit: float) -> tuple[Tensor, Tensor, Tensor]:
    """Sums (K, D) int64 in units of 1 / unit, counts (K,) int64, and the summed squared distance, a float64 scalar.

    On the centroids' device; nothing is read back, so that several devices work at the same time.
    """
    device = centroids_KD.device
    sums_KD = torch.zeros(centroids_KD.shape, dtype=torch.int64, device=device)
    counts_K = torch.zeros(len(centroids_KD), dtype=torch.int64, device=device)
    objective = torch.zeros((), dtype=torch.float64, device=device)
    rows, norms_K = rows_per_chunk(centroids_KD), centroids_KD.square().sum(1)
    for first in range(0, len(sample_ND), rows):
        part_ND = sample_ND[first : first + rows].to(device, non_blocking=True).float()
        ids_N, scores_N = search_chunk(part_ND, centroids_KD, norms_K)
        sums_KD.index_add_(0, ids_N, (part_ND.double() * unit).round().long())
        counts_K.index_add_(0, ids_N, torch.ones_like(ids_N))
        objective += (scores_N.double() + part_ND.double().square().sum(1)).clamp(min=0).sum()
    return sums_KD, counts_K, objective


def _total(passes: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, ...]:
    """The passes of all devices added up on the first."""
    first = passes[0][0].device
    return tuple(sum((part.to(first) for part in parts[1:]), parts[0]) for parts in zip(*passes, strict=True))


def _near(sample_ND: Tensor, device: torch.device) -> Tensor:
    """The sample on the device if it leaves half of the free memory there, else where it is."""
    if device.type == "cuda" and sample_ND.nbytes < torch.cuda.mem_get_info(device)[0] // 2:
        return sample_ND.to(device)
    return sample_ND


def _peak(parts: Sequence[Tensor]) -> float:
    """The largest absolute value, found where the points are; at least 1e-30."""
    peaks = [torch.stack([block.abs().amax() for block in part.split(PEAK_ROWS)]).amax().float() for part in parts]
    return max(1e-30, *(float(peak) for peak in peaks))


def _split_empty(centroids_KD: Tensor, sizes_K: np.ndarray, points: int) -> int:
    """Give every empty cluster half of a large one, as FAISS does; changes the centroids, returns how many.

    A cluster is taken with probability (size - 1) / (N - K); the two halves move apart by 1/1024 per coordinate,
    with alternating signs.
    """
    k, width = centroids_KD.shape
    sign_D = 1 - 2 * (torch.arange(width, device=centroids_KD.device) % 2)
    empty, draws = np.flatnonzero(sizes_K == 0), _split_draws()
    for hole in empty:
        donor = 0
        while next(draws) >= (sizes_K[donor] - 1) / max(points - k, 1):
            donor = (donor + 1) % k
        centroids_KD[hole] = centroids_KD[donor] * (1 + sign_D * SPLIT_SHIFT)
        centroids_KD[donor] *= 1 - sign_D * SPLIT_SHIFT
        sizes_K[hole] = sizes_K[donor] / 2
        sizes_K[donor] -= sizes_K[hole]
    return len(empty)


def _split_draws() -> Iterator[float]:
    """Uniform numbers in [0, 1): the same stream that FAISS starts for every iteration."""
    source = np.random.MT19937()
    source._legacy_seeding(SPLIT_SEED)
    while True:
        yield from (source.random_raw(1024).astype(np.float32) / np.float32(2**32)).tolist()

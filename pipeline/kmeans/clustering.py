"""k-means over patch features: training by FAISS or by a plain torch Lloyd iteration, and assignment to centroids.

Both engines get the same initial centroids, split empty clusters in the same way and number the centroids alike.
"""

import importlib.util
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from semdict.pipeline.common.errors import SemdictError
from semdict.pipeline.common.nearest import nearest, refuse_non_finite, rows_per_chunk, search_chunk

SPLIT_SEED, SPLIT_SHIFT = 1234, 1 / 1024  # FAISS's constants for splitting a large cluster
SLAB_BYTES = 64 << 20  # features read at once


@dataclass(frozen=True)
class KmeansResult:
    """Centroids and the course of their training; the lists have one entry per iteration."""

    centroids: np.ndarray  # (K, D) float32, the most frequent first
    counts: np.ndarray  # (K,) int64, points of the sample per centroid, falling
    objective: list[float] = field(default_factory=list)  # mean squared distance to the nearest centroid
    splits: list[int] = field(default_factory=list)  # empty clusters that took half of a large one
    imbalance: list[float] = field(default_factory=list)  # K sum n_k^2 / N^2; 1 = all clusters of equal size
    engine: str = ""
    points: int = 0  # size of the sample


def train_centroids(
    features: Any,
    k: int,
    iterations: int = 20,
    seed: int = 0,
    engine: str = "auto",
    max_points_per_centroid: int = 256,
    device: str = "auto",
    init: np.ndarray | None = None,
) -> KmeansResult:
    """Cluster features (N, D), any float dtype, around k centroids by squared Euclidean distance (Lloyd's iteration).

    `features` may be an array, a tensor, a memory map or a zarr array: at most `max_points_per_centroid * k` rows,
    sampled by `seed`, are in memory. `engine` is auto, faiss or torch; auto takes FAISS (its GPU build when there),
    and torch on a GPU that FAISS cannot use. `init` (k, D) replaces k distinct random points as the start.
    Raises SemdictError for a row with NaN or Inf (named), fewer distinct points than k, and an engine that is missing.
    """
    if len(features.shape) != 2 or k < 1 or iterations < 1:
        raise SemdictError(f"k-means of {tuple(features.shape)} features, k {k}, iterations {iterations}: not possible")
    run, name, device_name = _select_engine(engine, device)
    rows = _draw_rows(features.shape[0], max_points_per_centroid * k, seed)
    sample_ND = _read(features, rows, keep_half=run is _lloyd)
    start_KD = _distinct_start(sample_ND, k, seed)
    if init is not None:
        start_KD = np.ascontiguousarray(init, dtype=np.float32)
        if start_KD.shape != (k, sample_ND.shape[1]):
            raise SemdictError(f"init is {start_KD.shape}, expected ({k}, {sample_ND.shape[1]})")
    centroids_KD, *curves = run(sample_ND, start_KD, iterations, device_name)
    counts_K = np.bincount(_assign_array(sample_ND, torch.from_numpy(centroids_KD).to(device_name)), minlength=k)
    order_K = np.argsort(-counts_K, kind="stable")
    return KmeansResult(centroids_KD[order_K], counts_K[order_K], *curves, engine=name, points=len(sample_ND))


def assign(features: Tensor | np.ndarray, centroids: Tensor | np.ndarray) -> Tensor | np.ndarray:
    """(N, D) features, (K, D) centroids -> (N,) int64: argmin of squared distance in float32, lowest id on a tie.

    Computed on the features' device in chunks; a numpy array in gives a numpy array out. SemdictError when the
    widths differ or a row holds NaN or Inf.
    """
    centroids_KD = torch.as_tensor(centroids)
    if isinstance(features, np.ndarray):
        return _assign_array(features, centroids_KD)
    return nearest(features, centroids_KD)


def _select_engine(engine: str, device: str) -> tuple[Any, str, str]:
    """(engine function, its name with version, device)."""
    if engine not in ("auto", "faiss", "torch"):
        raise SemdictError(f"k-means engine {engine} is unknown: auto, faiss or torch")
    cuda = torch.cuda.is_available()
    device_name = ("cuda" if cuda else "cpu") if device == "auto" else device
    if device_name.startswith("cuda") and not cuda:
        raise SemdictError(f"k-means device {device}: no such GPU here; use auto or cpu")
    torch_engine = (_lloyd, f"torch {torch.__version__} {torch.device(device_name).type}", device_name)
    if engine == "torch" or (engine == "auto" and importlib.util.find_spec("faiss") is None):
        return torch_engine
    if importlib.util.find_spec("faiss") is None:
        raise SemdictError("k-means engine faiss is not installed; install faiss-cpu or faiss-gpu, or use engine torch")
    import faiss

    if device_name.startswith("cuda") and (why := faiss_gpu_error()):
        if engine == "auto":
            print(f"k-means: torch instead of FAISS, which cannot use this GPU ({why})", file=sys.stderr)
            return torch_engine
        if device != "auto":
            raise SemdictError(f"FAISS cannot use this GPU ({why}); use kmeans.engine: torch, or runtime.device: cpu")
        device_name = "cpu"
    return _faiss, f"faiss {faiss.__version__} {torch.device(device_name).type}", device_name


GPU_TRIAL = """
import sys, numpy, faiss
if faiss.get_num_gpus() == 0:
    sys.exit("this build of FAISS has no GPU support")
faiss.Kmeans(4, 2, niter=1, gpu=True, min_points_per_centroid=1).train(numpy.eye(4, dtype=numpy.float32))
"""


@cache
def faiss_gpu_error() -> str:
    """Why FAISS cannot train on a GPU here, "" if it can: tried in a child, for builds without kernels may abort."""
    child = subprocess.run([sys.executable, "-c", GPU_TRIAL], capture_output=True, text=True, check=False)
    if child.returncode == 0:
        return ""
    return (child.stderr.strip().splitlines() or [f"the trial ended with status {child.returncode}"])[-1][:200]


def _draw_rows(total: int, limit: int, seed: int) -> np.ndarray:
    """Ascending row numbers: all of them, or `limit` distinct ones drawn by `seed`."""
    if total <= limit:
        return np.arange(total)
    return np.sort(np.random.default_rng(seed).choice(total, limit, replace=False, shuffle=False))


def _read(features: Any, rows_N: np.ndarray, keep_half: bool) -> np.ndarray:
    """Rows `rows_N` in memory, (N, D) float32, or float16 as stored when the engine can use it; all finite."""
    width = features.shape[1]
    half = keep_half and str(features.dtype).removeprefix("torch.") == "float16"
    sample_ND = np.empty((len(rows_N), width), dtype=np.float16 if half else np.float32)
    slab = max(1, SLAB_BYTES // (4 * width))
    for first in range(0, features.shape[0], slab):
        low, high = np.searchsorted(rows_N, (first, first + slab))
        if low == high:
            continue
        block = features[first : first + slab]
        block = block.detach().cpu().float().numpy() if isinstance(block, Tensor) else np.asarray(block)
        part = block[rows_N[low:high] - first]
        bad = ~np.isfinite(part).all(axis=1)
        if bad.any():
            refuse_non_finite(torch.from_numpy(part[bad.argmax()][None].astype(np.float32)), rows_N[low + bad.argmax()])
        sample_ND[low:high] = part
    return sample_ND


def _distinct_start(sample_ND: np.ndarray, k: int, seed: int) -> np.ndarray:
    """(k, D) float32: the first k points of a seeded permutation that differ from one another; refused if too few."""
    order_N = np.random.default_rng([seed, 1]).permutation(len(sample_ND))
    seen: set[bytes] = set()
    picks: list[int] = []
    for row in order_N:
        key = (sample_ND[row] + 0.0).tobytes()  # -0.0 and 0.0 are one point
        if key not in seen:
            seen.add(key)
            picks.append(row)
            if len(picks) == k:
                return sample_ND[picks].astype(np.float32)
    raise SemdictError(
        f"k-means around {k} centroids needs {k} distinct points, the sample of {len(sample_ND)} points has "
        f"{len(picks)}; lower kmeans.k or sample more images"
    )


def _faiss(sample_ND: np.ndarray, start_KD: np.ndarray, iterations: int, device_name: str) -> tuple:
    """Lloyd's iteration by FAISS, CPU or GPU build; (centroids, objective, splits, imbalance)."""
    import faiss

    points, width = sample_ND.shape
    k = len(start_KD)
    if points == k:  # FAISS would copy the points and report no iteration
        return _lloyd(sample_ND, start_KD, iterations, "cpu")
    engine = faiss.Kmeans(
        width,
        k,
        niter=iterations,
        gpu=device_name.startswith("cuda"),
        max_points_per_centroid=points // k + 1,  # the sample is drawn already
        min_points_per_centroid=1,
    )
    engine.train(sample_ND, init_centroids=start_KD)
    stats = engine.iteration_stats
    return (
        np.array(engine.centroids, dtype=np.float32),
        [float(step["obj"]) / points for step in stats],
        [int(step["nsplit"]) for step in stats],
        [float(step["imbalance_factor"]) for step in stats],
    )


def _lloyd(sample_ND: np.ndarray, start_KD: np.ndarray, iterations: int, device_name: str) -> tuple:
    """Lloyd's iteration in torch; (centroids, objective, splits, imbalance). Same bits for the same device.

    Sums are kept in 64-bit fixed point: their order, which a GPU does not promise, then changes nothing.
    """
    points, k = len(sample_ND), len(start_KD)
    centroids_KD = torch.from_numpy(start_KD).to(device_name)
    peak = max(float(sample_ND.max()), -float(sample_ND.min()), 1e-30)
    unit = 2.0 ** (61 - math.ceil(math.log2(peak)) - math.ceil(math.log2(points)))
    sample = _near(sample_ND, centroids_KD.device)
    curves: tuple[list, list, list] = ([], [], [])
    for _ in range(iterations):
        sums_KD, counts_K, objective = _one_pass(sample, centroids_KD, unit)
        means_KD = (sums_KD.double() / unit / counts_K.clamp(min=1)[:, None]).float()
        centroids_KD = torch.where(counts_K[:, None] > 0, means_KD, centroids_KD)
        sizes = counts_K.double().cpu().numpy()
        curves[0].append(objective / points)
        curves[2].append(float(k * np.square(sizes).sum() / points**2))
        curves[1].append(_split_empty(centroids_KD, sizes, points))
    return (centroids_KD.cpu().numpy(), *curves)


def _near(sample_ND: np.ndarray, device: torch.device) -> Tensor:
    """The sample on the device if it leaves half of the free memory there, else where it is."""
    sample = torch.from_numpy(sample_ND)
    if device.type == "cuda" and sample.nbytes < torch.cuda.mem_get_info(device)[0] // 2:
        return sample.to(device)
    return sample


def _one_pass(sample_ND: Tensor, centroids_KD: Tensor, unit: float) -> tuple[Tensor, Tensor, float]:
    """Sums (K, D) int64 in units of 1 / unit, counts (K,) int64, and the summed squared distance."""
    sums_KD = torch.zeros(centroids_KD.shape, dtype=torch.int64, device=centroids_KD.device)
    counts_K = torch.zeros(len(centroids_KD), dtype=torch.int64, device=centroids_KD.device)
    objective = torch.zeros((), dtype=torch.float64, device=centroids_KD.device)
    rows, norms_K = rows_per_chunk(centroids_KD), centroids_KD.square().sum(1)
    for first in range(0, len(sample_ND), rows):
        part_ND = sample_ND[first : first + rows].to(centroids_KD.device).float()
        ids_N, scores_N = search_chunk(part_ND, centroids_KD, norms_K)
        sums_KD.index_add_(0, ids_N, (part_ND.double() * unit).round().long())
        counts_K += torch.bincount(ids_N, minlength=len(centroids_KD))
        objective += (scores_N.double() + part_ND.double().square().sum(1)).clamp(min=0).sum()
    return sums_KD, counts_K, float(objective)


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


def _assign_array(points_ND: np.ndarray, centroids_KD: Tensor) -> np.ndarray:
    """(N,) int64 ids of the nearest centroids of an array, searched on the centroids' device slab by slab."""
    ids_N = np.empty(points_ND.shape[0], dtype=np.int64)
    slab = max(1, SLAB_BYTES // (4 * points_ND.shape[1]))
    for first in range(0, len(ids_N), slab):
        part_ND = torch.from_numpy(np.array(points_ND[first : first + slab]))  # a copy: a memory map is read-only
        ids_N[first : first + slab] = nearest(part_ND.to(centroids_KD.device), centroids_KD, first).cpu().numpy()
    return ids_N

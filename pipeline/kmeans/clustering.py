"""k-means over patch features: training by FAISS or by a plain torch Lloyd iteration, and assignment to centroids.

Both engines get the same initial centroids, split empty clusters in the same way and number the centroids alike.
"""

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from semdict.pipeline.common.errors import SemdictError
from semdict.pipeline.common.nearest import nearest, refuse_non_finite
from semdict.pipeline.kmeans.faiss_engine import faiss_gpu_error, faiss_lloyd, gpu_number
from semdict.pipeline.kmeans.torch_engine import Curves, lloyd

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
    sampled by `seed`, are in memory, once, as float16 where they are stored so. `engine` is auto, faiss or torch; auto
    takes FAISS (its GPU build when there), and torch on a GPU that FAISS cannot use. FAISS works on one GPU; torch
    takes all that the process sees, or the one that `device` names. `init` (k, D) replaces k distinct random points as
    the start.
    Raises SemdictError for a row with NaN or Inf (named), fewer distinct points than k, and an engine that is missing.
    """
    if len(features.shape) != 2 or k < 1 or iterations < 1:
        raise SemdictError(f"k-means of {tuple(features.shape)} features, k {k}, iterations {iterations}: not possible")
    run, name, devices = _select_engine(engine, device)
    rows = _draw_rows(features.shape[0], max_points_per_centroid * k, seed)
    sample_ND = _read(features, rows)
    start_KD = _distinct_start(sample_ND, k, seed)
    if init is not None:
        start_KD = np.ascontiguousarray(init, dtype=np.float32)
        if start_KD.shape != (k, sample_ND.shape[1]):
            raise SemdictError(f"init is {start_KD.shape}, expected ({k}, {sample_ND.shape[1]})")
    centroids_KD, curves = run(sample_ND, start_KD, iterations, devices)
    counts_K = np.bincount(_assign_array(sample_ND, torch.from_numpy(centroids_KD).to(devices[0])), minlength=k)
    order_K = np.argsort(-counts_K, kind="stable")
    return KmeansResult(centroids_KD[order_K], counts_K[order_K], **asdict(curves), engine=name, points=len(sample_ND))


def assign(features: Tensor | np.ndarray, centroids: Tensor | np.ndarray) -> Tensor | np.ndarray:
    """(N, D) features, (K, D) centroids -> (N,) int64: argmin of squared distance in float32, lowest id on a tie.

    Computed on the features' device in chunks; a numpy array in gives a numpy array out. SemdictError when the
    widths differ or a row holds NaN or Inf.
    """
    centroids_KD = torch.as_tensor(centroids)
    if isinstance(features, np.ndarray):
        return _assign_array(features, centroids_KD)
    return nearest(features, centroids_KD)


Engine = Callable[[np.ndarray, np.ndarray, int, list[str]], tuple[np.ndarray, Curves]]


def _select_engine(engine: str, device: str) -> tuple[Engine, str, list[str]]:
    """(engine function, its name with version and device, devices: the first one also assigns)."""
    if engine not in ("auto", "faiss", "torch"):
        raise SemdictError(f"k-means engine {engine} is unknown: auto, faiss or torch")
    cuda = torch.cuda.is_available()
    device_name = ("cuda" if cuda else "cpu") if device == "auto" else device
    if device_name.startswith("cuda") and not cuda:
        raise SemdictError(f"k-means device {device}: no such GPU here; use auto or cpu")
    if engine == "torch" or (engine == "auto" and importlib.util.find_spec("faiss") is None):
        return _torch_engine(device_name)
    if importlib.util.find_spec("faiss") is None:
        raise SemdictError("k-means engine faiss is not installed; install faiss-cpu or faiss-gpu, or use engine torch")
    import faiss

    if device_name.startswith("cuda") and (why := faiss_gpu_error(gpu_number(device_name))):
        if engine == "auto":
            print(f"k-means: torch instead of FAISS, which cannot use this GPU ({why})", file=sys.stderr)
            return _torch_engine(device_name)
        if device != "auto":
            raise SemdictError(f"FAISS cannot use this GPU ({why}); use kmeans.engine: torch, or runtime.device: cpu")
        device_name = "cpu"
    return faiss_lloyd, f"faiss {faiss.__version__} {torch.device(device_name).type}", [device_name]


def _torch_engine(device_name: str) -> tuple[Engine, str, list[str]]:
    """The torch engine on the named device, or on all visible GPUs if none is named by number."""
    device, count = torch.device(device_name), 1
    if device.type == "cuda" and device.index is None:
        count = torch.cuda.device_count()
    devices = [f"cuda:{i}" for i in range(count)] if count > 1 else [device_name]
    return lloyd, f"torch {torch.__version__} {device.type}{f' x {count}' if count > 1 else ''}", devices


def _draw_rows(total: int, limit: int, seed: int) -> np.ndarray:
    """Ascending row numbers: all of them, or `limit` distinct ones drawn by `seed`."""
    if total <= limit:
        return np.arange(total)
    return np.sort(np.random.default_rng(seed).choice(total, limit, replace=False, shuffle=False))


def _read(features: Any, rows_N: np.ndarray) -> np.ndarray:
    """Rows `rows_N` in memory, (N, D) float16 where they are stored so, else float32; all finite."""
    width = features.shape[1]
    half = str(features.dtype).removeprefix("torch.") == "float16"
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


def _assign_array(points_ND: np.ndarray, centroids_KD: Tensor) -> np.ndarray:
    """(N,) int64 ids of the nearest centroids of an array, searched on the centroids' device slab by slab."""
    ids_N = np.empty(points_ND.shape[0], dtype=np.int64)
    slab = max(1, SLAB_BYTES // (4 * points_ND.shape[1]))
    for first in range(0, len(ids_N), slab):
        part_ND = torch.from_numpy(np.array(points_ND[first : first + slab]))  # a copy: a memory map is read-only
        ids_N[first : first + slab] = nearest(part_ND.to(centroids_KD.device), centroids_KD, first).cpu().numpy()
    return ids_N

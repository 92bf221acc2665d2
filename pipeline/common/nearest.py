"""Nearest code by squared Euclidean distance, the search of tokenizers and of k-means; exact float32 products."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from semdict.pipeline.common.errors import SemdictError

# Elements of the largest (rows, K) float32 matrix of distances: 64 MiB on a CPU, 1 GiB on a GPU.
CPU_CELLS, GPU_CELLS = 1 << 24, 1 << 28


@contextmanager
def exact_float32() -> Iterator[None]:
    """Float32 products and convolutions keep all their bits (no TF32, no bfloat16 passes) inside this context."""
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


@torch.no_grad()
def nearest(points_ND: Tensor, codes_KD: Tensor, first_row: int = 0) -> Tensor:
    """(N,) int64: for each point the code of least squared distance, lowest id on a tie.

    Any float dtype, computed in float32 on the points' device as |c|^2 - 2 x.c (|x|^2 changes no order), in chunks
    of rows: no (N, K, D) tensor, no (N, K) either. SemdictError names the first row that holds NaN or Inf in float32,
    counted from `first_row`.
    """
    if points_ND.ndim != 2 or codes_KD.ndim != 2 or points_ND.shape[1] != codes_KD.shape[1]:
        raise SemdictError(
            f"points are {tuple(points_ND.shape)}, the codebook is {tuple(codes_KD.shape)}: "
            "both must be two-dimensional and of equal width"
        )
    codes_KD = codes_KD.to(device=points_ND.device, dtype=torch.float32)
    ids_N = torch.empty(points_ND.shape[0], dtype=torch.int64, device=points_ND.device)
    rows, norms_K = rows_per_chunk(codes_KD), codes_KD.square().sum(1)
    for start in range(0, points_ND.shape[0], rows):
        chunk_ND = points_ND[start : start + rows].float()
        refuse_non_finite(chunk_ND, first_row + start)
        ids_N[start : start + rows] = search_chunk(chunk_ND, codes_KD, norms_K)[0]
    return ids_N


def rows_per_chunk(codes_KD: Tensor) -> int:
    """How many points may be compared with all codes at once on the codes' device."""
    return max(1, (GPU_CELLS if codes_KD.device.type == "cuda" else CPU_CELLS) // max(codes_KD.shape))


def search_chunk(points_ND: Tensor, codes_KD: Tensor, norms_K: Tensor) -> tuple[Tensor, Tensor]:
    """Few points, float32, `norms_K` = |c|^2: ids (N,) int64 of the nearest codes, and their distance less |x|^2."""
    with torch.autocast(points_ND.device.type, enabled=False), exact_float32():
        scores_NK = torch.addmm(norms_K, points_ND, codes_KD.T, alpha=-2)
    ids_N = scores_NK.argmin(dim=1)  # the first of equal minima, as torch documents
    return ids_N, scores_NK.gather(1, ids_N[:, None])[:, 0]


def refuse_non_finite(points_ND: Tensor, first_row: int = 0) -> None:
    """SemdictError that names the first row with NaN or Inf; rows are counted from `first_row`."""
    if torch.isfinite(points_ND).all():
        return
    bad = (~torch.isfinite(points_ND)).any(dim=1).nonzero()[:, 0]
    raise SemdictError(
        f"row {first_row + int(bad[0])} of the features holds NaN or Inf ({len(bad)} such rows of {len(points_ND)}); "
        "check the weights and the precision of the model that made them"
    )

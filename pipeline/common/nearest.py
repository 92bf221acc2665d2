"""Nearest code by squared Euclidean distance, the search of tokenizers and of k-means; exact float32 products."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from semdict.pipeline.common.errors import SemdictError

# Elements of the largest (rows, K) float32 matrix of distances: 64 MiB on a CPU, 1 GiB on a GPU.
CPU_CELLS, GPU_CELLS = 1 << 24, 1 << 28
# On a GPU, codebooks at least this large and wide are searched by shortlist: TF32 products find the best SHORTLIST
# codes, float32 products the nearest among them. Smaller searches are bound by memory, not by products.
SHORTLIST, SHORTLIST_CODES, SHORTLIST_WIDTH = 32, 4096, 64

_marks: ContextVar[bool] = ContextVar("marks", default=False)


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Inside, float32 products and convolutions on a GPU run in "ieee" or "tf32"; on a CPU they are always exact."""
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend, wanted in zip(backends, (precision, precision, "ieee"), strict=True):
            backend.fp32_precision = wanted
        yield
    finally:
        for backend, old in zip(backends, before, strict=True):
            backend.fp32_precision = old


def exact_float32() -> AbstractContextManager[None]:
    """Float32 products and convolutions keep all their bits (no TF32, no bfloat16 passes) inside this context."""
    return float32_products("ieee")


@contextmanager
def marked_non_finite() -> Iterator[None]:
    """Inside, `nearest` gives -1 to a row with NaN or Inf and does not raise: to raise it would wait for the GPU."""
    token = _marks.set(True)
    try:
        yield
    finally:
        _marks.reset(token)


@torch.no_grad()
def nearest(points_ND: Tensor, codes_KD: Tensor, first_row: int = 0) -> Tensor:
    """(N,) int64: for each point the code of least squared distance, lowest id on a tie.

    Any float dtype, computed in float32 on the points' device as |c|^2 - 2 x.c (|x|^2 changes no order), in chunks
    of rows: no (N, K, D) tensor, no (N, K) either. SemdictError names the first row that holds NaN or Inf in float32,
    counted from `first_row`; inside `marked_non_finite` such a row gets -1.
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
        if not _marks.get():
            refuse_non_finite(chunk_ND, first_row + start)
        part_N = search_chunk(chunk_ND, codes_KD, norms_K)[0]
        ids_N[start : start + rows] = _marked(part_N, chunk_ND) if _marks.get() else part_N
    return ids_N


def rows_per_chunk(codes_KD: Tensor) -> int:
    """How many points may be compared with all codes at once on the codes' device."""
    return max(1, (GPU_CELLS if codes_KD.device.type == "cuda" else CPU_CELLS) // max(codes_KD.shape))


def search_chunk(points_ND: Tensor, codes_KD: Tensor, norms_K: Tensor) -> tuple[Tensor, Tensor]:
    """Few points, float32, `norms_K` = |c|^2: ids (N,) int64 of the nearest codes, and their distance less |x|^2."""
    large = len(codes_KD) >= SHORTLIST_CODES and codes_KD.shape[1] >= SHORTLIST_WIDTH
    if points_ND.device.type == "cuda" and large:
        return shortlist_search(points_ND, codes_KD, norms_K)
    return full_search(points_ND, codes_KD, norms_K)


def full_search(points_ND: Tensor, codes_KD: Tensor, norms_K: Tensor) -> tuple[Tensor, Tensor]:
    """`search_chunk` by float32 products with every code."""
    with torch.autocast(points_ND.device.type, enabled=False), exact_float32():
        scores_NK = torch.addmm(norms_K, points_ND, codes_KD.T, alpha=-2)
    ids_N = scores_NK.argmin(dim=1)  # the first of equal minima, as torch documents
    return ids_N, scores_NK.gather(1, ids_N[:, None])[:, 0]


def shortlist_search(
    points_ND: Tensor, codes_KD: Tensor, norms_K: Tensor, rough_NK: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`search_chunk` by float32 products with the SHORTLIST codes that are best by rough ones.

    `rough_NK`: rough scores to use instead of TF32's. The same ids as `full_search` unless the nearest code is not in
    the shortlist: `benchmarks/bench_search.py` counts such rows on features of real images.
    """
    with torch.autocast(points_ND.device.type, enabled=False):
        if rough_NK is None:
            rough_NK = rough_scores(points_ND, codes_KD, norms_K)
        best_NS = rough_NK.topk(SHORTLIST, dim=1, largest=False, sorted=False).indices
        ids_NS = best_NS.sort(dim=1).values  # so that a tie goes to the lowest id
        del rough_NK
        with exact_float32():
            products_NS = torch.bmm(codes_KD[ids_NS], points_ND[:, :, None])[:, :, 0]
        scores_NS = torch.add(norms_K[ids_NS], products_NS, alpha=-2)
    best_N1 = scores_NS.argmin(dim=1, keepdim=True)
    return ids_NS.gather(1, best_N1)[:, 0], scores_NS.gather(1, best_N1)[:, 0]


def rough_scores(points_ND: Tensor, codes_KD: Tensor, norms_K: Tensor) -> Tensor:
    """(N, K) float32: |c|^2 - 2 x.c by TF32 products where the device has them (ten bits of each factor)."""
    with float32_products("tf32"):
        return torch.addmm(norms_K, points_ND, codes_KD.T, alpha=-2)


def refuse_non_finite(points_ND: Tensor, first_row: int = 0) -> None:
    """SemdictError that names the first row with NaN or Inf; rows are counted from `first_row`."""
    if torch.isfinite(points_ND).all():
        return
    bad = (~torch.isfinite(points_ND)).any(dim=1).nonzero()[:, 0]
    raise SemdictError(
        f"row {first_row + int(bad[0])} of the features holds NaN or Inf ({len(bad)} such rows of {len(points_ND)}); "
        "check the weights and the precision of the model that made them"
    )


def _marked(ids_N: Tensor, points_ND: Tensor) -> Tensor:
    """The ids, -1 where the point is not finite; nothing is read back."""
    return torch.where(torch.isfinite(points_ND).all(dim=1), ids_N, -1)

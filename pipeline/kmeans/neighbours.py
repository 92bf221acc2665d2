"""The nearest entries of each entry of a codebook, with weights: the (K, S) table of LEASE's codebook contrast.

The one implementation. Token shards store its result for S = 6 and tau = 0.1, for readers that have no semdict.
`train.masked.losses.neighbour_table` calls it with the S and tau of a run. Plain numpy.
"""

import numpy as np

from semdict.pipeline.common.errors import WeightsError


def neighbour_table(
    centroids: np.ndarray, size: int = 6, tau: float = 0.1, rows: int = 1024
) -> tuple[np.ndarray, np.ndarray]:
    """ids (K, S) int32 and weights (K, S) of each entry's `size` nearest by cosine, itself first.

    centroids: (K, D); float64 is worked in float64, every other type in float32, and so are the weights. Rows are
    normalised here. S = min(size, K); of equal cosines the lower id comes first. weights = softmax(cosine / tau) over
    the S entries, summing to 1 (LEASE, section 3: the targets of the codebook contrast). `rows` entries at a time, so
    that no (K, K) array exists. Raises WeightsError if a row is zero or not finite.
    """
    unit = _normalised(centroids)
    size = min(size, len(unit))
    ids = np.empty((len(unit), size), np.int32)
    weights = np.empty((len(unit), size), unit.dtype)
    for start in range(0, len(unit), rows):
        entries = np.arange(start, min(start + rows, len(unit)))
        near = _candidates(unit, entries, size)
        # float64 and a fixed order of summation: the bytes do not depend on the number of threads
        cosine = np.einsum("rd,rsd->rs", unit[entries], unit[near], dtype=np.float64)
        order = np.lexsort((near, -cosine, near != entries[:, None]))[:, :size]
        near, cosine = np.take_along_axis(near, order, 1), np.take_along_axis(cosine, order, 1)
        ids[entries] = near
        scaled = np.exp((cosine - cosine.max(axis=1, keepdims=True)) / tau)
        weights[entries] = scaled / scaled.sum(axis=1, keepdims=True)
    return ids, weights


def _candidates(unit: np.ndarray, entries: np.ndarray, size: int) -> np.ndarray:
    """(R, 2 S or K) ids among which are the S nearest of each entry, and the entry itself."""
    cosine = unit[entries] @ unit.T
    cosine[np.arange(len(entries)), entries] = np.inf
    keep = min(2 * size, len(unit))
    return np.argpartition(-cosine, keep - 1, axis=1)[:, :keep]


def _normalised(centroids: np.ndarray) -> np.ndarray:
    """Rows of length 1, float64 or float32."""
    centroids = np.asarray(centroids)
    if centroids.ndim != 2 or not len(centroids):
        raise WeightsError(f"centroids must be (K, D), got shape {centroids.shape}")
    length = np.sqrt(np.einsum("kd,kd->k", centroids, centroids, dtype=np.float64))
    bad = np.flatnonzero(~np.isfinite(length) | (length == 0))
    if bad.size:
        raise WeightsError(f"centroid {bad[0]} is zero or not finite ({bad.size} such rows): it has no direction")
    return (centroids / length[:, None]).astype(np.float64 if centroids.dtype == np.float64 else np.float32)

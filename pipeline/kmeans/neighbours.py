"""Which words of a dictionary are close to which: the (K, 6) table that the codebook contrast needs. Plain numpy."""

import numpy as np

from semdict.pipeline.common.errors import WeightsError


def neighbour_table(
    centroids: np.ndarray, size: int = 6, tau: float = 0.1, rows: int = 1024
) -> tuple[np.ndarray, np.ndarray]:
    """ids (K, S) int32 and weights (K, S) float32 of each word's `size` nearest by cosine, itself first.

    centroids (K, D) float; rows are normalised here. weights = softmax(cosine / tau) over the S words and sum to 1
    (LEASE, the target of the neighbour loss). S = min(size, K); equal cosines go to the lower id. `rows` words at a
    time, so no (K, K) array exists. WeightsError where a row is zero or not finite.
    """
    unit = _normalised(centroids)
    size = min(size, len(unit))
    ids = np.empty((len(unit), size), np.int32)
    weights = np.empty((len(unit), size), np.float32)
    for start in range(0, len(unit), rows):
        words = np.arange(start, min(start + rows, len(unit)))
        near = _nearest(unit, words, size)
        # float64 and a fixed order of summation: the bytes do not depend on the number of threads
        cosine = np.einsum("rd,rsd->rs", unit[words], unit[near], dtype=np.float64)
        order = np.lexsort((near, -cosine, near != words[:, None]))[:, :size]
        near, cosine = np.take_along_axis(near, order, 1), np.take_along_axis(cosine, order, 1)
        ids[words] = near
        scaled = np.exp((cosine - cosine.max(axis=1, keepdims=True)) / tau)
        weights[words] = scaled / scaled.sum(axis=1, keepdims=True)
    return ids, weights


def _nearest(unit: np.ndarray, words: np.ndarray, size: int) -> np.ndarray:
    """(R, about 2 S) ids that hold the S nearest of each word, chosen in float32; the word itself is among them."""
    cosine = unit[words] @ unit.T
    cosine[np.arange(len(words)), words] = np.inf
    keep = min(2 * size, len(unit))
    return np.argpartition(-cosine, keep - 1, axis=1)[:, :keep]


def _normalised(centroids: np.ndarray) -> np.ndarray:
    """Rows of length 1, float32."""
    centroids = np.asarray(centroids)
    if centroids.ndim != 2 or not len(centroids):
        raise WeightsError(f"centroids must be (K, D), got shape {centroids.shape}")
    length = np.sqrt(np.einsum("kd,kd->k", centroids, centroids, dtype=np.float64))
    bad = np.flatnonzero(~np.isfinite(length) | (length == 0))
    if bad.size:
        raise WeightsError(f"centroid {bad[0]} is zero or not finite ({bad.size} such rows): it has no direction")
    return (centroids / length[:, None]).astype(np.float32)

"""Frechet distance between Gaussians (Heusel et al., arXiv:1706.08500), in float64 throughout."""

import numpy as np


def gaussian(features_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and covariance (D, D) with N - 1 in the denominator, float64."""
    features = np.asarray(features_ND, dtype=np.float64)
    return features.mean(axis=0), np.cov(features, rowvar=False).reshape(features.shape[1], -1)


def frechet_distance(one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)).

    The trace of the root is the sum of the roots of the eigenvalues of S1^(1/2) S2 S1^(1/2), a symmetric matrix; what
    rounding makes negative counts as 0.
    """
    (m1, s1), (m2, s2) = ([np.asarray(part, dtype=np.float64) for part in pair] for pair in (one, other))
    if m1.shape != m2.shape or s1.shape != s2.shape:
        raise ValueError(f"features of width {len(m1)} cannot be compared with features of width {len(m2)}")
    values, vectors = np.linalg.eigh(s1)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    middle = root @ s2 @ root
    roots = np.sqrt(np.linalg.eigvalsh((middle + middle.T) / 2).clip(min=0))
    difference = m1 - m2
    return float(difference @ difference + np.trace(s1) + np.trace(s2) - 2 * roots.sum())

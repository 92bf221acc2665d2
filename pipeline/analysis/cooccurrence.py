"""Generative against discriminative ids on the same cells: joint counts, conditional entropy, mutual information.

Kg, Kd: entries of the two codebooks. Bits, from plug-in estimates; multiply by ln 2 for the nats of LEASE, figure D.1.
Plain numpy.
"""

import numpy as np

from semdict.pipeline.shards.ids import order0_entropy, sum_xlog2x


def cooccurrence(
    gen: np.ndarray, disc: np.ndarray, gen_size: int, disc_size: int, out: np.ndarray | None = None
) -> np.ndarray:
    """(Kg, Kd) int64: how often ids g and d stand on the same cell, in arrays of equal shape.

    The counts are added to `out` if it is passed. 1024 x 16384 pairs are 134 MB. Raises ValueError for an id outside
    its codebook.
    """
    if gen.shape != disc.shape:
        raise ValueError(f"paired tokens must have one shape, got {gen.shape} and {disc.shape}")
    joint = np.zeros((gen_size, disc_size), np.int64) if out is None else out
    flat_g, flat_d, step = gen.reshape(-1), disc.reshape(-1), max(1 << 16, joint.size)
    for start in range(0, flat_g.size, step):
        g, d = flat_g[start : start + step], flat_d[start : start + step]
        if g.max() >= gen_size or d.max() >= disc_size or min(g.min(), d.min()) < 0:
            raise ValueError(f"ids reach {g.max()} and {d.max()}, the codebooks are {gen_size} and {disc_size} long")
        pairs = g.astype(np.int64) * disc_size + d
        joint += np.bincount(pairs, minlength=joint.size).reshape(joint.shape)
    return joint


def entropy_given_column(joint: np.ndarray) -> np.ndarray:
    """(Kd,) bits: H(row variable | column = d) of counts (Kg, Kd); nan for a column that never occurs.

    H(GEN | DISC = d) for `cooccurrence`'s table, H(DISC | GEN = g) for its transpose (LEASE, figure D.1).
    """
    joint = np.asarray(joint, np.float64)
    total = joint.sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(total > 0, np.log2(total) - sum_xlog2x(joint, axis=0) / total, np.nan)


def mean_conditional_entropy(joint: np.ndarray) -> float:
    """Bits: H(row variable | column variable) = H(joint) - H(column) of counts (Kg, Kd)."""
    return order0_entropy(joint) - order0_entropy(joint.sum(axis=0))


def pointwise_mutual_information(joint: np.ndarray) -> np.ndarray:
    """(Kg, Kd) float64 bits, log2 p(g, d) / (p(g) p(d)); -inf for a pair that never occurs (LEASE, figure D.3)."""
    joint = np.asarray(joint, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = joint.sum(axis=1, keepdims=True) * (joint.sum(axis=0, keepdims=True) / joint.sum())
        return np.where(joint > 0, np.log2(joint / expected), -np.inf)

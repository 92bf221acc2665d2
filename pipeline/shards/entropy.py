"""Order-0 entropy of token counts: the size that a memoryless code would reach."""

import math

import numpy as np


def order0_entropy(counts: np.ndarray) -> float:
    """Bits per token of a memoryless source with these counts (any shape, pooled); 0 for an empty histogram."""
    counts = np.asarray(counts, np.float64).reshape(-1)
    counts = counts[counts > 0]
    total = counts.sum()
    return max(0.0, float(math.log2(total) - clog(counts) / total)) if counts.size else 0.0


def clog(counts: np.ndarray, axis: int | None = None) -> np.ndarray:
    """Sum of c log2 c, where 0 log2 0 is 0."""
    return (counts * np.log2(np.maximum(counts, 1))).sum(axis=axis)

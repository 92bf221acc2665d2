"""Per-position conditional entropy: partition refinement against a dictionary of prefixes, and at ImageNet size.

Example: python -m benchmarks.bench_entropy --out benchmarks/results/entropy.json      (--small for a quick look)
"""

import time
from collections import Counter

import numpy as np

from benchmarks.report import arguments, machine, publish
from semdict.pipeline.analysis import conditional_entropy

LENGTH = 256


def by_prefixes(tokens: np.ndarray) -> np.ndarray:
    """The baseline: count prefixes as bytes in a dictionary, position by position."""
    n, width, previous, curve = len(tokens), tokens.dtype.itemsize, 0.0, []
    rows = [row.tobytes() for row in tokens]
    for t in range(1, tokens.shape[1] + 1):
        counts = np.fromiter(Counter(row[: t * width] for row in rows).values(), np.float64)
        joint = np.log2(n) - (counts * np.log2(counts)).sum() / n
        curve.append(joint - previous)
        previous = joint
    return np.array(curve)


def make(rows: int, sizes: np.ndarray, duplicates: float) -> np.ndarray:
    """(rows, L) uint16 independent ids below sizes[t]; the last share of rows repeats the first."""
    rng = np.random.default_rng(0)
    tokens = np.empty((rows, len(sizes)), np.uint16)
    for t, size in enumerate(sizes):
        tokens[:, t] = rng.integers(0, size, rows)
    repeated = int(duplicates * rows)
    if repeated:
        tokens[-repeated:] = tokens[:repeated]
    return tokens


def timed(function, tokens: np.ndarray) -> tuple[float, np.ndarray]:
    started = time.perf_counter()
    curve = function(tokens)
    return time.perf_counter() - started, curve


def main() -> None:
    args = arguments(__doc__, "entropy").parse_args()
    rows, compared = (12_811, 2_000) if args.small else (1_281_167, 20_000)
    share = np.arange(LENGTH) / (LENGTH - 1)
    schedules = {
        "constant 16384": np.full(LENGTH, 16384),
        "cosine 2..16384": np.floor(2 + 16382 * (1 - np.cos(np.pi * share / 2)) + 0.5).astype(int),
        "power 2..16384": np.floor(2 + 16382 * share**2.5 + 0.5).astype(int),
    }
    result: dict = {
        "machine": machine(),
        "rows": rows,
        "rows_compared": compared,
        "seconds": {},
        "ratio_to_prefixes": {},
    }
    for name, sizes in schedules.items():
        for duplicates in (0.0, 0.1):
            case = f"{name}, {duplicates:.0%} duplicates"
            result["seconds"][case], _ = timed(conditional_entropy, make(rows, sizes, duplicates))
            few = make(compared, sizes, duplicates)
            ours, curve = timed(conditional_entropy, few)
            theirs, want = timed(by_prefixes, few)
            assert np.abs(curve - want).max() < 1e-9
            result["ratio_to_prefixes"][case] = theirs / ours
    publish(args.out, result)


if __name__ == "__main__":
    main()

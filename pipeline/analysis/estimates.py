"""Entropy along the token sequence: estimates in bits, and the remainder of log2 N. Plain numpy.

N rows, L positions, K codes. Every estimate is the plug-in (empirical) one over the rows. A curve depends on N as much
as on the structure of the tokens, so show the null curves beside it.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from semdict.pipeline.shards.ids import sum_xlog2x

BLOCK = 8  # columns fetched at once for the rows that remain
Fetch = Callable[[np.ndarray, int, int], np.ndarray]  # (rows (n,), start, stop) -> ids (stop - start, n)


def conditional_entropy(tokens: np.ndarray) -> np.ndarray:
    """(L,) float64 bits: empirical H(x_t | x_<t) of the rows of `tokens` (N, L), non-negative integers.

    Partition refinement: rows with an equal prefix form a group; each position splits groups, and a row alone in its
    group adds nothing from then on, so the work is the sum of the rows that remain, not N L. Exact duplicates, which
    would remain to the end, are merged into one row with a weight. H(x_t | x_<t) = H(x_<=t) - H(x_<t) with
    H(x_<=t) = log2 N - (1/N) sum over distinct prefixes of c log2 c (the quantity of arXiv:2605.06207, section 2.1).
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or tokens.dtype.kind not in "iu":
        raise ValueError(f"tokens must be (N, L) integers, got {tokens.dtype} {tokens.shape}")
    if tokens.dtype.kind == "i" and tokens.size and tokens.min() < 0:
        raise ValueError("tokens must not be negative; leave out the rows that have none")
    return _refine(len(tokens), tokens.shape[1], lambda rows, a, b: tokens[rows, a:b].T, tokens)


def uniform_null(rows: int, sizes: Sequence[int], seed: int = 0) -> np.ndarray:
    """(L,) bits: the curve of `rows` sequences of independent tokens, uniform over sizes[t] codes at position t."""
    rng = np.random.default_rng(seed)

    def fetch(kept: np.ndarray, start: int, stop: int) -> np.ndarray:
        return np.stack([rng.integers(0, size, rows)[kept] for size in sizes[start:stop]])

    return _refine(rows, len(sizes), fetch)


def shuffled_null(tokens: np.ndarray, seed: int = 0) -> np.ndarray:
    """(L,) bits: the curve of `tokens` (N, L) after each column was shuffled on its own; only the marginals remain."""
    rng = np.random.default_rng(seed)

    def fetch(kept: np.ndarray, start: int, stop: int) -> np.ndarray:
        return np.stack([rng.permutation(tokens[:, t])[kept] for t in range(start, stop)])

    return _refine(len(tokens), tokens.shape[1], fetch)


def remaining_entropy(entropy: np.ndarray, rows: int) -> np.ndarray:
    """(L,) bits left before each position, log2 N - H(x_<t), from the curve of `conditional_entropy`."""
    return math.log2(rows) - np.concatenate([[0.0], np.cumsum(entropy)[:-1]])


def remaining_capacity(sizes: Sequence[int], rows: int) -> np.ndarray:
    """(L,) bits left before each position if every code were used evenly: log2 N - sum over s < t of log2 K_s."""
    return remaining_entropy(np.log2(np.asarray(sizes, np.float64)), rows)


def cliff_position(sizes: Sequence[int], rows: int) -> int | None:
    """t*: the fewest positions whose capacity reaches log2 N (arXiv:2605.06207, equations 1 and 2); None if none do."""
    reached = np.flatnonzero(np.cumsum(np.log2(np.asarray(sizes, np.float64))) >= math.log2(rows))
    return int(reached[0]) + 1 if reached.size else None


def _refine(n: int, length: int, fetch: Fetch, tokens: np.ndarray | None = None) -> np.ndarray:
    """The curve of N rows whose columns `fetch` returns; duplicates of `tokens` are merged after the first block."""
    entropy = np.zeros(length)
    rows, weight, group = np.arange(n), None, np.zeros(n, np.int64)
    shared = n * math.log2(n) if n else 0.0  # sum of c log2 c over the groups of two rows and more
    for start in range(0, length, BLOCK):
        if len(rows) < 2:
            break
        if start == BLOCK and tokens is not None:
            rows, weight, group, shared = _merge_duplicates(tokens, rows, group)
        columns = np.ascontiguousarray(fetch(rows, start, min(start + BLOCK, length)))
        for t in range(start, start + len(columns)):
            if len(rows) < 2:
                break
            keep, group, after, still_shared = _split(group, columns[t - start], weight)
            entropy[t], shared = max(0.0, (shared - after) / n), still_shared
            if not keep.all():
                rows, columns = rows[keep], columns[:, keep]
                weight = None if weight is None else weight[keep]
    return entropy


def _split(
    group: np.ndarray, column: np.ndarray, weight: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Split groups by one column.

    group (n,) int64 dense, column (n,) ids, weight (n,) int64 or None (all 1). Returns keep (n,) bool: rows not alone
    afterwards; the new dense groups of those; the sum of c log2 c over all new groups, and over the kept ones.
    """
    column = column.astype(np.int64)
    if (int(column.max()) + 1) * len(column) >= 1 << 63:  # ids so large that the key below would overflow
        column = np.unique(column, return_inverse=True)[1]
    codes = int(column.max()) + 1
    key = group * codes + column
    span = (int(group.max()) + 1) * codes
    if span <= 4 * len(key) + (1 << 16):  # few enough to count without sorting
        members, member_of = np.bincount(key, minlength=span), key
    else:
        _, member_of, members = np.unique(key, return_inverse=True, return_counts=True)
    size = members if weight is None else np.bincount(member_of, weights=weight, minlength=len(members))
    shared = members > 1
    keep = shared[member_of]
    after = float(sum_xlog2x(size.astype(np.float64)))
    renumbered = np.cumsum(shared) - 1
    return keep, renumbered[member_of[keep]], after, float(sum_xlog2x(size[shared].astype(np.float64)))


def _merge_duplicates(
    tokens: np.ndarray, rows: np.ndarray, group: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Merge equal rows into one with a weight, and drop groups of one distinct row.

    Equal hashes only select pairs to compare, so the result is exact.
    """
    hashes = _hash_rows(tokens, rows)
    order = np.argsort(hashes, kind="stable")
    near = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
    first = np.ones(len(rows), bool)
    for start in range(0, len(near), 1 << 16):
        at = near[start : start + (1 << 16)]
        same = (tokens[rows[order[at]]] == tokens[rows[order[at + 1]]]).all(axis=1)
        first[at[same] + 1] = False
    weight = np.bincount(np.cumsum(first) - 1)
    kept = order[first]
    back = np.argsort(kept)  # row order, for the cache
    kept, weight = kept[back], weight[back]
    group = group[kept]
    shared = np.bincount(group) > 1
    keep = shared[group]
    rows, weight, group = rows[kept][keep], weight[keep], (np.cumsum(shared) - 1)[group[keep]]
    return rows, weight, group, float(sum_xlog2x(np.bincount(group, weights=weight))) if len(rows) else 0.0


def _hash_rows(tokens: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """(n,) uint64: equal rows have equal hashes; a sum of the row's 8-byte integers times odd constants."""
    width = tokens.shape[1] * tokens.dtype.itemsize
    integers = -(-width // 8)
    factors = np.random.default_rng(0).integers(0, 1 << 63, integers, dtype=np.uint64) * 2 + 1
    hashes = np.empty(len(rows), np.uint64)
    for start in range(0, len(rows), 1 << 13):
        part = np.ascontiguousarray(tokens[rows[start : start + (1 << 13)]])
        padded = np.zeros((len(part), integers * 8), np.uint8)
        padded[:, :width] = part.view(np.uint8).reshape(len(part), width)
        hashes[start : start + len(part)] = (padded.view(np.uint64) * factors).sum(axis=1)
    return hashes

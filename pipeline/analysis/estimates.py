"""What a token set carries, in bits: order-0, along the sequence, and one codebook against the other. numpy only.

N rows, L positions, K codes. Everything is the plug-in (empirical) estimate over the rows given; multiply by ln 2 for
the nats of LEASE figure D.1. A curve says as much about N as about structure: draw the null curves beside it.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from semdict.pipeline.shards.ids import order0_entropy, sum_xlog2x

BLOCK = 8  # columns fetched at once for the rows still in play
Fetch = Callable[[np.ndarray, int, int], np.ndarray]  # (rows (n,), start, stop) -> ids (stop - start, n)


def conditional_entropy(tokens: np.ndarray) -> np.ndarray:
    """(L,) float64 bits: empirical H(x_t | x_<t) of the rows of `tokens` (N, L), non-negative integers.

    Partition refinement: rows with an equal prefix form a group; each position splits groups, and a row alone in its
    group never matters again, so the work is the sum of surviving rows, not N L. Exact duplicates, which would survive
    to the end, are merged into one row with a weight. H(x_t | x_<t) = H(x_<=t) - H(x_<t) with
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


def cooccurrence(
    gen: np.ndarray, disc: np.ndarray, gen_size: int, disc_size: int, out: np.ndarray | None = None
) -> np.ndarray:
    """(Kg, Kd) int64: how often code g and word d stand on the same cell; equal shapes; `out` is added to if given.

    1024 x 16384 pairs are 134 MB. ValueError for an id outside its codebook.
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
    """(Kg, Kd) float64 bits, log2 p(g, d) / (p(g) p(d)); -inf where a pair never occurs (LEASE, figure D.3)."""
    joint = np.asarray(joint, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = joint.sum(axis=1, keepdims=True) * (joint.sum(axis=0, keepdims=True) / joint.sum())
        return np.where(joint > 0, np.log2(joint / expected), -np.inf)


def _refine(n: int, length: int, fetch: Fetch, tokens: np.ndarray | None = None) -> np.ndarray:
    """The curve of N rows whose columns `fetch` gives; duplicates of `tokens` are merged after the first block."""
    entropy = np.zeros(length)
    rows, weight, group = np.arange(n), None, np.zeros(n, np.int64)
    held = n * math.log2(n) if n else 0.0  # sum of c log2 c over the groups still in play
    for start in range(0, length, BLOCK):
        if len(rows) < 2:
            break
        if start == BLOCK and tokens is not None:
            rows, weight, group, held = _merge_duplicates(tokens, rows, group)
        columns = np.ascontiguousarray(fetch(rows, start, min(start + BLOCK, length)))
        for t in range(start, start + len(columns)):
            if len(rows) < 2:
                break
            keep, group, after, new_held = _split(group, columns[t - start], weight)
            entropy[t], held = max(0.0, (held - after) / n), new_held
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
        members, place = np.bincount(key, minlength=span), key
    else:
        _, place, members = np.unique(key, return_inverse=True, return_counts=True)
    size = members if weight is None else np.bincount(place, weights=weight, minlength=len(members))
    shared = members > 1
    keep = shared[place]
    after = float(sum_xlog2x(size.astype(np.float64)))
    renumbered = np.cumsum(shared) - 1
    return keep, renumbered[place[keep]], after, float(sum_xlog2x(size[shared].astype(np.float64)))


def _merge_duplicates(
    tokens: np.ndarray, rows: np.ndarray, group: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Equal rows become one with a weight; a group then of one distinct row leaves. Exact: a hash only proposes."""
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
    back = np.argsort(kept)  # in row order again, which memory likes
    kept, weight = kept[back], weight[back]
    group = group[kept]
    shared = np.bincount(group) > 1
    keep = shared[group]
    rows, weight, group = rows[kept][keep], weight[keep], (np.cumsum(shared) - 1)[group[keep]]
    return rows, weight, group, float(sum_xlog2x(np.bincount(group, weights=weight))) if len(rows) else 0.0


def _hash_rows(tokens: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """(n,) uint64: equal rows have equal hashes; a sum of the row's 8-byte words times odd constants."""
    width = tokens.shape[1] * tokens.dtype.itemsize
    words = -(-width // 8)
    factors = np.random.default_rng(0).integers(0, 1 << 63, words, dtype=np.uint64) * 2 + 1
    hashes = np.empty(len(rows), np.uint64)
    for start in range(0, len(rows), 1 << 13):
        part = np.ascontiguousarray(tokens[rows[start : start + (1 << 13)]])
        padded = np.zeros((len(part), words * 8), np.uint8)
        padded[:, :width] = part.view(np.uint8).reshape(len(part), width)
        hashes[start : start + len(part)] = (padded.view(np.uint64) * factors).sum(axis=1)
    return hashes

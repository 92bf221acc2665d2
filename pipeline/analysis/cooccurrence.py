"""Generative against discriminative ids on the same cells: joint counts, conditional entropy, mutual information.

Kg, Kd: entries of the two codebooks. Plug-in estimates, in bits where the name does not say nats. Plain numpy.
"""

import math

import numpy as np

from semdict.pipeline.shards.ids import sum_xlog2x

BLOCK = 1 << 21  # entries of a table that are turned into float64 at once
CANDIDATES = 1 << 16  # strongest pairs that the axes of a PMI map are filled from


def cooccurrence(
    gen: np.ndarray, disc: np.ndarray, gen_size: int, disc_size: int, out: np.ndarray | None = None
) -> np.ndarray:
    """(Kg, Kd) int64: how often ids g and d stand on the same cell, in arrays of equal shape.

    The counts are added to `out`, contiguous integers, if it is passed. Raises ValueError for an id outside its
    codebook.
    """
    if gen.shape != disc.shape:
        raise ValueError(f"paired tokens must have one shape, got {gen.shape} and {disc.shape}")
    joint = np.zeros((gen_size, disc_size), np.int64) if out is None else out
    flat_g, flat_d, counts, one = gen.reshape(-1), disc.reshape(-1), joint.reshape(-1), joint.dtype.type(1)
    step = 1 << 20
    for start in range(0, flat_g.size, step):
        g, d = flat_g[start : start + step], flat_d[start : start + step]
        if g.max() >= gen_size or d.max() >= disc_size or min(g.min(), d.min()) < 0:
            raise ValueError(f"ids reach {g.max()} and {d.max()}, the codebooks are {gen_size} and {disc_size} long")
        np.add.at(counts, g.astype(np.int64) * disc_size + d, one)
    return joint


def entropy_given_column(joint: np.ndarray) -> np.ndarray:
    """(Kd,) bits: H(row variable | column = d) of counts (Kg, Kd); nan for a column that never occurs.

    H(GEN | DISC = d) for `cooccurrence`'s table, H(DISC | GEN = g) for its transpose (LEASE, figure D.1).
    """
    joint = np.asarray(joint, np.float64)
    total = joint.sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(total > 0, np.log2(total) - sum_xlog2x(joint, axis=0) / total, np.nan)


def conditional_entropies(joint: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(Kd,) H(GEN | DISC = d) and (Kg,) H(DISC | GEN = g) in nats, nan for an id that never occurs (LEASE, figure D.1).

    Computed a block of columns, then of rows, at a time: the table itself is all that takes memory.
    """
    return _column_entropies(joint), _column_entropies(joint.T)


def _column_entropies(joint: np.ndarray) -> np.ndarray:
    step = max(1, BLOCK // max(1, joint.shape[0]))
    blocks = [joint[:, start : start + step] for start in range(0, joint.shape[1], step)]
    return math.log(2) * np.concatenate([entropy_given_column(block) for block in blocks])


def independent_entropies(joint: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """`conditional_entropies` of tokens without any relation: each id d keeps its count, its partners follow p(g).

    A plug-in entropy falls with the number of occurrences whatever the tokens mean, so figure D.1 is read against this.
    """
    rng = np.random.default_rng(seed)
    gen_total, disc_total = joint.sum(axis=1, dtype=np.int64), joint.sum(axis=0, dtype=np.int64)
    share, step = gen_total / max(1, gen_total.sum()), max(1, BLOCK // max(1, joint.shape[0]))
    parts, log_sum, row_total = [], np.zeros(len(gen_total)), np.zeros(len(gen_total))
    for start in range(0, len(disc_total), step):
        counts = rng.multinomial(disc_total[start : start + step], share).T
        parts.append(math.log(2) * entropy_given_column(counts))
        log_sum += sum_xlog2x(counts.astype(np.float64), axis=1)
        row_total += counts.sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        per_gen = np.where(row_total > 0, np.log2(row_total) - log_sum / row_total, np.nan)
    return np.concatenate(parts), math.log(2) * per_gen


def strongest_pairs(joint: np.ndarray, tokens: int, min_count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Generative ids (R,), discriminative ids (S,), R and S <= tokens, and their PMI (R, S), nats (LEASE, figure D.3).

    Pairs are taken by falling PMI and add their ids to the axes in that order, as long as both find room; -inf where
    two ids never share a cell. min_count: rarer pairs are not taken, since a single chance meeting of two rare ids has
    the highest PMI of all (the paper names no bound).
    """
    g, d = np.nonzero(joint >= max(1, min_count))
    gen_total, disc_total = joint.sum(axis=1, dtype=np.float64), joint.sum(axis=0, dtype=np.float64)
    total = gen_total.sum()
    ratio = joint[g, d] / (gen_total[g] * (disc_total[d] / max(1.0, total)))
    if len(ratio) > CANDIDATES:
        kept = np.argpartition(-ratio, CANDIDATES)[:CANDIDATES]
        kept.sort()
        g, d, ratio = g[kept], d[kept], ratio[kept]
    order = np.argsort(-ratio, kind="stable")
    rows: dict[int, None] = {}
    columns: dict[int, None] = {}
    for one_g, one_d in zip(g[order].tolist(), d[order].tolist(), strict=True):
        if (one_g in rows or len(rows) < tokens) and (one_d in columns or len(columns) < tokens):
            rows[one_g] = columns[one_d] = None
    gen_ids, disc_ids = np.fromiter(rows, np.int64), np.fromiter(columns, np.int64)
    with np.errstate(divide="ignore"):
        expected = np.outer(gen_total[gen_ids], disc_total[disc_ids] / max(1.0, total))
        return gen_ids, disc_ids, np.log(joint[np.ix_(gen_ids, disc_ids)] / expected)

"""Token ids and their ranks: integer types, look-up tables, counts, order-0 entropy. Plain numpy.

K entries of a codebook. Ids and ranks are uint16 or uint32, the smaller that holds K ids and the filler, the largest
value of the type, which means "no token". A set stores the rank of an id by falling frequency (0 = the most frequent
id): ranks compress to the entropy of the tokens for any numbering of the ids.
"""

import math

import numpy as np

FILL = 65535  # filler of uint16
MAX_CODES = 1 << 24  # counts of 128 MiB per array and thread
PIECE = 1 << 18  # ids counted at once: they stay in cache


def id_dtype(size: int) -> np.dtype:
    """uint16 or uint32: the smaller that holds ids 0..size-1 and, above them, the filler."""
    return np.dtype(np.uint16 if size <= np.iinfo(np.uint16).max else np.uint32)


def filler(dtype: np.dtype) -> int:
    """The value that means "no token": the largest of the type."""
    return int(np.iinfo(dtype).max)


def memory_dtype(size: int) -> np.dtype:
    """The smallest integer type for ids 0..size-1 without a filler; signed if torch indexes badly with the unsigned."""
    if size <= 1 << 8:
        return np.dtype(np.uint8)
    return np.dtype(np.int16 if size <= 1 << 15 else np.uint16 if size <= 1 << 16 else np.int32)


def ids_by_rank(counts: np.ndarray) -> np.ndarray:
    """The id at each rank of falling frequency, lower id first among equals, from (K,) counts of the ids.

    uint16: (65536,), filled up with 65535, so that every stored number looks up to something. uint32: (K + 1,), the
    filler last; larger numbers count as K. `look_up` does either.
    """
    dtype = id_dtype(len(counts))
    length = FILL + 1 if dtype == np.uint16 else len(counts) + 1
    table = np.full(length, filler(dtype), dtype)
    table[: len(counts)] = np.argsort(-counts, kind="stable")
    return table


def ranks_by_id(table: np.ndarray) -> np.ndarray:
    """The rank of each id, the inverse of `ids_by_rank` and of its shape; the filler for all other numbers."""
    inverse = np.full(len(table), filler(table.dtype), table.dtype)
    known = np.flatnonzero(table != filler(table.dtype))
    inverse[table[known]] = known
    return inverse


def look_up(table: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """`table[ids]` for one of the tables above and ids (or ranks) of its type, of any shape.

    The result is a writable copy. About five times the speed of numpy's indexing.
    """
    import pyarrow as pa

    if not ids.size:
        return np.empty(ids.shape, table.dtype)
    flat = ids.reshape(-1)
    if len(table) <= filler(table.dtype):  # shorter than the type reaches
        flat = np.minimum(flat, table.dtype.type(len(table) - 1))
    taken = pa.array(table).take(pa.array(flat))
    return np.frombuffer(taken.buffers()[1], table.dtype, ids.size).reshape(ids.shape)


def count_ids(ids: np.ndarray, size: int) -> tuple[np.ndarray, int]:
    """(size,) int64 counts of the numbers below `size` in an unsigned array, and how many numbers are the filler."""
    flat = ids.reshape(-1)
    total, fillers, step = np.zeros(size + 1, np.int64), 0, max(PIECE, 4 * size)
    for start in range(0, flat.size, step):
        piece = flat[start : start + step]
        counts = np.bincount(np.minimum(piece, flat.dtype.type(size)), minlength=size + 1)
        total += counts
        fillers += np.count_nonzero(piece == filler(flat.dtype)) if counts[size] else 0
    return total[:size], fillers


def order0_entropy(counts: np.ndarray) -> float:
    """Bits per token of a memoryless source with these counts (any shape, pooled); 0 for an empty histogram."""
    counts = np.asarray(counts, np.float64).reshape(-1)
    counts = counts[counts > 0]
    total = counts.sum()
    return max(0.0, float(math.log2(total) - sum_xlog2x(counts) / total)) if counts.size else 0.0


def sum_xlog2x(counts: np.ndarray, axis: int | None = None) -> np.ndarray:
    """Sum of c log2 c over an axis, where 0 log2 0 is 0."""
    return (counts * np.log2(np.maximum(counts, 1))).sum(axis=axis)

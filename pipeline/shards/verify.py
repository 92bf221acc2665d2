"""Read every byte of a token shard directory and name each damaged file, array and chunk."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np

from semdict.pipeline.common.errors import ShardError
from semdict.pipeline.common.files import sha256_file
from semdict.pipeline.shards.checksums import Sums, read_sums
from semdict.pipeline.shards.format import (
    CODEBOOKS,
    INDEX,
    INDEX_COLUMNS,
    SUMS,
    TOKENS,
    NotShardsError,
    expected_files,
    files_under,
    optional_books,
    read_metadata,
    token_file,
)
from semdict.pipeline.shards.ids import count_ids, filler, ids_by_rank, look_up
from semdict.pipeline.shards.reader import LazyArray, TokenShards, read_stored
from semdict.pipeline.shards.remote import local_shards

T = TypeVar("T")


@dataclass
class Report:
    """Result of `verify_shards`; the set is sound if `problems` is empty. bad_rows: rows without tokens."""

    path: Path
    rows: int = 0
    bad_rows: int = 0
    files: int = 0
    bytes: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems


def verify_shards(path: str | Path, workers: int = 0) -> Report:
    """Check every file against SHA256SUMS, every chunk's crc32c, and that the parts agree with each other.

    `workers` threads (0 = one per core) hold one shard each. NotShardsError if the path is no shard directory.
    """
    path = local_shards(path)
    report = Report(path)
    _require_shards(path)
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        sums = read_sums(path)
        _check_files(report, sums, pool)
        shards = _attempt(report, TOKENS, lambda: TokenShards(path, check=False))
        if shards is None:
            return report
        report.rows = len(shards)
        status = _attempt(report, "status", lambda: _check_rows(report, shards))
        if status is not None:
            report.bad_rows = int((status != 0).sum())
            for name in shards.spec.sizes:
                _attempt(report, name, lambda name=name: _check_tokens(report, shards, name, status, pool))
    for name, check in ((INDEX, _check_index), (CODEBOOKS, _check_books)):
        _attempt(report, name, lambda check=check: check(report, shards))
    _attempt(report, str(path), lambda: _check_names(report, shards, sums))
    return report


def _attempt(report: Report, name: str, check: Callable[[], T]) -> T | None:
    """The check's result; any exception is reported as a problem, since damaged metadata fails in many ways."""
    try:
        return check()
    except Exception as error:
        report.problems.append(
            f"{name}: cannot be checked ({str(error).splitlines()[0] if str(error) else repr(error)})"
        )
        return None


def _require_shards(path: Path) -> None:
    """A damaged shard directory is still one: its checksums, or its attributes, must be recognisable."""
    if not (path / TOKENS).is_dir() or not (path / SUMS).is_file():
        read_metadata(path)
        return
    try:
        read_metadata(path)
    except NotShardsError as error:
        if "format version" in str(error) and not _group_is_damaged(path):
            raise
    except ShardError:
        pass  # reported with the files


def _group_is_damaged(path: Path) -> bool:
    name = f"{TOKENS}/zarr.json"
    return read_sums(path).digests.get(name) != sha256_file(path / name)


def _check_files(report: Report, sums: Sums, pool: ThreadPoolExecutor) -> None:
    """Every file is listed in SHA256SUMS and has the listed bytes."""
    if sums.problem:
        report.problems.append(f"{SUMS}: {sums.problem}")
    present = files_under(report.path)
    report.files = len(present)
    report.bytes = sum((report.path / name).stat().st_size for name in present)
    if not sums.digests:
        return
    names = set(present) - {SUMS}
    report.problems += [f"{name}: the file is missing" for name in sorted(sums.digests.keys() - names)]
    report.problems += [f"{name}: an extra file, not in {SUMS}" for name in sorted(names - sums.digests.keys())]
    known = sorted(names & sums.digests.keys())
    for name, digest in zip(known, pool.map(lambda name: sha256_file(report.path / name), known), strict=True):
        if digest != sums.digests[name]:
            report.problems.append(f"{name}: its bytes are not those that were written (SHA-256 differs)")


def _check_names(report: Report, shards: TokenShards, sums: Sums) -> None:
    """The files that SHA256SUMS lists are those that the attributes imply."""
    expected = set(expected_files(shards.spec, shards.layout, optional_books(report.path)))
    listed = set(sums.digests) or set(files_under(report.path)) - {SUMS}
    report.problems += [f"{name}: the file is missing from {SUMS}" for name in sorted(expected - listed)]
    report.problems += [f"{name}: no file of this format" for name in sorted(listed - expected)]


def _check_rows(report: Report, shards: TokenShards) -> np.ndarray | None:
    """label and status decode; returns status, None if it cannot be read."""
    columns: dict[str, np.ndarray | None] = {"label": None, "status": None}
    for name in columns:
        try:
            columns[name] = getattr(shards, name)[:]
        except ShardError:
            report.problems.append(f"{name}: {_first_bad_chunk(getattr(shards, name))} cannot be decoded")
    label = columns["label"]
    if label is not None and (label < -1).any():
        row = int(np.flatnonzero(label < -1)[0])
        report.problems.append(f"label: row {row} holds {label[row]}, the least is -1 (none)")
    return columns["status"]


def _first_bad_chunk(array: LazyArray) -> str:
    size = array.stored.chunks[0]
    for start in range(0, len(array), size):
        try:
            read_stored(array.name, array.stored, slice(start, start + size))
        except ShardError:
            return f"chunk {start // size} ({TOKENS}/{array.name}/c/{start // size})"
    return "a chunk"


def _check_tokens(report: Report, shards: TokenShards, name: str, status: np.ndarray, pool: ThreadPoolExecutor) -> None:
    """Every chunk decodes, ids are within their codebooks, rows without tokens are those with a status, counts hold."""
    array: LazyArray = getattr(shards, name)
    count = np.asarray(shards.counts[name])
    if not np.array_equal(ids_by_rank(count), array.table):
        report.problems.append(f"{name}_ids: the table is not the order of {CODEBOOKS}/{name}_counts.npy")
    results = pool.map(lambda shard: _shard_problems(shards, name, shard, status), range(shards.layout.shards))
    total, whole = np.zeros(len(count), np.int64), True
    for counted, problems in results:
        report.problems += problems
        whole = whole and not problems
        total += counted if len(counted) == len(total) else 0
    if whole and not np.array_equal(total[array.table[: len(count)].argsort()], count):
        report.problems.append(f"{name}: the tokens are not those counted in {CODEBOOKS}/{name}_counts.npy")


def _shard_problems(shards: TokenShards, name: str, shard: int, status: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Counts by rank of the good rows, and problems: the whole shard at once, chunk by chunk only to name a problem."""
    array: LazyArray = getattr(shards, name)
    where, size = shards.layout.shard(shard), int(shards.spec.sizes[name].max())
    try:
        ranks = read_stored(name, array.stored, where)
        counts, fillers = count_ids(ranks, size)
        beyond = ranks.size - int(counts.sum()) - fillers
        if not beyond and _sound(array.table, ranks, status[where], shards.spec.sizes[name], fillers):
            return counts, []
    except ShardError:
        pass
    problems = []
    first = where.start // shards.layout.chunk_rows
    for number in range(first, first + -(-(where.stop - where.start) // shards.layout.chunk_rows)):
        rows = shards.layout.chunk(number)
        label = f"{name}: chunk {number} (rows {rows.start}-{rows.stop - 1}) in {token_file(name, shard)}"
        problems += [f"{label} {text}" for text in _chunk_problems(shards, name, rows, status[rows])]
    return np.zeros(size, np.int64), problems or [f"{name}: {token_file(name, shard)} cannot be decoded as a whole"]


def _sound(table: np.ndarray, ranks: np.ndarray, status: np.ndarray, sizes: np.ndarray, fillers: int) -> bool:
    """Whether rows without tokens are those with a status, and ids are within the codebooks of their positions.

    fillers: how many of the ranks are the filler; all others are known to be below the largest codebook.
    """
    bad, fill = np.flatnonzero(status), filler(ranks.dtype)
    if fillers != bad.size * ranks[0].size or (bad.size and not (ranks[bad] == fill).all()):
        return False
    if sizes.min() == sizes.max():
        return True
    ids = look_up(table, ranks)
    return bool(((ids < sizes.astype(np.uint32)) | (ids == fill)).all())


def _chunk_problems(shards: TokenShards, name: str, rows: slice, status: np.ndarray) -> list[str]:
    """What is wrong with one chunk, as the ends of sentences that begin with its name."""
    try:
        ids = getattr(shards, name)[rows]
    except ShardError as error:
        return [f"cannot be decoded ({str(error.__cause__).splitlines()[0] if error.__cause__ else error})"]
    sizes, fill, problems = shards.spec.sizes[name], filler(ids.dtype), []
    good = (status == 0)[:, None, None]
    for wrong, text in (
        ((ids == fill) & good, "has no token though the row's status is 0"),
        ((ids != fill) & ~good, "has a token though the row's status is not 0"),
        ((ids >= sizes) & (ids != fill), "is outside its codebook"),
    ):
        if wrong.any():
            row, view, at = np.argwhere(wrong)[0]
            problems.append(f"row {rows.start + row}, view {view}, position {at} (id {ids[row, view, at]}) {text}")
    return problems


def _check_index(report: Report, shards: TokenShards) -> None:
    """index.parquet decodes and has its columns and a row per image."""
    index = shards.index
    missing = [name for name in INDEX_COLUMNS if name not in index.column_names]
    if missing or index.num_rows != len(shards):
        report.problems.append(f"{INDEX}: {index.num_rows} rows of {len(shards)}, missing columns {missing}")


def _check_books(report: Report, shards: TokenShards) -> None:
    """Centroids and neighbour table have the shapes of the codebook, self first, weights that sum to 1."""
    centroids, table = shards.centroids, shards.neighbours
    if centroids is None:
        return
    if len(centroids) != shards.disc_size or table is None:
        report.problems.append(f"{CODEBOOKS}: centroids are {centroids.shape}, the codebook has {shards.disc_size}")
        return
    ids, weights = table
    fits = ids.shape == weights.shape and len(ids) == len(centroids) and (ids[:, 0] == np.arange(len(ids))).all()
    if not fits or not np.allclose(np.asarray(weights).sum(axis=1), 1, atol=1e-5):
        report.problems.append(f"{CODEBOOKS}: the neighbour table does not fit the centroids")

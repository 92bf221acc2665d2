"""Look at every listed image once: size, SHA-256, width, height, status; remembered until its file changes."""

import hashlib
import itertools
import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from semdict.pipeline.common.errors import ManifestError
from semdict.pipeline.common.files import atomic_write, remove
from semdict.pipeline.images.decode import BadImage, Status, probe
from semdict.pipeline.manifest.reader import ByteReader

BATCH_ROWS = 128  # per task
SAVE_ROWS = 65_536  # what a kill may cost, in rows
SAVE_SECONDS = 10.0  # and in seconds
STAMP = ("path", "offset", "stamp_size", "stamp_mtime")  # an image is the same while these are
RESULTS = pa.schema(
    [
        ("bytes", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("sha256", pa.string()),
        ("status", pa.uint8()),
        ("reason", pa.string()),
    ]
)
_CACHE = pa.schema([("path", pa.string()), *((name, pa.int64()) for name in STAMP[1:]), *RESULTS])


def scan(listing: pa.Table, images: Mapping[str, str], cache: Path, max_pixels: int, workers: int = 0) -> pa.Table:
    """RESULTS columns for each row of `listing` (see sources.Listing), in its order.

    `cache` is a folder of earlier results; images whose file has the same path, size and modification time are taken
    from it unread, the others are read by `workers` threads (0 = two per core; reading and hashing run outside Python's
    lock) and added batch by batch, so that a killed scan continues. ManifestError when a file changes meanwhile.
    """
    stamped = _stamped(listing, images)
    known = _lookup(stamped, _read_cache(cache))
    todo = np.flatnonzero(known["status"].is_null().to_numpy())
    if len(todo):
        reader = ByteReader(images)
        unreadable = _scan_rows(listing, stamped, todo, reader, cache, max_pixels, workers)
        known = _lookup(stamped, pa.concat_tables([_read_cache(cache), unreadable]))
    _compact(stamped, known, cache)
    return known


def _stamped(listing: pa.Table, images: Mapping[str, str]) -> pa.Table:
    """STAMP columns: where an image lies, absolutely, and the size and time of its file."""
    reader = ByteReader({split: str(Path(pattern).absolute()) for split, pattern in images.items()})
    places = zip(listing["split"].to_pylist(), listing["source"].to_pylist(), strict=True)
    paths = pa.array([reader.path(split, source) for split, source in places], pa.string())
    columns = [paths, listing["offset"], listing["stamp_size"], listing["stamp_mtime"]]
    return pa.table(columns, names=STAMP)


def _lookup(stamped: pa.Table, remembered: pa.Table) -> pa.Table:
    """RESULTS for every row, null where nothing is remembered."""
    rows = stamped.append_column("row", pa.array(np.arange(len(stamped))))
    joined = rows.join(remembered, keys=list(STAMP), join_type="left outer").sort_by("row")
    numbers = joined["row"].to_numpy()
    first = np.append(True, numbers[1:] != numbers[:-1])[: len(numbers)]  # a part may repeat what another holds
    return joined.filter(pa.array(first)).select(RESULTS.names).cast(RESULTS).combine_chunks()


def _read_cache(cache: Path) -> pa.Table:
    """All remembered rows; a part that cannot be read is deleted, its images are read again."""
    tables = [_CACHE.empty_table()]
    for part in sorted(cache.glob("*.parquet")):
        try:
            tables.append(pq.read_table(part, schema=_CACHE))
        except (pa.ArrowException, OSError):
            remove(part)
    return pa.concat_tables(tables)


def _scan_rows(
    listing: pa.Table,
    stamped: pa.Table,
    todo: np.ndarray,
    reader: ByteReader,
    cache: Path,
    max_pixels: int,
    workers: int,
) -> pa.Table:
    """Read the images of rows `todo` and add what was found to the cache, in pieces; an interrupt keeps the pieces.

    Returned, not remembered: files that could not be read, for a mended permission shows in neither size nor time.
    """
    from tqdm import tqdm

    done: list[tuple[int, tuple]] = []
    unreadable: list[tuple[int, tuple]] = []
    saved = time.monotonic()
    with tqdm(total=len(todo), unit="img", desc="manifest", mininterval=0.5, smoothing=0.05, file=sys.stderr) as bar:
        try:
            for batch in _examined(listing, todo, reader, max_pixels, workers):
                for row, result in batch:
                    (unreadable if result[-2] == Status.UNREADABLE else done).append((row, result))
                bar.update(len(batch))
                if len(done) >= SAVE_ROWS or time.monotonic() - saved > SAVE_SECONDS:
                    _save(_as_table(done, stamped), cache)
                    done, saved = [], time.monotonic()
        finally:
            _save(_as_table(done, stamped), cache)
    return _as_table(unreadable, stamped)


def _examined(
    listing: pa.Table, todo: np.ndarray, reader: ByteReader, max_pixels: int, workers: int
) -> Iterator[list[tuple[int, tuple]]]:
    """Batches of (row, result) in row order; neighbouring rows go to one thread, a few batches wait ahead."""
    threads = workers or 2 * (os.cpu_count() or 1)
    columns = listing.select(["split", "source", "offset", "bytes"])
    pool = ThreadPoolExecutor(threads, thread_name_prefix="manifest")
    try:
        pending: deque[Future] = deque()
        for start in range(0, len(todo), BATCH_ROWS):
            rows = todo[start : start + BATCH_ROWS]
            pending.append(pool.submit(_examine_batch, columns.take(pa.array(rows)), rows, reader, max_pixels))
            if len(pending) > 4 * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _examine_batch(table: pa.Table, rows: np.ndarray, reader: ByteReader, max_pixels: int) -> list[tuple[int, tuple]]:
    places = zip(*(table[name].to_pylist() for name in table.column_names), strict=True)
    return [(int(row), _examine(reader, max_pixels, *place)) for row, place in zip(rows, places, strict=True)]


def _examine(reader: ByteReader, max_pixels: int, split: str, source: str, offset: int, size: int) -> tuple:
    """(bytes, width, height, sha256, status, reason) of one image; width and height are 0 where it is bad."""
    try:
        data = reader.read(split, source, offset, size)
    except OSError as error:
        return max(size, 0), 0, 0, "", Status.UNREADABLE, f"cannot be read: {error.strerror}"
    if size not in (-1, len(data)):
        path = reader.path(split, source)
        raise ManifestError(f"{path}: changed while it was listed ({size} bytes, then {len(data)}); run this again")
    digest = hashlib.sha256(data).hexdigest()
    try:
        width, height = probe(data, max_pixels)
    except BadImage as bad:
        return len(data), 0, 0, digest, bad.status, bad.reason
    return len(data), width, height, digest, Status.OK, ""


def _as_table(done: list[tuple[int, tuple]], stamped: pa.Table) -> pa.Table:
    """(row, result) pairs in the cache's columns."""
    table = stamped.take(pa.array([row for row, _ in done], pa.int64()))
    for i, field in enumerate(RESULTS):
        table = table.append_column(field, pa.array([result[i] for _, result in done], field.type))
    return table


def _save(table: pa.Table, cache: Path) -> None:
    """One more part of the cache, whole or not at all."""
    if not len(table):
        return
    taken = {path.name for path in cache.glob("*.parquet")}
    name = next(name for i in itertools.count() if (name := f"part-{i:06d}.parquet") not in taken)
    with atomic_write(cache / name) as tmp_path:
        pq.write_table(table, tmp_path, compression="zstd")


def _compact(stamped: pa.Table, known: pa.Table, cache: Path) -> None:
    """One file of what the present listing needs, in place of the pieces."""
    parts = sorted(cache.glob("*.parquet"))
    table = stamped
    for field in RESULTS:
        table = table.append_column(field, known[field.name])
    table = table.filter(pc.not_equal(table["status"], int(Status.UNREADABLE)))
    if len(parts) == 1 and pq.read_metadata(parts[0]).num_rows == len(table):
        return
    name = "part-000000.parquet"
    with atomic_write(cache / name) as tmp_path:
        pq.write_table(table, tmp_path, compression="zstd")
    for part in parts:
        if part.name != name:
            remove(part)

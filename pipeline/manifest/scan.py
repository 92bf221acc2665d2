"""Look at every listed image once: size, SHA-256, width, height, status; remembered until its file changes."""

import hashlib
import os
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from semdict.pipeline.common.errors import ManifestError
from semdict.pipeline.common.progress import progress
from semdict.pipeline.images.decode import BadImage, DecodeSpec, Status, probe
from semdict.pipeline.manifest.cache import RESULTS, SCHEMA, STAMP, ScanCache, open_cache
from semdict.pipeline.manifest.reader import ByteReader

BATCH_ROWS = 128  # per task
SAVE_ROWS = 65_536  # what a kill may cost, in rows
SAVE_SECONDS = 10.0  # and in seconds

Result = tuple[int, int, int, str, int, str]  # the columns of RESULTS


def scan(
    listing: pa.Table, images: Mapping[str, str], cache: Path, limits: DecodeSpec, workers: int = 0, fresh: bool = False
) -> pa.Table:
    """RESULTS columns for each row of `listing` (see sources.Listing), in its order.

    `cache` is the file of earlier results; images whose file has the same path and stamp are taken from it unread, with
    `fresh` none is. The others are read by `workers` threads (0 = two per core; reading and hashing run outside
    Python's lock) and added to it in pieces, so that a killed scan continues. ManifestError when a file changes
    meanwhile.
    """
    stamped = _stamped(listing, images)
    with open_cache(cache, fresh) as (store, rows):
        known = _lookup(stamped, rows)
        missing = np.flatnonzero(known["status"].is_null().to_numpy())
        if len(missing):
            reader = ByteReader(images)
            results = _scan_rows(listing, stamped, missing, reader, store, limits, workers)
            known = _lookup(stamped, pa.concat_tables([results, rows]))
        if len(store) > 2 * len(listing):  # images that are gone and old stamps would pile up
            store.add(_remembered(stamped, known), replace=True)
    return known


def _stamped(listing: pa.Table, images: Mapping[str, str]) -> pa.Table:
    """STAMP columns: where an image lies, absolutely, and the stamp of its file."""
    reader = ByteReader({split: str(Path(pattern).absolute()) for split, pattern in images.items()})
    sources = zip(listing["split"].to_pylist(), listing["source"].to_pylist(), strict=True)
    paths = pa.array([reader.path(split, source) for split, source in sources], pa.string())
    return pa.table([paths, *(listing[name] for name in STAMP[1:])], names=STAMP)


def _lookup(stamped: pa.Table, remembered: pa.Table) -> pa.Table:
    """RESULTS for every row, null where nothing is remembered."""
    rows = stamped.append_column("row", pa.array(np.arange(len(stamped))))
    joined = rows.join(remembered, keys=list(STAMP), join_type="left outer").sort_by("row")
    numbers = joined["row"].to_numpy()
    first = np.append(True, numbers[1:] != numbers[:-1])[: len(numbers)]  # one image may be remembered twice
    return joined.filter(pa.array(first)).select(RESULTS.names).cast(RESULTS).combine_chunks()


def _scan_rows(
    listing: pa.Table,
    stamped: pa.Table,
    missing: np.ndarray,
    reader: ByteReader,
    cache: ScanCache,
    limits: DecodeSpec,
    workers: int,
) -> pa.Table:
    """Read the images of rows `missing` and add the results to the cache, in pieces; an interrupt keeps the pieces.

    Files that could not be read are returned, not remembered: a mended permission does not show in a stamp.
    """
    tables = [SCHEMA.empty_table()]
    waiting: list[tuple[int, Result]] = []
    saved = time.monotonic()

    def save() -> None:
        table = _as_table(waiting, stamped)
        tables.append(table)
        waiting.clear()
        cache.add(_readable(table))

    with progress(len(missing), "manifest") as bar:
        try:
            for batch in _examined(listing, missing, reader, limits, workers):
                waiting += batch
                bar.update(len(batch))
                if len(waiting) >= SAVE_ROWS or time.monotonic() - saved > SAVE_SECONDS:
                    save()
                    saved = time.monotonic()
        finally:
            save()
    return pa.concat_tables(tables)


def _examined(
    listing: pa.Table, rows: np.ndarray, reader: ByteReader, limits: DecodeSpec, workers: int
) -> Iterator[list[tuple[int, Result]]]:
    """Batches of (row, result) in row order; neighbouring rows go to one thread, a few batches wait ahead."""
    threads = workers or 2 * (os.cpu_count() or 1)
    columns = listing.select(["split", "source", "offset", "bytes"])
    pool = ThreadPoolExecutor(threads, thread_name_prefix="manifest")
    try:
        pending: deque[Future] = deque()
        for start in range(0, len(rows), BATCH_ROWS):
            part = rows[start : start + BATCH_ROWS]
            pending.append(pool.submit(_examine_batch, columns.take(pa.array(part)), part, reader, limits))
            if len(pending) > 4 * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _examine_batch(
    table: pa.Table, rows: np.ndarray, reader: ByteReader, limits: DecodeSpec
) -> list[tuple[int, Result]]:
    records = zip(*(table[name].to_pylist() for name in table.column_names), strict=True)
    return [(int(row), _examine(reader, limits, *record)) for row, record in zip(rows, records, strict=True)]


def _examine(reader: ByteReader, limits: DecodeSpec, split: str, source: str, offset: int, size: int) -> Result:
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
        width, height = probe(data, limits)
    except BadImage as bad:
        return len(data), 0, 0, digest, bad.status, bad.reason
    return len(data), width, height, digest, Status.OK, ""


def _as_table(results: list[tuple[int, Result]], stamped: pa.Table) -> pa.Table:
    """(row, result) pairs in the cache's columns."""
    table = stamped.take(pa.array([row for row, _ in results], pa.int64()))
    for i, field in enumerate(RESULTS):
        table = table.append_column(field, pa.array([result[i] for _, result in results], field.type))
    return table.cast(SCHEMA)


def _remembered(stamped: pa.Table, known: pa.Table) -> pa.Table:
    """The cache's rows for the present listing."""
    table = stamped
    for field in RESULTS:
        table = table.append_column(field, known[field.name])
    return _readable(table.cast(SCHEMA))


def _readable(table: pa.Table) -> pa.Table:
    return table.filter(pc.not_equal(table["status"], int(Status.UNREADABLE)))

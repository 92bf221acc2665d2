"""What earlier scans saw of each image: one SQLite table, keyed by where an image lies and its file's stamp.

Every row carries a checksum. A damaged table is deleted, and its images are read again: it saves time, nothing else.
"""

import sqlite3
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from zlib import crc32

import pyarrow as pa

from semdict.pipeline.common.errors import SemdictError
from semdict.pipeline.common.files import remove

STAMP = ("path", "offset", "stamp_size", "stamp_mtime", "stamp_ctime")  # an image is unchanged while these are equal
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
SCHEMA = pa.schema([("path", pa.string()), *((name, pa.int64()) for name in STAMP[1:]), *RESULTS])
FETCHED = 1 << 16  # rows fetched at once


class DamagedCache(Exception):  # noqa: N818
    """A row's checksum does not fit the row."""


class ScanCache:
    """Rows of SCHEMA in one SQLite file, of which at most the pages of one transaction are lost by a kill."""

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        # no locks: the stage holds its own, and network drives often have none that SQLite can use
        self._database = sqlite3.connect(f"{path.absolute().as_uri()}?nolock=1", uri=True)
        columns = ", ".join(f"{field.name} {'TEXT' if field.type == pa.string() else 'INTEGER'}" for field in SCHEMA)
        self._database.execute(
            f"CREATE TABLE IF NOT EXISTS images ({columns}, checksum INTEGER, PRIMARY KEY (path, offset)) WITHOUT ROWID"
        )

    def rows(self) -> pa.Table:
        """All rows; DamagedCache or sqlite3.DatabaseError where they are not those that were written."""
        cursor = self._database.execute(f"SELECT {', '.join(SCHEMA.names)}, checksum FROM images")
        tables = [SCHEMA.empty_table()]
        while records := cursor.fetchmany(FETCHED):
            for *record, checksum in records:
                if _checksum(record) != checksum:
                    raise DamagedCache(f"{self.path}: a row does not fit its checksum")
            columns = zip(list(zip(*records, strict=True))[:-1], SCHEMA.types, strict=True)
            tables.append(pa.table([pa.array(values, kind) for values, kind in columns], SCHEMA))
        return pa.concat_tables(tables)

    def __len__(self) -> int:
        return self._database.execute("SELECT COUNT(*) FROM images").fetchone()[0]

    def add(self, table: pa.Table, replace: bool = False) -> None:
        """Add rows of SCHEMA in one transaction, in place of those of the same path and offset, or of all rows.

        SemdictError when the file cannot be written.
        """
        if not len(table) and not replace:
            return
        records = zip(*(table[name].to_pylist() for name in SCHEMA.names), strict=True)
        marks = ", ".join("?" * (len(SCHEMA) + 1))
        try:
            with self._database:
                if replace:
                    self._database.execute("DELETE FROM images")
                self._database.executemany(
                    f"INSERT OR REPLACE INTO images VALUES ({marks})", ((*r, _checksum(r)) for r in records)
                )
        except sqlite3.OperationalError as error:
            raise SemdictError(f"{self.path} cannot be written ({error}); make room and run this again") from None

    def close(self) -> None:
        """Close the file; nothing is written."""
        self._database.close()


@contextmanager
def open_cache(path: Path, fresh: bool = False) -> Iterator[tuple[ScanCache, pa.Table]]:
    """Yield the cache at `path` and its rows; an empty one where there is none, it is damaged, or with `fresh`."""
    if fresh:
        _delete(path)
    try:
        cache = ScanCache(path)
        rows = cache.rows()
    except (sqlite3.DatabaseError, DamagedCache, pa.ArrowInvalid, TypeError, OverflowError) as error:
        print(f"{path} is damaged and deleted, all images are read again ({error})", file=sys.stderr)
        _delete(path)
        cache = ScanCache(path)
        rows = cache.rows()
    try:
        yield cache, rows
    finally:
        cache.close()


def _delete(path: Path) -> None:
    for suffix in ("", "-journal"):
        remove(path.with_name(path.name + suffix))


def _checksum(record: list | tuple) -> int:
    return crc32(repr(tuple(record)).encode())

"""Read the bytes of any listed image, and make sure that they are still those that the manifest describes."""
# Paths are plain strings here: millions of them, no object for each.
# ruff: noqa: PTH118, PTH122, SIM115

import hashlib
import os
from collections.abc import Mapping
from threading import local
from typing import BinaryIO

import pyarrow as pa

from semdict.pipeline.common.errors import ManifestError
from semdict.pipeline.images.decode import BadImage, Status
from semdict.pipeline.manifest.listing import REFRESH, split_root
from semdict.pipeline.manifest.parquets import ParquetBytes

OPEN_TARS = 8  # per thread


class ByteReader:
    """Raw bytes of any listed image, from any thread; a few tars stay open per thread, a few row groups in memory."""

    def __init__(self, images: Mapping[str, str]):
        self.roots = {split: split_root(pattern) for split, pattern in images.items()}
        self._parquet = ParquetBytes()
        self._local = local()

    def path(self, split: str, source: str) -> str:
        """The file that holds an image; ManifestError when the split is not among `images`."""
        if split not in self.roots:
            raise ManifestError(f"split {split!r} is in the manifest, not in manifest.images ({', '.join(self.roots)})")
        return os.path.join(self.roots[split], source)

    def read(self, split: str, source: str, offset: int, size: int) -> bytes:
        """Encoded bytes as they are now: a file, `size` bytes of a tar at `offset`, or row `offset` of a parquet file.

        OSError when a file or tar cannot be read; ManifestError for parquet.
        """
        path = self.path(split, source)
        suffix = os.path.splitext(source)[1]
        if suffix == ".parquet":
            return self._parquet.read(path, offset)
        if suffix == ".tar":
            return _pread(self._tar(path).fileno(), size, offset)
        with open(path, "rb", buffering=0) as file:
            return file.read()

    def _tar(self, path: str) -> BinaryIO:
        """An open tar of this thread; the least recently used one is closed when there are too many."""
        tars = self._local.__dict__.setdefault("tars", {})
        tars[path] = tars.pop(path, None) or open(path, "rb", buffering=0)
        while len(tars) > OPEN_TARS:
            tars.pop(next(iter(tars))).close()
        return tars[path]


class Reader:
    """Bytes of manifest rows, each checked against its size and SHA-256. Safe between threads.

    `table` holds the manifest's columns; `images` maps each split to the folder or pattern it was listed from.
    """

    def __init__(self, images: Mapping[str, str], table: pa.Table):
        self._bytes = ByteReader(images)
        self._columns = [table[name] for name in ("split", "source", "offset", "bytes", "sha256", "status", "reason")]

    def __len__(self) -> int:
        return len(self._columns[0])

    def read(self, row: int) -> bytes:
        """Encoded bytes of one row. BadImage for a row with a status; ManifestError when the image has changed."""
        split, source, offset, size, sha256, status, reason = (column[row].as_py() for column in self._columns)
        if status:
            raise BadImage(Status(status), reason)
        try:
            data = self._bytes.read(split, source, offset, size)
        except OSError as error:
            path = self._bytes.path(split, source)
            raise ManifestError(f"row {row}: {path} cannot be read: {error.strerror}; {REFRESH}") from None
        if len(data) != size:
            raise ManifestError(f"{self._name(row)} has {len(data)} bytes, the manifest says {size}; {REFRESH}")
        if hashlib.sha256(data).hexdigest() != sha256:
            raise ManifestError(f"{self._name(row)} is not the image that the manifest describes (SHA-256); {REFRESH}")
        return data

    def _name(self, row: int) -> str:
        split, source, offset = (column[row].as_py() for column in self._columns[:3])
        inside = f" at {offset}" if source.endswith((".tar", ".parquet")) else ""
        return f"row {row}: {self._bytes.path(split, source)}{inside}"


def _pread(descriptor: int, size: int, offset: int) -> bytes:
    """`size` bytes at `offset`, fewer only at the end of the file (one call may return less on network drives)."""
    parts = []
    while size > 0 and (part := os.pread(descriptor, size, offset)):
        parts.append(part)
        size, offset = size - len(part), offset + len(part)
    return b"".join(parts)

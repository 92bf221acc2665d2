"""Long work in chunks, and their store on disk: one folder per fingerprint, one complete file per finished chunk.

The state of a run is on disk and nowhere else: a chunk is done when its file stands under its final name, so a killed
run, a lost Dask worker and a second start are the same case. A folder is named by the fingerprint of everything that
shapes the result, so chunks of another recipe never match.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from zipfile import BadZipFile

import numpy as np

from semdict.pipeline.common.files import atomic_write, remove, sha256_json

WORK = Path("work")
FINGERPRINT_DIGITS = 16
Arrays = dict[str, np.ndarray]
Advance = Callable[[int, int], None]  # (images done, bad ones among them)


@dataclass(frozen=True)
class Chunk:
    """Rows [start, stop) of the manifest: the unit that is computed, written and resumed."""

    index: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


Finished = Callable[[Chunk, Arrays], None]  # called once per chunk that is in the store


class Worker(Protocol):
    """Computes chunks one after the other; may look ahead, must yield them in order."""

    def process(self, chunks: Iterable[Chunk], advance: Advance) -> Iterator[tuple[Chunk, Arrays]]: ...


class Job(Protocol):
    """A picklable description of the work; `open` loads the models, once per process."""

    fingerprint: str

    def open(self) -> Worker: ...


def split_rows(rows: int, size: int) -> list[Chunk]:
    """Cut `rows` into chunks of `size`; the last may be shorter."""
    return [Chunk(i, start, min(start + size, rows)) for i, start in enumerate(range(0, rows, size))]


def fingerprint(**parts: Any) -> str:
    """16 hex digits over every JSON-able part that shapes the result."""
    return sha256_json(parts)[:FINGERPRINT_DIGITS]


class ChunkStore:
    """Finished chunks of one recipe: `work/<stage>-<fingerprint>/chunk-000000.npz`, each complete or absent."""

    def __init__(self, root: Path, stage: str, recipe: str):
        self.folder = Path(root).resolve() / f"{stage}-{recipe}"
        self.siblings = f"{stage}-{'[0-9a-f]' * FINGERPRINT_DIGITS}"

    def path(self, chunk: Chunk) -> Path:
        """Where a finished chunk stands."""
        return self.folder / f"chunk-{chunk.index:06d}.npz"

    def write(self, chunk: Chunk, arrays: Arrays) -> None:
        """Write one chunk under a temporary name and rename it: from here on it is done."""
        with atomic_write(self.path(chunk)) as tmp_path, tmp_path.open("wb") as file:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())

    def read(self, chunk: Chunk, names: Sequence[str] = ()) -> Arrays:
        """The arrays of a finished chunk, all or those named; the zip's checksums are verified while reading."""
        with np.load(self.path(chunk), allow_pickle=False) as archive:
            return {name: archive[name] for name in names or archive.files}

    def read_if_done(self, chunk: Chunk) -> Arrays | None:
        """The arrays of a chunk, None where it is not done; a damaged file is removed, its chunk computed again."""
        if not self.path(chunk).exists():
            return None
        try:
            return self.read(chunk)
        except (OSError, ValueError, BadZipFile, EOFError, KeyError):
            remove(self.path(chunk))
            return None

    def sweep(self) -> None:
        """Delete this stage's work folders, stale recipes included; called once the output is published."""
        for folder in self.folder.parent.glob(self.siblings):
            remove(folder)

"""Rows -> crops, a few batches ahead of the models: reading and decoding never wait for them, nor they for it."""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import astuple, dataclass
from typing import Protocol

import numpy as np

from semdict.pipeline.execute.chunks import Chunk
from semdict.pipeline.images.decode import BadImage, ViewSpec, crop_views, decode

AHEAD = 3  # batches in flight: one under the models, one ready, one being decoded


class Rows(Protocol):
    """What batches need to know of a manifest: status (N,) uint8 and the key of each row."""

    status: np.ndarray

    def key(self, row: int) -> str: ...


class Source(Protocol):
    """Encoded bytes of a manifest row."""

    def read(self, row: int) -> bytes: ...


@dataclass(frozen=True)
class CropRecipe:
    """Everything that decides which pixels a view shows."""

    crop: str
    views: tuple[ViewSpec, ...]
    decoder: str
    max_pixels: int
    seed: int


@dataclass(frozen=True)
class Batch:
    """Crops of the good rows of a chunk's slice; rows that could not be decoded carry a status instead."""

    chunk: Chunk
    rows: np.ndarray  # (n,) int64 manifest rows, good ones only
    pixels: np.ndarray  # (n, V, 256, 256, 3) uint8
    boxes: np.ndarray  # (n, V, 5) float32: left, top, right, bottom in source pixels, flip (0 or 1)
    bad: dict[int, tuple[int, str]]  # row -> (status, reason)
    size: int  # rows covered, good and bad
    last: bool  # the chunk ends here


def load_crop(reader: Source, manifest: Rows, row: int, recipe: CropRecipe) -> tuple[np.ndarray, np.ndarray]:
    """One row to (V, 256, 256, 3) uint8 crops and (V, 5) float32 boxes; BadImage where it cannot be decoded."""
    rgb = decode(reader.read(row), recipe.decoder, recipe.max_pixels)
    pixels, boxes = crop_views(rgb, recipe.crop, list(recipe.views), manifest.key(row), recipe.seed)
    return pixels, np.asarray([astuple(box) for box in boxes], dtype=np.float32)


def stream_batches(
    reader: Source, manifest: Rows, chunks: Iterable[Chunk], recipe: CropRecipe, batch: int, workers: int = 0
) -> Iterator[Batch]:
    """Batches in row order, decoded by `workers` threads (0 = one per core), looking ahead over chunk borders.

    Batch borders depend on the chunk alone, never on timing, so that a resumed run feeds the models the same batches.
    """
    pool = ThreadPoolExecutor(workers or os.cpu_count() or 1, thread_name_prefix="decode")
    try:
        pending: deque[tuple[Chunk, range, list[Future | None]]] = deque()
        for chunk, rows in _slices(chunks, batch):
            futures = [
                pool.submit(load_crop, reader, manifest, row, recipe) if manifest.status[row] == 0 else None
                for row in rows
            ]
            pending.append((chunk, rows, futures))
            if len(pending) >= AHEAD:
                yield _gather(*pending.popleft(), len(recipe.views))
        while pending:
            yield _gather(*pending.popleft(), len(recipe.views))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _slices(chunks: Iterable[Chunk], batch: int) -> Iterator[tuple[Chunk, range]]:
    for chunk in chunks:
        for start in range(chunk.start, chunk.stop, batch):
            yield chunk, range(start, min(start + batch, chunk.stop))


def _gather(chunk: Chunk, rows: range, futures: list[Future | None], views: int) -> Batch:
    """Wait for one batch's decodes; a bad image becomes a status, anything else is raised."""
    good, crops, boxes, bad = [], [], [], {}
    for row, future in zip(rows, futures, strict=True):
        if future is None:
            continue  # the manifest already says why
        try:
            pixels, box = future.result()
        except BadImage as error:
            bad[row] = (int(error.status), error.reason)
            continue
        good.append(row)
        crops.append(pixels)
        boxes.append(box)
    return Batch(
        chunk=chunk,
        rows=np.asarray(good, dtype=np.int64),
        pixels=np.stack(crops) if crops else np.zeros((0, views, 256, 256, 3), np.uint8),
        boxes=np.stack(boxes) if boxes else np.zeros((0, views, 5), np.float32),
        bad=bad,
        size=len(rows),
        last=rows.stop == chunk.stop,
    )

"""Manifest rows -> batches of crops, decoded ahead of their use: the only look-ahead over images.

`load_ahead` decides when an image is decoded, never what is returned: results come in the order of the requests, for
any number of workers. What a bad image does is up to the function that loads it: raise BadImage (nothing caught),
return it (`good_or_bad`: encode records a status), or take the next image (`first_good`: training).
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import astuple, dataclass
from itertools import tee
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from semdict.pipeline.common.errors import ManifestError
from semdict.pipeline.execute.processes import cores
from semdict.pipeline.execute.store import Chunk
from semdict.pipeline.images.crops import Crop, ViewSpec, crop_identity, crop_views, expand_views
from semdict.pipeline.images.decode import DEFAULT_DECODING, BadImage, DecodeSpec, decoded, decoder_identity

if TYPE_CHECKING:
    from semdict.pipeline.config.schema import Pixels
    from semdict.pipeline.config.schema.base import CropProtocol

AHEAD = 3  # batches in flight: one in use, one ready, one being decoded

Crops = tuple[np.ndarray, np.ndarray]  # (V, S, S, 3) uint8, boxes (V, 5) float32


class Rows(Protocol):
    """Part of a manifest that the batches need: status (N,) uint8 and the key of each row."""

    status: np.ndarray

    def key(self, row: int) -> str: ...


class Source(Protocol):
    """Encoded bytes of a manifest row."""

    def read(self, row: int) -> bytes: ...


@dataclass(frozen=True)
class CropRecipe:
    """Everything that decides the pixels of a view."""

    crop: Crop
    views: tuple[ViewSpec, ...]
    decoding: DecodeSpec = DEFAULT_DECODING
    seed: int = 0  # of random views

    @classmethod
    def of(
        cls, pixels: "Pixels", views: Sequence[str], seed: int = 0, crop: "CropProtocol | None" = None
    ) -> "CropRecipe":
        """From section pixels of params.yaml and names of views; crop: a protocol other than that of the section."""
        views = tuple(expand_views(list(views)))
        return cls(Crop.of(crop or pixels.crop, pixels.size), views, DecodeSpec.of(pixels), seed)

    def identity(self) -> dict[str, Any]:
        """Part of a token set's recipe: crop and decoder."""
        return {
            "crop": crop_identity(self.crop, list(self.views), self.seed),
            "decoder": decoder_identity(self.decoding.decoder),
        }


@dataclass(frozen=True)
class CropBatch:
    """Crops of the good rows of a chunk's slice; rows that cannot be decoded carry a status instead."""

    chunk: Chunk
    rows: np.ndarray  # (n,) int64 manifest rows, good ones only
    pixels: np.ndarray  # (n, V, S, S, 3) uint8
    boxes: np.ndarray  # (n, V, 5) float32: left, top, right, bottom in source pixels, flip (0 or 1)
    bad: dict[int, tuple[int, str]]  # row -> (status, reason)
    size: int  # rows covered, good and bad
    last: bool  # the chunk ends here


def load_ahead(
    batches: Iterable[Sequence[Any]],
    load: Callable[[Any], Any],
    workers: int = 0,
    collate: Callable[[list], Any] = list,
    processes: bool = False,
    pin_memory: bool = False,
) -> Iterator[Any]:
    """Yield collate([load(request) for request in batch]) for each batch, loading AHEAD batches before they are used.

    Requests run on `workers` threads (0 = one per core). With `processes`, whole batches run in worker processes of a
    torch DataLoader, which `load` needs if it uses global state such as NumPy's generator; `load` and `collate` must be
    picklable then, and `pin_memory` applies to collated tensors. `batches` may be endless. An exception of `load` is
    raised at the batch that it belongs to.
    """
    workers = workers or cores()
    if processes:
        from torch.utils.data import DataLoader

        yield from DataLoader(
            _Requests(load), batch_sampler=batches, num_workers=workers, collate_fn=collate, pin_memory=pin_memory
        )
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    pending: deque[list[Future]] = deque()
    try:
        for batch in batches:
            pending.append([pool.submit(load, request) for request in batch])
            if len(pending) >= AHEAD:
                yield collate([future.result() for future in pending.popleft()])
        while pending:
            yield collate([future.result() for future in pending.popleft()])
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@dataclass
class _Requests:
    """A dataset whose indices are requests."""

    load: Callable[[Any], Any]

    def __getitem__(self, request: Any) -> Any:
        return self.load(request)


def good_or_bad(load: Callable[..., Any], *request: Any) -> Any:
    """load(*request), or the BadImage that it raised."""
    try:
        return load(*request)
    except BadImage as error:
        return error


def first_good(rows: np.ndarray, position: int, load: Callable[[int], Any]) -> tuple[Any, list[int]]:
    """load(row) of the first good image among rows[position], rows[position + 1], ..., which go on at rows[0].

    Also returns the positions tried, the last of which is that of the result. ManifestError if every image is bad.
    """
    tried: list[int] = []
    for offset in range(len(rows)):
        tried.append((position + offset) % len(rows))
        result = good_or_bad(load, int(rows[tried[-1]]))
        if not isinstance(result, BadImage):
            return result, tried
    raise ManifestError("none of the listed images can be decoded; run `dvc repro -f manifest`")


def load_crop(reader: Source, manifest: Rows, row: int, recipe: CropRecipe) -> Crops:
    """Views of one row and their boxes; BadImage where it cannot be decoded."""
    crop = recipe.crop
    with decoded(reader.read(row), recipe.decoding, max(crop.short, crop.ten_crop_side)) as rgb_HW3:
        pixels, boxes = crop_views(rgb_HW3, crop, list(recipe.views), manifest.key(row), recipe.seed)
    return pixels, np.asarray([astuple(box) for box in boxes], dtype=np.float32)


def stream_batches(
    reader: Source, manifest: Rows, chunks: Iterable[Chunk], recipe: CropRecipe, batch: int, workers: int = 0
) -> Iterator[CropBatch]:
    """Batches of the chunks' rows in row order, looking ahead over chunk borders.

    Batch borders depend on the chunk alone, never on timing, so that a resumed run feeds the models the same batches.
    Rows that the manifest lists with a status are not read.
    """
    slices, ahead = tee(_slices(chunks, batch))
    good = ([row for row in rows if manifest.status[row] == 0] for _, rows in ahead)

    def load(row: int) -> tuple[int, Crops | BadImage]:
        return row, good_or_bad(load_crop, reader, manifest, row, recipe)

    with closing(load_ahead(good, load, workers)) as loaded:
        for results, (chunk, rows) in zip(loaded, slices, strict=True):
            yield _crop_batch(chunk, rows, results, (len(recipe.views), recipe.crop.size))


def _slices(chunks: Iterable[Chunk], batch: int) -> Iterator[tuple[Chunk, range]]:
    for chunk in chunks:
        for start in range(chunk.start, chunk.stop, batch):
            yield chunk, range(start, min(start + batch, chunk.stop))


def _crop_batch(
    chunk: Chunk, rows: range, results: list[tuple[int, Crops | BadImage]], shape: tuple[int, int]
) -> CropBatch:
    """Stack the good rows, shape = (V, S); a bad image becomes a status."""
    views, size = shape
    good = {row: result for row, result in results if not isinstance(result, BadImage)}
    bad = {row: (int(error.status), error.reason) for row, error in results if isinstance(error, BadImage)}
    pixels, boxes = zip(*good.values(), strict=True) if good else ((), ())
    return CropBatch(
        chunk=chunk,
        rows=np.fromiter(good, np.int64),
        pixels=np.stack(pixels) if good else np.zeros((0, views, size, size, 3), np.uint8),
        boxes=np.stack(boxes) if good else np.zeros((0, views, 5), np.float32),
        bad=bad,
        size=len(rows),
        last=rows.stop == chunk.stop,
    )

"""One worker's part of encoding: a chunk of rows is decoded, cropped and tokenised into arrays of fixed shape."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from semdict.pipeline.common.device import HostCopy, keep_freed_memory, read_one_late, to_device
from semdict.pipeline.common.errors import SemdictError
from semdict.pipeline.common.inference import CROPS
from semdict.pipeline.common.nearest import marked_non_finite
from semdict.pipeline.execute.store import Advance, Arrays, Chunk
from semdict.pipeline.images.batches import CropBatch, CropRecipe, Source, stream_batches
from semdict.pipeline.manifest.table import Manifest, load_manifest
from semdict.pipeline.shards.ids import filler
from semdict.pipeline.tokenizers.pair import StreamTokenizer, StreamTokenizerSpec


@dataclass(frozen=True)
class EncodeJob:
    """Picklable: paths, recipe and tokenizer description; the fingerprint names what shapes the result."""

    fingerprint: str
    manifest: str
    images: tuple[tuple[str, str], ...]  # (split, folder or pattern of its images)
    recipe: CropRecipe
    spec: StreamTokenizerSpec
    dtypes: tuple[tuple[str, str], ...]  # (stream, integer type of its ids): "gen", and "disc" of a pair
    length: int  # L, tokens per view
    batch: int
    workers: int
    precision: str

    def open(self) -> "EncodeWorker":
        """Load the manifest, the image reader and the models in this process."""
        keep_freed_memory()
        manifest = load_manifest(self.manifest)
        return EncodeWorker(self, manifest, manifest.reader(dict(self.images)), self.spec.open())


@dataclass
class EncodeWorker:
    """A loaded tokenizer and the images; `process` turns chunks into arrays, decoding ahead while the models run."""

    job: EncodeJob
    manifest: Manifest
    reader: Source
    tokenizer: StreamTokenizer

    def process(self, chunks: Iterable[Chunk], advance: Advance) -> Iterator[tuple[Chunk, Arrays]]:
        """Yield (chunk, {gen, disc: (n, V, L) ids; status (n,) uint8; boxes (n, V, 5); reasons: JSON})."""
        job = self.job
        arrays: Arrays = {}
        reasons: dict[int, str] = {}
        batches = stream_batches(self.reader, self.manifest, chunks, job.recipe, job.batch, job.workers)
        for batch, tokens in read_one_late(batches, self._queue):
            if not arrays:
                arrays, reasons = self._blank(batch.chunk), {}
            self._fill(arrays, reasons, batch, tokens)
            advance(batch.size, batch.size - len(batch.rows))
            if batch.last:
                text = json.dumps(reasons, sort_keys=True).encode()
                yield batch.chunk, {**arrays, "reasons": np.frombuffer(text, dtype=np.uint8)}
                arrays = {}

    def _queue(self, batch: CropBatch) -> HostCopy:
        """The tokens of a batch on their way to the host; none for a batch without a good image."""
        return self._tokens(batch.pixels.reshape(-1, *batch.pixels.shape[2:])) if len(batch.rows) else HostCopy({})

    @torch.inference_mode()
    def _tokens(self, crops: np.ndarray) -> HostCopy:
        """(N, H, W, 3) uint8 crops of any number -> tokens of each stream, (N, L), at most `CROPS` crops at a time.

        Nothing here waits for a GPU: what it computes is on its way when this returns.
        """
        device, precision = self.tokenizer.device, self.job.precision
        with marked_non_finite():
            pieces = [
                self.tokenizer.tokens(to_device(crops[start : start + CROPS], device), precision)
                for start in range(0, len(crops), CROPS)
            ]
        return HostCopy({name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]})

    def _blank(self, chunk: Chunk) -> Arrays:
        """A chunk in which no row has tokens yet, with the manifest's statuses."""
        shape = (len(chunk), len(self.job.recipe.views), self.job.length)
        tokens = {name: np.full(shape, filler(np.dtype(dtype)), dtype) for name, dtype in self.job.dtypes}
        status = self.manifest.status[chunk.start : chunk.stop].astype(np.uint8)
        return {**tokens, "status": status, "boxes": np.zeros((*shape[:2], 5), np.float32)}

    def _fill(self, arrays: Arrays, reasons: dict[int, str], batch: CropBatch, tokens: dict[str, np.ndarray]) -> None:
        """Put one batch's tokens, boxes and statuses into the chunk's arrays; SemdictError where features are NaN."""
        start = batch.chunk.start
        for row, (status, reason) in batch.bad.items():
            arrays["status"][row - start] = status
            reasons[row] = reason
        if not len(batch.rows):
            return
        n, V = batch.pixels.shape[:2]
        for name, dtype in self.job.dtypes:
            ids_nVL = tokens[name].reshape(n, V, -1)
            if (lost := np.argwhere(ids_nVL < 0)).size:
                key = self.manifest.key(int(batch.rows[lost[0][0]]))
                raise SemdictError(
                    f"image {key}: the features behind its {name} tokens hold NaN or Inf ({len(lost)} cells of this "
                    f"batch do); check the weights, and the precision {self.job.precision}"
                )
            arrays[name][batch.rows - start] = ids_nVL.astype(dtype)
        arrays["boxes"][batch.rows - start] = batch.boxes

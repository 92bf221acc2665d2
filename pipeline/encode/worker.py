"""What one worker does with a chunk of rows: decode, crop, tokenise, and hand back arrays of fixed shape."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from semdict.pipeline.common.device import to_device
from semdict.pipeline.common.memory import keep_freed_memory
from semdict.pipeline.execute.store import Advance, Chunk
from semdict.pipeline.images.batches import CropBatch, CropRecipe, stream_batches
from semdict.pipeline.manifest.reader import Reader
from semdict.pipeline.manifest.table import Manifest, load_manifest
from semdict.pipeline.tokenizers.pair import StreamTokenizer, StreamTokenizerSpec

FILL = 65535  # stands where a row has no tokens; never a word


@dataclass(frozen=True)
class EncodeJob:
    """Picklable: paths, recipe and tokenizer description; the fingerprint names what shapes the result."""

    fingerprint: str
    manifest: str
    images: tuple[tuple[str, str], ...]  # (split, where its images are)
    recipe: CropRecipe
    spec: StreamTokenizerSpec
    streams: tuple[str, ...]  # ("gen", "disc") or ("gen",)
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
    """Holds the models; `process` turns chunks into arrays, decoding ahead while the models run."""

    job: EncodeJob
    manifest: Manifest
    reader: Reader
    tokenizer: StreamTokenizer

    def process(self, chunks: Iterable[Chunk], advance: Advance) -> Iterator[tuple[Chunk, dict[str, np.ndarray]]]:
        """Yield (chunk, {gen, disc: (n, V, L) uint16; status (n,) uint8; boxes (n, V, 5); reasons: JSON})."""
        job = self.job
        arrays: dict[str, np.ndarray] = {}
        reasons: dict[int, str] = {}
        for batch, tokens in self._launched(
            stream_batches(self.reader, self.manifest, chunks, job.recipe, job.batch, job.workers)
        ):
            if not arrays:
                arrays, reasons = self._blank(batch.chunk), {}
            self._fill(arrays, reasons, batch, tokens)
            advance(batch.size, batch.size - len(batch.rows))
            if batch.last:
                text = json.dumps(reasons, sort_keys=True).encode()
                yield batch.chunk, {**arrays, "reasons": np.frombuffer(text, dtype=np.uint8)}
                arrays = {}

    def _launched(self, batches: Iterable[CropBatch]) -> Iterator[tuple[CropBatch, dict[str, Tensor]]]:
        """Pair each batch with its tokens, one batch late: a GPU has the next queued before this one is read back."""
        waiting: tuple[CropBatch, dict[str, Tensor]] | None = None
        for batch in batches:
            tokens = {}
            if len(batch.rows):
                images = to_device(batch.pixels.reshape(-1, *batch.pixels.shape[2:]), self.tokenizer.device)
                tokens = self.tokenizer.tokens(images, self.job.precision)
            if waiting:
                yield waiting
            waiting = batch, tokens
        if waiting:
            yield waiting

    def _blank(self, chunk: Chunk) -> dict[str, np.ndarray]:
        """A chunk in which every row is still without tokens, with the manifest's statuses."""
        shape = (len(chunk), len(self.job.recipe.views), self.job.length)
        tokens = {name: np.full(shape, FILL, np.uint16) for name in self.job.streams}
        status = self.manifest.status[chunk.start : chunk.stop].astype(np.uint8)
        return {**tokens, "status": status, "boxes": np.zeros((*shape[:2], 5), np.float32)}

    def _fill(
        self, arrays: dict[str, np.ndarray], reasons: dict[int, str], batch: CropBatch, tokens: dict[str, Tensor]
    ) -> None:
        """Put one batch's tokens, boxes and faults into the chunk's arrays."""
        start = batch.chunk.start
        for row, (status, reason) in batch.bad.items():
            arrays["status"][row - start] = status
            reasons[row] = reason
        if not len(batch.rows):
            return
        n, V = batch.pixels.shape[:2]
        for name in self.job.streams:
            arrays[name][batch.rows - start] = tokens[name].reshape(n, V, -1).cpu().numpy().astype(np.uint16)
        arrays["boxes"][batch.rows - start] = batch.boxes

"""From an encode job to published token shards, for any tokenizer: compute the chunks, assemble, publish."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from semdict.pipeline.common.errors import SemdictError
from semdict.pipeline.common.progress import progress
from semdict.pipeline.config.schema import Shards
from semdict.pipeline.encode.worker import EncodeJob
from semdict.pipeline.execute.executor import run_chunks
from semdict.pipeline.execute.store import Arrays, Chunk, ChunkStore, split_rows
from semdict.pipeline.images.decode import Status
from semdict.pipeline.manifest.table import Manifest
from semdict.pipeline.shards import Block, ShardSpec, count_tokens, write_shards

SHOWN = 5  # bad images named in an error message


@dataclass(frozen=True)
class Publication:
    """What is encoded, where its chunks wait, and what is published."""

    job: EncodeJob
    manifest: Manifest
    store: ChunkStore
    spec: ShardSpec
    out: Path
    chunk: int  # images per chunk
    max_bad_fraction: float
    storage: Shards
    centroids: np.ndarray | None = None


def encode_and_publish(publication: Publication, scheduler: str) -> dict[str, Any]:
    """Compute the missing chunks, write and publish the shards; returns the counts of good and bad images.

    A chunk's file is read once, when its tokens are written: what the shards need to know of all chunks beforehand is
    collected while they are computed. SemdictError once more than `max_bad_fraction` of the images are bad.
    """
    chunks = split_rows(len(publication.manifest), publication.chunk)
    summary = Summary(publication)
    with progress(len(publication.manifest), "encode") as bar:

        def advance(done: int, _bad: int) -> None:
            bar.set_postfix(bad=summary.bad, refresh=False)
            bar.update(done)

        run_chunks(publication.job, publication.store, chunks, scheduler, advance, summary.add)
    storage = publication.storage
    write_shards(
        publication.out,
        publication.spec,
        _blocks(publication, chunks),
        summary.index(),
        centroids=publication.centroids,
        gen_counts=summary.counts["gen"],
        disc_counts=summary.counts.get("disc"),
        codec=storage.codec,
        chunk_rows=storage.chunk_rows,
        shard_rows=storage.shard_rows,
    )
    return summary.metrics()


class Summary:
    """What is known of all chunks before the first is written: statuses, reasons, boxes and token counts."""

    def __init__(self, publication: Publication):
        self.publication = publication
        rows, views = len(publication.manifest), publication.job.recipe.views
        self.rows = self.bad = 0
        self.status = np.zeros(rows, np.uint8)
        self.reasons: dict[int, str] = {}
        self.counts = {name: np.zeros(sizes.max(), np.int64) for name, sizes in publication.spec.sizes.items()}
        random = any(view.kind == "random" for view in views)  # the other views' boxes follow from the image's size
        self.boxes = np.zeros((rows, 5 * len(views)), np.float32) if random else None

    def add(self, chunk: Chunk, arrays: Arrays) -> None:
        """Take in a finished chunk; SemdictError once too many images are bad."""
        part = slice(chunk.start, chunk.stop)
        self.status[part] = arrays["status"]
        self.reasons |= {int(row): reason for row, reason in json.loads(arrays["reasons"].tobytes()).items()}
        for name, counts in count_tokens(self.publication.spec, [_block(self.publication, chunk, arrays)]).items():
            self.counts[name] += counts
        if self.boxes is not None:
            self.boxes[part] = arrays["boxes"].reshape(len(chunk), -1)
        self.rows += len(chunk)
        self.bad += int(np.count_nonzero(arrays["status"]))
        if self.bad > self.publication.max_bad_fraction * len(self.status):
            raise SemdictError(self._too_many())

    def index(self) -> pa.Table:
        """key, split, label name and reason of every row; the boxes too where views are drawn per image."""
        table = self.publication.manifest.table
        reasons = table.column("reason").to_pylist()
        for row, reason in self.reasons.items():
            reasons[row] = reason
        columns = {name: table.column(name) for name in ("key", "split", "label_name")}
        columns["reason"] = pa.array(reasons, pa.string())
        if self.boxes is not None:
            columns["boxes"] = pa.FixedSizeListArray.from_arrays(pa.array(self.boxes.reshape(-1)), self.boxes.shape[1])
        return pa.table(columns)

    def metrics(self) -> dict[str, Any]:
        """Images by status."""
        codes, numbers = np.unique(self.status, return_counts=True)
        counts = {Status(int(c)).name.lower(): int(n) for c, n in zip(codes, numbers, strict=True)}
        return {"rows": len(self.status), "bad": self.bad, "status": counts}

    def _too_many(self) -> str:
        """Why the stage stops: how many, how many are allowed, the first of them with their reasons."""
        manifest, limit = self.publication.manifest, self.publication.max_bad_fraction
        bad = np.flatnonzero(self.status)[: SHOWN + 1].tolist()
        named = [f"{manifest.key(row)} ({self.reasons.get(row) or manifest.reason(row)})" for row in bad[:SHOWN]]
        return (
            f"{self.bad} of the first {self.rows} images are bad, more than max_bad_fraction {limit} of all "
            f"{len(manifest)}: {', '.join([*named, *['...'] * (len(bad) > SHOWN)])}; "
            "repair them or raise manifest.max_bad_fraction"
        )


def _blocks(publication: Publication, chunks: list[Chunk]) -> Iterator[Block]:
    """The finished chunks in row order."""
    for chunk in chunks:
        yield _block(publication, chunk, publication.store.read(chunk, [*publication.spec.sizes, "status"]))


def _block(publication: Publication, chunk: Chunk, arrays: Arrays) -> Block:
    """A chunk's tokens with the manifest's labels."""
    label = publication.manifest.label[chunk.start : chunk.stop]
    return Block(gen=arrays["gen"], disc=arrays.get("disc"), label=label, status=arrays["status"])

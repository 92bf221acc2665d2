"""From an encode job to a published shard directory, for any tokenizer: run, count, assemble, rename."""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from semdict.pipeline.common.errors import SemdictError
from semdict.pipeline.config.schema import Shards
from semdict.pipeline.encode.worker import EncodeJob
from semdict.pipeline.execute.chunks import Chunk, ChunkStore, run_chunks, split_rows
from semdict.pipeline.images.decode import Status
from semdict.pipeline.manifest.stage import Manifest
from semdict.pipeline.shards import Block, ShardSpec, write_shards


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


def encode_and_publish(what: Publication, scheduler: str) -> dict[str, Any]:
    """Compute missing chunks, write and publish the shards; counts of good and bad images."""
    chunks = split_rows(len(what.manifest), what.chunk)
    _compute(what, chunks, scheduler)
    counts = _count(what, chunks)
    write_shards(
        what.out,
        what.spec,
        lambda: _blocks(what, chunks),
        _index(what, chunks),
        centroids=what.centroids,
        codec=what.storage.codec,
        chunk_rows=what.storage.chunk_rows,
        shard_rows=what.storage.shard_rows,
    )
    return counts


def _compute(what: Publication, chunks: list[Chunk], scheduler: str) -> None:
    """Run the job under a progress bar (images/s, time left, bad files); stop once too many images are bad."""
    found = 0
    with tqdm(total=len(what.manifest), unit="img", desc="encode", smoothing=0.05, file=sys.stderr) as bar:

        def advance(done: int, bad: int) -> None:
            nonlocal found
            found += bad
            bar.set_postfix(bad=found, refresh=False)
            bar.update(done)

        seen: list[Chunk] = []
        counts = {"bad": 0}

        def finished(chunk: Chunk) -> None:
            seen.append(chunk)
            counts["bad"] += int(np.count_nonzero(what.store.read(chunk, "status")["status"]))
            if counts["bad"] > what.max_bad_fraction * len(what.manifest):
                raise SemdictError(_too_many(what, counts["bad"], seen))

        run_chunks(what.job, what.store, chunks, scheduler, advance, finished)


def _too_many(what: Publication, bad: int, seen: list[Chunk]) -> str:
    """Why the stage gives up: how many, how many are allowed, the first of them with their reasons."""
    rows = sum(map(len, seen))
    return (
        f"{bad} of the first {rows} images are bad, more than max_bad_fraction {what.max_bad_fraction} of all "
        f"{len(what.manifest)}: {_first_bad(what, seen)}; repair them or raise manifest.max_bad_fraction"
    )


def _count(what: Publication, chunks: list[Chunk]) -> dict[str, Any]:
    """Images by status."""
    statuses = np.concatenate([what.store.read(chunk, "status")["status"] for chunk in chunks])
    codes, numbers = np.unique(statuses, return_counts=True)
    counts = {Status(int(c)).name.lower(): int(n) for c, n in zip(codes, numbers, strict=True)}
    return {"rows": len(statuses), "bad": int(np.count_nonzero(statuses)), "status": counts}


def _first_bad(what: Publication, chunks: list[Chunk], show: int = 5) -> str:
    """The first few bad keys with their reasons."""
    named: list[str] = []
    for chunk in chunks:
        arrays = what.store.read(chunk)
        reasons = json.loads(arrays["reasons"].tobytes())
        for offset in np.flatnonzero(arrays["status"]):
            row = chunk.start + int(offset)
            if len(named) == show:
                return ", ".join([*named, "..."])
            named.append(f"{what.manifest.key(row)} ({reasons.get(str(row)) or what.manifest.reason(row)})")
    return ", ".join(named)


def _blocks(what: Publication, chunks: list[Chunk]) -> Iterator[Block]:
    """The finished chunks in row order, with the manifest's labels."""
    for chunk in chunks:
        arrays = what.store.read(chunk)
        yield Block(
            gen=arrays["gen"],
            disc=arrays.get("disc"),
            label=what.manifest.label[chunk.start : chunk.stop],
            status=arrays["status"],
        )


def _index(what: Publication, chunks: list[Chunk]) -> pa.Table:
    """key, split, label name and reason of every row; the boxes too where a view is drawn per image."""
    table = what.manifest.table
    reasons = table.column("reason").to_pylist()
    boxes = []
    drawn = any(view.kind == "random" for view in what.job.recipe.views)
    for chunk in chunks:
        arrays = what.store.read(chunk)
        for row, reason in json.loads(arrays["reasons"].tobytes()).items():
            reasons[int(row)] = reason
        if drawn:
            boxes.append(arrays["boxes"].reshape(len(chunk), -1))
    columns = {name: table.column(name) for name in ("key", "split", "label_name")}
    columns["reason"] = pa.array(reasons, pa.string())
    if drawn:
        flat = np.concatenate(boxes)
        columns["boxes"] = pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), flat.shape[1])
    return pa.table(columns)

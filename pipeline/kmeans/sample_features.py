"""Stage `sample_features`: teacher features of a few patches of every image, enough for k-means and no more."""

import argparse
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from semdict.pipeline.common.device import reduced_precision, resolve_device, to_device
from semdict.pipeline.common.errors import ManifestError
from semdict.pipeline.common.files import sha256_file, write_json
from semdict.pipeline.common.hub import absolute, local_file
from semdict.pipeline.common.memory import keep_freed_memory
from semdict.pipeline.common.progress import progress
from semdict.pipeline.common.publish import check_output, publish_folder
from semdict.pipeline.config import paths as places
from semdict.pipeline.config.params import add_params_arguments, params_of
from semdict.pipeline.config.schema import Params
from semdict.pipeline.execute.code_identity import code_identity
from semdict.pipeline.execute.executor import run_chunks
from semdict.pipeline.execute.locks import interrupt_on_signals, lock
from semdict.pipeline.execute.store import WORK, Advance, Arrays, Chunk, ChunkStore, fingerprint, split_rows
from semdict.pipeline.images import batches as flow
from semdict.pipeline.manifest.reader import Reader
from semdict.pipeline.manifest.table import Manifest, load_manifest
from semdict.pipeline.tokenizers import load_features, load_tokenizer
from semdict.pipeline.tokenizers.teachers import GRID

EXAMPLE = """example:
  semdict sample-features                     what `dvc repro sample_features` runs
  semdict sample-features --scheduler local-2"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Paths default to the preset's own."""
    add_params_arguments(parser)
    parser.add_argument("--scheduler", help="in-process | local | local-N | tcp://host:port (default: params.yaml)")
    parser.add_argument("--manifest", type=Path, help="default: data/<preset>/manifest/manifest.parquet")
    parser.add_argument("--out", type=Path, help="default: data/<preset>/features.zarr")
    parser.add_argument("--work", type=Path, default=WORK, help="where unfinished chunks wait (default: work)")


def run(args: argparse.Namespace) -> int:
    """Sample, or say why there is nothing to sample."""
    settings = params_of(args)
    out = args.out or places.features(settings.preset)
    check_output(out, "features")
    with lock(f"sample_features-{settings.preset}", args.work), interrupt_on_signals():
        if settings.kmeans.centroids:
            print(f"kmeans.centroids = {settings.kmeans.centroids} is used: nothing to sample", file=sys.stderr)
            with publish_folder(out, "features") as folder:
                write_json(folder / "not-needed.json", {"kmeans.centroids": settings.kmeans.centroids})
            return 0
        scheduler = args.scheduler or settings.runtime.scheduler
        sample(settings, args.manifest or places.manifest(settings.preset), out, args.work, scheduler)
    return 0


def points_per_row(rows: int, points: int, length: int) -> np.ndarray:
    """(rows,) int64 patches to draw from each image: `points` spread evenly, at most `length` from one image."""
    edges = np.arange(rows + 1, dtype=np.int64) * points // max(rows, 1)
    return np.minimum(np.diff(edges), length)


def positions_of(row: int, count: int, length: int, seed: int) -> np.ndarray:
    """`count` distinct grid positions of manifest row `row`, ascending; depends on (seed, row) alone."""
    rng = np.random.Generator(np.random.Philox(key=[seed, 0], counter=[row, 0, 0, 0]))
    return np.sort(rng.choice(length, size=count, replace=False))


@dataclass(frozen=True)
class SampleJob:
    """Picklable: chunks are slices of the list of sampled rows, not of the manifest."""

    fingerprint: str
    manifest: str
    images: tuple[tuple[str, str], ...]
    splits: tuple[str, ...]
    recipe: flow.CropRecipe
    features: Mapping[str, Any]  # arguments of load_features
    grid: int  # cells a side
    device: str
    precision: str
    points: int
    seed: int
    batch: int
    workers: int

    def open(self) -> "SampleWorker":
        """Load manifest, reader and teacher in this process."""
        keep_freed_memory()
        manifest = load_manifest(self.manifest)
        teacher = load_features(**self.features, device=self.device, grid=self.grid)
        counts = np.zeros(len(manifest), np.int64)
        rows = manifest.rows_of(self.splits)
        counts[rows] = points_per_row(len(rows), self.points, math.prod(teacher.grid))
        return SampleWorker(self, manifest, manifest.reader(dict(self.images)), teacher, counts)


@dataclass
class SampleWorker:
    """Teacher plus how many patches each manifest row gives."""

    job: SampleJob
    manifest: Manifest
    reader: Reader
    teacher: Any
    counts: np.ndarray

    def process(self, chunks: Iterable[Chunk], advance: Advance) -> Iterator[tuple[Chunk, dict[str, np.ndarray]]]:
        """Yield (chunk, {features (m, D) float16, row (m,) int64, position (m,) int16}) in row order."""
        job, parts = self.job, []
        for batch in flow.stream_batches(self.reader, self.manifest, chunks, job.recipe, job.batch, job.workers):
            if len(batch.rows):
                parts.append(self._draw(batch))
            advance(batch.size, batch.size - len(batch.rows))
            if batch.last:
                yield batch.chunk, self._joined(parts)
                parts = []

    @torch.inference_mode()
    def _draw(self, batch: flow.CropBatch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Features of the drawn positions of one batch."""
        pixels = to_device(batch.pixels[:, 0], torch.device(self.job.device))
        with reduced_precision(pixels.device, self.job.precision):
            features_BLD = self.teacher(pixels).float()
        L = features_BLD.shape[1]
        drawn = [positions_of(int(row), int(self.counts[row]), L, self.job.seed) for row in batch.rows]
        index = np.repeat(np.arange(len(drawn)), [len(d) for d in drawn])
        position = np.concatenate(drawn) if drawn else np.zeros(0, np.int64)
        picked = features_BLD[torch.from_numpy(index), torch.from_numpy(position)]
        return picked.half().cpu().numpy(), batch.rows[index], position.astype(np.int16)

    def _joined(self, parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> dict[str, np.ndarray]:
        if not parts:
            empty = np.zeros(0)
            return {
                "features": np.zeros((0, self.teacher.dim), np.float16),
                "row": empty.astype(np.int64),
                "position": empty.astype(np.int16),
            }
        features_MD, row, position = (np.concatenate(column) for column in zip(*parts, strict=True))
        return {"features": features_MD, "row": row, "position": position}


def sample(settings: Params, manifest_path: Path, out: Path, root: Path, scheduler: str) -> None:
    """Run the missing chunks and publish one float16 zarr array of all drawn features, in row order."""
    manifest = load_manifest(manifest_path)
    rows = manifest.rows_of(settings.sample_features.splits)
    if not len(rows):
        known = sorted(settings.manifest.images)
        raise ManifestError(
            f"sample_features.splits {settings.sample_features.splits} has no good image; known: {known}"
        )
    job = make_job(settings, manifest, manifest_path)
    store = ChunkStore(root, f"sample_features-{settings.preset}", job.fingerprint)
    size = settings.sample_features.chunk
    chunks = [c for c in split_rows(len(manifest), size) if _overlaps(rows, c)]
    shapes: dict[Chunk, tuple[int, int]] = {}  # (m, D) of each chunk's features

    def finished(chunk: Chunk, arrays: Arrays) -> None:
        shapes[chunk] = arrays["features"].shape

    with progress(sum(map(len, chunks)), "sample-features") as bar:
        run_chunks(job, store, chunks, scheduler, lambda done, bad: bar.update(done), finished)
    _publish(store, [(chunk, shapes[chunk]) for chunk in chunks], out)
    store.sweep()


def _overlaps(rows: np.ndarray, chunk: Chunk) -> bool:
    """True when any of the sorted `rows` lies in the chunk: chunks of other splits are not even read."""
    return bool(np.searchsorted(rows, chunk.stop) > np.searchsorted(rows, chunk.start))


def make_job(settings: Params, manifest: Manifest, manifest_path: Path) -> SampleJob:
    """The picklable job and its fingerprint."""
    chosen, weights = settings.sample_features, settings.features.weights
    recipe = flow.CropRecipe.of(settings.pixels, ["centre"])
    where = resolve_device(settings.runtime.device)
    grid = _grid(settings)
    name = fingerprint(
        manifest=manifest.sha256,
        sample=chosen.model_dump(),
        features=settings.features.model_dump(),
        grid=grid,
        weights=sha256_file(local_file(weights)) if weights else None,
        **recipe.identity(),
        device=where.partition(":")[0],
        code=code_identity(__name__),
    )
    return SampleJob(
        fingerprint=name,
        manifest=str(Path(manifest_path).resolve()),
        images=tuple((split, str(Path(where).absolute())) for split, where in settings.manifest.images.items()),
        splits=tuple(chosen.splits),
        recipe=recipe,
        features={**settings.features.model_dump(), "weights": absolute(weights) if weights else None},
        grid=grid,
        device=where,
        precision=chosen.precision,
        points=chosen.points,
        seed=chosen.seed,
        batch=chosen.batch,
        workers=settings.runtime.workers,
    )


def _grid(settings: Params) -> int:
    """Cells a side: of the tokenizer, which is read for that only where features.image_size does not decide it."""
    if settings.features.image_size is not None:
        return GRID
    tokenizer = load_tokenizer(settings.vqgan.weights, layout=settings.vqgan.layout)
    return math.isqrt(math.prod(tokenizer.grid(settings.pixels.size)))


def _publish(store: ChunkStore, chunks: list[tuple[Chunk, tuple[int, int]]], out: Path) -> None:
    """Write `chunks` and the shapes of their features as zarr group `out`, complete or not at all.

    {features (M, D) float16, row (M,) int64, position (M,) int16} in row order.
    """
    import zarr

    total, width = sum(points for _, (points, _) in chunks), chunks[0][1][1]
    block = max(1, min(total, 64 * 2**20 // (2 * width)))
    with publish_folder(out, "features") as folder:
        group = zarr.create_group(folder)
        arrays = {
            "features": group.create_array("features", shape=(total, width), chunks=(block, width), dtype="float16"),
            "row": group.create_array("row", shape=(total,), chunks=(block,), dtype="int64"),
            "position": group.create_array("position", shape=(total,), chunks=(block,), dtype="int16"),
        }
        start = 0
        for chunk, (points, _) in chunks:
            part = store.read(chunk)
            for name, array in arrays.items():
                array[start : start + points] = part[name]
            start += points

"""Stage `sample_features`: teacher features of a few patches of every image, which k-means clusters."""

import argparse
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from semdict.pipeline.common.device import (
    HostCopy,
    keep_freed_memory,
    read_one_late,
    reduced_precision,
    resolve_device,
    send,
    to_device,
)
from semdict.pipeline.common.digests import write_sums
from semdict.pipeline.common.errors import ManifestError
from semdict.pipeline.common.files import sha256_file, write_json
from semdict.pipeline.common.hub import absolute, local_file
from semdict.pipeline.common.inference import CROPS, with_rounded_weights
from semdict.pipeline.common.progress import progress
from semdict.pipeline.common.publish import check_output, publish_folder
from semdict.pipeline.config import paths
from semdict.pipeline.config.params import add_params_arguments, params_of
from semdict.pipeline.config.schema import Params
from semdict.pipeline.execute.code_identity import code_identity
from semdict.pipeline.execute.executor import run_chunks
from semdict.pipeline.execute.locks import interrupt_on_signals, lock
from semdict.pipeline.execute.processes import decode_threads, resolve_scheduler
from semdict.pipeline.execute.store import WORK, Advance, Arrays, Chunk, ChunkStore, fingerprint, split_rows
from semdict.pipeline.images.batches import CropBatch, CropRecipe, Source, stream_batches
from semdict.pipeline.images.decode import Status
from semdict.pipeline.manifest.table import Manifest, load_manifest
from semdict.pipeline.tokenizers import load_features, load_tokenizer
from semdict.pipeline.tokenizers.teachers import GRID

EXAMPLE = """example:
  semdict sample-features                     what `dvc repro sample_features` runs
  semdict sample-features --scheduler local-2"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Paths default to the preset's own."""
    add_params_arguments(parser)
    parser.add_argument("--scheduler", help="auto | in-process | local-N | tcp://host:port (default: params.yaml)")
    parser.add_argument("--manifest", type=Path, help="default: data/<preset>/manifest/manifest.parquet")
    parser.add_argument("--out", type=Path, help="default: data/<preset>/features.zarr")
    parser.add_argument("--work", type=Path, default=WORK, help="where unfinished chunks wait (default: work)")


def run(args: argparse.Namespace) -> int:
    """Sample the features; a note takes their place if kmeans.centroids names existing centroids."""
    params = params_of(args)
    out = args.out or paths.features(params.preset)
    check_output(out, "features")
    with lock(f"sample_features-{params.preset}", args.work), interrupt_on_signals():
        if params.kmeans.centroids:
            print(f"kmeans.centroids is {params.kmeans.centroids}: no features are needed", file=sys.stderr)
            with publish_folder(out, "features") as folder:
                write_json(folder / "not-needed.json", {"kmeans.centroids": params.kmeans.centroids})
        else:
            scheduler = resolve_scheduler(args.scheduler or params.runtime.scheduler, params.runtime.device)
            sample(params, args.manifest or paths.manifest(params.preset), out, args.work, scheduler)
    return 0


def sample(params: Params, manifest_path: Path, out: Path, work: Path, scheduler: str) -> None:
    """Compute the missing chunks and publish one zarr group of all sampled features, in row order."""
    cfg = params.sample_features
    manifest = load_manifest(manifest_path)
    rows = read_rows(manifest.rows_of(cfg.splits), cfg.images)
    if not len(rows):
        known = ", ".join(sorted(params.manifest.images))
        raise ManifestError(f"sample_features.splits {list(cfg.splits)} has no image; known splits: {known}")
    job = make_job(params, manifest, manifest_path, scheduler)
    store = ChunkStore(work, f"sample_features-{params.preset}", job.fingerprint)
    chunks = [chunk for chunk in split_rows(len(manifest), cfg.chunk) if _overlaps(rows, chunk)]
    shapes: dict[Chunk, tuple[int, int]] = {}  # (m, D) of each chunk's features

    def finished(chunk: Chunk, arrays: Arrays) -> None:
        shapes[chunk] = arrays["features"].shape

    with progress(sum(map(len, chunks)), "sample-features") as bar:
        run_chunks(job, store, chunks, scheduler, lambda done, bad: bar.update(done), finished)
    _publish(store, [(chunk, shapes[chunk]) for chunk in chunks], out)
    store.sweep()


def points_per_row(rows: int, points: int, length: int) -> np.ndarray:
    """(rows,) int64 patches to sample from each image: `points` spread evenly, at most `length` from one image."""
    edges = np.arange(rows + 1, dtype=np.int64) * points // max(rows, 1)
    return np.minimum(np.diff(edges), length)


def read_rows(rows_N: np.ndarray, share: float) -> np.ndarray:
    """A `share` of the rows, at least one, evenly spread; all of them for 1."""
    count = max(1, round(share * len(rows_N))) if len(rows_N) else 0
    return rows_N[np.arange(count, dtype=np.int64) * len(rows_N) // max(count, 1)]


def positions_of(row: int, count: int, length: int, seed: int) -> np.ndarray:
    """`count` distinct grid positions of manifest row `row`, ascending; a function of (seed, row) alone."""
    rng = np.random.Generator(np.random.Philox(key=[seed, 0], counter=[row, 0, 0, 0]))
    return np.sort(rng.choice(length, size=count, replace=False))


@dataclass(frozen=True)
class SampleJob:
    """Picklable: paths, recipe and teacher; the fingerprint names what shapes the result."""

    fingerprint: str
    manifest: str
    images: tuple[tuple[str, str], ...]  # (split, folder or pattern of its images)
    splits: tuple[str, ...]
    recipe: CropRecipe
    features: Mapping[str, Any]  # arguments of load_features
    grid: int  # cells a side
    device: str
    precision: str
    points: int
    share: float  # of the images that are read
    seed: int
    batch: int
    workers: int

    def open(self) -> "SampleWorker":
        """Load the manifest, the image reader and the teacher in this process."""
        keep_freed_memory()
        manifest = load_manifest(self.manifest)
        teacher = load_features(**self.features, device=self.device, grid=self.grid)
        if self.precision != "float32":
            teacher = with_rounded_weights(teacher, self.precision)
        counts = np.zeros(len(manifest), np.int64)
        rows = read_rows(manifest.rows_of(list(self.splits)), self.share)
        counts[rows] = points_per_row(len(rows), self.points, math.prod(teacher.grid))
        return SampleWorker(self, manifest, manifest.reader(dict(self.images)), teacher, counts)


class Wanted:
    """The manifest with a status on every row that no point is drawn from, so that its image is not read."""

    def __init__(self, manifest: Manifest, counts: np.ndarray) -> None:
        self.key = manifest.key
        self.status = np.where(counts > 0, manifest.status, np.uint8(Status.UNREADABLE))


@dataclass
class SampleWorker:
    """The loaded teacher, the images, and the number of patches to sample from each manifest row."""

    job: SampleJob
    manifest: Manifest
    reader: Source
    teacher: Any
    counts: np.ndarray

    def process(self, chunks: Iterable[Chunk], advance: Advance) -> Iterator[tuple[Chunk, Arrays]]:
        """Yield (chunk, {features (m, D) float16, row (m,) int64, position (m,) int16}) in row order."""
        job = self.job
        parts = [self._nothing()]
        wanted = Wanted(self.manifest, self.counts)
        batches = stream_batches(self.reader, wanted, chunks, job.recipe, job.batch, job.workers)
        for batch, sampled in read_one_late(batches, self._queue):
            if len(batch.rows):
                parts.append({**self._origin(batch), **sampled})
            advance(batch.size, batch.size - len(batch.rows))
            if batch.last:
                yield batch.chunk, {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
                parts = [self._nothing()]

    @torch.inference_mode()
    def _queue(self, batch: CropBatch) -> HostCopy:
        """Features of the sampled positions of one batch, on their way to the host."""
        if not len(batch.rows):
            return HostCopy({})
        device = torch.device(self.job.device)
        parts = [to_device(batch.pixels[i : i + CROPS, 0], device) for i in range(0, len(batch.rows), CROPS)]
        with reduced_precision(device, self.job.precision):
            features_BLD = torch.cat([self.teacher(pixels).float() for pixels in parts])
        origin = self._origin(batch)
        cells = np.searchsorted(batch.rows, origin["row"]) * features_BLD.shape[1] + origin["position"]
        index = send(torch.from_numpy(cells), device)
        return HostCopy({"features": features_BLD.flatten(0, 1)[index].half()})

    def _origin(self, batch: CropBatch) -> Arrays:
        """The row and the grid position of each point that is drawn from a batch."""
        L, seed = math.prod(self.teacher.grid), self.job.seed
        positions = [positions_of(int(row), int(self.counts[row]), L, seed) for row in batch.rows]
        rows = np.repeat(batch.rows, [len(part) for part in positions])
        return {"row": rows, "position": np.concatenate(positions).astype(np.int16)}

    def _nothing(self) -> Arrays:
        """Arrays without a row: a chunk may have no good image."""
        features_MD = np.zeros((0, self.teacher.dim), np.float16)
        return {"features": features_MD, "row": np.zeros(0, np.int64), "position": np.zeros(0, np.int16)}


def make_job(params: Params, manifest: Manifest, manifest_path: Path, scheduler: str = "in-process") -> SampleJob:
    """The picklable job; its fingerprint covers images, teacher, crop, sample, kind of device and code."""
    cfg, features = params.sample_features, params.features
    recipe = CropRecipe.of(params.pixels, ["centre"])
    device, grid = resolve_device(params.runtime.device), _grid(params)
    name = fingerprint(
        manifest=manifest.sha256,
        sample=cfg.model_dump(),
        features=features.model_dump(),
        grid=grid,
        weights=sha256_file(local_file(features.weights)) if features.weights else None,
        **recipe.identity(),
        limits=[params.pixels.max_pixels, params.pixels.decode_memory],
        device=device.partition(":")[0],
        code=code_identity(__name__),
    )
    images = params.manifest.images.items()
    return SampleJob(
        fingerprint=name,
        manifest=str(manifest_path.resolve()),
        images=tuple((split, str(Path(pattern).absolute())) for split, pattern in images),
        splits=tuple(cfg.splits),
        recipe=recipe,
        features={**features.model_dump(), "weights": absolute(features.weights) if features.weights else None},
        grid=grid,
        device=device,
        precision=cfg.precision,
        points=cfg.points,
        share=cfg.images,
        seed=cfg.seed,
        batch=cfg.batch,
        workers=decode_threads(params.runtime.workers, scheduler),
    )


def _grid(params: Params) -> int:
    """Cells a side: of the tokenizer, which is read for that only where features.image_size does not decide it."""
    if params.features.image_size is not None:
        return GRID
    tokenizer = load_tokenizer(params.vqgan.weights, layout=params.vqgan.layout)
    return math.isqrt(math.prod(tokenizer.grid(params.pixels.size)))


def _overlaps(rows: np.ndarray, chunk: Chunk) -> bool:
    """True if any of the sorted `rows` lies in the chunk; chunks of other splits are skipped."""
    return bool(np.searchsorted(rows, chunk.stop) > np.searchsorted(rows, chunk.start))


def _publish(store: ChunkStore, chunks: list[tuple[Chunk, tuple[int, int]]], out: Path) -> None:
    """Write `chunks` and the shapes of their features as zarr group `out`, complete or not at all.

    {features (M, D) float16, row (M,) int64, position (M,) int16} in row order; SHA256SUMS lists its files.
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
        write_sums(folder)

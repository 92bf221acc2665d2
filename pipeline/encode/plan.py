"""An encode stage, for any tokenizer: recipe, picklable job and description of the shards, and the run of all three."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from semdict.pipeline.common.errors import ManifestError
from semdict.pipeline.common.files import write_json
from semdict.pipeline.config.schema import Encode, Params
from semdict.pipeline.encode.assemble import Publication, encode_and_publish
from semdict.pipeline.encode.preflight import Floor, preflight
from semdict.pipeline.encode.worker import EncodeJob
from semdict.pipeline.execute.code_identity import code_identity
from semdict.pipeline.execute.processes import decode_threads, resolve_scheduler
from semdict.pipeline.execute.store import ChunkStore, fingerprint
from semdict.pipeline.images.batches import CropRecipe
from semdict.pipeline.manifest.table import Manifest, load_manifest
from semdict.pipeline.shards import ShardSpec
from semdict.pipeline.tokenizers.pair import StreamTokenizer, StreamTokenizerSpec


@dataclass(frozen=True)
class Streams:
    """The token streams of a loaded tokenizer ("gen", and "disc" of a pair) and their codebooks."""

    identities: dict[str, dict[str, Any]]  # stream -> identity of the models behind it, part of the recipe
    grid: tuple[int, ...]
    gen_sizes: int | list[int]  # K, or K_t of each position
    centroids: np.ndarray | None = None  # (K, D) of the discriminative codebook
    title: str = ""  # after the title of section shards


@dataclass(frozen=True)
class EncodePaths:
    """What an encode stage reads and writes."""

    manifest: Path
    out: Path
    reports: Path
    work: Path


@dataclass(frozen=True)
class EncodeStage:
    """One encode stage: its name, the module whose code shapes the tokens, its section of params.yaml and its paths."""

    name: str
    module: str
    params: Params
    cfg: Encode
    floor: Floor
    paths: EncodePaths

    @property
    def crops(self) -> CropRecipe:
        """Decoding, crop and views."""
        return CropRecipe.of(self.params.pixels, self.cfg.views, self.cfg.seed)

    def run(self, spec: StreamTokenizerSpec, tokenizer: StreamTokenizer, streams: Streams, scheduler: str) -> None:
        """Encode a sample, run the chunks, assemble and publish; nothing appears at `paths.out` before it is complete.

        `tokenizer` is what `spec` opens, in this process; workers open their own.
        """
        scheduler = resolve_scheduler(scheduler, self.params.runtime.device)
        manifest = load_manifest(self.paths.manifest)
        if len(manifest) == 0:
            raise ManifestError(f"{self.paths.manifest} lists no images; run `dvc repro manifest`")
        recipe = self.recipe(streams)
        shards = self.shard_spec(manifest, streams, recipe, self.fingerprint(manifest, recipe, tokenizer.device.type))
        job = self.job(spec, shards, scheduler)
        store = ChunkStore(self.paths.work, self.name, job.fingerprint)
        report = preflight(job, tokenizer, manifest, self.cfg, self.floor, self.paths.reports, streams.centroids)
        publication = Publication(
            job=job,
            manifest=manifest,
            store=store,
            spec=shards,
            out=self.paths.out,
            chunk=self.cfg.chunk,
            max_bad_fraction=self.params.manifest.max_bad_fraction,
            storage=self.params.shards,
            centroids=streams.centroids,
        )
        images = encode_and_publish(publication, scheduler)
        write_json(self.paths.reports / "encode.json", {"preflight": report, "images": images})
        store.sweep()

    def recipe(self, streams: Streams) -> dict[str, Any]:
        """What a token set carries about how it was made; trainers and measures compare it."""
        return {
            **self.crops.identity(),
            "input_range": [0, 1],
            "precision": self.cfg.precision,
            **streams.identities,
        }

    def fingerprint(self, manifest: Manifest, recipe: dict[str, Any], device: str) -> str:
        """Of everything that shapes the tokens: images, recipe, borders of batches, kind of device, code."""
        return fingerprint(
            manifest=manifest.sha256,
            recipe=recipe,
            batch=self.cfg.batch,
            chunk=self.cfg.chunk,
            compile=self.cfg.compile,
            limits=[self.params.pixels.max_pixels, self.params.pixels.decode_memory],
            device=device,
            code=code_identity(self.module),
        )

    def shard_spec(self, manifest: Manifest, streams: Streams, recipe: dict[str, Any], name: str) -> ShardSpec:
        """Counts, grid, codebooks, views, recipe and provenance of the shards."""
        shards = self.params.shards
        return ShardSpec(
            rows=len(manifest),
            views=[{**asdict(view), "name": view.name} for view in self.crops.views],
            grid=streams.grid,
            gen_sizes=streams.gen_sizes,
            disc_size=None if streams.centroids is None else len(streams.centroids),
            recipe=recipe,
            fingerprint=name,
            title=shards.title + streams.title,
            licence=shards.licence,
            source=shards.source,
        )

    def job(self, spec: StreamTokenizerSpec, shards: ShardSpec, scheduler: str = "in-process") -> EncodeJob:
        """The picklable job, with absolute paths: workers may start in other folders."""
        images = self.params.manifest.images.items()
        return EncodeJob(
            fingerprint=shards.fingerprint,
            manifest=str(self.paths.manifest.resolve()),
            images=tuple((split, str(Path(pattern).absolute())) for split, pattern in images),
            recipe=self.crops,
            spec=spec,
            dtypes=tuple((name, dtype.name) for name, dtype in shards.dtypes.items()),
            length=shards.length,
            batch=self.cfg.batch,
            workers=decode_threads(self.params.runtime.workers, scheduler),
            precision=self.cfg.precision,
        )

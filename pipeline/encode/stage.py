"""Stage `encode`: every manifest row to aligned generative and discriminative tokens in one shard directory."""

import argparse
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from semdict.pipeline.common.device import resolve_device
from semdict.pipeline.common.errors import ManifestError
from semdict.pipeline.common.files import sha256_file, write_json
from semdict.pipeline.common.hub import absolute
from semdict.pipeline.common.memory import keep_freed_memory
from semdict.pipeline.common.publish import check_output
from semdict.pipeline.config import paths as places
from semdict.pipeline.config.params import add_params_arguments, params_of
from semdict.pipeline.config.schema import Params
from semdict.pipeline.encode.assemble import Publication, encode_and_publish
from semdict.pipeline.encode.preflight import probe
from semdict.pipeline.encode.worker import EncodeJob
from semdict.pipeline.execute.code_identity import code_identity
from semdict.pipeline.execute.locks import interrupt_on_signals, lock
from semdict.pipeline.execute.store import WORK, ChunkStore, fingerprint
from semdict.pipeline.images.batches import CropRecipe
from semdict.pipeline.images.crops import expand_views
from semdict.pipeline.manifest.table import Manifest, load_manifest
from semdict.pipeline.shards import ShardSpec
from semdict.pipeline.tokenizers.pair import PairSpec, PairTokenizer

EXAMPLE = """example:
  semdict encode                                        what `dvc repro encode` runs
  semdict encode --scheduler local-2                    two processes on this machine
  semdict encode --scheduler tcp://10.0.0.1:8786        join a running Dask cluster (shared folder needed)

A killed run continues where it stopped: the same command again."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Paths default to the preset's own; every other choice is in params.yaml."""
    add_params_arguments(parser)
    parser.add_argument("--scheduler", help="in-process | local | local-N | tcp://host:port (default: params.yaml)")
    parser.add_argument("--manifest", type=Path, help="default: data/<preset>/manifest/manifest.parquet")
    parser.add_argument("--centroids", type=Path, help="default: data/<preset>/kmeans/centroids.npy")
    parser.add_argument("--out", type=Path, help="default: shards/<preset>")
    parser.add_argument("--reports", type=Path, help="default: reports/<preset>")
    parser.add_argument("--work", type=Path, default=WORK, help="where unfinished chunks wait (default: work)")


def run(args: argparse.Namespace) -> int:
    """Encode what is missing, publish, report; 0 when the shard directory stands whole."""
    settings = params_of(args)
    preset = settings.preset
    out = args.out or Path("shards") / preset
    check_output(out, "shards")
    keep_freed_memory()
    with lock(f"encode-{preset}", args.work), interrupt_on_signals():
        encode(
            settings,
            manifest_path=args.manifest or places.manifest(preset),
            centroids=args.centroids or places.centroids(preset),
            out=out,
            reports=args.reports or Path("reports") / preset,
            root=args.work,
            scheduler=args.scheduler or settings.runtime.scheduler,
        )
    return 0


def encode(
    settings: Params, *, manifest_path: Path, centroids: Path, out: Path, reports: Path, root: Path, scheduler: str
) -> None:
    """Probe a sample, run the chunks, assemble and publish; nothing appears at `out` before all of it is there."""
    manifest = load_manifest(manifest_path)
    if len(manifest) == 0:
        raise ManifestError(f"{manifest_path} lists no images; run `dvc repro manifest`")
    spec = pair_spec(settings, centroids)
    pair = spec.open()
    recipe = make_recipe(settings, pair, centroids)
    job = make_job(settings, manifest, manifest_path, spec, pair, recipe)
    store = ChunkStore(root, f"encode-{settings.preset}", job.fingerprint)
    words = pair.centroids.cpu().numpy()
    metrics = {"probe": probe(job, pair, manifest, settings.vqgan, settings.encode, reports, words)}
    metrics["images"] = encode_and_publish(
        Publication(
            job=job,
            manifest=manifest,
            store=store,
            spec=shard_spec(settings, manifest, pair, recipe, job.fingerprint),
            out=out,
            chunk=settings.encode.chunk,
            max_bad_fraction=settings.manifest.max_bad_fraction,
            storage=settings.shards,
            centroids=words,
        ),
        scheduler,
    )
    write_json(reports / "encode.json", metrics)
    store.sweep()


def pair_spec(settings: Params, centroids: Path) -> PairSpec:
    """The tokenizer pair that params.yaml names, with absolute paths (workers may start elsewhere)."""
    tokenizer, features = settings.vqgan, settings.features
    return PairSpec(
        tokenizer={"path": absolute(tokenizer.weights), "layout": tokenizer.layout, "ema": tokenizer.ema},
        features={**features.model_dump(), "weights": absolute(features.weights) if features.weights else None},
        centroids=str(Path(centroids).resolve()),
        device=resolve_device(settings.runtime.device),
        image_size=settings.pixels.size,
    )


def crop_recipe(settings: Params) -> CropRecipe:
    """Decoding, crop and views of the stage."""
    return CropRecipe.of(settings.pixels, settings.encode.views, settings.encode.seed)


def make_recipe(settings: Params, pair: PairTokenizer, centroids: Path) -> dict[str, Any]:
    """What a token set carries about how it was made; trainers and probes compare it."""
    chosen = settings.encode
    return {
        **crop_recipe(settings).identity(),
        "input_range": [0, 1],
        "precision": chosen.precision,
        "gen": pair.tokenizer.identity,
        "disc": {**pair.teacher.identity, "centroids_sha256": sha256_file(centroids), "metric": "squared L2"},
    }


def make_job(
    settings: Params, manifest: Manifest, manifest_path: Path, spec: PairSpec, pair: PairTokenizer, recipe: dict
) -> EncodeJob:
    """The picklable job; its fingerprint covers pixels, weights, recipe, batch borders and code."""
    chosen = settings.encode
    name = fingerprint(
        manifest=manifest.sha256,
        recipe=recipe,
        batch=chosen.batch,
        chunk=chosen.chunk,
        limits=[settings.pixels.max_pixels, settings.pixels.decode_memory],
        device=pair.device.type,
        code=code_identity(__name__),
    )
    return EncodeJob(
        fingerprint=name,
        manifest=str(Path(manifest_path).resolve()),
        images=tuple((split, str(Path(where).absolute())) for split, where in settings.manifest.images.items()),
        recipe=crop_recipe(settings),
        spec=spec,
        streams=("gen", "disc"),
        length=math.prod(pair.grid),
        batch=chosen.batch,
        workers=settings.runtime.workers,
        precision=chosen.precision,
    )


def shard_spec(settings: Params, manifest: Manifest, pair: PairTokenizer, recipe: dict, name: str) -> ShardSpec:
    """Counts, grid, codebooks, views, recipe and provenance of the shard directory."""
    return ShardSpec(
        rows=len(manifest),
        views=[{**asdict(view), "name": view.name} for view in expand_views(list(settings.encode.views))],
        grid=pair.grid,
        gen_sizes=pair.gen_sizes,
        disc_size=len(pair.centroids),
        recipe=recipe,
        fingerprint=name,
        title=settings.shards.title,
        licence=settings.shards.licence,
        source=settings.shards.source,
    )

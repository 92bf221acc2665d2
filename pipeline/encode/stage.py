"""Stage `encode`: every manifest row to aligned generative and discriminative tokens in one shard directory."""

import argparse
from pathlib import Path

from semdict.pipeline.common.device import keep_freed_memory, resolve_device
from semdict.pipeline.common.files import sha256_file
from semdict.pipeline.common.hub import absolute
from semdict.pipeline.common.publish import check_output
from semdict.pipeline.config import paths
from semdict.pipeline.config.params import add_params_arguments, params_of
from semdict.pipeline.config.schema import Params
from semdict.pipeline.encode.plan import EncodePaths, EncodeStage, Streams
from semdict.pipeline.encode.preflight import Floor
from semdict.pipeline.execute.locks import interrupt_on_signals, lock
from semdict.pipeline.execute.store import WORK
from semdict.pipeline.tokenizers.pair import PairSpec, PairTokenizer

EXAMPLE = """example:
  semdict encode                                        what `dvc repro encode` runs
  semdict encode --scheduler local-2                    two processes on this machine
  semdict encode --scheduler tcp://10.0.0.1:8786        join a running Dask cluster (shared folder needed)

A killed run continues where it stopped: the same command again."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Paths default to the preset's own; every other choice is in params.yaml."""
    add_params_arguments(parser)
    parser.add_argument("--scheduler", help="auto | in-process | local-N | tcp://host:port (default: params.yaml)")
    parser.add_argument("--manifest", type=Path, help="default: data/<preset>/manifest/manifest.parquet")
    parser.add_argument("--centroids", type=Path, help="default: data/<preset>/kmeans/centroids.npy")
    parser.add_argument("--out", type=Path, help="default: shards/<preset>")
    parser.add_argument("--reports", type=Path, help="default: reports/<preset>")
    parser.add_argument("--work", type=Path, default=WORK, help="where unfinished chunks wait (default: work)")


def run(args: argparse.Namespace) -> int:
    """Compute the missing chunks, publish the shards and report; 0 when the shard directory is complete."""
    params = params_of(args)
    preset = params.preset
    files = EncodePaths(
        manifest=args.manifest or paths.manifest(preset),
        out=args.out or Path("shards") / preset,
        reports=args.reports or Path("reports") / preset,
        work=args.work,
    )
    check_output(files.out, "shards")
    keep_freed_memory()
    name, vqgan = f"encode-{preset}", params.vqgan
    floor = Floor(vqgan.psnr_floor, vqgan.psnr_images, "vqgan.psnr_floor", vqgan.weights)
    stage = EncodeStage(name, __name__, params, params.encode, floor, files)
    with lock(name, args.work), interrupt_on_signals():
        centroids = args.centroids or paths.centroids(preset)
        spec = pair_spec(params, centroids)
        pair = spec.open()
        stage.run(spec, pair, streams_of(pair, centroids), args.scheduler or params.runtime.scheduler)
    return 0


def pair_spec(params: Params, centroids: Path) -> PairSpec:
    """The tokenizer pair of params.yaml, with absolute paths: workers may start in other folders."""
    tokenizer, features = params.vqgan, params.features
    return PairSpec(
        tokenizer={"path": absolute(tokenizer.weights), "layout": tokenizer.layout, "ema": tokenizer.ema},
        features={**features.model_dump(), "weights": absolute(features.weights) if features.weights else None},
        centroids=str(Path(centroids).resolve()),
        device=resolve_device(params.runtime.device),
        image_size=params.pixels.size,
        compile=params.encode.compile,
    )


def streams_of(pair: PairTokenizer, centroids: Path) -> Streams:
    """Both token streams; the recipe holds the SHA-256 of every file of weights and of the centroids."""
    disc = {**pair.teacher.identity, "centroids_sha256": sha256_file(centroids), "metric": "squared L2"}
    return Streams(
        identities={"gen": pair.tokenizer.identity, "disc": disc},
        grid=pair.grid,
        gen_sizes=pair.gen_sizes,
        centroids=pair.centroids.cpu().numpy(),
    )

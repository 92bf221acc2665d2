"""Encode images with a trained 1-D tokenizer into token shards, by the same machinery as the paired dictionaries."""

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from semdict.pipeline.common.errors import UsageError
from semdict.pipeline.common.publish import check_output
from semdict.pipeline.config import paths as places
from semdict.train.engine.loop import DTYPES
from semdict.train.vcq.tokenizer import Tokenizer1d, load_vcq_tokenizer

EXAMPLE = """examples:
  semdict vcq encode --tokenizer runs/demo/vcq --out shards/demo-vcq
  semdict vcq encode --set vcq_encode.views=[ten-crop] --scheduler local-2"""


@dataclass(frozen=True)
class VcqSpec:
    """A tokenizer file and the device to open it on; picklable, for worker processes."""

    path: str
    device: str

    def open(self) -> "VcqTokenizer":
        """Read the weights; WeightsError says what is wrong with them."""
        return VcqTokenizer(load_vcq_tokenizer(self.path, self.device), torch.device(self.device))


@dataclass
class VcqTokenizer:
    """A loaded tokenizer as the encode machinery wants it: one stream, `gen`."""

    model: Tokenizer1d
    device: torch.device

    @torch.inference_mode()
    def tokens(self, images: Tensor, precision: str = "float32") -> dict[str, Tensor]:
        """(B, 3, 256, 256) in [0, 1] -> {"gen": (B, L) int64}; the code search is float32 at any precision."""
        with torch.autocast(self.device.type, DTYPES[precision], enabled=precision != "float32"):
            return {"gen": self.model.encode(images)}

    @torch.inference_mode()
    def decode(self, gen: Tensor) -> Tensor:
        """(B, L) ids -> (B, 3, 256, 256) in [0, 1]."""
        return self.model.decode(gen)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which tokenizer and manifest; views, batch and chunks stand in params.yaml, section vcq_encode."""
    parser.add_argument("--params", default="params.yaml", type=Path, help="default: params.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a parameter")
    parser.add_argument("--tokenizer", type=Path, help="run of `semdict vcq train` (default runs/<preset>/vcq)")
    parser.add_argument("--manifest", type=Path, help="default: data/<preset>/manifest/manifest.parquet")
    parser.add_argument("--out", type=Path, help="default: shards/<preset>-vcq")
    parser.add_argument("--reports", type=Path, help="default: reports/<preset>/vcq-encode")
    parser.add_argument("--work", type=Path, default="work", help="where unfinished chunks wait (default: work)")
    parser.add_argument("--scheduler", help="in-process | local-N | tcp://host:port (default: params.yaml)")


def run(args: argparse.Namespace) -> int:
    """Encode what is missing, publish, report; 0 when the shard directory stands whole."""
    from semdict.pipeline.config.params import load_params
    from semdict.pipeline.execute.locks import interrupt_on_signals, lock

    params = load_params(args.params, args.set)
    args.out = args.out or Path("shards") / f"{params.preset}-vcq"
    check_output(args.out, "shards")
    path = args.tokenizer or Path("runs") / params.preset / "vcq"
    with lock(f"vcq-encode-{params.preset}", args.work), interrupt_on_signals():
        _encode(params, args, path)
    return 0


def _encode(params, args: argparse.Namespace, path: Path) -> None:
    from semdict.pipeline.common.files import write_json
    from semdict.pipeline.config.schema import Vqgan
    from semdict.pipeline.encode.assemble import Publication, encode_and_publish
    from semdict.pipeline.encode.preflight import probe
    from semdict.pipeline.execute.store import ChunkStore
    from semdict.pipeline.manifest.table import load_manifest
    from semdict.train.engine.dist import pick_device

    chosen, preset = params.vcq_encode, params.preset
    manifest_path = args.manifest or places.manifest(preset)
    manifest = load_manifest(manifest_path)
    spec = VcqSpec(str(path.resolve()), str(pick_device(params.runtime.device)))
    tokenizer = spec.open()
    job, shards = _job(params, manifest, manifest_path, spec, tokenizer.model)
    reports = args.reports or Path("reports") / preset / "vcq-encode"
    store = ChunkStore(args.work, f"vcq-encode-{preset}", job.fingerprint)
    floor = Vqgan(
        weights=str(path), layout=None, ema=True, psnr_floor=chosen.psnr_floor, psnr_images=chosen.psnr_images
    )
    metrics = {"probe": probe(job, tokenizer, manifest, floor, chosen, reports)}
    publication = Publication(
        job=job,
        manifest=manifest,
        store=store,
        spec=shards,
        out=args.out,
        chunk=chosen.chunk,
        max_bad_fraction=params.manifest.max_bad_fraction,
        storage=params.shards,
    )
    metrics["images"] = encode_and_publish(publication, args.scheduler or params.runtime.scheduler)
    write_json(reports / "encode.json", metrics)
    store.sweep()


def _job(params, manifest, manifest_path: Path, spec: VcqSpec, model: Tokenizer1d):
    """The picklable job and the description of its shards."""
    from semdict.pipeline.encode.worker import EncodeJob
    from semdict.pipeline.execute.code_identity import code_identity
    from semdict.pipeline.execute.store import fingerprint
    from semdict.pipeline.images.batches import CropRecipe
    from semdict.pipeline.shards import ShardSpec

    chosen, pixels = params.vcq_encode, params.pixels
    crops = CropRecipe.of(pixels, chosen.views, chosen.seed)
    if model.config.image_size != crops.crop.size:
        raise UsageError(f"{spec.path} works on {model.config.image_size} pixels, crops have {crops.crop.size}")
    recipe = {
        **crops.identity(),
        "input_range": [0, 1],
        "precision": chosen.precision,
        "gen": model.identity,
    }
    name = fingerprint(
        manifest=manifest.sha256, recipe=recipe, batch=chosen.batch, chunk=chosen.chunk,
        limits=[pixels.max_pixels, pixels.decode_memory],
        device=spec.device, code=code_identity(__name__),
    )  # fmt: skip
    where = tuple((split, str(Path(pattern).absolute())) for split, pattern in params.manifest.images.items())
    job = EncodeJob(
        name, str(Path(manifest_path).resolve()), where, crops, spec, ("gen",), model.config.tokens, chosen.batch,
        params.runtime.workers, chosen.precision,
    )  # fmt: skip
    shards = ShardSpec(
        rows=len(manifest),
        views=[{**asdict(view), "name": view.name} for view in crops.views],
        grid=(model.config.tokens,),
        gen_sizes=list(model.quantizer.sizes),
        disc_size=None,
        recipe=recipe,
        fingerprint=name,
        title=f"{params.shards.title} (VCQ)",
        licence=params.shards.licence,
        source=params.shards.source,
    )
    return job, shards

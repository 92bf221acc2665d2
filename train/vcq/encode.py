"""`semdict vcq encode`: every manifest row to the tokens of a trained 1-D tokenizer, as `semdict encode` does."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from semdict.pipeline.common.device import reduced_precision, resolve_device
from semdict.pipeline.common.errors import UsageError
from semdict.pipeline.common.inference import Precisions
from semdict.pipeline.common.publish import check_output
from semdict.pipeline.config import paths
from semdict.pipeline.config.naming import REPORT, RUN, add_name_argument
from semdict.train.vcq.tokenizer import Tokenizer1d, load_vcq_tokenizer

EXAMPLE = """examples:
  semdict vcq encode --tokenizer runs/demo/vcq --out shards/demo-vcq
  semdict vcq encode --set vcq_encode.views=[ten-crop] --scheduler local-2"""


@dataclass(frozen=True)
class VcqSpec:
    """A tokenizer file, the device to open it on and the side of the crops; picklable, for worker processes."""

    path: str
    device: str
    image_size: int
    compile: bool = False  # the encoder, on a GPU in reduced precision

    def open(self) -> "VcqTokenizer":
        """Read the weights; WeightsError if they are no tokenizer, UsageError if it works on images of another size."""
        model = load_vcq_tokenizer(self.path, self.device)
        if model.config.image_size != self.image_size:
            raise UsageError(
                f"{self.path} works on images of {model.config.image_size} pixels, crops have {self.image_size}: "
                f"set pixels.size: {model.config.image_size}"
            )
        return VcqTokenizer(model, torch.device(self.device), self.compile)


@dataclass
class VcqTokenizer:
    """A loaded tokenizer with one token stream, `gen`."""

    model: Tokenizer1d
    device: torch.device
    compile: bool = False  # the encoder, on a GPU in reduced precision

    def __post_init__(self) -> None:
        self.precisions = Precisions({"tokenizer": self.model}, self.device, self.compile, compiled_parts=("encoder",))

    @torch.inference_mode()
    def tokens(self, images: Tensor, precision: str = "float32") -> dict[str, Tensor]:
        """(B, 3, H, W) in [0, 1] -> {"gen": (B, L) int64}; the code search is float32 at any precision."""
        model = self.precisions.at(precision)["tokenizer"]
        with reduced_precision(self.device, precision):
            return {"gen": model.encode(self.precisions.padded(images, precision))[: len(images)]}

    @torch.inference_mode()
    def decode(self, gen: Tensor) -> Tensor:
        """(B, L) ids -> (B, 3, H, W) in [0, 1]."""
        return self.model.decode(gen)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which tokenizer and manifest; views, batch and chunks stand in params.yaml, section vcq_encode."""
    parser.add_argument("--params", default="params.yaml", type=Path, help="default: params.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a parameter")
    add_name_argument(parser, tokenizer=RUN, out="shards/{preset}-{name}", reports=f"{REPORT}-encode")
    parser.add_argument("--tokenizer", type=Path, help="run of `semdict vcq train` (default runs/<preset>/vcq)")
    parser.add_argument("--manifest", type=Path, help="default: data/<preset>/manifest/manifest.parquet")
    parser.add_argument("--out", type=Path, help="default: shards/<preset>-vcq")
    parser.add_argument("--reports", type=Path, help="default: reports/<preset>/vcq-encode")
    parser.add_argument("--work", type=Path, default="work", help="where unfinished chunks wait (default: work)")
    parser.add_argument("--scheduler", help="auto | in-process | local-N | tcp://host:port (default: params.yaml)")


def run(args: argparse.Namespace) -> int:
    """Compute the missing chunks, publish the shards and report; 0 when the shard directory is complete."""
    from semdict.pipeline.config.params import params_of
    from semdict.pipeline.encode.plan import EncodePaths, EncodeStage, Streams
    from semdict.pipeline.encode.preflight import Floor
    from semdict.pipeline.execute.locks import interrupt_on_signals, lock

    params = params_of(args)
    preset, cfg = params.preset, params.vcq_encode
    files = EncodePaths(
        manifest=args.manifest or paths.manifest(preset),
        out=args.out or Path("shards") / f"{preset}-vcq",
        reports=args.reports or Path("reports") / preset / "vcq-encode",
        work=args.work,
    )
    check_output(files.out, "shards")
    weights, name = args.tokenizer or Path("runs") / preset / "vcq", f"vcq-encode-{preset}"
    floor = Floor(cfg.psnr_floor, cfg.psnr_images, "vcq_encode.psnr_floor", str(weights))
    stage = EncodeStage(name, __name__, params, cfg, floor, files)
    with lock(name, args.work), interrupt_on_signals():
        device = resolve_device(params.runtime.device)
        spec = VcqSpec(str(weights.resolve()), device, params.pixels.size, cfg.compile)
        tokenizer = spec.open()
        model = tokenizer.model
        streams = Streams({"gen": model.identity}, (model.config.tokens,), list(model.quantizer.sizes), title=" (VCQ)")
        stage.run(spec, tokenizer, streams, args.scheduler or params.runtime.scheduler)
    return 0

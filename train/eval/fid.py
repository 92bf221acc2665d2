"""`semdict evaluate fid`: image scores of samples, or the teacher's distances where there is no Inception."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from semdict.pipeline.common.errors import UsageError
from semdict.pipeline.common.files import write_json
from semdict.pipeline.common.publish import check_output
from semdict.pipeline.config import paths
from semdict.pipeline.config.naming import RUN, add_name_argument, required
from semdict.train.eval.extractors import MissingWeightsError
from semdict.train.eval.image_scores import ImageScores, adm, teacher, val50k
from semdict.train.eval.image_sets import ImageSet, open_images
from semdict.train.eval.reference_images import reference_crop

if TYPE_CHECKING:
    from semdict.pipeline.config.schema import Params

EXAMPLE = """examples:
  semdict evaluate fid --samples runs/demo/lease-samples --protocol teacher
  semdict evaluate fid --samples samples/lease --reference imagenet-val-256/ --protocol val50k
  semdict evaluate fid --samples runs/in1k-vcq-base/ar-samples-guided/samples.npz --protocol adm \\
      --reference VIRTUAL_imagenet256_labeled.npz

Samples are a folder of PNGs (as `semdict generate` writes) or an .npz with arr_0. Reference: a folder of PNGs, a
manifest.parquet (val50k then crops as `semdict evaluate reference` does), or ADM's statistics. Scores carry protocol
and counts; figures of different counts or protocols are not comparable."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The samples and the reference; the rest is in params.yaml, section scores."""
    from semdict.pipeline.config.params import add_params_arguments

    add_name_argument(parser, samples=f"{RUN}-samples")
    parser.add_argument("--samples", type=Path, help="a folder of images or of `semdict generate`, or an .npz")
    parser.add_argument("--reference", type=Path, help="default scores.reference, or the preset's manifest")
    parser.add_argument("--protocol", choices=("val50k", "adm", "teacher"), help="default scores.protocol")
    add_params_arguments(parser)
    parser.add_argument("--out", type=Path, help="score file (default reports/<preset>/<samples>/scores.json)")


def run(args: argparse.Namespace) -> int:
    """Score and write one JSON file; MissingWeightsError when no score could be computed."""
    from semdict.pipeline.config.params import params_of

    params = params_of(args)
    samples = required(args, "samples")
    out = args.out or Path("reports") / params.preset / samples_name(samples) / "scores.json"
    check_output(out, "json")
    result, protocol = score_samples(samples, params, args.protocol, args.reference)
    if not result.scores:
        raise MissingWeightsError(f"no score: {next(iter(result.missing.values()))}")
    write_scores(out, result, protocol)
    return 0


def score_samples(
    path: Path, params: "Params", protocol: str | None = None, reference: Path | None = None
) -> tuple[ImageScores, dict[str, Any]]:
    """Scores of a folder or .npz of samples, and what they were compared with; None = as section scores says."""
    cfg = params.scores
    protocol = protocol or cfg.protocol
    samples = open_images(path, params)
    reference = reference or Path(cfg.reference or paths.manifest(params.preset))
    if protocol == "adm":
        if reference.suffix != ".npz":
            raise UsageError(
                f"protocol adm needs ADM's statistics .npz as reference, not {reference}; set scores.reference"
            )
        result, about = adm(samples, reference, params), {"from": str(reference)}
    else:
        crop = reference_crop if protocol == "val50k" else None
        images = open_images(reference, params, limit=cfg.references, crop=crop)
        measure = val50k if protocol == "val50k" else teacher
        result = measure(samples, images, params)
        report_left_out("fid", images)
        about = images.about
    return result, {"protocol": protocol, "samples": samples.about, "reference": about}


def report_left_out(command: str, images: ImageSet) -> None:
    """A line on stderr that counts the images that could not be decoded and names the first."""
    if images.left_out:
        number, reason = next(iter(images.left_out.items()))
        print(
            f"{command}: left out {len(images.left_out)} of {len(images)} images that cannot be decoded; the first is "
            f"{images.name(number)}: {reason}",
            file=sys.stderr,
        )


def samples_name(path: Path) -> str:
    """The folder's name, also of an .npz inside it."""
    return path.resolve().parent.name if path.is_file() else path.resolve().name


def write_scores(out: Path, result: ImageScores, protocol: dict[str, Any]) -> None:
    """Scores flat; missing ones and the protocol in lists, since DVC shows every number outside lists as a metric."""
    about = {**protocol, "extractor": result.extractor}
    write_json(out, {**result.scores, "missing": [result.missing], "protocol": [about]})
    scores = ", ".join(f"{name} {value:.4g}" for name, value in result.scores.items())
    print(f"fid: {scores} ({out})", file=sys.stderr)
    for reason in dict.fromkeys(result.missing.values()):
        names = ", ".join(name for name, why in result.missing.items() if why == reason)
        print(f"fid: missing {names}: {reason}", file=sys.stderr)

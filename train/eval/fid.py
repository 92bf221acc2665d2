"""Image scores of a folder of samples: FID and its kin, or the teacher's distances where there is no Inception."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from semdict.pipeline.common.errors import UsageError
from semdict.pipeline.common.files import write_json
from semdict.pipeline.common.publish import check_output
from semdict.pipeline.config import paths as places
from semdict.train.eval import image_scores as scores
from semdict.train.eval.image_sets import open_images
from semdict.train.eval.reference_images import reference_crop

if TYPE_CHECKING:
    from semdict.pipeline.config.schema import Params

EXAMPLE = """examples:
  semdict evaluate fid --samples runs/demo/lease-unconditional --protocol teacher
  semdict evaluate fid --samples samples/lease --reference imagenet-val-256/ --protocol val50k
  semdict evaluate fid --samples runs/in1k-vcq-base/ar-samples-guided/samples.npz --protocol adm \\
      --reference VIRTUAL_imagenet256_labeled.npz

Samples are a folder of PNGs (what `semdict generate` writes) or an .npz with arr_0. Reference: a folder of PNGs, a
manifest.parquet (val50k then crops as `semdict evaluate reference` does), or ADM's statistics. Scores carry protocol
and counts; figures of different counts or protocols are not comparable."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is scored against what; the rest stands in params.yaml, section scores."""
    parser.add_argument("--samples", type=Path, required=True)
    parser.add_argument("--reference", type=Path, help="default scores.reference, or the preset's manifest")
    parser.add_argument("--protocol", choices=("val50k", "adm", "teacher"), help="default scores.protocol")
    parser.add_argument("--params", default="params.yaml", type=Path, help="default: params.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a parameter")
    parser.add_argument("--out", type=Path, help="score file (default reports/<preset>/<samples>/scores.json)")


def run(args: argparse.Namespace) -> int:
    """Score and write one JSON file."""
    from semdict.pipeline.config.params import load_params

    params = load_params(args.params, args.set)
    out = args.out or Path("reports") / params.preset / samples_name(args.samples) / "scores.json"
    check_output(out, "json")
    found, about = score_samples(args.samples, params, args.protocol, args.reference)
    write_scores(out, found, about)
    return 0


def score_samples(
    path: Path, params: "Params", protocol: str | None = None, reference: Path | None = None
) -> tuple[scores.Scored, dict[str, Any]]:
    """Scores of a folder or .npz of samples, and what they were measured with; None = as section scores says."""
    given = params.scores
    protocol = protocol or given.protocol
    samples = open_images(path, params)
    reference = reference or Path(given.reference or places.manifest(params.preset))
    if protocol == "adm":
        if reference.suffix != ".npz":
            raise UsageError(
                f"protocol adm needs ADM's statistics .npz as reference, not {reference}; set scores.reference"
            )
        found, about = scores.adm(samples, reference, params), {"from": str(reference)}
    else:
        crop = reference_crop if protocol == "val50k" else None
        others = open_images(reference, params, limit=given.references, crop=crop)
        measure = scores.val50k if protocol == "val50k" else scores.teacher
        found, about = measure(samples, others, params), others.about
    return found, {"protocol": protocol, "samples": samples.about, "reference": about}


def samples_name(path: Path) -> str:
    """The folder's name, also of an .npz inside it."""
    return path.resolve().parent.name if path.is_file() else path.resolve().name


def write_scores(out: Path, found: scores.Scored, protocol: dict[str, Any]) -> None:
    """Scores flat, what is missing with its reason, the protocol in a list: DVC shows numbers outside lists only."""
    about = {**protocol, "extractor": found.extractor}
    write_json(out, {**found.scores, "missing": [found.missing], "protocol": [about]})
    shown = ", ".join(f"{name} {value:.4g}" for name, value in found.scores.items()) or "no score"
    print(f"fid: {shown} ({out})", file=sys.stderr)
    for reason in dict.fromkeys(found.missing.values()):
        names = ", ".join(name for name, why in found.missing.items() if why == reason)
        print(f"fid: missing {names}: {reason}", file=sys.stderr)


def read_scores(path: Path) -> dict[str, Any]:
    """A score file."""
    return json.loads(path.read_text())

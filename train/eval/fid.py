"""Image scores of a folder of samples: FID and its kin, or the teacher's distances where there is no Inception."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from pipeline.errors import UsageError
from pipeline.files import write_json
from train.eval import scores
from train.eval.imagesets import open_images

EXAMPLE = """examples:
  semdict evaluate fid --samples runs/demo/lease-unconditional --reference data/demo/manifest.parquet --protocol teacher
  semdict evaluate fid --samples samples/lease --reference imagenet-val-256/ --protocol val50k
  semdict evaluate fid --samples runs/in1k-vcq-base/ar-samples/samples.npz --protocol adm \\
      --reference VIRTUAL_imagenet256_labeled.npz

Samples are a folder of PNGs (what `semdict generate` writes) or an .npz with arr_0. Reference: a folder of PNGs (see
`semdict evaluate reference`), a manifest.parquet, or ADM's statistics. Scores carry protocol and counts; figures of
different counts or protocols are not comparable."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is scored against what; the rest stands in params.yaml, section scores."""
    parser.add_argument("--samples", type=Path, required=True)
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--protocol", choices=("val50k", "adm", "teacher"), required=True)
    parser.add_argument("--params", default="params.yaml", type=Path, help="default: params.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a parameter")
    parser.add_argument("--out", type=Path, help="score file (default reports/<preset>/<samples>/scores.json)")


def run(args: argparse.Namespace) -> int:
    """Score and write one JSON file."""
    from pipeline.params import load_params

    params = load_params(args.params, args.set)
    samples = open_images(args.samples, params)
    if args.protocol == "adm":
        if args.reference.suffix != ".npz":
            raise UsageError(f"--protocol adm needs ADM's statistics .npz as reference, not {args.reference}")
        found, reference = scores.adm(samples, args.reference, params), {"from": str(args.reference)}
    else:
        others = open_images(args.reference, params, limit=params.scores.references)
        measure = scores.val50k if args.protocol == "val50k" else scores.teacher
        found, reference = measure(samples, others, params), others.about
    out = args.out or Path("reports") / params.preset / samples_name(args.samples) / "scores.json"
    write_scores(out, found, {"protocol": args.protocol, "samples": samples.about, "reference": reference})
    return 0


def samples_name(path: Path) -> str:
    """The folder's name, also of an .npz inside it."""
    return path.resolve().parent.name if path.is_file() else path.resolve().name


def write_scores(out: Path, found: scores.Scored, protocol: dict[str, Any]) -> None:
    """Scores flat, what is missing with its reason, the protocol in a list: DVC shows numbers outside lists only."""
    about = {**protocol, "extractor": found.extractor}
    write_json(out, {**found.scores, "missing": [found.missing], "protocol": [about]})
    shown = ", ".join(f"{name} {value:.4g}" for name, value in found.scores.items()) or "no score"
    print(f"fid: {shown} ({out})", file=sys.stderr)
    for name, reason in found.missing.items():
        print(f"fid: {name} is missing: {reason}", file=sys.stderr)


def read_scores(path: Path) -> dict[str, Any]:
    """A score file."""
    return json.loads(path.read_text())

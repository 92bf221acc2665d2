"""`semdict evaluate nearest`: samples beside their nearest training images, which shows memorised ones.

N training images, n samples, D feature width.
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from semdict.pipeline.common.device import resolve_device
from semdict.pipeline.common.files import write_json
from semdict.pipeline.config import paths
from semdict.pipeline.config.naming import RUN, add_name_argument, required
from semdict.train.eval.common import cosine_neighbours
from semdict.train.eval.extractors import PATCH_MEAN, extract, teacher
from semdict.train.eval.fid import report_left_out, samples_name
from semdict.train.eval.image_sets import ImageSet, open_images

EXAMPLE = """example:
  semdict evaluate nearest --samples runs/demo/lease-samples --split train

Writes nearest.png (each sample above its three nearest) and nearest.json with cosines of the teacher's patch-mean
features, and, for scale, how near training images are to each other."""
NEAREST = 3
TYPICAL = 200  # training images whose own nearest neighbour gives the scale


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The samples and the training images."""
    from semdict.pipeline.config.params import add_params_arguments

    add_name_argument(parser, samples=f"{RUN}-samples")
    parser.add_argument("--samples", type=Path, help="a folder of images or of `semdict generate`, or an .npz")
    parser.add_argument("--reference", type=Path, help="default data/<preset>/manifest/manifest.parquet")
    parser.add_argument("--split", default="train", help="of a manifest")
    add_params_arguments(parser)
    parser.add_argument("--out", type=Path, help="folder (default reports/<preset>/<name of the samples>)")


def run(args: argparse.Namespace) -> int:
    """Find the nearest of the first `scores.shown` samples; write the picture and the cosines."""
    from semdict.pipeline.config.params import params_of
    from semdict.pipeline.images.visualize import save_grid

    params = params_of(args)
    path = required(args, "samples")
    device = torch.device(resolve_device(params.runtime.device))
    extractor, network = teacher(params, device)
    samples = open_images(path, params)
    training = open_images(args.reference or paths.manifest(params.preset), params, args.split)
    count, batch = min(params.scores.shown, len(samples)), params.scores.batch
    samples_nD = extract(samples, extractor, device, batch, count)[PATCH_MEAN].numpy()
    training_ND = extract(training, extractor, device, batch)[PATCH_MEAN].numpy()
    report_left_out("nearest", training)
    nearest = min(NEAREST, len(training_ND))
    cosine, row = cosine_neighbours(training_ND, samples_nD, nearest, device)
    typical, _ = cosine_neighbours(training_ND, training_ND[:: max(1, len(training_ND) // TYPICAL)], 2, device)
    number = np.asarray(training.kept)[row.numpy()]
    out = args.out or Path("reports") / params.preset / samples_name(path)
    rows = [stacked(samples, range(count))]
    rows += [stacked(training, number[:, k].tolist()) for k in range(nearest)]
    save_grid(out / "nearest.png", rows, ["sample", *(f"training #{k + 1}" for k in range(nearest))])
    scores = {"nearest_cosine": cosine[:, 0].mean().item()}
    scores["training_cosine"] = typical[:, 1].mean().item()  # the nearest of all is the image itself
    protocol = {"samples": samples.about, "training": training.about, "teacher": network.identity}
    pairs = [{"sample": i, "training": number[i].tolist(), "cosine": cosine[i].tolist()} for i in range(count)]
    write_json(out / "nearest.json", {**scores, "pairs": pairs, "protocol": [protocol]})
    print(
        f"nearest: cosine to the nearest {scores['nearest_cosine']:.3f}, among training images "
        f"{scores['training_cosine']:.3f} ({out / 'nearest.png'})",
        file=sys.stderr,
    )
    return 0


def stacked(images: ImageSet, numbers: Iterable[int]) -> np.ndarray:
    """(n, H, W, 3) uint8."""
    return np.stack([images.pixels(number) for number in numbers])

"""Samples beside their nearest training images, so that memorised ones can be seen; `semdict evaluate nearest`."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from semdict.pipeline.common.device import resolve_device
from semdict.pipeline.common.files import write_json
from semdict.pipeline.config import paths as places
from semdict.train.eval.image_sets import ImageSet, open_images

if TYPE_CHECKING:
    from semdict.pipeline.tokenizers.teachers import Teacher

EXAMPLE = """example:
  semdict evaluate nearest --samples runs/demo/lease-unconditional --split train

Writes nearest.png (each sample above its three nearest) and nearest.json with cosines of the teacher's patch-mean
features, and, for scale, how near training images are to each other."""
NEAREST = 3
BLOCK = 65_536  # training images compared at a time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which samples, which training images."""
    parser.add_argument("--samples", type=Path, required=True)
    parser.add_argument("--reference", type=Path, help="default data/<preset>/manifest/manifest.parquet")
    parser.add_argument("--split", default="train", help="of a manifest")
    parser.add_argument("--params", default="params.yaml", type=Path, help="default: params.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a parameter")
    parser.add_argument("--out", type=Path, help="folder (default reports/<preset>/<name of the samples>)")


def run(args: argparse.Namespace) -> int:
    """Find the nearest of the first `scores.shown` samples; write the picture and the cosines."""
    from semdict.pipeline.config.params import load_params
    from semdict.pipeline.images.visualize import save_grid
    from semdict.pipeline.tokenizers import load_features

    params = load_params(args.params, args.set)
    given = params.features
    device = resolve_device(params.runtime.device)
    teacher = load_features(given.model, given.weights, given.layer, device, given.image_size)
    samples = open_images(args.samples, params)
    training = open_images(args.reference or places.manifest(params.preset), params, args.split)
    count = min(params.scores.shown, len(samples))
    wanted = described(samples, teacher, device, params.scores.batch, count)
    bank = described(training, teacher, device, params.scores.batch)
    cosine, number = nearest(wanted, bank, NEAREST)
    own, _ = nearest(bank[:: max(1, len(bank) // 200)], bank, 2)  # the first is the image itself
    out = args.out or Path("reports") / params.preset / args.samples.resolve().name
    rows = [stacked(samples, list(range(count)))]
    rows += [stacked(training, number[:, k].tolist()) for k in range(NEAREST)]
    save_grid(out / "nearest.png", rows, ["sample", *(f"training #{k + 1}" for k in range(NEAREST))])
    scores: dict[str, Any] = {"nearest_cosine": cosine[:, 0].mean().item(), "training_cosine": own[:, 1].mean().item()}
    about = {"samples": samples.about, "training": training.about, "teacher": teacher.identity}
    pairs = [{"sample": i, "training": number[i].tolist(), "cosine": cosine[i].tolist()} for i in range(count)]
    write_json(out / "nearest.json", {**scores, "pairs": pairs, "protocol": [about]})
    told = (
        f"cosine to the nearest {scores['nearest_cosine']:.3f}, among training images {scores['training_cosine']:.3f}"
    )
    print(f"nearest: {told} ({out / 'nearest.png'})", file=sys.stderr)
    return 0


def described(images: ImageSet, teacher: "Teacher", device: str, batch: int, count: int | None = None) -> Tensor:
    """(n, D) float32 unit vectors: patch-mean features of the first `count` images, all by default."""
    loader = torch.utils.data.DataLoader(
        torch.utils.data.Subset(images, range(count)) if count else images, batch_size=batch
    )
    with torch.inference_mode():
        parts = [teacher(part.to(device).float() / 255).mean(1).cpu() for part in loader]
    return torch.nn.functional.normalize(torch.cat(parts), dim=1)


def nearest(wanted_nD: Tensor, bank_ND: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cosines (n, k), falling, and numbers (n, k) of the k nearest of the bank, a block of it at a time."""
    best, number = torch.empty(len(wanted_nD), 0), torch.empty(len(wanted_nD), 0, dtype=torch.int64)
    for start in range(0, len(bank_ND), BLOCK):
        block = wanted_nD @ bank_ND[start : start + BLOCK].T
        at = torch.arange(start, start + block.shape[1]).expand_as(block)
        best, number = torch.cat([best, block], 1), torch.cat([number, at], 1)
        order = best.argsort(dim=1, descending=True, stable=True)[:, :k]
        best, number = best.gather(1, order), number.gather(1, order)
    return best, number


def stacked(images: ImageSet, numbers: list[int]) -> np.ndarray:
    """(n, H, W, 3) uint8."""
    return np.stack([images[number].permute(1, 2, 0).numpy() for number in numbers])

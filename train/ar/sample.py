"""Draw images: codes from the autoregressive model, pixels from the tokenizer; PNG grid and an npz for evaluation."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from semdict.pipeline.common.errors import UsageError
from semdict.pipeline.common.files import write_json
from semdict.pipeline.common.publish import check_output, publish_folder
from semdict.train.ar.model import ArModel
from semdict.train.ar.sampling import sample
from semdict.train.ar.train import check_tokenizer
from semdict.train.engine.dist import pick_device
from semdict.train.engine.guidance import Guidance
from semdict.train.engine.model_file import load_model
from semdict.train.vcq.tokenizer import load_vcq_tokenizer

if TYPE_CHECKING:
    from semdict.pipeline.config.schema import ArSample

EXAMPLE = """examples:
  semdict ar sample --model runs/demo/ar --tokenizer runs/demo/vcq --out samples
  semdict ar sample --draw unguided --set ar_sample.unguided_temperature=0.85      the paper's "w/o CFG"
  semdict ar sample --set ar_sample.mode=ramp                                     plain cosine guidance (table 8)"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model and tokenizer; how to draw stands in params.yaml, section ar_sample."""
    parser.add_argument("--params", default="params.yaml", type=Path, help="default: params.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a parameter")
    parser.add_argument("--model", type=Path, help="run of `semdict ar train` (default runs/<preset>/ar)")
    parser.add_argument("--tokenizer", type=Path, help="run of `semdict vcq train` (default runs/<preset>/vcq)")
    parser.add_argument("--draw", choices=("guided", "unguided"), default="guided", help="default: guided")
    parser.add_argument("--out", type=Path, help="default: runs/<preset>/ar-samples-<draw>")


def run(args: argparse.Namespace) -> int:
    """Write samples.npz (arr_0 uint8 (N, H, W, 3), arr_1 labels, tokens), grid.png and sampling.json."""
    from semdict.pipeline.config.params import load_params
    from semdict.pipeline.images.visualize import save_grid, to_uint8

    params = load_params(args.params, args.set)
    given, runs = drawing(params.ar_sample, args.draw), Path("runs") / params.preset
    out = args.out or runs / f"ar-samples-{args.draw}"
    check_output(out, "ar-samples")
    device = pick_device(params.runtime.device)
    model, file = load_model(args.model or runs / "ar", ArModel, device)
    path = args.tokenizer or runs / "vcq"
    tokenizer = load_vcq_tokenizer(path, device)
    check_tokenizer(file.about["token_set"], tokenizer.identity, path)
    if tokenizer.quantizer.sizes != model.config.sizes:
        raise UsageError(f"{path} has other codebook sizes than the model was trained with")
    names = file.about.get("classes") or []
    labels = wanted_labels(given.classes, given.per_class, model.null_class)
    guidance = Guidance(given.scale, given.power, given.start, given.mode)
    images, tokens = [], []
    for start in range(0, len(labels), given.batch):
        part = torch.tensor(labels[start : start + given.batch], device=device)
        numbers = list(range(start, start + len(part)))
        with torch.autocast(device.type, torch.bfloat16, enabled=given.precision == "bfloat16"):
            ids_BL = sample(model, part, numbers, given.seed, given.temperature, guidance)
            pixels = tokenizer.decode(ids_BL)
        images.append(to_uint8(pixels))
        tokens.append(ids_BL.cpu().numpy().astype(np.uint16))
    images_NHWC = np.concatenate(images)
    with publish_folder(out, "ar-samples") as folder:
        np.savez(folder / "samples.npz", arr_0=images_NHWC, arr_1=np.array(labels), tokens=np.concatenate(tokens))
        save_grid(folder / "grid.png", *by_class(images_NHWC, labels, names))
        write_json(folder / "sampling.json", {**given.model_dump(), "images": len(labels), "class_names": names})
    return 0


def drawing(given: "ArSample", draw: str) -> "ArSample":
    """The section as it is, or unguided and at its temperature for that."""
    if draw == "guided":
        return given
    return given.model_copy(update={"scale": 0.0, "start": 0.0, "temperature": given.unguided_temperature})


def wanted_labels(classes: list[int], per_class: int, null_class: int) -> list[int]:
    """`per_class` times each class asked for (all by default), class by class; UsageError for a wrong one."""
    for label in classes:
        if not 0 <= label <= null_class:
            raise UsageError(f"ar_sample.classes: {label} is not in [0, {null_class}] ({null_class} = no class)")
    return [label for label in classes or range(null_class) for _ in range(per_class)]


def by_class(images_NHWC: np.ndarray, labels: list[int], names: list[str]) -> tuple[list[np.ndarray], list[str]]:
    """Rows of at most eight pictures for at most eight classes spread evenly over those drawn, and their names."""
    drawn = sorted(set(labels))
    chosen = [drawn[i] for i in np.linspace(0, len(drawn) - 1, min(8, len(drawn))).astype(int)]
    rows = [images_NHWC[np.flatnonzero(np.array(labels) == label)[:8]] for label in chosen]
    return rows, [names[label] if label < len(names) else str(label) for label in chosen]

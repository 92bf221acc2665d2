"""Before the long run: encode a sample, decode it back, and refuse tokens that do not look like the images."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from semdict.pipeline.common.device import to_device
from semdict.pipeline.common.errors import SemdictError
from semdict.pipeline.common.files import write_json
from semdict.pipeline.common.inference import CROPS
from semdict.pipeline.config.schema import Encode
from semdict.pipeline.encode.worker import EncodeJob
from semdict.pipeline.images.batches import load_crop
from semdict.pipeline.images.decode import BadImage
from semdict.pipeline.images.visualize import psnr, reconstruct, save_grid, word_colours, word_maps
from semdict.pipeline.manifest.table import Manifest
from semdict.pipeline.tokenizers.pair import StreamTokenizer


@dataclass(frozen=True)
class Floor:
    """The reconstruction quality below which encoding stops, and what to name then."""

    psnr: float  # dB
    images: int  # that are encoded and decoded back
    key: str  # of params.yaml
    weights: str


def preflight(
    job: EncodeJob,
    tokenizer: StreamTokenizer,
    manifest: Manifest,
    cfg: Encode,
    floor: Floor,
    reports: Path,
    centroids: np.ndarray | None = None,
) -> dict[str, Any]:
    """Write the grid of reconstructions and preflight.json: PSNR, and the share of tokens that differ from float32.

    SemdictError below the floor. A wrong input range is the field's most common silent error and shows here.
    """
    pixels = sample_crops(job, manifest, max(floor.images, cfg.precision_images))
    images = to_device(pixels, tokenizer.device)
    batch = min(cfg.batch, CROPS)
    exact = _tokens(tokenizer, images, "float32", batch)
    tokens = exact if job.precision == "float32" else _tokens(tokenizer, images, job.precision, batch)
    shown = min(floor.images, len(pixels))
    copies = reconstruct(tokenizer, tokens["gen"][:shown], batch)
    decibels = psnr(pixels[:shown], copies)
    rows, labels = [pixels[:shown], copies], ["original", "generative\nback to pixels"]
    if centroids is not None:
        rows.append(word_maps(tokens["disc"][:shown], word_colours(centroids), pixels.shape[1]))
        labels.append("discriminative\nas colours")
    save_grid(reports / "reconstructions.png", rows, labels)
    report = {
        "images": len(pixels),
        "psnr_mean": round(float(decibels.mean()), 3),
        "psnr_min": round(float(decibels.min()), 3),
        "precision": job.precision,
        "tokens_unlike_float32": {name: float(np.mean(tokens[name] != exact[name])) for name, _ in job.dtypes},
    }
    write_json(reports / "preflight.json", report)
    if report["psnr_mean"] < floor.psnr:
        raise SemdictError(
            f"tokens decode back at {report['psnr_mean']:.2f} dB, under {floor.key} {floor.psnr}: look at "
            f"{reports / 'reconstructions.png'}; {floor.weights} is likely trained for other images or for another "
            "input range"
        )
    return report


def sample_crops(job: EncodeJob, manifest: Manifest, count: int) -> np.ndarray:
    """(n, S, S, 3) uint8: the first view of up to `count` good rows, evenly spread over the manifest."""
    good = np.flatnonzero(manifest.status == 0)
    picks = np.unique(np.linspace(0, len(good) - 1, min(count, len(good))).astype(np.int64)) if len(good) else []
    reader = manifest.reader(dict(job.images))
    crops = []
    for row in good[picks]:
        try:
            crops.append(load_crop(reader, manifest, int(row), job.recipe)[0][0])
        except BadImage:
            continue  # the run itself records why
    if not crops:
        raise SemdictError(f"none of {len(picks)} sampled images can be decoded; look at {job.manifest}")
    return np.stack(crops)


def _tokens(tokenizer: StreamTokenizer, images: Tensor, precision: str, batch: int) -> dict[str, np.ndarray]:
    parts = [tokenizer.tokens(images[i : i + batch], precision) for i in range(0, len(images), batch)]
    return {name: np.concatenate([part[name].cpu().numpy() for part in parts]) for name in parts[0]}

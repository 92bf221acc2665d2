"""Before the long run: encode a sample, decode it back, and refuse tokens that do not look like the images."""

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from semdict.pipeline.common.device import to_device
from semdict.pipeline.common.errors import SemdictError
from semdict.pipeline.common.files import write_json
from semdict.pipeline.config.schema import Encode, Vqgan
from semdict.pipeline.encode.worker import EncodeJob
from semdict.pipeline.images.batches import load_crop
from semdict.pipeline.images.decode import BadImage
from semdict.pipeline.images.visualize import psnr, reconstruct, save_grid, word_colours, word_maps
from semdict.pipeline.manifest.table import Manifest
from semdict.pipeline.tokenizers.pair import StreamTokenizer


def probe(
    job: EncodeJob,
    tokenizer: StreamTokenizer,
    manifest: Manifest,
    vqgan: Vqgan,
    encode: Encode,
    reports: Path,
    words: np.ndarray | None = None,
) -> dict[str, Any]:
    """Keep the reconstruction grid and its PSNR, count tokens that differ from float32; SemdictError under the floor.

    A wrong input range is the field's most common silent error and shows here, before the long run.
    """
    pixels = sample_crops(job, manifest, max(vqgan.psnr_images, encode.precision_images))
    images = to_device(pixels, tokenizer.device)
    exact = _tokens(tokenizer, images, "float32", encode.batch)
    used = exact if job.precision == "float32" else _tokens(tokenizer, images, job.precision, encode.batch)
    shown = min(vqgan.psnr_images, len(pixels))
    copies = reconstruct(tokenizer, used["gen"][:shown], encode.batch)
    decibels = psnr(pixels[:shown], copies)
    rows, labels = [pixels[:shown], copies], ["original", "generative\nback to pixels"]
    if words is not None:
        rows.append(word_maps(used["disc"][:shown], word_colours(words)))
        labels.append("discriminative\nwords as colours")
    save_grid(reports / "reconstructions.png", rows, labels)
    report = {
        "images": len(pixels),
        "psnr_mean": round(float(decibels.mean()), 3),
        "psnr_min": round(float(decibels.min()), 3),
        "precision": job.precision,
        "tokens_unlike_float32": {name: float(np.mean(used[name] != exact[name])) for name in job.streams},
    }
    write_json(reports / "probe.json", report)
    if report["psnr_mean"] < vqgan.psnr_floor:
        raise SemdictError(
            f"tokens decode back at {report['psnr_mean']:.2f} dB, under vqgan.psnr_floor {vqgan.psnr_floor}: "
            f"look at {reports / 'reconstructions.png'}; {vqgan.weights} is likely trained for other images or for "
            "another input range"
        )
    return report


def sample_crops(job: EncodeJob, manifest: Manifest, wanted: int) -> np.ndarray:
    """(n, 256, 256, 3) uint8: the first view of up to `wanted` good rows, evenly spread over the manifest."""
    good = np.flatnonzero(manifest.status == 0)
    picks = np.unique(np.linspace(0, len(good) - 1, min(wanted, len(good))).astype(np.int64)) if len(good) else []
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

"""The reference images of fid_val50k as files: 256 x 256 PNGs of a split, as MAGE prepares ImageNet's."""

import argparse
import io
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from semdict.pipeline.common.errors import UsageError
from semdict.pipeline.common.files import write_json
from semdict.pipeline.common.publish import check_output, occupied, publish_folder
from semdict.pipeline.config import paths as places

EXAMPLE = """example:
  semdict evaluate reference --manifest data/in1k/manifest/manifest.parquet --split val --out imagenet-val-256

Shorter side to 256 (bilinear with antialias, as torchvision's Resize on PIL images), centre crop 256, PNG."""
SIDE = 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which images, and where the PNGs go."""
    parser.add_argument("--manifest", type=Path, help="default data/<preset>/manifest/manifest.parquet")
    parser.add_argument("--split", default="val")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--params", default="params.yaml", type=Path, help="default: params.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a parameter")


def run(args: argparse.Namespace) -> int:
    """Write the folder whole or not at all; rows with a status are left out and counted."""
    from tqdm import tqdm

    from semdict.pipeline.config.params import load_params
    from semdict.pipeline.manifest.table import load_manifest

    params = load_params(args.params, args.set)
    check_output(args.out, "reference")
    if occupied(args.out):
        raise UsageError(f"{args.out} exists; give another --out or remove it")
    manifest = load_manifest(args.manifest or places.manifest(params.preset))
    rows = manifest.rows_of([args.split])
    good = [int(row) for row in rows[manifest.status[rows] == 0]]
    reader = manifest.reader(params.manifest.images)
    with publish_folder(args.out, "reference") as folder, ThreadPoolExecutor() as pool:
        (folder / "images").mkdir()
        jobs = pool.map(lambda row: save(reader.read(row), folder / "images" / f"{row:08d}.png"), good)
        for _ in tqdm(jobs, total=len(good), desc="reference", unit="img"):
            pass
        about = {"split": args.split, "images": len(good), "left_out": len(rows) - len(good), "resize": "bilinear 256"}
        write_json(folder / "reference.json", {**about, "manifest_sha256": manifest.sha256})
    print(f"reference: {len(good)} images in {args.out}", file=sys.stderr)
    return 0


def reference_crop(data: bytes) -> np.ndarray:
    """Encoded bytes to (256, 256, 3) uint8."""
    from PIL import Image
    from torchvision.transforms.functional import InterpolationMode, center_crop, resize

    image = Image.open(io.BytesIO(data)).convert("RGB")
    return np.asarray(center_crop(resize(image, SIDE, InterpolationMode.BILINEAR), SIDE))


def save(data: bytes, path: Path) -> None:
    """One encoded image as the reference PNG."""
    from PIL import Image

    Image.fromarray(reference_crop(data)).save(path)

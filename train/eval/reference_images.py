"""`semdict evaluate reference`: the reference images of protocol val50k as 256 x 256 PNGs, as MAGE makes ImageNet's."""

import argparse
import sys
from pathlib import Path

import numpy as np

from semdict.pipeline.common.errors import UsageError
from semdict.pipeline.common.files import write_json
from semdict.pipeline.common.progress import progress
from semdict.pipeline.common.publish import check_output, occupied, publish_folder
from semdict.pipeline.config import paths

EXAMPLE = """example:
  semdict evaluate reference --manifest data/in1k/manifest/manifest.parquet --split val --out imagenet-val-256

Shorter side to 256 (bilinear with antialias, as torchvision's Resize on PIL images), centre crop 256, PNG. Images that
cannot be decoded are left out, counted and named in reference.json."""
SIDE = 256
BATCH = 64  # images decoded ahead


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The images and the folder of the PNGs."""
    from semdict.pipeline.config.params import add_params_arguments

    parser.add_argument("--manifest", type=Path, help="default data/<preset>/manifest/manifest.parquet")
    parser.add_argument("--split", default="val")
    parser.add_argument("--out", type=Path, required=True)
    add_params_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Write the folder whole or not at all."""
    from semdict.pipeline.config.params import params_of
    from semdict.pipeline.images.batches import good_or_bad, load_ahead
    from semdict.pipeline.images.decode import BadImage
    from semdict.pipeline.manifest.table import load_manifest

    params = params_of(args)
    check_output(args.out, "reference")
    if occupied(args.out):
        raise UsageError(f"{args.out} exists; give another --out or remove it")
    manifest = load_manifest(args.manifest or paths.manifest(params.preset))
    rows = manifest.rows_of([args.split])
    left_out = {manifest.key(int(row)): manifest.reason(int(row)) for row in rows[manifest.status[rows] != 0]}
    good = rows[manifest.status[rows] == 0].tolist()
    reader = manifest.reader(params.manifest.images)
    with publish_folder(args.out, "reference") as folder:
        (folder / "images").mkdir()

        def write(row: int) -> None:
            save(reader.read(row), params.pixels.max_pixels, folder / "images" / f"{row:08d}.png")

        batches = (good[start : start + BATCH] for start in range(0, len(good), BATCH))
        with progress(len(good), "reference") as bar:
            for done in load_ahead(batches, lambda row: (row, good_or_bad(write, row))):
                left_out |= {manifest.key(row): bad.reason for row, bad in done if isinstance(bad, BadImage)}
                bar.update(len(done))
        count = len(rows) - len(left_out)
        about = {"split": args.split, "images": count, "left_out": len(left_out), "resize": "bilinear 256"}
        about["left_out_first"] = dict(list(left_out.items())[:5])
        write_json(folder / "reference.json", {**about, "manifest_sha256": manifest.sha256})
    print(f"reference: {count} images in {args.out}", file=sys.stderr)
    for name, reason in list(left_out.items())[:1]:
        print(f"reference: {len(left_out)} of {len(rows)} are left out; first: {name}: {reason}", file=sys.stderr)
    return 0


def reference_crop(data: bytes, max_pixels: int) -> np.ndarray:
    """An encoded image to (256, 256, 3) uint8; BadImage where it cannot be decoded."""
    from PIL import Image
    from torchvision.transforms.functional import InterpolationMode, center_crop, resize

    from semdict.pipeline.images.decode import DecodeSpec, decode

    image = Image.fromarray(decode(data, DecodeSpec("pillow", max_pixels)))
    return np.asarray(center_crop(resize(image, SIDE, InterpolationMode.BILINEAR), SIDE))


def save(data: bytes, max_pixels: int, path: Path) -> None:
    """Write one encoded image as a reference PNG."""
    from PIL import Image

    Image.fromarray(reference_crop(data, max_pixels)).save(path)

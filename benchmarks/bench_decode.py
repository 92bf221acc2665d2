"""Decode and crop rate of the two decoders, and how fast a manifest is made, against the plain ways.

Example: python -m benchmarks.bench_decode --images FOLDER --files 20000    (--small for a quick look)
"""

import hashlib
import io
import os
import resource
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.report import arguments, machine, publish
from benchmarks.timing import alternate
from semdict.pipeline.config import schema
from semdict.pipeline.config.yaml import read_yaml
from semdict.pipeline.images.crops import Crop, crop_views, expand_views
from semdict.pipeline.images.decode import DecodeSpec, decode, decoder_identity
from semdict.pipeline.manifest.stage import build_manifest

PRESETS = Path(__file__).resolve().parent.parent / "presets"
LINKS = 10_000  # names per file: file systems limit them


def photographs(folder: Path | None, count: int) -> list[bytes]:
    """JPEGs from a folder, or 500 x 375 synthetic ones of an ordinary photograph's size in bytes."""
    if folder:
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
        return [path.read_bytes() for path in files[:count]]
    made = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        coarse = Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).resize((500, 375))
        noisy = np.asarray(coarse, np.int16) + rng.integers(-18, 19, (375, 500, 3))
        file = io.BytesIO()
        Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=92)
        made.append(file.getvalue())
    return made


def bench_decoders(items: list[bytes], repeats: int) -> dict:
    """Images per second on one thread: decoding alone, and decoding with one centre crop, the decoders in turns."""
    centre = expand_views(["centre"])

    def decode_all(name: str) -> None:
        for item in items:
            decode(item, DecodeSpec(name))

    def crop_all(name: str) -> None:
        for item in items:
            crop_views(decode(item, DecodeSpec(name)), Crop("resize", 256), centre)

    figures: dict = {"images": len(items), "mean_bytes": int(np.mean([len(item) for item in items]))}
    for kind, run in (("decode", decode_all), ("decode_and_crop", crop_all)):
        best, _ = alternate({name: partial(run, name) for name in ("simplejpeg", "pillow")}, repeats)
        figures[kind] = {f"{name}_per_s": len(items) / seconds for name, seconds in best.items()}
        figures[kind]["ratio"] = best["pillow"] / best["simplejpeg"]
    pairs = (
        (decode(item, DecodeSpec("simplejpeg")).astype(np.int16), decode(item, DecodeSpec("pillow"))) for item in items
    )
    figures["largest_difference"] = int(max(np.abs(fast - slow).max() for fast, slow in pairs))
    return figures


def make_tree(root: Path, files: int, data: bytes) -> None:
    """Class folders of 1,000 names each, hard links to a few files, so that the disk holds next to nothing."""
    source = root / "source"
    for i in range(files):
        if i % LINKS == 0:
            source = root / f"source-{i}"
            source.write_bytes(data)
        folder = root / "train" / f"n{i // 1000:08d}"
        if i % 1000 == 0:
            folder.mkdir(parents=True)
        os.link(source, folder / f"{i:08d}.jpeg")


def plain_loop(root: Path) -> int:
    """What a first draft does: one Path, one open, one hash, one header after the other."""
    rows = []
    for path in sorted(root.rglob("*.jpeg")):
        data = path.read_bytes()
        with Image.open(path) as image:
            rows.append((str(path), path.parent.name, *image.size, len(data), hashlib.sha256(data).hexdigest()))
    return len(rows)


def bench_manifest(files: int, data: bytes) -> dict:
    """Files per second: a first run, a second with everything remembered, and the plain loop (page cache warm)."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_tree(root, files, data)
        defaults = read_yaml(PRESETS / "base.yaml")["manifest"]
        settings = schema.Manifest(**{**defaults, "images": {"train": str(root / "train")}})
        build = partial(build_manifest, settings, root / "m.parquet", root / "m.json", root / "cache", DecodeSpec())
        seconds = {}
        for name, run in (("first", build), ("again", build), ("plain", partial(plain_loop, root / "train"))):
            start = time.perf_counter()
            run()
            seconds[name] = time.perf_counter() - start
        size = (root / "m.parquet").stat().st_size
    return {
        "files": files,
        "bytes_each": len(data),
        "files_per_s": {name: files / spent for name, spent in seconds.items()},
        "ratio_to_plain": {name: seconds["plain"] / seconds[name] for name in ("first", "again")},
        "manifest_bytes": size,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def main() -> None:
    parser = arguments(__doc__, "decode")
    parser.add_argument("--images", type=Path, help="folder of JPEGs (default: synthetic ones)")
    parser.add_argument("--files", type=int, help="size of the synthetic tree (default: 20000, with --small 2000)")
    args = parser.parse_args()
    items = photographs(args.images, 16 if args.small else 128)
    files = args.files or (2_000 if args.small else 20_000)
    median = sorted(items, key=len)[len(items) // 2]
    figures = {
        "machine": machine(),
        "decoder": decoder_identity(),
        "decode": bench_decoders(items, 1 if args.small else 3),
    }
    publish(args.out, {**figures, "manifest": bench_manifest(files, median)})


if __name__ == "__main__":
    main()

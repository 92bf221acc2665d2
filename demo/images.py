"""The demo's images, drawn from a seed: `python -m demo.images --out DIR --seed 0`.

As in photographs, things belong together: sky over ground, a thing where it usually is and of a usual colour, and some
exceptions. An image's class is the thing that it shows. Grounds and colours are shared by several things, so neither
says which thing it is. Every image has its own random generator: the bytes do not depend on the number of workers.
"""

import argparse
import io
import multiprocessing
import os
import sys
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from demo.things import PAINTS, THINGS, Brush, paint, shade
from semdict.pipeline.common.files import write_json
from semdict.pipeline.common.publish import publish_folder

SIZE = 64  # pixels a side
CLASSES = tuple(THINGS)
SPLITS = ("train", "val", "teach")  # "teach" is never written to files: the images that train the teacher
TAR_IMAGES = 1000  # images of one tar
JPEG_QUALITY = 95
SUPERSAMPLE = 4  # outlines are drawn this much larger, then averaged

SKIES = np.float32(  # top, horizon
    [[[86, 148, 214], [190, 220, 240]], [[120, 150, 200], [246, 196, 140]], [[150, 160, 172], [208, 212, 216]]]
)
SKY_SHARES = (0.6, 0.2, 0.2)  # clear, evening, grey
GROUNDS = {  # near, far
    "meadow": np.float32([[82, 138, 60], [136, 174, 92]]),
    "desert": np.float32([[206, 160, 100], [228, 194, 138]]),
    "snow": np.float32([[214, 222, 232], [238, 242, 246]]),
    "water": np.float32([[34, 88, 138], [96, 152, 188]]),
}
ROUGHNESS = {"meadow": 9.0, "desert": 6.0, "snow": 4.0, "water": 8.0}  # amplitude of the texture
USUAL = {  # share of each ground per thing, in GROUNDS' order
    "balloon": (0.25, 0.25, 0.25, 0.25),
    "boat": (0.05, 0.05, 0.0, 0.9),
    "cactus": (0.3, 0.5, 0.2, 0.0),
    "car": (0.4, 0.3, 0.3, 0.0),
    "fish": (0.0, 0.0, 0.0, 1.0),
    "flower": (0.5, 0.25, 0.25, 0.0),
    "house": (0.4, 0.3, 0.3, 0.0),
    "lighthouse": (0.2, 0.1, 0.1, 0.6),
    "mushroom": (0.5, 0.25, 0.25, 0.0),
    "penguin": (0.2, 0.15, 0.45, 0.2),
    "snowman": (0.3, 0.15, 0.55, 0.0),
    "tree": (0.4, 0.3, 0.3, 0.0),
}
EXPOSURE = (0.7, 1.12)
CAST = 0.06  # standard deviation of the light's colour


@dataclass(frozen=True)
class Picture:
    """One drawn image: rgb (64, 64, 3) uint8, thing (64, 64) float32 in [0, 1], the share of a pixel that it covers."""

    rgb: np.ndarray
    thing: np.ndarray
    ground: int  # index into GROUNDS


def draw(label: int, rng: np.random.Generator) -> Picture:
    """Draw an image of class `label` (index into CLASSES); all randomness is from `rng`."""
    name = CLASSES[label]
    ground = int(rng.choice(len(GROUNDS), p=USUAL[name]))
    horizon = SIZE * (rng.uniform(0.25, 0.4) if name == "fish" else rng.uniform(0.4, 0.62))
    canvas = _scene(list(GROUNDS)[ground], horizon, rng)
    _clutter(canvas, horizon, rng)
    rgba, foot, width = _thing(name, horizon, rng)
    if name not in ("balloon", "fish"):
        _shadow(canvas, foot, width, rng)
    light = 1 + rng.uniform(-0.16, 0.16) * (np.arange(SIZE, dtype=np.float32) - foot[0])[None, :, None] / width
    canvas += rgba[..., :3] * light - rgba[..., 3:] * canvas
    canvas *= (rng.uniform(*EXPOSURE) * (1 + CAST * rng.standard_normal(3))).astype(np.float32)
    canvas += rng.normal(0, 1.2, canvas.shape[:2])[..., None]
    return Picture(np.clip(np.rint(canvas), 0, 255).astype(np.uint8), rgba[..., 3], ground)


def picture(seed: int, split: str, index: int) -> tuple[Picture, int]:
    """Image number `index` of a split and its label, `index` modulo the number of classes."""
    label = index % len(CLASSES)
    return draw(label, np.random.default_rng([seed, SPLITS.index(split), index])), label


def _scene(ground: str, horizon: float, rng: np.random.Generator) -> np.ndarray:
    """(64, 64, 3) float32: a sky with clouds over a textured ground."""
    rows = np.arange(SIZE, dtype=np.float32)[:, None]
    top, low = SKIES[rng.choice(len(SKIES), p=SKY_SHARES)] + rng.normal(0, 5, (2, 3)).astype(np.float32)
    sky = _blend(top, low, np.clip(rows / horizon, 0, 1))
    cloud = np.clip(2.5 * (_noise(rng, 10, 4) - rng.uniform(0.3, 0.9)), 0, 0.8) * np.clip(1 - rows / horizon, 0, 1)
    sky = sky + cloud[..., None] * (np.float32([246, 246, 246]) - sky)
    near, far = GROUNDS[ground] + rng.normal(0, 6, (2, 3)).astype(np.float32)
    edge = horizon + (0 if ground == "water" else rng.uniform(0, 3)) * _noise(rng, 1, 4)[:1]
    depth = np.clip((rows - edge) / (SIZE - horizon), 0, 1)
    texture = _noise(rng, 24, 10) if ground in ("water", "desert") else _noise(rng, 20, 20)
    land = _blend(far, near, depth) + (ROUGHNESS[ground] * (0.4 + 0.6 * depth) * texture)[..., None]
    below = np.clip(rows - edge + 0.5, 0, 1)[..., None]
    return sky + below * (land - sky)


def _clutter(canvas: np.ndarray, horizon: float, rng: np.random.Generator) -> None:
    """Paint small things of any colour: bushes and stones on the ground, a sun or birds in the sky."""
    brush = Brush(SIZE * SUPERSAMPLE, (0, 0), (SUPERSAMPLE, -SUPERSAMPLE))
    for _ in range(rng.integers(2, 7)):
        x, y, r = rng.uniform(0, SIZE), rng.uniform(horizon + 2, SIZE), rng.uniform(2, 5)
        kind, colour = rng.integers(4), paint(rng, PAINTS)
        if kind == 0:
            brush.oval(shade(colour, 0.85), x - 0.6 * r, y, r, 0.8 * r)
            brush.oval(colour, x + 0.4 * r, y, r, 0.9 * r)
        elif kind == 1:
            brush.polygon(colour, (x - r, y), (x + r, y), (x + 0.4 * r, y - r), (x - 0.6 * r, y - 0.8 * r))
        elif kind == 2:
            brush.box(colour, x - 0.35 * r, y - 2 * r, x + 0.35 * r, y)
        else:
            brush.oval(colour, x, rng.uniform(0, max(horizon, 8)), 0.8 * r)
    rgba = brush.rgba(SUPERSAMPLE)
    canvas += rgba[..., :3] - rgba[..., 3:] * canvas


def _thing(name: str, horizon: float, rng: np.random.Generator) -> tuple[np.ndarray, tuple[float, float], float]:
    """The thing (64, 64, 4), its colours times its share of each pixel; where it stands, and its width, in pixels."""
    unit = SIZE * rng.uniform(0.25, 0.33)
    wide, high = unit * rng.uniform(0.94, 1.06), unit * rng.uniform(0.94, 1.06)
    x = SIZE / 2 + rng.uniform(-1, 1) * SIZE * 0.12
    if name == "balloon":
        y = 2 * high + SIZE * rng.uniform(0.06, 0.2)
    elif name == "fish":
        y = horizon + 1.6 * high + SIZE * rng.uniform(0.0, 0.12)
    else:
        y = max(horizon + SIZE * rng.uniform(0.1, 0.3), 2.15 * high)
    mirror = -1 if rng.random() < 0.5 else 1
    foot = (x, min(y, 0.94 * SIZE))
    brush = Brush(
        SIZE * SUPERSAMPLE, tuple(SUPERSAMPLE * c for c in foot), (mirror * SUPERSAMPLE * wide, SUPERSAMPLE * high)
    )
    THINGS[name](brush, rng)
    return brush.rgba(SUPERSAMPLE), foot, wide


def _shadow(canvas: np.ndarray, foot: tuple[float, float], width: float, rng: np.random.Generator) -> None:
    """Darken the ground under the thing."""
    y, x = np.ogrid[:SIZE, :SIZE]
    distance = ((x - foot[0] - rng.uniform(-3, 3)) / (1.1 * width)) ** 2 + ((y - foot[1]) / (0.2 * width)) ** 2
    canvas *= 1 - rng.uniform(0.15, 0.35) * np.clip(1.6 - distance, 0, 1)[..., None].astype(np.float32)


def _blend(first: np.ndarray, second: np.ndarray, share: np.ndarray) -> np.ndarray:
    """(64, 64, 3): from the first colour (share 0) to the second; share (64, 1 or 64)."""
    return first + np.broadcast_to(share, (SIZE, SIZE))[..., None] * (second - first)


@cache
def _stretch(cells: int) -> np.ndarray:
    """(64, cells) float32: cubic interpolation of `cells` values to 64."""
    eye = Image.fromarray(np.eye(cells, dtype=np.float32))
    return np.asarray(eye.resize((cells, SIZE), Image.Resampling.BICUBIC))


def _noise(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """(64, 64) float32 smooth noise in about [-1, 1]: a random grid, enlarged."""
    grid = rng.uniform(-1, 1, (rows, columns)).astype(np.float32)
    return _stretch(rows) @ grid @ _stretch(columns).T


def _member(name: str, data: bytes) -> tuple[tarfile.TarInfo, io.BytesIO]:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    return entry, io.BytesIO(data)


def _write(job: tuple[Path, int, str, range]) -> int:
    """Draw the images of one tar, each a .jpg beside a .cls with its class's name; returns the tar's bytes."""
    path, seed, split, indices = job
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for index in indices:
            drawn, label = picture(seed, split, index)
            jpeg = io.BytesIO()
            Image.fromarray(drawn.rgb).save(jpeg, "JPEG", quality=JPEG_QUALITY, subsampling=0)
            tar.addfile(*_member(f"{split}_{index:05d}.jpg", jpeg.getvalue()))
            tar.addfile(*_member(f"{split}_{index:05d}.cls", CLASSES[label].encode()))
    return path.stat().st_size


def workers_map(function, jobs: Iterable, workers: int = 0) -> list:
    """The function's results in order, by `workers` processes; 0 = one per core."""
    workers = workers or len(os.sched_getaffinity(0))
    if workers == 1:
        return [function(job) for job in jobs]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        return pool.map(function, jobs, chunksize=1)


def write_images(
    out: str | Path, seed: int = 0, train: int = 6000, val: int = 1000, workers: int = 0
) -> dict[str, int]:
    """Write webdataset tars out/{train,val}-<number>.tar, all or nothing; workers 0 = one per core.

    Returns counts and bytes. The bytes depend on `seed` and the library versions, never on `workers`.
    """
    with publish_folder(out, "demo-images") as folder:
        jobs = [
            (
                folder / f"{split}-{start // TAR_IMAGES:03d}.tar",
                seed,
                split,
                range(start, min(start + TAR_IMAGES, count)),
            )
            for split, count in (("train", train), ("val", val))
            for start in range(0, count, TAR_IMAGES)
        ]
        sizes = workers_map(_write, jobs, workers)
        write_json(folder / "demo-images.json", {"seed": seed, "train": train, "val": val})
    return {"images": train + val, "bytes": sum(sizes), "classes": len(CLASSES)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m demo.images", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write, e.g. demo/assets/images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=int, default=6000, help="images of the train split")
    parser.add_argument("--val", type=int, default=1000, help="images of the val split")
    parser.add_argument("--workers", type=int, default=0, help="processes, 0 = one per core")
    args = parser.parse_args(argv)
    done = write_images(args.out, args.seed, args.train, args.val, args.workers)
    summary = f"{done['images']} images of {done['classes']} classes, {done['bytes'] / 1e6:.1f} MB, seed {args.seed}"
    print(f"{args.out}: {summary}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

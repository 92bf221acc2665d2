"""The demo's images: textured shapes among distractors, drawn from a seed; `python -m demo.images --out DIR --seed 0`.

A class is a texture and a shape. Colours, background, position, scale, rotation, lighting and distractors are
independent of the class. Every image has its own random generator, so the bytes do not depend on the worker count.
"""

import argparse
import math
import multiprocessing
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from semdict.pipeline.common.files import write_json
from semdict.pipeline.common.publish import publish_folder

SHAPES = ("disc", "star")
TEXTURES = ("striped", "dotted", "checked", "zigzag", "gridded", "bricked")
DISTRACTORS = (*SHAPES, "triangle", "cross", "bar")
CLASSES = tuple(f"{texture}-{shape}" for texture in TEXTURES for shape in SHAPES)
SPLITS = ("train", "val", "teach")  # "teach" is never written to files: the images that train the teacher
JPEG_QUALITY = 92
SUPERSAMPLE = 4  # outlines are drawn this much larger, then averaged
INKS = np.array(
    [
        [214, 69, 65], [233, 138, 52], [242, 201, 76], [111, 174, 78], [52, 138, 128], [66, 133, 196],
        [94, 84, 164], [186, 90, 152], [238, 232, 213], [66, 62, 72], [150, 116, 90], [140, 158, 172],
    ],
    dtype=np.float32,
)  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """One drawn image: rgb (H, W, 3) uint8, object (H, W) float32 in [0, 1], the share of a pixel that it covers."""

    rgb: np.ndarray
    object: np.ndarray


def draw(label: int, rng: np.random.Generator, size: tuple[int, int] = (256, 256)) -> Picture:
    """Draw an image of class `label` (index into CLASSES), `size` = (height, width); all randomness is from `rng`."""
    texture, shape = TEXTURES[label // len(SHAPES)], SHAPES[label % len(SHAPES)]
    unit = min(size)
    canvas = _background(rng, size)
    for _ in range(rng.integers(2, 6)):
        _distractor(canvas, rng, unit)
    radius = unit * rng.uniform(0.24, 0.40)
    margin = 0.8 * radius
    centre = rng.uniform(margin, size[1] - margin), rng.uniform(margin, size[0] - margin)
    outline = _outline(shape, rng) * radius
    cover = _cover(outline + centre, size)
    _shadow(canvas, cover, rng, unit)
    surface = _surface(texture, rng, size, unit)
    if rng.random() < 0.6:  # a dark border
        inside = _cover(outline * rng.uniform(0.9, 0.95) + centre, size)
        surface *= (0.55 + 0.45 * inside)[..., None]
    canvas += cover[..., None] * (surface - canvas)
    if rng.random() < 0.5:
        _distractor(canvas, rng, unit, scale=0.5)  # in front, but small
    canvas *= _light(rng, size)[..., None]
    canvas += rng.normal(0.0, rng.uniform(0.5, 2.5), (*size, 1))
    return Picture(np.clip(np.rint(canvas), 0, 255).astype(np.uint8), cover)


def picture(seed: int, split: str, index: int, size: tuple[int, int] | None = None) -> tuple[Picture, int]:
    """Image number `index` of a split and its label, `index` modulo the number of classes; size None = random."""
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    label = index % len(CLASSES)
    return draw(label, rng, size or _size(rng)), label


def _size(rng: np.random.Generator) -> tuple[int, int]:
    """(height, width): the short side 256..320, a third of the images square."""
    short = int(rng.integers(256, 321))
    long = short if rng.random() < 1 / 3 else round(short * rng.uniform(1.02, 1.3))
    return (short, long) if rng.random() < 0.5 else (long, short)


def _ink(rng: np.random.Generator, other: np.ndarray | None = None) -> np.ndarray:
    """(3,) float32 colour near one of INKS; away in luminance from `other` when there is one."""
    luminance = INKS @ np.float32([0.299, 0.587, 0.114])
    pool = np.arange(len(INKS))
    if other is not None:
        pool = np.flatnonzero(np.abs(luminance - other @ np.float32([0.299, 0.587, 0.114])) > 42)
    return np.clip(INKS[rng.choice(pool)] + rng.normal(0, 7, 3), 8, 247).astype(np.float32)


def _clouds(rng: np.random.Generator, size: tuple[int, int], cells: int) -> np.ndarray:
    """(H, W) float32 smooth noise in about [-1, 1]: a small random grid, enlarged."""
    grid = Image.fromarray(rng.uniform(-1, 1, (cells, cells)).astype(np.float32))
    return np.asarray(grid.resize((size[1], size[0]), Image.Resampling.BICUBIC))


def _axes(size: tuple[int, int], angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Two (H, W) float32 pixel coordinates along axes rotated by `angle`."""
    y, x = np.ogrid[: size[0], : size[1]]
    c, s = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    return (c * x + s * y).astype(np.float32), (c * y - s * x).astype(np.float32)


def _pattern(texture: str, rng: np.random.Generator, size: tuple[int, int], unit: int) -> np.ndarray:
    """(H, W) float32 in [0, 1]: where the second ink lies. The period is 1/13 to 1/8 of the short side."""
    u, v = _axes(size, rng.uniform(0, math.pi))
    warp = unit * rng.uniform(0, 0.03)
    u = u + warp * _clouds(rng, size, 4)
    v = v + warp * _clouds(rng, size, 4)
    pulse = 2 * math.pi / (unit * rng.uniform(1 / 13, 1 / 8))
    phase_u, phase_v = rng.uniform(0, 2 * math.pi, 2)
    if texture == "striped":
        wave = np.sin(pulse * u + phase_u) + rng.uniform(-0.3, 0.3)
    elif texture == "dotted":
        wave = np.cos(pulse * u + phase_u) + np.cos(pulse * v + phase_v) - rng.uniform(0.3, 0.8)
    elif texture == "checked":
        wave = 2 * np.sin(0.5 * pulse * u + phase_u) * np.sin(0.5 * pulse * v + phase_v)
    elif texture == "zigzag":
        fold = np.arcsin(np.sin(pulse * v + phase_v)) / pulse  # a triangle wave, slopes of 45 degrees
        wave = np.sin(pulse * (u + fold) + phase_u) + rng.uniform(-0.3, 0.3)
    elif texture == "gridded":
        wave = np.maximum(np.cos(pulse * u + phase_u), np.cos(pulse * v + phase_v)) - rng.uniform(0.5, 0.8)
    else:  # bricks twice as long as high, every other row shifted by half a brick
        rows = np.floor((pulse * v + phase_v) / (2 * math.pi))
        ends = 1 - 4 * (1 - np.cos(0.5 * pulse * u + phase_u + math.pi * rows))  # as sharp as the courses
        wave = np.maximum(np.cos(pulse * v + phase_v), ends) - rng.uniform(0.5, 0.8)
    return 0.5 + 0.5 * np.tanh(rng.uniform(2, 5) * wave)


def _surface(texture: str, rng: np.random.Generator, size: tuple[int, int], unit: int) -> np.ndarray:
    """(H, W, 3) float32 colours of a textured plane."""
    first = _ink(rng)
    second = _ink(rng, first)
    pattern = _pattern(texture, rng, size, unit)[..., None].astype(np.float32)
    return first + pattern * (second - first)


def _background(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) float32: two inks blended by a gradient, by clouds, or by a faint texture of any kind."""
    first, second = _ink(rng), _ink(rng)
    u, _ = _axes(size, rng.uniform(0, 2 * math.pi))
    ramp = (u - u.min()) / (u.max() - u.min())
    kind = rng.integers(3)
    if kind == 0:
        blend = ramp
    elif kind == 1:
        blend = 0.5 + 0.5 * _clouds(rng, size, int(rng.integers(3, 9)))
    else:
        faint = _pattern(TEXTURES[rng.integers(len(TEXTURES))], rng, size, min(size))
        blend = 0.5 * ramp + rng.uniform(0.15, 0.4) * faint
    blend = np.clip(blend * rng.uniform(0.5, 1.0), 0, 1)[..., None].astype(np.float32)
    return first + blend * (second - first)


def _outline(shape: str, rng: np.random.Generator) -> np.ndarray:
    """(P, 2) vertices of a shape of radius about 1, randomly stretched, slanted and rotated."""
    if shape == "disc":
        fractions, radii = np.linspace(0, 1, 72, endpoint=False), np.ones(72)
    elif shape == "triangle":
        fractions, radii = np.arange(3) / 3, np.full(3, 1.25)
    elif shape == "star":
        fractions, radii = np.arange(10) / 10, np.where(np.arange(10) % 2, rng.uniform(0.42, 0.58), 1.2)
    else:
        arm = rng.uniform(0.28, 0.42)
        quarter = np.array([[1.1, -arm], [1.1, arm], [arm, arm]])
        points = np.concatenate([quarter @ _rotation(k * math.pi / 2).T for k in range(4)])
        fractions, radii = np.arctan2(points[:, 1], points[:, 0]) / (2 * math.pi), np.hypot(*points.T)
    points = radii[:, None] * np.stack([np.cos(2 * np.pi * fractions), np.sin(2 * np.pi * fractions)], axis=1)
    stretch = np.array([[rng.uniform(0.8, 1.2), rng.uniform(-0.2, 0.2)], [0, 1]])
    return points @ stretch.T @ _rotation(rng.uniform(0, 2 * math.pi)).T


def _rotation(angle: float) -> np.ndarray:
    return np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


def _cover(points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W) float32 in [0, 1]: share of each pixel inside the polygon `points` (P, 2) of (x, y) pixels."""
    large = Image.new("L", (size[1] * SUPERSAMPLE, size[0] * SUPERSAMPLE))
    ImageDraw.Draw(large).polygon([tuple(p) for p in (points * SUPERSAMPLE).tolist()], fill=255)
    return np.asarray(large.reduce(SUPERSAMPLE), dtype=np.float32) / 255


def _shadow(canvas: np.ndarray, cover: np.ndarray, rng: np.random.Generator, unit: int) -> None:
    """Darken the canvas under the object, shifted by a few pixels (at the borders the cover's edge is repeated)."""
    reach = math.ceil(0.04 * unit)
    down, right = reach + np.rint(rng.uniform(-0.04, 0.04, 2) * unit).astype(int)
    moved = np.pad(cover, reach, mode="edge")[down : down + cover.shape[0], right : right + cover.shape[1]]
    canvas *= 1 - rng.uniform(0.2, 0.5) * moved[..., None]


def _distractor(canvas: np.ndarray, rng: np.random.Generator, unit: int, scale: float = 1.0) -> None:
    """Paint one small plain shape of any kind, or a bar, anywhere."""
    size = canvas.shape[:2]
    centre = rng.uniform(0, size[1]), rng.uniform(0, size[0])
    kind = DISTRACTORS[rng.integers(len(DISTRACTORS))]
    if kind == "bar":
        bar = np.array([[-3.0, -0.25], [3.0, -0.25], [3.0, 0.25], [-3.0, 0.25]])
        outline = bar @ _rotation(rng.uniform(0, math.pi)).T
    else:
        outline = _outline(kind, rng)
    cover = _cover(outline * (scale * unit * rng.uniform(0.04, 0.12)) + centre, size)[..., None]
    canvas += cover * rng.uniform(0.7, 1.0) * (_ink(rng) - canvas)


def _light(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """(H, W) float32 factor: a linear light gradient times an exposure."""
    u, _ = _axes(size, rng.uniform(0, 2 * math.pi))
    ramp = (u - u.min()) / (u.max() - u.min())
    return (rng.uniform(0.8, 1.1) * (1 - rng.uniform(0, 0.35) * ramp)).astype(np.float32)


def _write(job: tuple[str, int, str, int]) -> int:
    """Draw and save one image; returns its bytes."""
    folder, seed, split, index = job
    drawn, label = picture(seed, split, index)
    path = Path(folder, split, CLASSES[label], f"{split}_{index:05d}.jpg")
    Image.fromarray(drawn.rgb).save(path, quality=JPEG_QUALITY, subsampling=0)
    return path.stat().st_size


def _jobs(folder: Path, seed: int, counts: dict[str, int]) -> Iterator[tuple[str, int, str, int]]:
    for split, count in counts.items():
        for name in CLASSES:
            (folder / split / name).mkdir(parents=True)
        yield from ((str(folder), seed, split, index) for index in range(count))


def write_images(out: str | Path, seed: int = 0, train: int = 1200, val: int = 480, workers: int = 0) -> dict[str, int]:
    """Write out/{train,val}/<class>/<split>_<number>.jpg, all or nothing; workers 0 = one per core.

    Returns counts and bytes. The bytes depend on `seed` and the library versions, never on `workers`.
    """
    workers = workers or len(os.sched_getaffinity(0))
    with publish_folder(out, "demo-images") as folder:
        jobs = list(_jobs(folder, seed, {"train": train, "val": val}))
        if workers == 1:
            sizes = [_write(job) for job in jobs]
        else:
            with multiprocessing.get_context("spawn").Pool(workers) as pool:
                sizes = pool.map(_write, jobs, chunksize=16)
        write_json(folder / "demo-images.json", {"seed": seed, "train": train, "val": val})
    return {"images": len(jobs), "bytes": sum(sizes), "classes": len(CLASSES)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m demo.images", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write, e.g. demo/assets/images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=int, default=1200, help="images of the train split")
    parser.add_argument("--val", type=int, default=480, help="images of the val split")
    parser.add_argument("--workers", type=int, default=0, help="processes, 0 = one per core")
    args = parser.parse_args(argv)
    done = write_images(args.out, args.seed, args.train, args.val, args.workers)
    summary = f"{done['images']} images of {done['classes']} classes, {done['bytes'] / 1e6:.1f} MB, seed {args.seed}"
    print(f"{args.out}: {summary}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

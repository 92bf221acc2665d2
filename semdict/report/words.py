"""Gallery of words: for entries of the discriminative codebook, the image patches that are assigned to them.

Patches are cut from the same crops that were encoded, out of an even sample of the images.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from semdict.pipeline.common.errors import SemdictError
from semdict.report.parts import Picture
from semdict.report.pictures import Pictures
from semdict.report.results import Results

if TYPE_CHECKING:
    from collections.abc import Callable

    from PIL import Image

    from semdict.pipeline.shards import TokenShards

IMAGES = 400  # of the sample
WORDS = 24  # in the gallery
PATCHES = (4, 2)  # of a word, columns and rows
MARGIN = 1  # cells around the patch that are shown with it
TILE = 72  # pixels a side of a shown patch


@dataclass(frozen=True)
class Word:
    """An entry of the codebook, its share of all tokens, and (image of the sample, cell) of its patches."""

    id: int
    share: float
    patches: list[tuple[int, int]]


def gallery(results: Results, shards: "TokenShards", pictures: Pictures) -> tuple[list[Picture], str]:
    """A picture per word, and why there is none where there is none (the images are not on this machine)."""
    if shards.disc is None or len(shards.grid) != 2:
        return [], ""
    try:
        crop_of = crops(results, shards)
        rows = sample_rows(shards.status[:], IMAGES)
        sample = shards.disc[rows][:, 0].astype(np.int64)
        words = spread(sample, shards.counts["disc"], WORDS, PATCHES[0] * PATCHES[1])
        wanted = sorted({image for word in words for image, _ in word.patches})
        pixels = {image: crop_of(int(rows[image])) for image in wanted}
    except (SemdictError, OSError) as error:
        return [], f"No patches of words: {error}"
    tiles = [pictures.image(contact(word, pixels, shards.grid), caption(word), "word") for word in words]
    return [tile for tile in tiles if tile is not None], ""


def crops(results: Results, shards: "TokenShards") -> "Callable[[int], np.ndarray]":
    """Row -> its first view as it was encoded, (S, S, 3) uint8; SemdictError where manifest or images are others."""
    import os

    from semdict.pipeline.common.errors import UsageError
    from semdict.pipeline.config import paths
    from semdict.pipeline.config.params import load_params
    from semdict.pipeline.images.batches import CropRecipe, load_crop
    from semdict.pipeline.manifest.table import load_manifest

    params = load_params(results.root / "params.yaml")
    if params.preset != results.preset:
        raise UsageError(f"params.yaml is of preset {params.preset}; the images of {results.preset} are not known here")
    recipe = CropRecipe.of(params.pixels, params.encode.views, params.encode.seed)
    if recipe.identity()["crop"] != shards.recipe.get("crop"):
        raise UsageError("section pixels of params.yaml describes other crops than those that were encoded")
    manifest = load_manifest(results.root / paths.manifest(results.preset))
    if len(manifest) != len(shards):
        raise UsageError(f"the manifest has {len(manifest)} rows, the token set {len(shards)}")
    images = {split: os.path.join(results.root, pattern) for split, pattern in params.manifest.images.items()}  # noqa: PTH118
    reader = manifest.reader(images)
    return lambda row: load_crop(reader, manifest, row, recipe)[0][0]


def sample_rows(status: np.ndarray, size: int) -> np.ndarray:
    """At most `size` rows of status 0, evenly spread, ascending."""
    good = np.flatnonzero(status == 0)
    return good[np.unique(np.linspace(0, len(good) - 1, min(size, len(good))).astype(int))]


def spread(sample_BL: np.ndarray, counts_K: np.ndarray, words: int, patches: int) -> list[Word]:
    """Words from the most to the least frequent, evenly spread over those with `patches` images in the sample.

    Where fewer than `words` have that many, those with fewer images fill up, most images first. One patch per image:
    the middle one of the cells that hold the word.
    """
    images_of: dict[int, list[int]] = {}
    for image, cells in enumerate(sample_BL):
        for word in np.unique(cells):
            images_of.setdefault(int(word), []).append(image)
    by_images = sorted(images_of, key=lambda word: (-len(images_of[word]), word))
    rich = [word for word in by_images if len(images_of[word]) >= patches]
    pool = rich if len(rich) >= words else by_images[:words]
    pool.sort(key=lambda word: (-counts_K[word], word))
    selected = [pool[i] for i in np.unique(np.linspace(0, len(pool) - 1, min(words, len(pool))).astype(int))]
    total = max(1, int(counts_K.sum()))
    return [
        Word(word, counts_K[word] / total, patches_of(sample_BL, word, evenly(images_of[word], patches)))
        for word in selected
    ]


def patches_of(sample_BL: np.ndarray, word: int, images: list[int]) -> list[tuple[int, int]]:
    """(image, cell) of the word in each image."""
    cells = [np.flatnonzero(sample_BL[image] == word) for image in images]
    return [(image, int(with_word[len(with_word) // 2])) for image, with_word in zip(images, cells, strict=True)]


def evenly(values: list[int], count: int) -> list[int]:
    """At most `count` of the values, evenly spaced."""
    return [values[i] for i in np.unique(np.linspace(0, len(values) - 1, min(count, len(values))).astype(int))]


def contact(word: Word, pixels: dict[int, np.ndarray], grid: tuple[int, ...]) -> "Image.Image":
    """The word's patches side by side, each framed inside its neighbouring cells."""
    from PIL import Image, ImageDraw

    columns, rows = PATCHES
    sheet = Image.new("RGB", (columns * (TILE + 3) - 3, rows * (TILE + 3) - 3), "white")
    for number, (image, cell) in enumerate(word.patches):
        crop = pixels[image]
        side = crop.shape[0] // grid[0]
        window = side * (2 * MARGIN + 1)
        top, left = (cell // grid[1]) * side, (cell % grid[1]) * side
        above, before = (min(max(0, at - MARGIN * side), crop.shape[0] - window) for at in (top, left))
        tile = Image.fromarray(crop[above : above + window, before : before + window])
        tile = tile.resize((TILE, TILE), Image.Resampling.LANCZOS)
        scale = TILE / window
        box = [round((left - before) * scale), round((top - above) * scale)]
        box += [round((left - before + side) * scale) - 1, round((top - above + side) * scale) - 1]
        ImageDraw.Draw(tile).rectangle(box, outline="white", width=2)
        ImageDraw.Draw(tile).rectangle([box[0] - 1, box[1] - 1, box[2] + 1, box[3] + 1], outline="black")
        sheet.paste(tile, ((number % columns) * (TILE + 3), (number // columns) * (TILE + 3)))
    return sheet


def caption(word: Word) -> str:
    """ "word 17: 1.3 % of the tokens"."""
    return f"word {word.id}: {word.share:.2%} of the tokens"

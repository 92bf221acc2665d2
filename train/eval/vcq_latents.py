"""One pass of a tokenizer over the images of some splits: codes, latents before quantization, pixels both ways.

N images, L positions, D code width. Everything large is memory-mapped in a folder that the caller removes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from semdict.pipeline.common.device import to_device
from semdict.pipeline.common.errors import ManifestError
from semdict.train.data.tokens import class_names
from semdict.train.engine.loop import DTYPES
from semdict.train.eval.image_sets import ImageSet
from semdict.train.vcq.tokenizer import Tokenizer1d

if TYPE_CHECKING:
    from semdict.pipeline.config.schema import Params
    from semdict.pipeline.images.batches import CropRecipe
    from semdict.pipeline.manifest.table import Manifest


@dataclass
class Latents:
    """What the tokenizer makes of N images: ids (N, L) uint16, z (N, L, D) float16, rows of the manifest, labels (N,).

    names: of the classes, by label. z is what the search compares with the codes. copies: (N, H, W, 3) uint8
    reconstructions, where they were asked for.
    """

    ids: np.ndarray
    z: np.ndarray
    rows: np.ndarray
    labels: np.ndarray
    names: list[str]
    copies: np.ndarray | None = None


class Pictures(ImageSet):
    """Images by number from an array (N, H, W, 3) uint8."""

    def __init__(self, pixels: np.ndarray, about: dict) -> None:
        self.pixels, self.about = pixels, {"images": len(pixels), **about}

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, number: int) -> Tensor:
        return torch.from_numpy(self.pixels[number].copy()).permute(2, 0, 1)


class Originals(ImageSet):
    """The crops of manifest rows that the tokenizer saw, decoded again."""

    def __init__(self, place: "Place", rows: np.ndarray) -> None:
        self.place, self.rows = place, rows
        self.about = {"images": len(rows), "manifest_sha256": place.manifest.sha256, "crop": place.recipe.crop}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Tensor:
        return torch.from_numpy(self.pixels(number)).permute(2, 0, 1)

    def pixels(self, number: int) -> np.ndarray:
        """(H, W, 3) uint8."""
        from semdict.pipeline.images.batches import load_crop

        place = self.place
        return load_crop(place.reader, place.manifest, int(self.rows[number]), place.recipe)[0][0].copy()


@dataclass
class Place:
    """Where images come from, and how they are cropped: centre view, as section pixels says."""

    manifest: "Manifest"
    reader: object
    recipe: "CropRecipe"

    @classmethod
    def of(cls, path: Path, params: "Params") -> "Place":
        """The manifest's images as params.yaml describes them."""
        from semdict.pipeline.images.batches import CropRecipe
        from semdict.pipeline.images.crops import expand_views
        from semdict.pipeline.manifest.table import load_manifest

        manifest, pixels = load_manifest(path), params.pixels
        recipe = CropRecipe(pixels.crop, tuple(expand_views(["centre"])), pixels.decoder, pixels.max_pixels, 0)
        return cls(manifest, manifest.reader(params.manifest.images), recipe)

    def rows(self, splits: list[str]) -> np.ndarray:
        """Usable rows; ManifestError when there are none."""
        rows = self.manifest.rows_of(splits)
        good = np.sort(rows[self.manifest.status[rows] == 0])
        if not len(good):
            raise ManifestError(f"the manifest has no usable image in {', '.join(splits)}")
        return good

    def stream(self, rows: np.ndarray, batch: int, workers: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(rows (n,), crops (n, H, W, 3) uint8) of those that can be decoded, in order."""
        from semdict.pipeline.execute.store import Chunk
        from semdict.pipeline.images.batches import stream_batches

        runs = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1)
        chunks = [Chunk(i, int(run[0]), int(run[-1]) + 1) for i, run in enumerate(runs)]
        for found in stream_batches(self.reader, self.manifest, chunks, self.recipe, batch, workers):
            if len(found.rows):
                yield found.rows, found.pixels[:, 0]


def latents_of(
    model: Tokenizer1d, place: Place, splits: list[str], params: "Params", folder: Path, copies: bool = False
) -> Latents:
    """Encode every image of some splits, and decode it again where `copies`; files go to `folder`."""
    given, device = params.vcq_evaluate, model.codebook_sizes.device
    wanted, shape = place.rows(splits), (model.config.tokens, model.config.dim)
    name = "-".join(splits)
    ids = _array(folder / f"{name}-ids.npy", np.uint16, (len(wanted), shape[0]))
    z = _array(folder / f"{name}-z.npy", np.float16, (len(wanted), *shape))
    side = model.config.image_size
    pictures = _array(folder / f"{name}-copies.npy", np.uint8, (len(wanted), side, side, 3)) if copies else None
    rows, n = np.empty(len(wanted), np.int64), 0
    for found, pixels in place.stream(wanted, given.batch, params.runtime.workers):
        here = slice(n, n + len(found))
        ids[here], z[here], back = _pass(model, to_device(pixels, device), given.precision, copies)
        rows[here], n = found, here.stop
        if pictures is not None:
            pictures[here] = back
    labels = place.manifest.label[rows[:n]].astype(np.int64)
    names = class_names(labels, None, place.manifest.classes)
    return Latents(ids[:n], z[:n], rows[:n], labels, names, None if pictures is None else pictures[:n])


@torch.inference_mode()
def _pass(
    model: Tokenizer1d, images: Tensor, precision: str, copies: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """ids (B, L), z (B, L, D) and, where asked for, reconstructions (B, H, W, 3) uint8 of one batch."""
    from semdict.pipeline.images.visualize import to_uint8

    with torch.autocast(images.device.type, DTYPES[precision], enabled=precision != "float32"):
        z_BLD = model.features(images)
        ids_BL = model.quantizer.search(z_BLD)
        back = to_uint8(model.decode(ids_BL)) if copies else None
    return ids_BL.cpu().numpy(), z_BLD.cpu().numpy(), back


def _array(path: Path, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    return np.lib.format.open_memmap(path, "w+", dtype, shape)

"""One pass of a VCQ tokenizer over the images of some splits: ids, latents before quantization, reconstructions.

N images, B of a batch, L positions, D code width, H, W pixels. Large arrays are memory-mapped in a folder that the
caller removes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from semdict.pipeline.common.device import DTYPES, to_device
from semdict.pipeline.common.errors import ManifestError
from semdict.train.data.resident import class_names
from semdict.train.eval.image_sets import ImageSet
from semdict.train.vcq.tokenizer import Tokenizer1d

if TYPE_CHECKING:
    from semdict.pipeline.config.schema import Params
    from semdict.pipeline.images.batches import CropRecipe, Source
    from semdict.pipeline.manifest.table import Manifest


@dataclass
class Latents:
    """The tokenizer's output for N images: ids (N, L) unsigned, z (N, L, D) float16, rows of the manifest, labels (N,).

    z is compared with the codes in the search for the nearest. names: of the classes, by label. reconstructions:
    (N, H, W, 3) uint8 or None.
    """

    ids: np.ndarray
    z: np.ndarray
    rows: np.ndarray
    labels: np.ndarray
    names: list[str]
    reconstructions: np.ndarray | None = None


@dataclass
class CroppedImages:
    """A manifest's images in the centre view of section pixels, as the tokenizer is trained on."""

    manifest: "Manifest"
    reader: "Source"
    recipe: "CropRecipe"

    @classmethod
    def of(cls, path: Path, params: "Params") -> "CroppedImages":
        """The images of the manifest at `path` as params.yaml describes them."""
        from semdict.pipeline.images.batches import CropRecipe
        from semdict.pipeline.manifest.table import load_manifest

        manifest, recipe = load_manifest(path), CropRecipe.of(params.pixels, ["centre"])
        return cls(manifest, manifest.reader(params.manifest.images), recipe)

    def rows(self, splits: list[str]) -> np.ndarray:
        """Usable rows of some splits; ManifestError when there are none."""
        rows = self.manifest.rows_of(splits)
        good = np.sort(rows[self.manifest.status[rows] == 0])
        if not len(good):
            raise ManifestError(f"the manifest has no usable image in {', '.join(splits)}")
        return good

    def pixels(self, row: int) -> np.ndarray:
        """(H, W, 3) uint8 of one row."""
        from semdict.pipeline.images.batches import load_crop

        return load_crop(self.reader, self.manifest, row, self.recipe)[0][0].copy()

    def batches(self, rows: np.ndarray, size: int, workers: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(rows (B,), crops (B, H, W, 3) uint8) of the rows that can be decoded, in order."""
        from semdict.pipeline.execute.store import Chunk
        from semdict.pipeline.images.batches import stream_batches

        runs = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1)
        chunks = [Chunk(i, int(run[0]), int(run[-1]) + 1) for i, run in enumerate(runs)]
        for batch in stream_batches(self.reader, self.manifest, chunks, self.recipe, size, workers):
            if len(batch.rows):
                yield batch.rows, batch.pixels[:, 0]


class Originals(ImageSet):
    """Crops of manifest rows, decoded again when they are read."""

    def __init__(self, images: CroppedImages, rows: np.ndarray) -> None:
        super().__init__()
        self.images, self.rows = images, rows
        self.origin = {"manifest_sha256": images.manifest.sha256, "crop": images.recipe.crop.name}

    def __len__(self) -> int:
        return len(self.rows)

    def pixels(self, number: int) -> np.ndarray:
        """(H, W, 3) uint8."""
        return self.images.pixels(int(self.rows[number]))


def latents_of(
    model: Tokenizer1d, images: CroppedImages, splits: list[str], params: "Params", folder: Path,
    reconstruct: bool = False,
) -> Latents:  # fmt: skip
    """Encode every image of some splits and, with `reconstruct`, decode it again; arrays are files in `folder`."""
    from semdict.pipeline.shards.ids import id_dtype

    cfg, device = params.vcq_evaluate, model.codebook_sizes.device
    folder.mkdir()
    rows, length, side = images.rows(splits), model.config.tokens, model.config.image_size
    arrays = {
        "ids": _array(folder / "ids.npy", id_dtype(model.config.k_max), (len(rows), length)),
        "z": _array(folder / "z.npy", np.float16, (len(rows), length, model.config.dim)),
    }
    if reconstruct:
        arrays["reconstructions"] = _array(folder / "reconstructions.npy", np.uint8, (len(rows), side, side, 3))
    good, n = np.empty(len(rows), np.int64), 0
    for batch_rows, pixels in images.batches(rows, cfg.batch, params.runtime.workers):
        part = slice(n, n + len(batch_rows))
        for name, values in _encode(model, to_device(pixels, device), cfg.precision, reconstruct).items():
            arrays[name][part] = values
        good[part], n = batch_rows, part.stop
    labels = images.manifest.label[good[:n]].astype(np.int64)
    names = class_names(labels, None, images.manifest.classes)
    return Latents(rows=good[:n], labels=labels, names=names, **{name: array[:n] for name, array in arrays.items()})


@torch.inference_mode()
def _encode(model: Tokenizer1d, images: Tensor, precision: str, reconstruct: bool) -> dict[str, np.ndarray]:
    """ids (B, L), z (B, L, D) and, with `reconstruct`, reconstructions (B, H, W, 3) uint8 of one batch."""
    from semdict.pipeline.images.visualize import to_uint8

    with torch.autocast(images.device.type, DTYPES[precision], enabled=precision != "float32"):
        z_BLD = model.features(images)
        ids_BL = model.quantizer.search(z_BLD)
        result = {"reconstructions": to_uint8(model.decode(ids_BL))} if reconstruct else {}
    return {"ids": ids_BL.cpu().numpy(), "z": z_BLD.cpu().numpy(), **result}


def _array(path: Path, dtype: np.dtype | type, shape: tuple[int, ...]) -> np.ndarray:
    return np.lib.format.open_memmap(path, "w+", dtype, shape)

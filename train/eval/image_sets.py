"""Sets of images to score: a folder of PNGs, an .npz of samples, an array, or a split of a manifest.

B images of a batch, H, W height and width in pixels.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from semdict.pipeline.common.errors import ManifestError, SemdictError, UsageError
from semdict.pipeline.common.files import is_foreign, sha256_file, sha256_json
from semdict.pipeline.common.safeload import check_npz_size

if TYPE_CHECKING:
    from semdict.pipeline.config.schema import Params

Crop = Callable[[bytes, int], np.ndarray]  # (encoded image, max_pixels) -> (H, W, 3) uint8
GENERATOR_FILES = ("generate.json", "sampling.json")  # what `semdict generate` and `semdict ar sample` write
LOSSY = (".jpg", ".jpeg", ".webp")


class ImageSet:
    """N images of one size by number. `origin` describes the set in score files.

    left_out: number -> reason of the images that `batches` could not decode.
    """

    origin: dict[str, Any]

    def __init__(self) -> None:
        self.left_out: dict[int, str] = {}

    def __len__(self) -> int:
        raise NotImplementedError

    def name(self, number: int) -> str:
        """For messages."""
        return f"image {number}"

    def pixels(self, number: int) -> np.ndarray:
        """(H, W, 3) uint8; BadImage where a manifest's image cannot be decoded."""
        raise NotImplementedError

    @property
    def kept(self) -> list[int]:
        """Numbers of the images that are not left out."""
        return [number for number in range(len(self)) if number not in self.left_out]

    @property
    def about(self) -> dict[str, Any]:
        """For score files: origin, number of images without those left out, and the first five of these."""
        about = {**self.origin, "images": len(self) - len(self.left_out)}
        if self.left_out:
            first = {self.name(number): reason for number, reason in list(self.left_out.items())[:5]}
            about |= {"left_out": len(self.left_out), "left_out_first": first}
        return about

    def batches(self, size: int, count: int | None = None) -> Iterator[tuple[list[int], Tensor]]:
        """(numbers, images (B, 3, H, W) uint8) of the first `count` images (None = all) in order, decoded ahead.

        Images that cannot be decoded are entered in `left_out`. UsageError when the set is empty or an image has
        another size than the first one; ManifestError when no image can be decoded.
        """
        from semdict.pipeline.images.batches import good_or_bad, load_ahead
        from semdict.pipeline.images.decode import BadImage

        count = len(self) if count is None else min(count, len(self))
        if not count:
            raise UsageError(f"{self.origin.get('from', 'the set')} holds no images")
        self.left_out, first = {}, None
        parts = (range(start, min(start + size, count)) for start in range(0, count, size))
        for batch in load_ahead(parts, lambda number: (number, good_or_bad(self.pixels, number))):
            self.left_out |= {number: image.reason for number, image in batch if isinstance(image, BadImage)}
            good = [(number, image) for number, image in batch if number not in self.left_out]
            if good:
                first = first or (good[0][0], good[0][1].shape)
                self._check_sizes(good, *first)
                numbers, images = zip(*good, strict=True)
                yield list(numbers), torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        if first is None:
            number, reason = next(iter(self.left_out.items()))
            raise ManifestError(f"none of {count} images can be decoded; the first is {self.name(number)}: {reason}")

    def _check_sizes(self, images: list[tuple[int, np.ndarray]], first: int, shape: tuple[int, ...]) -> None:
        for number, image in images:
            if image.shape != shape:
                raise UsageError(
                    f"{self.name(first)} has {shape[1]} x {shape[0]} pixels, {self.name(number)} has "
                    f"{image.shape[1]} x {image.shape[0]}: images of one set must have one size"
                )


class PngFolder(ImageSet):
    """The PNG files of a folder (of its `images/` where there is one), by name; lossy files are refused."""

    def __init__(self, path: Path, max_pixels: int) -> None:
        super().__init__()
        folder = path / "images" if (path / "images").is_dir() else path
        files = sorted(p for p in folder.iterdir() if p.is_file() and not is_foreign(p.name))
        lossy = [p for p in files if p.suffix.lower() in LOSSY]
        if lossy:
            raise UsageError(f"{lossy[0]}: scores of lossy files are not comparable; save samples as PNG")
        self.files, self.max_pixels = [p for p in files if p.suffix.lower() == ".png"], max_pixels
        if not self.files:
            raise UsageError(f"{folder} holds no PNG files")
        names = sha256_json([[p.name, p.stat().st_size] for p in self.files])
        self.origin = {"from": str(path), "listing_sha256": names, **generator_settings(path)}

    def __len__(self) -> int:
        return len(self.files)

    def name(self, number: int) -> str:
        """The file."""
        return str(self.files[number])

    def pixels(self, number: int) -> np.ndarray:
        """(H, W, 3) uint8; SemdictError where a file is damaged, since a sample must not be left out of a score."""
        from semdict.pipeline.images.decode import BadImage, DecodeSpec, decode

        try:
            return decode(self.files[number].read_bytes(), DecodeSpec("pillow", self.max_pixels))
        except BadImage as error:
            raise SemdictError(
                f"{self.files[number]} cannot be decoded ({error.reason}); make the images of this folder again"
            ) from None


class ArrayImages(ImageSet):
    """Images from an array (N, H, W, 3) uint8."""

    def __init__(self, images_NHW3: np.ndarray, origin: dict[str, Any]) -> None:
        super().__init__()
        self.images_NHW3, self.origin = images_NHW3, origin

    def __len__(self) -> int:
        return len(self.images_NHW3)

    def pixels(self, number: int) -> np.ndarray:
        """(H, W, 3) uint8."""
        return self.images_NHW3[number]


class ManifestSplit(ImageSet):
    """The good images of a split, cropped; `limit` > 0 takes that many, evenly.

    crop: encoded bytes -> pixels; None = as section pixels of params.yaml says.
    """

    def __init__(self, path: Path, params: "Params", split: str, limit: int = 0, crop: Crop | None = None) -> None:
        from semdict.pipeline.images.batches import CropRecipe
        from semdict.pipeline.manifest.table import load_manifest

        super().__init__()
        manifest = load_manifest(path)
        rows = manifest.rows_of([split])
        self.rows = rows[manifest.status[rows] == 0]
        if limit and limit < len(self.rows):
            self.rows = self.rows[np.linspace(0, len(self.rows) - 1, limit).astype(np.int64)]
        self.manifest, self.recipe = manifest, CropRecipe.of(params.pixels, ["centre"])
        self.reader, self.crop = manifest.reader(params.manifest.images), crop
        self.origin = {
            "from": str(path), "split": split, "manifest_sha256": manifest.sha256,
            "crop": crop.__name__ if crop else self.recipe.crop.name,
            "decoder": "pillow" if crop else self.recipe.identity()["decoder"],
        }  # fmt: skip

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, number: int) -> str:
        """The key in the manifest."""
        return self.manifest.key(int(self.rows[number]))

    def pixels(self, number: int) -> np.ndarray:
        """(H, W, 3) uint8; BadImage where the image cannot be decoded."""
        from semdict.pipeline.images.batches import load_crop

        row = int(self.rows[number])
        if self.crop is not None:
            return self.crop(self.reader.read(row), self.recipe.decoding.max_pixels)
        return load_crop(self.reader, self.manifest, row, self.recipe)[0][0]


def open_images(
    path: Path, params: "Params", split: str | None = None, limit: int = 0, crop: Crop | None = None
) -> ImageSet:
    """The image set at `path`, a folder, an .npz or a manifest.parquet; UsageError when it is none of them."""
    path = Path(path)
    if path.is_dir():
        return PngFolder(path, params.pixels.max_pixels)
    if not path.exists():
        raise UsageError(f"{path} does not exist; name a folder of PNGs, an .npz or a manifest.parquet")
    if path.suffix == ".npz":
        return open_npz(path)
    if path.suffix == ".parquet":
        return ManifestSplit(path, params, split or params.scores.split, limit, crop)
    raise UsageError(f"{path} is neither a folder of PNGs nor an .npz nor a manifest.parquet")


def open_npz(path: Path) -> ArrayImages:
    """`arr_0` (N, H, W, 3) uint8 of an .npz, the layout of ADM's sample batches."""
    images = read_npz(path, ("arr_0",))["arr_0"]
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        raise UsageError(f"{path}: arr_0 is {images.dtype} {images.shape}, expected uint8 (N, H, W, 3)")
    settings = generator_settings(path.parent) if path.name == "samples.npz" else {}
    return ArrayImages(images, {"from": str(path), "sha256": sha256_file(path), **settings})


def generator_settings(folder: Path) -> dict[str, Any]:
    """{"sampling": settings of the command that wrote the samples}; empty where the folder has no such file."""
    for name in GENERATOR_FILES:
        path = folder / name
        if path.is_file():
            try:
                return {"sampling": json.loads(path.read_text(encoding="utf-8"))}
            except ValueError as error:
                raise UsageError(f"{path} is damaged ({error}); sample again") from None
    return {}


def read_npz(path: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Arrays of an .npz by name, never a pickle; UsageError names what is missing or refused."""
    try:
        check_npz_size(path)
        with np.load(path, allow_pickle=False) as file:
            missing = [name for name in names if name not in file.files]
            if missing:
                raise UsageError(f"{path} holds {', '.join(file.files)}; {missing[0]} is missing")
            return {name: file[name] for name in names}
    except (ValueError, OSError, EOFError, BadZipFile, NotImplementedError) as error:
        raise UsageError(f"{path} cannot be read as plain arrays ({error}); nothing in it was executed") from None

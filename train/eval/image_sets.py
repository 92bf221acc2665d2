"""Sets of images as torch-fidelity takes them: a folder of PNGs, an .npz of samples, or a split of a manifest."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from semdict.pipeline.common.errors import SemdictError, UsageError
from semdict.pipeline.common.files import sha256_file, sha256_json

if TYPE_CHECKING:
    from semdict.pipeline.config.schema import Params

Crop = Callable[[bytes], np.ndarray]
CARDS = ("generate.json", "sampling.json")  # what a generator writes beside its samples
LOSSY = (".jpg", ".jpeg", ".webp")


class ImageSet(Dataset):
    """N images, each (3, H, W) uint8 by number; `about` says what they are."""

    about: dict[str, Any]

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, number: int) -> Tensor:
        raise NotImplementedError


class Folder(ImageSet):
    """The PNG files of a folder (of its `images/` where there is one), by name; lossy files are refused."""

    def __init__(self, path: Path) -> None:
        inner = path / "images" if (path / "images").is_dir() else path
        found = sorted(p for p in inner.iterdir() if p.is_file())
        lossy = [p for p in found if p.suffix.lower() in LOSSY]
        if lossy:
            raise UsageError(f"{lossy[0]}: scores of lossy files are not comparable; save samples as PNG")
        self.files = [p for p in found if p.suffix.lower() == ".png"]
        if not self.files:
            raise UsageError(f"{inner} holds no PNG files")
        names = sha256_json([[p.name, p.stat().st_size] for p in self.files])
        self.about = {"images": len(self.files), "from": str(path), "listing_sha256": names, **card(path)}

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> Tensor:
        from PIL import Image, UnidentifiedImageError

        try:
            pixels = np.asarray(Image.open(self.files[number]).convert("RGB"))
        except (UnidentifiedImageError, OSError) as error:
            raise SemdictError(f"{self.files[number]} is no image: {error}") from None
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


class Arrays(ImageSet):
    """`arr_0` (N, H, W, 3) uint8 of an .npz, the layout of ADM's sample batches."""

    def __init__(self, path: Path) -> None:
        arrays = read_npz(path, ("arr_0",))
        self.pixels = arrays["arr_0"]
        if self.pixels.ndim != 4 or self.pixels.shape[-1] != 3 or self.pixels.dtype != np.uint8:
            raise UsageError(f"{path}: arr_0 is {self.pixels.dtype} {self.pixels.shape}, expected uint8 (N, H, W, 3)")
        folder = card(path.parent) if path.name == "samples.npz" else {}
        self.about = {"images": len(self.pixels), "from": str(path), "sha256": sha256_file(path), **folder}

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, number: int) -> Tensor:
        return torch.from_numpy(self.pixels[number].copy()).permute(2, 0, 1)


class ManifestSplit(ImageSet):
    """The good images of a split; `limit` > 0 takes that many, evenly.

    crop: encoded bytes -> (H, W, 3) uint8; None = as section pixels of params.yaml says.
    """

    def __init__(self, path: Path, params: "Params", split: str, limit: int = 0, crop: Crop | None = None) -> None:
        from semdict.pipeline.images.crops import expand_views
        from semdict.pipeline.images.decode import decoder_identity
        from semdict.pipeline.manifest.table import load_manifest

        manifest = load_manifest(path)
        rows = manifest.rows_of([split])
        self.rows = rows[manifest.status[rows] == 0]
        if limit and limit < len(self.rows):
            self.rows = self.rows[np.linspace(0, len(self.rows) - 1, limit).astype(np.int64)]
        self.manifest, self.pixels, self.views = manifest, params.pixels, expand_views(["centre"])
        self.reader, self.crop = manifest.reader(params.manifest.images), crop
        self.about = {
            "images": len(self.rows), "from": str(path), "split": split, "manifest_sha256": manifest.sha256,
            "crop": crop.__name__ if crop else params.pixels.crop,
            "decoder": "pillow" if crop else decoder_identity(params.pixels.decoder),
        }  # fmt: skip

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Tensor:
        from semdict.pipeline.images.crops import crop_views
        from semdict.pipeline.images.decode import decode

        row = int(self.rows[number])
        if self.crop is not None:
            return torch.from_numpy(self.crop(self.reader.read(row)).copy()).permute(2, 0, 1)
        rgb = decode(self.reader.read(row), self.pixels.decoder, self.pixels.max_pixels)
        cropped, _ = crop_views(rgb, self.pixels.crop, list(self.views), self.manifest.key(row), 0)
        return torch.from_numpy(cropped[0].copy()).permute(2, 0, 1)


def open_images(
    path: Path, params: "Params", split: str | None = None, limit: int = 0, crop: Crop | None = None
) -> ImageSet:
    """Whatever `path` is: a folder, an .npz, or manifest.parquet; UsageError when it is none of them."""
    path = Path(path)
    if path.is_dir():
        return Folder(path)
    if not path.exists():
        raise UsageError(f"{path} does not exist; name a folder of PNGs, an .npz or a manifest.parquet")
    if path.suffix == ".npz":
        return Arrays(path)
    if path.suffix == ".parquet":
        return ManifestSplit(path, params, split or params.scores.split, limit, crop)
    raise UsageError(f"{path} is neither a folder of PNGs nor an .npz nor a manifest.parquet")


def card(folder: Path) -> dict[str, Any]:
    """What the generator says of its samples, as {"sampling": ...}; empty where it says nothing."""
    for name in CARDS:
        if (Path(folder) / name).is_file():
            return {"sampling": json.loads((Path(folder) / name).read_text())}
    return {}


def read_npz(path: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Arrays of an .npz by name, never a pickle; UsageError names what is missing or refused."""
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [name for name in names if name not in file.files]
            if missing:
                raise UsageError(f"{path} holds {', '.join(file.files)}; {missing[0]} is missing")
            return {name: file[name] for name in names}
    except (ValueError, OSError, EOFError) as error:
        raise UsageError(f"{path} cannot be read as plain arrays ({error}); nothing in it was executed") from None

"""Training images: batches of randomly cropped or augmented images, decoded ahead of their use."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from semdict.pipeline.common.errors import ManifestError, UsageError
from semdict.train.data.loader import Resumable, epoch_order, share_of
from semdict.train.engine.loop import Batch
from semdict.train.engine.rng import Stream, stream_key

if TYPE_CHECKING:
    from PIL.Image import Image

    from semdict.pipeline.images.decode import DecodeSpec
    from semdict.pipeline.manifest.table import Manifest


class Augmentation(Protocol):
    """Random views of an image: they depend on the image, epoch, row and the augmentation's own seed alone."""

    size: int  # S, pixels

    def __call__(self, rgb_HW3: np.ndarray, epoch: int, row: int) -> np.ndarray:
        """(S, S, 3) uint8."""


@dataclass
class ImageRows:
    """Decoded images of some manifest rows; picklable, files are opened in the process that reads them."""

    manifest: "Manifest"
    images: dict[str, str]  # split -> where its images are
    rows: np.ndarray  # (n,) int64
    decoding: "DecodeSpec"

    def __post_init__(self) -> None:
        self._reader: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reader": None}

    def load(self, row: int, size: int, crop: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """crop(pixels (H, W, 3) uint8) of a manifest row; BadImage where it cannot be decoded.

        size: pixels that `crop` resizes the shorter side to, for the estimate of memory.
        """
        from semdict.pipeline.images.decode import decoded

        if self._reader is None:
            self._reader = self.manifest.reader(self.images)
        with decoded(self._reader.read(row), self.decoding, size) as rgb_HW3:
            return crop(rgb_HW3)


def usable_rows(manifest: "Manifest", splits: list[str]) -> np.ndarray:
    """(n,) int64 manifest rows of the splits whose status is OK."""
    rows = manifest.rows_of(splits)
    return rows[manifest.status[rows] == 0]


@dataclass(frozen=True)
class RandomCrop:
    """Shorter side to `size` pixels (bicubic, antialias), a random size x size crop, a flip with probability 1/2.

    TiTok's training crop (arXiv:2406.07550).
    """

    size: int
    seed: int

    def __call__(self, rgb_HW3: np.ndarray, epoch: int, row: int) -> np.ndarray:
        image = resize_shorter_side(rgb_HW3, self.size)
        u = [
            (int(stream_key(self.seed, Stream.RANDOM_CROP, epoch, row, i)) >> 11) / 2**53 for i in range(3)
        ]  # in [0, 1)
        left, top = (min(int(u[i] * (side - self.size + 1)), side - self.size) for i, side in enumerate(image.size))
        pixels_SS3 = square(image, left, top, self.size)
        return np.ascontiguousarray(pixels_SS3[:, ::-1]) if u[2] < 0.5 else pixels_SS3


def centre_crops(images: ImageRows, size: int, n: int, workers: int = 0) -> np.ndarray:
    """(n, size, size, 3) uint8 centre crops of rows spread evenly over `images`, for measures and pictures.

    Resized as by RandomCrop. Fewer where there are fewer rows; BadImage if one of them cannot be decoded.
    """
    from semdict.pipeline.images.batches import load_ahead

    def centre(rgb_HW3: np.ndarray) -> np.ndarray:
        image = resize_shorter_side(rgb_HW3, size)
        return square(image, (image.width - size) // 2, (image.height - size) // 2, size)

    def load(row: int) -> np.ndarray:
        return images.load(row, size, centre)

    n = min(n, len(images.rows))
    rows = images.rows[np.linspace(0, len(images.rows) - 1, n).astype(np.int64)]
    return np.stack([crop for crops in load_ahead(rows[:, None].tolist(), load, workers) for crop in crops])


def resize_shorter_side(rgb_HW3: np.ndarray, size: int) -> "Image":
    """The image with its shorter side at `size` pixels, the longer one rounded to the nearest."""
    from PIL import Image

    image = Image.fromarray(rgb_HW3)
    scale = size / min(image.size)
    shape = (max(size, round(image.width * scale)), max(size, round(image.height * scale)))
    return image.resize(shape, Image.Resampling.BICUBIC)


def square(image: "Image", left: int, top: int, size: int) -> np.ndarray:
    """(size, size, 3) uint8 cut out of the image at (left, top)."""
    return np.asarray(image.crop((left, top, left + size, top + size)))


class ImageLoader(Resumable):
    """Endless shuffled batches of augmented images: this rank's rows of global batches of `batch` rows.

    Batches hold images (B, 3, S, S), label (B,) int64 (-1 = none) and row (B,) int64 on `device`. Images are uint8, or
    float32 in [0, 1] with channels last in memory if `floats`.

    Epoch e is a permutation of the rows drawn from (seed, e), cut into batches; the remainder that fills no batch is
    left out of that epoch. A resumed run and any number of ranks or workers see the same images. A row that cannot be
    decoded is replaced by the next one in the order; `replaced` counts such rows. Images are loaded by threads, or by
    `processes` where the augmentation draws from global generators.
    """

    error = ManifestError

    def __init__(
        self, images: ImageRows, augment: Augmentation, batch: int, seed: int, rank: int = 0, world: int = 1,
        device: torch.device | str = "cpu", workers: int = 0, processes: bool = False, floats: bool = False,
    ) -> None:  # fmt: skip
        self._share = share_of(batch, world)
        if batch > len(images.rows):
            raise UsageError(f"batch {batch} is larger than the training set ({len(images.rows)} images)")
        self.images, self.augment, self.batch, self.seed = images, augment, batch, seed
        self.rank, self.device, self.workers, self.processes = rank, torch.device(device), workers, processes
        self.floats = floats
        self.steps_per_epoch = len(images.rows) // batch
        self.recipe = images.manifest.sha256[:16]
        self.replaced: set[int] = set()  # manifest rows
        self._batches: Iterator | None = None  # in flight, from self._step on

    def __next__(self) -> Batch:
        if self._batches is None:
            self._batches = self._load_ahead()
        pixels_BSS3, rows, bad = next(self._batches)
        self._step += 1
        self.replaced.update(bad)
        if self.device.type == "cuda" and not pixels_BSS3.is_pinned():
            pixels_BSS3 = pixels_BSS3.pin_memory()
        images = pixels_BSS3.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        label = torch.from_numpy(self.images.manifest.label[rows].astype(np.int64))
        return {
            "images": images.float().div_(255) if self.floats else images.contiguous(),
            "label": label.to(self.device, non_blocking=True),
            "row": torch.from_numpy(rows).to(self.device, non_blocking=True),
        }

    def close(self) -> None:
        """End threads or processes; the next batch starts them again."""
        self._batches = None

    def identity(self) -> dict[str, Any]:
        return {"rows": len(self.images.rows), "batch": self.batch, "recipe": self.recipe}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "replaced": sorted(self.replaced)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.replaced = set(state.get("replaced", ()))
        self._batches = None

    def _load_ahead(self) -> Iterator[tuple[Tensor, np.ndarray, list[int]]]:
        from semdict.pipeline.images.batches import load_ahead

        load = _LoadAugmented(self.images, self.augment, self.seed)
        cuda = self.device.type == "cuda"
        return load_ahead(self._requests(self._step), load, self.workers, collate, self.processes, pin_memory=cuda)

    def _requests(self, step: int) -> Iterator[list[tuple[int, int]]]:
        """(epoch, position in its order) of this rank's rows in each step from `step` on."""
        while True:
            epoch, within = divmod(step, self.steps_per_epoch)
            first = within * self.batch + self.rank * self._share
            yield [(epoch, position) for position in range(first, first + self._share)]
            step += 1


@dataclass
class _LoadAugmented:
    """(epoch, position) -> augmented pixels (S, S, 3) uint8, their manifest row, and the bad rows that it replaces."""

    images: ImageRows
    augment: Augmentation
    seed: int

    def __call__(self, request: tuple[int, int]) -> tuple[np.ndarray, int, list[int]]:
        from semdict.pipeline.images.batches import first_good

        epoch, position = request
        rows = self.images.rows
        order = epoch_order(len(rows), self.seed, epoch)

        def load(at: int) -> np.ndarray:
            row = int(rows[at])
            return self.images.load(row, self.augment.size, lambda rgb_HW3: self.augment(rgb_HW3, epoch, row))

        pixels_SS3, tried = first_good(order, position, load)
        *bad, row = rows[order[tried]].tolist()
        return pixels_SS3, row, bad


def collate(loaded: list[tuple[np.ndarray, int, list[int]]]) -> tuple[Tensor, np.ndarray, list[int]]:
    """(pixels (B, S, S, 3) uint8, rows (B,) int64, replaced rows)."""
    pixels, rows, bad = zip(*loaded, strict=True)
    return torch.from_numpy(np.stack(pixels)), np.asarray(rows), [row for part in bad for row in part]

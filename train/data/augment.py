"""Augmented images for fine-tuning: timm's crop, flip and RandAugment in worker processes, all drawn from counters."""

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from semdict.pipeline.common.errors import ManifestError, UsageError
from semdict.train.data.tokens import even_share
from semdict.train.engine import rng as draws
from semdict.train.engine.batch import Batch

ORDER, AUGMENT = 41, 42  # streams of the seed
SIZE = 256  # pixels a side


@dataclass
class Augmented(Dataset):
    """(epoch, place in `rows`) -> (3, 256, 256) uint8, label, manifest row; the same whatever was drawn before.

    Random resized crop (bicubic), flip, RandAugment by timm's name ("" = none), filled with ImageNet's mean as timm
    does. timm draws from the process's global generators, which is why this runs in processes of its own. A row that
    cannot be decoded is replaced by the one that follows it.
    """

    manifest: str
    images: dict[str, str]
    rows: np.ndarray
    seed: int
    rand_augment: str
    crop_scale: tuple[float, float]
    decoder: str
    max_pixels: int

    def __post_init__(self) -> None:
        self._opened: tuple | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def __getitem__(self, place: tuple[int, int]) -> tuple[Tensor, int, int]:
        from PIL import Image

        from semdict.pipeline.images.decode import BadImage, decode

        manifest, reader, transform = self._open()
        epoch, at = place
        for offset in range(len(self.rows)):
            row = int(self.rows[(at + offset) % len(self.rows)])
            try:
                rgb = decode(reader.read(row), self.decoder, self.max_pixels)
            except BadImage:
                continue
            seed_all(int(draws.key(self.seed, AUGMENT, epoch, row)) >> 32)
            pixels = np.ascontiguousarray(transform(Image.fromarray(rgb)))
            return torch.from_numpy(pixels), int(manifest.label[row]), row
        raise ManifestError("none of the listed images can be decoded; run `dvc repro -f manifest`")

    def _open(self) -> tuple:
        """Manifest, reader and transform of this process."""
        if self._opened is None:
            from semdict.pipeline.manifest.stage import load_manifest

            manifest = load_manifest(self.manifest)
            transform = make_transform(self.rand_augment, self.crop_scale)
            self._opened = manifest, manifest.reader(self.images), transform
        return self._opened


def make_transform(rand_augment: str, crop_scale: tuple[float, float]) -> Callable[[Any], np.ndarray]:
    """PIL image -> (3, 256, 256) uint8, by timm."""
    from timm.data import auto_augment, create_transform

    transform = create_transform(
        SIZE, is_training=True, scale=crop_scale, color_jitter=None, interpolation="bicubic",
        auto_augment=rand_augment or None, re_prob=0.0, use_prefetcher=True,  # ends with uint8, CHW
    )  # fmt: skip
    for operation in (one for part in transform.transforms for one in getattr(part, "ops", ())):
        if operation.aug_fn is auto_augment.posterize:
            operation.aug_fn = posterize
    return transform


def posterize(image: Any, bits: int, **_: Any) -> Any:
    """timm's posterize; at full magnitude it asks for 0 bits, a black image, which Pillow no longer makes."""
    from PIL import Image
    from timm.data import auto_augment

    return auto_augment.posterize(image, bits) if bits else Image.new(image.mode, image.size)


def seed_all(seed: int) -> None:
    """Python's, NumPy's and torch's global generators of this process; `seed` below 2^32."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class AugmentedLoader:
    """Endless shuffled batches {"images": (B, 3, 256, 256) uint8, "label": (B,), "row": (B,)} of this rank's rows.

    Epoch e is a permutation drawn from (seed, e); the remainder that fills no batch is left out of it.
    """

    def __init__(
        self, images: Augmented, batch: int, recipe: str, rank: int = 0, world: int = 1,
        device: torch.device | str = "cpu", workers: int = 0,
    ) -> None:  # fmt: skip
        self._share = even_share(batch, world)
        if batch > len(images.rows):
            raise UsageError(f"batch {batch} is larger than the training set ({len(images.rows)} images)")
        self.images, self.batch, self.recipe, self.rank, self.device = images, batch, recipe, rank, torch.device(device)
        self.steps_per_epoch = len(images.rows) // batch
        self.workers = workers or os.cpu_count() or 1
        self._step, self._running = 0, None
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def __next__(self) -> Batch:
        if self._running is None:
            pinned = self.device.type == "cuda"
            places = Places(self, self._step)
            self._running = iter(
                DataLoader(self.images, batch_sampler=places, num_workers=self.workers, pin_memory=pinned)
            )
        pixels, label, row = next(self._running)
        self._step += 1
        there = {"images": pixels, "label": label, "row": row}
        return {name: value.to(self.device, non_blocking=True) for name, value in there.items()}

    def places(self, step: int) -> list[tuple[int, int]]:
        """(epoch, place) of this rank's rows in a step."""
        epoch, within = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, draws.shuffled(len(self.images.rows), self.images.seed, ORDER, epoch)
        first = within * self.batch + self.rank * self._share
        return [(epoch, int(at)) for at in self._order[first : first + self._share]]

    def close(self) -> None:
        """End the worker processes."""
        self._running = None

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it is a position in."""
        return {"step": self._step, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken; ManifestError when the images are others."""
        for name, mine in self._identity().items():
            if state.get(name) != mine:
                raise ManifestError(f"the checkpoint's loader has {name} {state.get(name)}, this run has {mine}")
        self._step, self._running = state["step"], None

    def _identity(self) -> dict[str, Any]:
        return {"rows": len(self.images.rows), "batch": self.batch, "recipe": self.recipe}


@dataclass
class Places:
    """Batches of places for a DataLoader, from a step on and without end."""

    loader: AugmentedLoader
    step: int

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        step = self.step
        while True:
            yield self.loader.places(step)
            step += 1

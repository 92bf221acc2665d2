"""Images shown to a frozen encoder through the VQGAN, cropped as the published probe crops them.

N labelled images, L grid cells, B rows of a batch, E feature width.
"""

import copy
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pipeline.device import reduced_precision, to_device
from pipeline.errors import ManifestError, UsageError
from train import draws
from train.eval.encoder import Encoder
from train.eval.sources import Shown, class_names

if TYPE_CHECKING:
    from pipeline.crops import ViewSpec
    from pipeline.vqgan import Vqgan

AHEAD = 3  # batches decoded before they are asked for
ORDER = 23  # stream of the seed


class ImageSource:
    """Images of some splits of a manifest, cropped by the protocol and tokenised by the VQGAN in float32.

    Its one cached view is the test crop. `random_crops` gives training batches. A row that cannot be decoded is bad.
    """

    def __init__(
        self, manifest: Path, images: dict[str, str], splits: list[str], crop: str, vqgan: "Vqgan", encoder: Encoder,
        device: torch.device, decoder: str, max_pixels: int, workers: int = 0, other_recipe: bool = False,
    ) -> None:  # fmt: skip
        from pipeline.crops import crop_identity, expand_views
        from pipeline.images import decoder_identity
        from pipeline.manifest import load_manifest

        self.manifest = load_manifest(manifest)
        rows = self.manifest.rows_of(splits) if splits else np.arange(len(self.manifest))
        good = rows[(self.manifest.status[rows] == 0) & (self.manifest.label[rows] >= 0)]
        if not len(good):
            raise ManifestError(f"{manifest}: no usable image with a label in {splits or 'any split'}")
        gen = {"gen": vqgan.identity}
        same = encoder.only("gen").check_tokens(
            Path("the VQGAN"), vqgan.codebook_size, vqgan.grid**2, gen, other_recipe
        )
        self.reader, self.vqgan, self.device = self.manifest.reader(images), vqgan, device
        self.rows, self.labels = good, self.manifest.label[good].astype(np.int64)
        self.names = class_names(self.labels, None, self.manifest.classes)
        self.crop, self.views, self.left_out = crop, [crop], len(rows) - len(good)
        self.decoder, self.max_pixels = decoder, max_pixels
        self.workers = workers or os.cpu_count() or 1
        view = expand_views(["centre"])
        self.identity = {"manifest": self.manifest.sha256, "splits": splits, "crop": crop_identity(crop, view, 0),
                         "decoder": decoder_identity(decoder), **gen}  # fmt: skip
        self.about = {"source": "images", "manifest": self.manifest.sha256[:16], "vqgan": vqgan.identity["sha256"],
                      "same_recipe_as_training": same, "splits": splits or ["all"], "images": len(good),
                      "left_out": self.left_out}  # fmt: skip

    def stream(self, view: str, batch: int) -> Iterator[Shown]:
        """The test crop of every image once, in order."""
        from pipeline.crops import ViewSpec

        if view != self.crop:
            raise ManifestError(f"there is no view {view!r}; images are shown as {self.crop}")
        starts = range(0, len(self.rows), batch)
        jobs = ([(int(row), ViewSpec("centre")) for row in self.rows[start : start + batch]] for start in starts)
        for start, crops in zip(starts, self.decoded(jobs), strict=True):
            bad = tuple(i for i, pixels in enumerate(crops) if pixels is None)
            yield Shown(
                start, self.tokenise([np.zeros((256, 256, 3), np.uint8) if p is None else p for p in crops]), bad
            )

    def random_crops(self, epoch: int, batch: int, steps: int, seed: int) -> Iterator[tuple[Tensor, np.ndarray]]:
        """Shuffled (tokens (B, L), positions (B,)) of an epoch: one random resized crop and flip each, new every epoch.

        Everything is drawn from (seed, epoch, row). An image that cannot be decoded is replaced by the next one.
        """
        from pipeline.crops import ViewSpec

        order = draws.shuffled(len(self.rows), seed, ORDER, epoch)
        spec = ViewSpec("random", epoch)
        taken = [order[start : start + batch] for start in range(0, steps * batch, batch)]
        jobs = ([(int(self.rows[i]), spec) for i in chosen] for chosen in taken)
        for number, crops in enumerate(self.decoded(jobs, seed)):
            at = taken[number].copy()
            for i, pixels in enumerate(crops):
                if pixels is None:
                    crops[i], at[i] = self._next_good(order, number * batch + i, spec, seed)
            yield self.tokenise(crops), at

    def decoded(self, jobs: Iterable[list[tuple[int, "ViewSpec"]]], seed: int = 0) -> Iterator[list[np.ndarray | None]]:
        """(256, 256, 3) uint8 crops of each batch of (manifest row, view), a few batches ahead; None = bad."""
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="decode")
        try:
            waiting: deque = deque()
            for job in jobs:
                waiting.append([pool.submit(self._crop, row, spec, seed) for row, spec in job])
                if len(waiting) >= AHEAD:
                    yield [future.result() for future in waiting.popleft()]
            while waiting:
                yield [future.result() for future in waiting.popleft()]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def narrowed(self, at: np.ndarray) -> "ImageSource":
        """The same source with only the images `at`, in that order."""
        fewer = copy.copy(self)
        fewer.rows, fewer.labels = self.rows[at], self.labels[at]
        return fewer

    @torch.no_grad()
    def tokenise(self, crops: list[np.ndarray]) -> Tensor:
        """(B, L) int64 codes of (256, 256, 3) uint8 crops; float32, since other precisions change codes."""
        with reduced_precision(self.device, "float32"):
            return self.vqgan.encode(to_device(np.stack(crops), self.device))

    def _crop(self, row: int, spec: "ViewSpec", seed: int) -> np.ndarray | None:
        from pipeline.flow import CropRecipe, load_crop
        from pipeline.images import BadImage

        recipe = CropRecipe(self.crop, (spec,), self.decoder, self.max_pixels, seed)
        try:
            return load_crop(self.reader, self.manifest, row, recipe)[0][0]
        except BadImage:
            return None

    def _next_good(self, order: np.ndarray, place: int, spec: "ViewSpec", seed: int) -> tuple[np.ndarray, int]:
        for offset in range(1, len(order)):
            at = int(order[(place + offset) % len(order)])
            pixels = self._crop(int(self.rows[at]), spec, seed)
            if pixels is not None:
                return pixels, at
        raise ManifestError("none of the listed images can be decoded; run `dvc repro -f manifest`")


class CropBatches:
    """Training batches for a head: features of new random crops every epoch (the published probe's own way).

    features: tokens (B, L) -> (B, E), called with the generator seeded by (seed, epoch, step), for its dropout.
    """

    def __init__(
        self, source: ImageSource, features: Callable[[Tensor], Tensor], width: int, batch: int, seed: int,
        within: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        self.source = source if within is None else source.narrowed(within)
        count = len(self.source.labels)
        if not 2 <= batch <= count:
            raise UsageError(f"batch {batch} must be between 2 and the {count} images there are")
        self.features, self.width, self.batch, self.seed = features, width, batch, seed
        self.steps = count // batch
        self.labels = torch.from_numpy(self.source.labels).to(source.device)

    def __call__(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        for step, (tokens_BL, at) in enumerate(self.source.random_crops(epoch, self.batch, self.steps, self.seed)):
            torch.manual_seed(int(draws.key(self.seed, ORDER, epoch, step)) >> 1)
            yield self.features(tokens_BL), self.labels[torch.from_numpy(at).to(self.labels.device)]

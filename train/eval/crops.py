"""Images shown to a frozen encoder through the VQGAN, cropped as the published probe crops them.

N labelled images, L grid cells, B rows of a batch, E feature width.
"""

import copy
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from semdict.pipeline.common.device import reduced_precision, to_device
from semdict.pipeline.common.errors import ManifestError, UsageError
from semdict.train.data.tokens import class_names
from semdict.train.engine import rng as draws
from semdict.train.eval.sources import Shown
from semdict.train.masked.encoder import Encoder

if TYPE_CHECKING:
    from semdict.pipeline.images.crops import ViewSpec
    from semdict.pipeline.tokenizers.vqgan import Vqgan

AHEAD = 3  # batches decoded before they are asked for
ROWS = 128  # images of a training batch that share a forward pass and its dropout's draw; part of the result
ORDER = 23  # stream of the seed


class ImageSource:
    """Images of some splits of a manifest, cropped by the protocol and tokenised by the VQGAN in float32.

    Its one cached view is the test crop. `random_crops` gives training batches. A row that cannot be decoded is bad.
    batch: images per pass of the VQGAN.
    """

    def __init__(
        self, manifest: Path, images: dict[str, str], splits: list[str], crop: str, vqgan: "Vqgan", encoder: Encoder,
        device: torch.device, decoder: str, max_pixels: int, batch: int = 64, workers: int = 0,
        other_recipe: bool = False,
    ) -> None:  # fmt: skip
        from semdict.pipeline.images.crops import crop_identity, expand_views
        from semdict.pipeline.images.decode import decoder_identity
        from semdict.pipeline.manifest.stage import load_manifest

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
        self.decoder, self.max_pixels, self.batch = decoder, max_pixels, batch
        self.workers = workers or os.cpu_count() or 1
        view = expand_views(["centre"])
        self.identity = {"manifest": self.manifest.sha256, "splits": splits, "crop": crop_identity(crop, view, 0),
                         "decoder": decoder_identity(decoder), **gen}  # fmt: skip
        self.about = {"source": "images", "manifest": self.manifest.sha256[:16], "vqgan": vqgan.identity["sha256"],
                      "same_recipe_as_training": same, "splits": splits or ["all"], "images": len(good),
                      "left_out": self.left_out}  # fmt: skip

    def stream(self, view: str, batch: int) -> Iterator[Shown]:
        """The test crop of every image once, in order."""
        from semdict.pipeline.images.crops import ViewSpec

        if view != self.crop:
            raise ManifestError(f"there is no view {view!r}; images are shown as {self.crop}")
        starts = range(0, len(self.rows), batch)
        jobs = ([(int(row), ViewSpec("centre")) for row in self.rows[start : start + batch]] for start in starts)
        for start, crops in zip(starts, self.decoded(jobs), strict=True):
            bad = tuple(i for i, pixels in enumerate(crops) if pixels is None)
            yield Shown(
                start, self.tokenise([np.zeros((256, 256, 3), np.uint8) if p is None else p for p in crops]), bad
            )

    def random_crops(self, parts: list[np.ndarray], epoch: int, seed: int) -> Iterator[tuple[Tensor, np.ndarray]]:
        """(tokens (B, L), positions (B,)) of each part: a random resized crop and flip of each image, new every epoch.

        Everything is drawn from (seed, epoch, row). An image that cannot be decoded is replaced by the next one.
        """
        from semdict.pipeline.images.crops import ViewSpec

        order, spec, place = np.concatenate(parts), ViewSpec("random", epoch), 0
        jobs = ([(int(self.rows[i]), spec) for i in part] for part in parts)
        for part, crops in zip(parts, self.decoded(jobs, seed), strict=True):
            at = part.copy()
            for i, pixels in enumerate(crops):
                if pixels is None:
                    crops[i], at[i] = self._next_good(order, place + i, spec, seed)
            place += len(part)
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

    def tokenise(self, crops: list[np.ndarray]) -> Tensor:
        """(B, L) int64 codes of (256, 256, 3) uint8 crops."""
        parts = [crops[start : start + self.batch] for start in range(0, len(crops), self.batch)]
        return torch.cat([self.codes(to_device(np.stack(part), self.device)) for part in parts])

    @torch.no_grad()
    def codes(self, images: Tensor) -> Tensor:
        """(B, L) int64 codes of (B, 3, 256, 256) in [0, 1]; always in float32, since other precisions change codes."""
        with torch.autocast(self.device.type, enabled=False), reduced_precision(self.device, "float32"):
            return torch.cat([self.vqgan.encode(part) for part in images.float().split(self.batch)])

    def _crop(self, row: int, spec: "ViewSpec", seed: int) -> np.ndarray | None:
        from semdict.pipeline.images.batches import CropRecipe, load_crop
        from semdict.pipeline.images.decode import BadImage

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

    features: tokens (B, L) -> (B, E), called with the generator seeded by (seed, epoch, part), for its dropout.
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
        order = draws.shuffled(len(self.labels), self.seed, ORDER, epoch)[: self.steps * self.batch]
        cuts = range(ROWS, self.batch, ROWS)
        parts = [part for chosen in order.reshape(self.steps, self.batch) for part in np.split(chosen, cuts)]
        shown = self.source.random_crops(parts, epoch, self.seed)
        number = 0
        for _ in range(self.steps):
            features, places = [], []
            for tokens_BL, at in itertools.islice(shown, len(cuts) + 1):
                torch.manual_seed(int(draws.key(self.seed, ORDER, epoch, number)) >> 1)
                features.append(self.features(tokens_BL))
                places.append(torch.from_numpy(at).to(self.labels.device))
                number += 1
            yield torch.cat(features), self.labels[torch.cat(places)]

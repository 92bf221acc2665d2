"""Images as token batches for a frozen encoder, cropped as the published probe crops them and encoded by the VQGAN.

N labelled images, L grid cells, B rows of a batch, E feature width, S pixels along the side of a crop.
"""

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from semdict.pipeline.common.device import reduced_precision, to_device
from semdict.pipeline.common.errors import ManifestError, UsageError
from semdict.train.data.resident import class_names
from semdict.train.engine.rng import Stream, permutation, torch_seed
from semdict.train.eval.sources import TokenBatch
from semdict.train.masked.encoder import Encoder

if TYPE_CHECKING:
    from semdict.pipeline.images.batches import CropRecipe
    from semdict.pipeline.images.crops import ViewSpec
    from semdict.pipeline.tokenizers.base import Tokenizer

ROWS = 128  # images of a training batch that share a forward pass and its dropout; changes the result


class ImageSource:
    """Labelled images of some splits of a manifest ([] = all), cropped by the protocol and encoded in float32.

    Its one cached view is the test crop, the centre view of `recipe`; `random_crops` gives training batches.
    batch: images per pass of the VQGAN.
    """

    def __init__(
        self, manifest: Path, images: dict[str, str], splits: list[str], recipe: "CropRecipe", vqgan: "Tokenizer",
        encoder: Encoder, device: torch.device, batch: int = 64, workers: int = 0, other_recipe: bool = False,
    ) -> None:  # fmt: skip
        from semdict.pipeline.manifest.table import load_manifest

        self.manifest = load_manifest(manifest)
        rows = self.manifest.rows_of(splits) if splits else np.arange(len(self.manifest))
        good = rows[(self.manifest.status[rows] == 0) & (self.manifest.label[rows] >= 0)]
        if not len(good):
            raise ManifestError(f"{manifest}: no usable image with a label in {splits or 'any split'}")
        gen = {"gen": vqgan.identity}
        same = encoder.only("gen").check_tokens(
            Path("the VQGAN"), vqgan.codebook_size, math.prod(vqgan.grid(recipe.crop.size)), gen, other_recipe
        )
        self.reader, self.vqgan, self.device = self.manifest.reader(images), vqgan, device
        self.rows, self.labels = good, self.manifest.label[good].astype(np.int64)
        self.names = class_names(self.labels, None, self.manifest.classes)
        self.recipe, self.batch, self.workers = recipe, batch, workers
        self.crop, self.left_out = recipe.crop.name, len(rows) - len(good)
        self.views = [self.crop]
        self.identity = {"manifest": self.manifest.sha256, "splits": splits, **recipe.identity(), **gen}
        self.about = {"source": "images", "manifest": self.manifest.sha256[:16], "vqgan": vqgan.identity["sha256"],
                      "same_recipe_as_training": same, "splits": splits or ["all"], "images": len(good),
                      "left_out": self.left_out}  # fmt: skip

    def stream(self, view: str, batch: int) -> Iterator[TokenBatch]:
        """The test crop of every image once, in order; an image that cannot be decoded is black and listed as bad."""
        from semdict.pipeline.images.batches import good_or_bad, load_ahead
        from semdict.pipeline.images.crops import ViewSpec
        from semdict.pipeline.images.decode import BadImage

        if view != self.crop:
            raise ManifestError(f"there is no view {view!r}; images are shown as {self.crop}")

        def load(row: int) -> np.ndarray | BadImage:
            return good_or_bad(self._crop, row, ViewSpec("centre"), 0)

        parts = np.split(self.rows, range(batch, len(self.rows), batch))
        start = 0
        for crops in load_ahead((part.tolist() for part in parts), load, self.workers):
            bad = tuple(i for i, crop in enumerate(crops) if isinstance(crop, BadImage))
            for i in bad:
                crops[i] = np.zeros((self.recipe.crop.size, self.recipe.crop.size, 3), np.uint8)
            yield TokenBatch(start, self.tokenise(crops), bad)
            start += len(crops)

    def random_crops(self, parts: list[np.ndarray], epoch: int, seed: int) -> Iterator[tuple[Tensor, np.ndarray]]:
        """(tokens (B, L), positions (B,)) of each part: a random resized crop and flip of each image, new every epoch.

        The crop depends on (seed, epoch, row) alone. An image that cannot be decoded is replaced by the next one.
        """
        from semdict.pipeline.images.batches import first_good, load_ahead
        from semdict.pipeline.images.crops import ViewSpec

        order, view = np.concatenate(parts), ViewSpec("random", epoch)
        rows, borders = self.rows[order], np.cumsum([0, *map(len, parts)])

        def load(position: int) -> tuple[np.ndarray, int]:
            crop, tried = first_good(rows, position, lambda row: self._crop(row, view, seed))
            return crop, tried[-1]

        for loaded in load_ahead(itertools.starmap(range, itertools.pairwise(borders)), load, self.workers):
            crops, used = zip(*loaded, strict=True)
            yield self.tokenise(crops), order[list(used)]

    def narrowed(self, at: np.ndarray) -> "ImageSource":
        """The same source with only the images `at`, in that order."""
        fewer = copy.copy(self)
        fewer.rows, fewer.labels = self.rows[at], self.labels[at]
        return fewer

    def tokenise(self, crops: Sequence[np.ndarray]) -> Tensor:
        """(B, L) int64 codes of (S, S, 3) uint8 crops."""
        parts = [crops[start : start + self.batch] for start in range(0, len(crops), self.batch)]
        return torch.cat([self.codes(to_device(np.stack(part), self.device)) for part in parts])

    @torch.no_grad()
    def codes(self, images: Tensor) -> Tensor:
        """(B, L) int64 codes of (B, 3, S, S) in [0, 1]; always in float32, since other precisions change codes."""
        with torch.autocast(self.device.type, enabled=False), reduced_precision(self.device, "float32"):
            return torch.cat([self.vqgan.encode(part) for part in images.float().split(self.batch)])

    def _crop(self, row: int, view: "ViewSpec", seed: int) -> np.ndarray:
        """(S, S, 3) uint8 view of a manifest row; BadImage where it cannot be decoded."""
        from semdict.pipeline.images.batches import load_crop

        recipe = replace(self.recipe, views=(view,), seed=seed)
        return load_crop(self.reader, self.manifest, row, recipe)[0][0]


class RandomCropFeatures:
    """Training batches for a head: features of new random crops every epoch, as in the published probe.

    features: tokens (B, L) -> (B, E), called with torch's generator seeded from (seed, epoch, part) for its dropout.
    Yields (features (B, E), labels (B,)); within: positions of the images to use, all by default.
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
        order = permutation(len(self.labels), self.seed, Stream.CROP_ORDER, epoch)[: self.steps * self.batch]
        cuts = range(ROWS, self.batch, ROWS)
        parts = [part for batch in order.reshape(self.steps, self.batch) for part in np.split(batch, cuts)]
        crops = enumerate(self.source.random_crops(parts, epoch, self.seed))
        for _ in range(self.steps):
            features, labels = [], []
            for number, (tokens_BL, positions) in itertools.islice(crops, len(cuts) + 1):
                torch.manual_seed(torch_seed(self.seed, Stream.CROP_DROPOUT, epoch, number))
                features.append(self.features(tokens_BL))
                labels.append(self.labels[torch.from_numpy(positions).to(self.labels.device)])
            yield torch.cat(features), torch.cat(labels)

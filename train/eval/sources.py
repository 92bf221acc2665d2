"""Sources of tokens for a frozen encoder: stored views of a shard directory, or images cropped and encoded on the way.

N labelled images, L grid cells, B rows of a batch, S pixels along the side of a crop.
"""

import copy
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from semdict.pipeline.common.device import reduced_precision, to_device
from semdict.pipeline.common.errors import ManifestError, ShardError
from semdict.pipeline.common.files import sha256_file
from semdict.train.data.resident import class_names
from semdict.train.data.token_set import recipe_of
from semdict.train.masked.encoder import Encoder

if TYPE_CHECKING:
    from semdict.pipeline.images.batches import CropRecipe
    from semdict.pipeline.images.crops import ViewSpec
    from semdict.pipeline.tokenizers.base import Tokenizer


@dataclass(frozen=True)
class TokenBatch:
    """Tokens (B, L) int64, on the encoder's device, of images [start, start + B); bad: those that have none."""

    start: int
    tokens: Tensor
    bad: tuple[int, ...] = ()


class Source(Protocol):
    """Labelled images in a fixed order, as tokens."""

    labels: np.ndarray  # (N,) int64, all >= 0
    names: list[str]  # of the classes, by label
    views: list[str]
    left_out: int  # images of a bad status or without a label
    identity: dict[str, Any]  # everything that decides the tokens: part of the features' fingerprint
    about: dict[str, Any]  # for the score file

    def stream(self, view: str, batch: int) -> Iterator[TokenBatch]: ...


class TokenSource:
    """Stored views of some splits of a shard directory; refused when the encoder was trained on other tokens.

    Tokens are read a shard at a time, and only by `stream`: cached features need none.
    """

    def __init__(
        self, path: Path, splits: list[str], encoder: Encoder, device: torch.device, other_recipe: bool = False
    ) -> None:
        from semdict.pipeline.shards import open_shards
        from semdict.pipeline.shards.format import SUMS

        shards = open_shards(path)
        gen = shards.meta["codebooks"]["gen"]
        if gen["sizes"] is not None:
            raise ShardError(f"{path} has a codebook size per position, which no masked-token model reads")
        cells = int(np.prod(shards.grid))
        same = encoder.check_tokens(path, gen["size"], cells, shards.recipe, other_recipe)
        label, wanted = shards.label[:], np.zeros(len(shards), bool)
        for split in splits or [None]:
            wanted |= shards.split_rows(split)
        self.good = wanted & (shards.status[:] == 0) & (label >= 0)
        if not self.good.any():
            raise ShardError(f"{path}: no image of {splits or 'any split'} has a label; scores need labels")
        self.shards, self.device, self.labels = shards, device, label[self.good].astype(np.int64)
        self.left_out = int(wanted.sum() - self.good.sum())
        self.names = class_names(label, shards.index["label_name"].to_pylist())
        self.views = [view["name"] for view in shards.views]
        recipe = recipe_of(shards.meta)
        self.identity = {"tokens": sha256_file(path / SUMS), "splits": splits}
        self.about = {"source": "tokens", "tokens": str(path), "tokens_recipe": recipe, "same_recipe_as_training": same,
                      "splits": splits or ["all"], "images": len(self.labels), "left_out": self.left_out}  # fmt: skip

    def stream(self, view: str, batch: int) -> Iterator[TokenBatch]:
        """Every labelled image once, in order; ShardError when there is no such view."""
        if view not in self.views:
            raise ShardError(
                f"there is no view {view!r} among {', '.join(self.views)}; set evaluate.test_view and train_views"
            )
        number, step, first = self.views.index(view), self.shards.layout.shard_rows, 0
        for start in range(0, len(self.good), step):
            rows = slice(start, min(start + step, len(self.good)))
            if not self.good[rows].any():
                continue
            ids = self.shards.gen[rows][self.good[rows], number]
            for part in np.split(ids, range(batch, len(ids), batch)):
                yield TokenBatch(first, torch.from_numpy(part.astype(np.int64)).to(self.device))
                first += len(part)


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

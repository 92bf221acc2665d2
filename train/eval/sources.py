"""Token sources of a frozen encoder: the stored views of a shard directory (images: `image_source`).

N labelled images, L grid cells, B rows of a batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from semdict.pipeline.common.errors import ShardError
from semdict.pipeline.common.files import sha256_file
from semdict.train.data.resident import class_names
from semdict.train.data.token_set import recipe_of
from semdict.train.masked.encoder import Encoder


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

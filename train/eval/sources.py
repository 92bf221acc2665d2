"""What a frozen encoder is shown: token views of a shard directory (images: `train.eval.crops`).

N labelled images, L grid cells, B rows of a batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import ShardError
from pipeline.files import sha256_file
from train.eval.encoder import Encoder
from train.loader import recipe_of, table_from_shards


@dataclass(frozen=True)
class Shown:
    """Tokens (B, L) int64 on the encoder's device of images [start, start + B); bad: which of them have none."""

    start: int
    tokens: Tensor
    bad: tuple[int, ...] = ()


class Source(Protocol):
    """Labelled images in a fixed order, as tokens."""

    labels: np.ndarray  # (N,) int64, all >= 0
    names: list[str]  # of the classes, by label
    views: list[str]
    left_out: int  # images of a bad status or without a label
    identity: dict[str, Any]  # all that decides the tokens: part of the features' fingerprint
    about: dict[str, Any]  # what a score file says

    def stream(self, view: str, batch: int) -> Iterator[Shown]: ...


class TokenSource:
    """Pre-tokenised views of some splits of a shard directory; refused when the encoder was trained on other tokens."""

    def __init__(
        self, path: Path, splits: list[str], encoder: Encoder, device: torch.device, other_recipe: bool = False
    ) -> None:
        from pipeline.shards import open_shards
        from pipeline.shards_format import SUMS

        shards = open_shards(path)
        gen = shards.meta["codebooks"]["gen"]
        if gen["sizes"] is not None:
            raise ShardError(f"{path} has a codebook size per position, which no masked-token model reads")
        cells = int(np.prod(shards.grid))
        same = encoder.check_tokens(path, gen["size"], cells, shards.recipe, other_recipe)
        self.table, self.device = table_from_shards(path, splits or None), device
        label = self.table.label
        self.at = np.flatnonzero(label >= 0)
        if not len(self.at):
            raise ShardError(f"{path}: no image of {splits or 'any split'} has a label; scores need labels")
        self.labels = label[self.at].astype(np.int64)
        self.left_out = self.table.left_out + len(label) - len(self.at)
        self.names = class_names(shards.label[:], shards.index["label_name"].to_pylist())
        self.views = [view["name"] for view in shards.views]
        recipe = recipe_of(shards.meta)
        self.identity = {"tokens": sha256_file(path / SUMS), "splits": splits}
        self.about = {"source": "tokens", "tokens": str(path), "tokens_recipe": recipe, "same_recipe_as_training": same,
                      "splits": splits or ["all"], "images": len(self.at), "left_out": self.left_out}  # fmt: skip

    def stream(self, view: str, batch: int) -> Iterator[Shown]:
        """Every labelled image once, in order; ShardError when there is no such view."""
        if view not in self.views:
            raise ShardError(f"there is no view {view!r} among {', '.join(self.views)}")
        number = self.views.index(view)
        for start in range(0, len(self.at), batch):
            ids = self.table.gen[self.at[start : start + batch], number].astype(np.int64)
            yield Shown(start, torch.from_numpy(ids).to(self.device))


def class_names(labels: np.ndarray, names: list[str] | None, classes: list[str] | None = None) -> list[str]:
    """Name of every label in [0, max]: as the rows or the class list say, else its number."""
    found = list(classes or [])
    found += [""] * (int(labels.max(initial=-1)) + 1 - len(found))
    for label, name in zip(labels.tolist(), names or [], strict=False):
        if label >= 0 and name:
            found[label] = name
    return [name or str(label) for label, name in enumerate(found)]

"""The resident dataloader: token sets in memory, batches in an order that depends on (seed, epoch) alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from semdict.pipeline.common.errors import ShardError, UsageError
from semdict.train.data.loader import Resumable, epoch_order, share_of
from semdict.train.data.token_set import recipe_of
from semdict.train.engine.loop import Batch
from semdict.train.engine.rng import Stream, choice_per_row


@dataclass(frozen=True)
class TokenTable:
    """A token set in memory: gen and disc (N, V, L) of their smallest integer type, label (N,) int32, the usable rows.

    at: (n,) int64, positions of the usable rows in the arrays. row: (n,) int64, the manifest row of each.
    left_out: number of rows with a bad status. recipe: fingerprint of the token set.
    """

    gen: np.ndarray
    disc: np.ndarray | None
    label: np.ndarray | None
    at: np.ndarray
    row: np.ndarray
    left_out: int = 0
    recipe: str = ""

    @property
    def classes(self) -> int:
        """One more than the largest label, 0 without labels."""
        return 0 if self.label is None else int(self.label.max()) + 1

    def __post_init__(self) -> None:
        if self.disc is not None and self.disc.shape != self.gen.shape:
            raise ShardError(f"gen is {self.gen.shape}, disc {self.disc.shape}: the halves are not of the same images")
        if not len(self.at):
            raise ShardError(f"no usable rows: all {len(self.gen)} have a bad status")

    @classmethod
    def of(
        cls,
        gen: np.ndarray,
        disc: np.ndarray | None = None,
        label: np.ndarray | None = None,
        status: np.ndarray | None = None,
        recipe: str = "",
    ) -> "TokenTable":
        """A table of these arrays; rows whose status is not 0 stay in memory but are never in a batch."""
        good = np.arange(len(gen)) if status is None else np.flatnonzero(status == 0)
        return cls(gen, disc, label, good, good, len(gen) - len(good), recipe)


def table_from_shards(path: str | Path, splits: list[str] | None = None) -> TokenTable:
    """Read the good rows of a shard directory's splits (all by default) into memory; ShardError names a fault."""
    from semdict.pipeline.shards import open_shards

    shards = open_shards(path)
    parts = [shards.load(split) for split in splits or [None]]
    halves = {name: [getattr(part, name) for part in parts] for name in ("gen", "disc", "label", "rows")}
    gen, disc, label, rows = (_joined(arrays) for arrays in halves.values())
    left_out = sum(part.left_out for part in parts)
    return TokenTable(gen, disc, label, np.arange(len(gen)), rows, left_out, recipe_of(shards.meta))


def open_metadata(path: Path) -> tuple[dict[str, Any], str, np.ndarray | None]:
    """Metadata of a shard directory, the digest of its content, its centroids (K, D) or None."""
    from semdict.pipeline.shards import open_shards

    shards = open_shards(path)
    return shards.meta, shards.content_sha256, shards.centroids


def open_loader(path: Path, splits: list[str], *share: Any) -> "ResidentLoader":
    """The dataloader of a shard directory's splits; `share`: batch, seed, rank, world, device."""
    return ResidentLoader(table_from_shards(path, splits), *share)


def _joined(arrays: list[np.ndarray | None]) -> np.ndarray | None:
    if arrays[0] is None:
        return None
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


class ResidentLoader(Resumable):
    """Endless shuffled batches of a `TokenTable`, `batch` rows over all ranks; each rank gets its own contiguous share.

    Epoch e is the permutation `epoch_order(rows, seed, e)`, cut into batches; the remainder that fills no batch
    is left out of that epoch, other rows each time. Nothing is padded or repeated, and the order does not depend on
    the number of ranks. The view of an image depends on (seed, epoch, row).
    Batches hold gen, disc (B, L) int64, label, row (B,) int64, on `device`; the table keeps its small integers there.
    """

    def __init__(
        self,
        table: TokenTable,
        batch: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        self._share = share_of(batch, world)
        if batch > len(table.at):
            raise UsageError(f"batch {batch} is larger than the token set ({len(table.at)} usable rows)")
        self.table, self.batch, self.seed = table, batch, seed
        self.rank, self.world, self.device = rank, world, torch.device(device)
        self.steps_per_epoch = len(table.at) // batch
        self.recipe, self.left_out, self.classes = table.recipe, table.left_out, table.classes
        self.views, self.length = table.gen.shape[1:]
        self._gen = _Column(table.gen, self.device)
        self._disc = None if table.disc is None else _Column(table.disc, self.device)
        self._label = None if table.label is None else torch.from_numpy(table.label).to(self.device)

    def __next__(self) -> Batch:
        epoch, within = divmod(self._step, self.steps_per_epoch)
        start = within * self.batch + self.rank * self._share
        indices = self.order(epoch)[start : start + self._share]
        self._step += 1
        if self.views == 1:
            return self.take(indices)
        return self.take(indices, choice_per_row(self.table.row[indices], self.views, self.seed, Stream.VIEW, epoch))

    def order(self, epoch: int) -> np.ndarray:
        """(n,) int64 permutation of range(n), n usable rows; includes the remainder that is in no batch."""
        return epoch_order(len(self.table.at), self.seed, epoch)

    def take(self, indices: np.ndarray, views: np.ndarray | None = None) -> Batch:
        """A batch of usable rows: indices (B,) in [0, n), views (B,) ints (None = view 0)."""
        at = self.table.at[indices]
        flat = torch.from_numpy(at * self.views + (0 if views is None else views)).to(self.device)
        return {
            "gen": self._gen.take(flat),
            "disc": None if self._disc is None else self._disc.take(flat),
            "label": None if self._label is None else self._label[torch.from_numpy(at).to(self.device)].long(),
            "row": torch.from_numpy(self.table.row[indices]).to(self.device),
        }

    def sample(self, n: int) -> Tensor:
        """(n, L) int64 generative ids of rows spread evenly over the set, the same every time; for pictures."""
        return self.take(np.linspace(0, len(self.table.at) - 1, n).astype(np.int64))["gen"]

    def identity(self) -> dict[str, Any]:
        return {"rows": len(self.table.at), "batch": self.batch, "seed": self.seed, "recipe": self.recipe}


class _Column:
    """(N, V, L) integers as (N * V, L), no copy on the CPU; uint16 is kept as int16, which torch indexes fast."""

    def __init__(self, tokens: np.ndarray, device: torch.device) -> None:
        self.unsigned = tokens.dtype == np.uint16
        bits = np.ascontiguousarray(tokens).reshape(-1, tokens.shape[-1])
        self.rows = torch.from_numpy(bits.view(np.int16) if self.unsigned else bits).to(device)

    def take(self, at: Tensor) -> Tensor:
        """(B, L) int64 ids of the rows `at`."""
        ids = self.rows.index_select(0, at)
        return (ids.view(torch.uint16) if self.unsigned else ids).long()


def class_names(labels: np.ndarray, names: list[str] | None, classes: list[str] | None = None) -> list[str]:
    """Name of every label in [0, max]: that of its rows, else of the class list, else its number."""
    by_label = list(classes or [])
    by_label += [""] * (int(labels.max(initial=-1)) + 1 - len(by_label))
    for label, name in zip(labels.tolist(), names or [], strict=False):
        if label >= 0 and name:
            by_label[label] = name
    return [name or str(label) for label, name in enumerate(by_label)]

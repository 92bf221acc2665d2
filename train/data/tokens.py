"""Token sets in memory: batches by index, in an order that depends on (seed, epoch) alone and resumes anywhere."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from semdict.pipeline.common.errors import ShardError, UsageError
from semdict.pipeline.common.files import sha256_json
from semdict.train.engine import rng as draws
from semdict.train.engine.batch import Batch

# Streams of one seed, kept apart by a number.
ORDER, VIEW = 1, 2


@dataclass(frozen=True)
class TokenTable:
    """A token set in memory: gen and disc (N, V, L) of their smallest integer type, label (N,) int32, the usable rows.

    at: (n,) int64, positions of the usable rows in the arrays. row: (n,) int64, the id of each (its manifest row).
    left_out: rows of a bad status. recipe: fingerprint of what the tokens are.
    """

    gen: np.ndarray
    disc: np.ndarray | None
    label: np.ndarray | None
    at: np.ndarray
    row: np.ndarray
    left_out: int = 0
    recipe: str = ""

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
        """Arrays as they are; rows whose status is not 0 stay in memory but are never drawn."""
        good = np.arange(len(gen)) if status is None else np.flatnonzero(status == 0)
        return cls(gen, disc, label, good, good, len(gen) - len(good), recipe)


def table_from_shards(path: str | Path, splits: list[str] | None = None) -> TokenTable:
    """Read the good rows of a shard directory's splits (all by default) into memory; ShardError says what is wrong."""
    from semdict.pipeline.shards import open_shards

    shards = open_shards(path)
    parts = [shards.load(split) for split in splits or [None]]
    halves = {name: [getattr(part, name) for part in parts] for name in ("gen", "disc", "label", "rows")}
    gen, disc, label, rows = (_joined(arrays) for arrays in halves.values())
    left_out = sum(part.left_out for part in parts)
    return TokenTable(gen, disc, label, np.arange(len(gen)), rows, left_out, recipe_of(shards.meta))


def recipe_of(meta: dict[str, Any]) -> str:
    """16 hex digits that name a token set: what made it, of which images, in which codebooks and views."""
    parts = {name: meta[name] for name in ("recipe", "fingerprint", "codebooks", "grid", "views", "rows")}
    return sha256_json(parts)[:16]


def even_share(batch: int, world: int) -> int:
    """Rows of each rank in a global batch; UsageError when they cannot be equal."""
    if batch % world:
        raise UsageError(f"a global batch of {batch} cannot be shared evenly by {world} processes")
    return batch // world


def _joined(arrays: list[np.ndarray | None]) -> np.ndarray | None:
    if arrays[0] is None:
        return None
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


class ResidentLoader:
    """Endless shuffled batches of a `TokenTable`, `batch` rows over all ranks; each rank gets its own contiguous share.

    Epoch e is the permutation draws.shuffled(rows, seed, ORDER, e), cut into batches; the remainder that fills no batch
    is left out of that epoch, other rows each time. Nothing is padded or repeated, and the order does not depend on
    the number of ranks. One view per image is drawn from (seed, epoch, row).
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
        self._share = even_share(batch, world)
        if batch > len(table.at):
            raise UsageError(f"batch {batch} is larger than the token set ({len(table.at)} usable rows)")
        self.table, self.batch, self.seed = table, batch, seed
        self.rank, self.world, self.device = rank, world, torch.device(device)
        self.steps_per_epoch = len(table.at) // batch
        self.recipe = table.recipe
        self.views, self.length = table.gen.shape[1:]
        self._gen = _Column(table.gen, self.device)
        self._disc = None if table.disc is None else _Column(table.disc, self.device)
        self._label = None if table.label is None else torch.from_numpy(table.label).to(self.device)
        self._step = 0  # batches handed out since the start of the run
        self._epoch, self._order = -1, np.empty(0, np.int64)  # the permutation in use

    @property
    def epoch(self) -> int:
        """The epoch that the next batch belongs to."""
        return self._step // self.steps_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        epoch, within = divmod(self._step, self.steps_per_epoch)
        start = within * self.batch + self.rank * self._share
        chosen = self.order(epoch)[start : start + self._share]
        self._step += 1
        views = draws.choices(self.table.row[chosen], self.views, self.seed, VIEW, epoch) if self.views > 1 else None
        return self.take(chosen, views)

    def order(self, epoch: int) -> np.ndarray:
        """(n,) int64 permutation of range(n), the usable rows, in the order of `epoch`; remainder included."""
        if epoch != self._epoch:
            self._epoch, self._order = epoch, draws.shuffled(len(self.table.at), self.seed, ORDER, epoch)
        return self._order

    def take(self, chosen: np.ndarray, views: np.ndarray | None = None) -> Batch:
        """Usable rows by number in [0, n), in that order, at the given views ((B,) ints; None = view 0)."""
        at = self.table.at[chosen]
        flat = torch.from_numpy(at * self.views + (0 if views is None else views)).to(self.device)
        return {
            "gen": self._gen.take(flat),
            "disc": None if self._disc is None else self._disc.take(flat),
            "label": None if self._label is None else self._label[torch.from_numpy(at).to(self.device)].long(),
            "row": torch.from_numpy(self.table.row[chosen]).to(self.device),
        }

    def once(self, batch: int | None = None) -> Iterator[Batch]:
        """One pass over this rank's share of the usable rows in ascending order, view 0, for measures.

        Shares are contiguous and differ by at most one row; the last batch may be shorter. Does not move the position.
        """
        mine = np.array_split(np.arange(len(self.table.at)), self.world)[self.rank]
        size = batch or self.batch
        for start in range(0, len(mine), size):
            yield self.take(mine[start : start + size])

    def sample(self, n: int) -> Tensor:
        """(n, L) int64 generative ids of rows spread evenly over the set, the same every time; for pictures."""
        return self.take(np.linspace(0, len(self.table.at) - 1, n).astype(np.int64))["gen"]

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it is a position in."""
        return {"step": self._step, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken, on any number of ranks; ShardError when data or order is another."""
        for name, mine in self._identity().items():
            if state.get(name) != mine:
                raise ShardError(f"the checkpoint's loader has {name} {state.get(name)}, this run has {name} {mine}")
        self._step = state["step"]

    def _identity(self) -> dict[str, Any]:
        return {"rows": len(self.table.at), "batch": self.batch, "seed": self.seed, "recipe": self.recipe}


class _Column:
    """(N, V, L) integers as (N * V, L), on the CPU in the same memory; uint16 as int16, which torch indexes fast."""

    def __init__(self, tokens: np.ndarray, device: torch.device) -> None:
        self.unsigned = tokens.dtype == np.uint16
        bits = np.ascontiguousarray(tokens).reshape(-1, tokens.shape[-1])
        self.rows = torch.from_numpy(bits.view(np.int16) if self.unsigned else bits).to(device)

    def take(self, at: Tensor) -> Tensor:
        """(B, L) int64 ids of the rows `at`."""
        found = self.rows.index_select(0, at)
        return (found.view(torch.uint16) if self.unsigned else found).long()


def class_names(labels: np.ndarray, names: list[str] | None, classes: list[str] | None = None) -> list[str]:
    """Name of every label in [0, max]: as the rows or the class list say, else its number."""
    found = list(classes or [])
    found += [""] * (int(labels.max(initial=-1)) + 1 - len(found))
    for label, name in zip(labels.tolist(), names or [], strict=False):
        if label >= 0 and name:
            found[label] = name
    return [name or str(label) for label, name in enumerate(found)]

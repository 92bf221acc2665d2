"""The streaming dataloader: token sets larger than memory, read from `semdict shards export --to webdataset`'s tars.

A block is a tar sample of some thousand rows, which can be read at its offset without the rest of its tar. Each rank
reads its own blocks, a window of them at a time, and shuffles the rows of the window. Every order comes from counters,
so a position is one number.
"""

import io
import json
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from semdict.pipeline.common.digests import seal_holds
from semdict.pipeline.common.errors import ShardError, UsageError
from semdict.train.data.loader import Resumable, share_of
from semdict.train.data.token_set import recipe_of
from semdict.train.engine.loop import Batch
from semdict.train.engine.rng import Stream, choice_per_row, permutation

WINDOW = 64  # blocks shuffled together: 65,536 rows of 1 KiB by default
COLUMNS = {"gen": "gen.npy", "disc": "disc.npy", "label": "cls.npy"}


@dataclass(frozen=True)
class TarBlock:
    """Some rows of an exported set: the byte range of each column in a tar, column -> (offset, bytes).

    first: number of the first row, counted over all tars in order. rows: how many there are.
    """

    tar: Path
    name: str
    columns: dict[str, tuple[int, int]]
    first: int
    rows: int
    checksum: int | None  # CRC-32 over the columns' bytes, in the order of COLUMNS; None in exports without it


def open_metadata(path: Path) -> tuple[dict[str, Any], str, None]:
    """Metadata of an exported set and the digest of the shards that it was exported from; tars have no centroids."""
    about = read_about(path)
    return about, about.get("content_sha256", ""), None


def open_loader(path: Path, splits: list[str], *share: Any) -> "StreamingLoader":
    """The dataloader of an exported set's splits; `share`: batch, seed, rank, world, device."""
    return StreamingLoader(path, splits, *share)


def read_about(folder: str | Path) -> dict[str, Any]:
    """The folder's dataset.json: shapes, codebooks, recipe, tars of each split; ShardError if it names no blocks."""
    path = Path(folder) / "dataset.json"
    try:
        about = json.loads(path.read_text())
        tars, rows = about["tars"], about["rows_per_sample"]
    except FileNotFoundError:
        raise ShardError(f"{path} does not exist: {folder} was not written by `semdict shards export`") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{path} is damaged ({error}); export the shards again") from None
    if not seal_holds(about):
        raise ShardError(f"{path} is damaged: its SHA-256 is not the one that it states; export the shards again")
    if not isinstance(tars, dict) or rows == 1:
        raise ShardError(f"{folder} holds one image per sample; export again without --per-sample to train from it")
    return about


def find_blocks(folder: str | Path, about: dict[str, Any], splits: list[str]) -> list[TarBlock]:
    """Every block of the splits' tars, in order; only headers are read. ShardError names a tar that is damaged."""
    missing = [split for split in splits if split not in about["tars"]]
    if missing:
        raise ShardError(f"{folder} has no split {missing[0]!r}; it has {sorted(about['tars'])}")
    blocks: list[TarBlock] = []
    for name in (tar for split in splits for tar in about["tars"][split]):
        path = Path(folder) / name
        if path.name != name:
            raise ShardError(f"{folder}/dataset.json names {name!r}, which is not a file of that folder")
        try:
            first = blocks[-1].first + blocks[-1].rows if blocks else 0
            blocks += _blocks_of(path, first, about["blocks"][name] if "blocks" in about else None)
        except (OSError, tarfile.TarError, ValueError, KeyError) as error:
            raise ShardError(f"{path} cannot be read ({error}); export the shards again") from None
    return blocks


def _blocks_of(path: Path, first: int, listed: list[list[Any]] | None) -> Iterator[TarBlock]:
    """The samples of one tar; the number of rows stands in the header of the label array.

    listed: [name, rows, checksum] of each, as dataset.json has them; ValueError where the tar has others.
    """
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    with tarfile.open(path, "r:") as tar, path.open("rb") as file:
        for member in tar:
            base, _, extension = member.name.partition(".")
            for column, wanted in COLUMNS.items():
                if extension == wanted:
                    samples.setdefault(base, {})[column] = (member.offset_data, member.size)
        if listed is not None and [name for name, *_ in listed] != list(samples):
            raise ValueError("its samples are not those that dataset.json lists")
        for number, (base, columns) in enumerate(samples.items()):
            file.seek(columns["label"][0])
            version = np.lib.format.read_magic(file)
            shape = (np.lib.format.read_array_header_1_0 if version == (1, 0) else
                     np.lib.format.read_array_header_2_0)(file)[0]  # fmt: skip
            rows, checksum = (shape[0], None) if listed is None else listed[number][1:]
            if rows != shape[0]:
                raise ValueError(f"{base} has {shape[0]} rows, dataset.json says {rows}")
            yield TarBlock(path, base, columns, first, rows, checksum)
            first += shape[0]


class StreamingLoader(Resumable):
    """Endless shuffled batches from block tars, `batch` rows over all ranks; the batches are those of ResidentLoader.

    In epoch e the blocks are shuffled by (seed, e) and dealt out to the ranks in turn; each rank cuts its blocks into
    windows of `window` and shuffles the rows of each window. An epoch ends for all ranks after `steps_per_epoch`
    batches, which the smallest share of rows can always fill; the rest is left out of that epoch, other rows each
    time. No row comes twice in an epoch. Memory: two windows.

    The order depends on the number of ranks, so a position of another number of ranks is refused. `row` counts rows in
    the order of the export.
    """

    advice = ": streamed rows come in another order then; go back to it, or start anew"

    def __init__(
        self,
        folder: str | Path,
        splits: list[str],
        batch: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
        window: int = WINDOW,
    ) -> None:
        self._share = share_of(batch, world)
        self.about = read_about(folder)
        self.blocks = find_blocks(folder, self.about, splits)
        self.batch, self.seed, self.rank, self.world, self.window = batch, seed, rank, world, window
        self.device, self.recipe = torch.device(device), recipe_of(self.about)
        self.views = len(self.about["views"])
        self.steps_per_epoch = self._fewest_rows() // self._share
        if not self.steps_per_epoch:
            raise UsageError(
                f"{folder}: {len(self.blocks)} blocks, {sum(b.rows for b in self.blocks)} rows are too few for {world} "
                f"processes with {self._share} rows each a step; use fewer processes, a smaller batch, "
                "or pretrain.loader=resident"
            )
        self._dealt_epoch = -1
        self._order: list[list[TarBlock]] = []  # this rank's windows in the current epoch
        self._starts = np.zeros(1, np.int64)  # first row of each window in this rank's epoch
        self._windows: dict[int, dict[str, np.ndarray]] = {}

    def _fewest_rows(self) -> int:
        """Rows of the smallest share that a rank can be dealt: the fewest blocks, and the smallest ones."""
        return sum(sorted(block.rows for block in self.blocks)[: len(self.blocks) // self.world])

    def __next__(self) -> Batch:
        epoch, within = divmod(self._step, self.steps_per_epoch)
        self._open(epoch)
        parts = list(self._parts(within * self._share, (within + 1) * self._share))
        self._step += 1
        columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        views = choice_per_row(columns["row"], self.views, self.seed, Stream.VIEW, epoch)
        return {"disc": None, **{name: self._tensor(name, values, views) for name, values in columns.items()}}

    def sample(self, n: int) -> Tensor:
        """(n, L) int64 generative ids of rows spread evenly over the set, the same every time; for pictures."""
        total = self.blocks[-1].first + self.blocks[-1].rows
        ids = []
        for row in np.linspace(0, total - 1, n).astype(np.int64):
            block = next(block for block in reversed(self.blocks) if block.first <= row)
            ids.append(self._read(block)["gen"][row - block.first, 0])
        return torch.from_numpy(np.stack(ids).astype(np.int64)).to(self.device)

    def identity(self) -> dict[str, Any]:
        rows = sum(block.rows for block in self.blocks)
        data = {"rows": rows, "blocks": len(self.blocks), "batch": self.batch, "seed": self.seed, "recipe": self.recipe}
        return {**data, "processes": self.world, "window": self.window}

    def _open(self, epoch: int) -> None:
        """Deal out the blocks of an epoch."""
        if epoch == self._dealt_epoch:
            return
        dealt = permutation(len(self.blocks), self.seed, Stream.BLOCK_ORDER, epoch)[self.rank :: self.world]
        mine = [self.blocks[number] for number in dealt]
        self._order = [mine[i : i + self.window] for i in range(0, len(mine), self.window)]
        self._starts = np.cumsum([0, *(sum(block.rows for block in window) for window in self._order)])
        self._dealt_epoch, self._windows = epoch, {}

    def _parts(self, start: int, stop: int) -> Iterator[dict[str, np.ndarray]]:
        """Rows [start, stop) of this rank's epoch, cut where a window ends."""
        for number, (begin, end) in enumerate(pairwise(self._starts)):
            a, b = max(start, begin), min(stop, end)
            if a < b:
                window = self._window(number)
                yield {name: values[a - begin : b - begin] for name, values in window.items()}

    def _window(self, number: int) -> dict[str, np.ndarray]:
        """The shuffled rows of one window; of those read before, only the previous one is kept."""
        if number not in self._windows:
            parts = [self._read(block) for block in self._order[number]]
            joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            order = permutation(
                len(joined["row"]), self.seed, Stream.WINDOW_ORDER, self._dealt_epoch, self.rank, number
            )
            self._windows = {n: rows for n, rows in self._windows.items() if n == number - 1}
            self._windows[number] = {name: values[order] for name, values in joined.items()}
        return self._windows[number]

    def _read(self, block: TarBlock) -> dict[str, np.ndarray]:
        """Every column of a block: ids (n, V, L), label (n,), row (n,); ShardError names what is wrong."""
        arrays, checksum = {"row": np.arange(block.first, block.first + block.rows)}, 0
        with block.tar.open("rb") as file:
            for column, (offset, size) in block.columns.items():
                where = f"{block.tar}: {block.name}.{COLUMNS[column]}"
                file.seek(offset)
                data = file.read(size)
                checksum = zlib.crc32(data, checksum)
                try:
                    arrays[column] = np.load(io.BytesIO(data), allow_pickle=False)
                except (ValueError, OSError, EOFError) as error:
                    raise ShardError(f"{where} is not a plain array ({error}); export the shards again") from None
                self._check(where, column, arrays[column], block.rows)
        if block.checksum not in (None, checksum):
            raise ShardError(f"{block.tar}: {block.name} is damaged: its checksum differs; export the shards again")
        return arrays

    def _check(self, where: str, column: str, values: np.ndarray, rows: int) -> None:
        length = int(np.prod(self.about["grid"]))
        shape = (rows,) if column == "label" else (rows, self.views, length)
        if values.shape != shape or values.dtype.kind not in "iu":
            raise ShardError(f"{where} is {values.dtype} {values.shape}, dataset.json says whole numbers {shape}")
        if column != "label" and values.max() >= self.about["codebooks"][column]["size"]:
            size = self.about["codebooks"][column]["size"]
            raise ShardError(f"{where} holds id {values.max()}, its codebook has {size} entries")

    def _tensor(self, name: str, values: np.ndarray, views: np.ndarray) -> Tensor:
        if values.ndim == 3:
            values = values[np.arange(len(values)), views]
        return torch.from_numpy(values.astype(np.int64)).to(self.device)

"""Rows on their way into and out of token shards: shared by importers and exporters.

N rows (images), V views, L grid cells.
"""

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from semdict.pipeline.common.errors import ShardError, UsageError
from semdict.pipeline.shards.format import Block, ShardSpec
from semdict.pipeline.shards.reader import TokenShards

if TYPE_CHECKING:
    import pyarrow as pa

STEP = 1 << 16  # rows converted at a time


@dataclass
class RawRows:
    """Consecutive rows of another layout: gen, disc (n, V, L) and label (n,), integers of any type, unchecked."""

    gen: np.ndarray
    disc: np.ndarray | None
    label: np.ndarray


@dataclass(frozen=True)
class Source:
    """A token set in another layout, as an importer describes it; nothing is converted yet.

    path: the file or folder, for messages. names: "gen", "disc" (if there are such tokens) and "label" -> their
    names in that layout. default_sizes: codebook sizes of the published sets, used if the user names none. read:
    returns a fresh iterator over all rows. origin: where the tokens come from (JSON-able); it becomes
    `recipe["imported"]`. ignored: entries of the file that are not imported. class_embeddings: (C, E) floats, if the
    layout has them.

    A layout that was exported from token shards also has the set's attributes (meta: codebook sizes, recipe, title,
    licence and source are kept), the keys, splits and names of its rows (index), and its centroids.
    """

    path: str
    rows: int
    views: list[dict[str, Any]]
    grid: tuple[int, ...]
    names: dict[str, str]
    default_sizes: dict[str, int]
    read: Callable[[], Iterator[RawRows]]
    origin: dict[str, Any]
    ignored: tuple[str, ...] = field(default=())
    class_embeddings: np.ndarray | None = None
    meta: dict[str, Any] | None = None
    index: "Callable[[], pa.Table] | None" = None
    centroids: Path | None = None


def checked_blocks(source: Source, spec: ShardSpec, assumed: Collection[str] = ()) -> Iterator[Block]:
    """The rows of `source` as blocks of a shard directory, cast only after every number is known to fit.

    assumed: the arrays whose codebook size is a default. Raises ShardError naming row, view and position of an id
    outside its codebook, or the row of a label outside -1..2^31-1; UsageError for an id beyond an assumed size.
    """
    start = 0
    for raw in source.read():
        n = len(raw.label)
        for name, sizes in spec.sizes.items():
            _refuse_outside(source, name, getattr(raw, name), sizes, start, name in assumed)
        wrong = (raw.label < -1) | (raw.label > np.iinfo(np.int32).max)
        if wrong.any():
            row = int(wrong.argmax())
            raise ShardError(
                f"{source.path}: {source.names['label']} row {start + row} holds {raw.label[row]}, "
                "expected a class number, or -1 for none"
            )
        ids = {name: getattr(raw, name).astype(dtype) for name, dtype in spec.dtypes.items()}
        yield Block(ids["gen"], ids.get("disc"), raw.label.astype(np.int32), np.zeros(n, np.uint8))
        start += n


def _refuse_outside(source: Source, name: str, ids: np.ndarray, sizes: np.ndarray, start: int, assumed: bool) -> None:
    if not ids.size or (int(ids.min()) >= 0 and int(ids.max()) < int(sizes.min())):
        return
    outside = np.argwhere((ids < 0) | (ids >= sizes))
    if not len(outside):
        return
    row, view, position = outside[0]
    value, size = int(ids[row, view, position]), sizes[position]
    where = f"{source.path}: {source.names[name]} row {start + row}, position {position} holds {value}"
    if assumed and value >= 0:
        option = f"--{name}-size" + (" or --centroids" if name == "disc" else "")
        raise UsageError(f"{where}, beyond the usual codebook of {size}: give {option}")
    raise ShardError(f"{where}, the codebook has {size} entries")


def numbered_index(rows: int, split: str) -> "pa.RecordBatchReader":
    """An index for rows that came without keys: the row number in eight digits; as a stream."""
    import pyarrow as pa

    text = pa.string()
    schema = pa.schema([("key", text), ("split", text), ("label_name", text), ("reason", text)])

    def batches() -> Iterator["pa.RecordBatch"]:
        for start in range(0, rows, STEP):
            n = min(STEP, rows - start)
            keys = [f"{row:08d}" for row in range(start, start + n)]
            yield pa.record_batch([keys, [split] * n, [""] * n, [""] * n], schema=schema)

    return pa.RecordBatchReader.from_batches(schema, batches())


def square_grid(length: int) -> tuple[int, ...]:
    """(s, s) if `length` is a square number s * s, else (length,)."""
    side = math.isqrt(length)
    return (side, side) if side * side == length else (length,)


@dataclass
class RowBatch:
    """Good rows of one split: gen, disc (n, V, L) ids, label (n,) int32, rows (n,) int64 manifest rows."""

    gen: np.ndarray
    disc: np.ndarray | None
    label: np.ndarray
    rows: np.ndarray


def row_batches(shards: TokenShards, split: str, size: int) -> Iterator[RowBatch]:
    """The good rows of a split in order, `size` at a time (fewer in the last); memory: one shard."""
    wanted = shards.split_rows(split) & (shards.status[:] == 0)
    names = [name for name in ("gen", "disc") if getattr(shards, name) is not None]
    pending: dict[str, np.ndarray] = {}
    for number in range(shards.layout.shards):
        where = shards.layout.shard(number)
        keep = np.flatnonzero(wanted[where])
        if not keep.size:
            continue
        new = {name: getattr(shards, name)[where][keep] for name in [*names, "label"]} | {"rows": keep + where.start}
        pending = {name: np.concatenate([pending[name], new[name]]) if pending else new[name] for name in new}
        whole = len(pending["rows"]) // size * size
        for start in range(0, whole, size):
            yield RowBatch(**{"disc": None} | {name: part[start : start + size] for name, part in pending.items()})
        pending = {name: values[whole:] for name, values in pending.items()}
    if pending and pending["rows"].size:
        yield RowBatch(**{"disc": None} | pending)


def export_splits(shards: TokenShards, split: str | None) -> list[str]:
    """The splits to export, in order of first appearance; only `split` if one is named."""
    if split is not None:
        shards.split_rows(split)
        return [split]
    return [str(name) for name in shards.index["split"].unique().to_pylist()]


def class_names(shards: TokenShards) -> list[str]:
    """Names of classes 0..C-1, the number where a class has no name; [] if no row has a label."""
    import pyarrow as pa

    label = shards.label[:]
    if not (label >= 0).any():
        return []
    table = (
        pa.table({"label": label, "name": shards.index["label_name"]}).group_by("label").aggregate([("name", "min")])
    )
    names = dict(zip(table["label"].to_pylist(), table["name_min"].to_pylist(), strict=True))
    names = [names.get(number) or str(number) for number in range(int(label.max()) + 1)]
    return names if len(set(names)) == len(names) else [str(number) for number in range(len(names))]


def rows_of(shards: TokenShards, split: str | None) -> int:
    """Rows of a split, or of the set; those without tokens included."""
    return len(shards) if split is None else int(shards.split_rows(split).sum())

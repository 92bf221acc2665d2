"""Counts of a token set in one pass over its files: which ids share a cell, and which ids each class has.

N rows, V views, L cells, Kg and Kd entries of the two codebooks, C classes. Memory: the three tables and one shard.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from semdict.pipeline.analysis.cooccurrence import cooccurrence
from semdict.pipeline.common.errors import UsageError
from semdict.pipeline.common.progress import progress

if TYPE_CHECKING:
    from semdict.pipeline.shards import TokenShards

LARGEST_TABLE = 1 << 30  # entries of Kg x Kd: 4 GB of 32-bit counts


@dataclass
class TokenCounts:
    """joint: (Kg, Kd), how often ids g and d share a cell; by_class: "gen", "disc" -> (C, K), how often the images of a
    class have an id; rows: images counted; cells: pairs counted. Rows without a label are in `joint` only.
    """

    joint: np.ndarray
    by_class: dict[str, np.ndarray]
    rows: int
    cells: int


def count_tokens(shards: "TokenShards", split: str | None = None, view: str | None = None) -> TokenCounts:
    """Counts over the good rows of a split (None = all) in one view (None = all); reads a shard at a time.

    UsageError for a set without discriminative tokens, an unknown view, or codebooks whose table would not fit.
    """
    if shards.disc is None:
        raise UsageError(f"{shards.path} has generative tokens only; this analysis compares two codebooks")
    sizes = {name: int(of_position.max()) for name, of_position in shards.spec.sizes.items()}
    if sizes["gen"] * sizes["disc"] > LARGEST_TABLE:
        raise UsageError(
            f"{shards.path} has codebooks of {sizes['gen']:,} and {sizes['disc']:,} entries; a table of all pairs "
            f"would take {4e-9 * sizes['gen'] * sizes['disc']:.0f} GB, the limit is {4e-9 * LARGEST_TABLE:.0f} GB"
        )
    views = _views(shards, view)
    wanted, label = shards.split_rows(split) & (shards.status[:] == 0), shards.label[:]
    cells = int(wanted.sum()) * len(views) * shards.spec.length
    dtype = np.uint32 if cells < 1 << 32 else np.uint64
    joint = np.zeros((sizes["gen"], sizes["disc"]), dtype)
    classes = max(0, int(label[wanted].max(initial=-1)) + 1)
    by_class = {name: np.zeros((classes, size), dtype) for name, size in sizes.items()}
    with progress(int(wanted.sum()), "count tokens") as bar:
        for number in range(shards.layout.shards):
            where = shards.layout.shard(number)
            rows = np.flatnonzero(wanted[where])
            if not rows.size:
                continue
            ids = {name: getattr(shards, name)[where][rows][:, views] for name in sizes}
            cooccurrence(ids["gen"], ids["disc"], *joint.shape, out=joint)
            for name, table in by_class.items():
                _count_by_class(ids[name], label[where][rows], table)
            bar.update(len(rows))
    return TokenCounts(joint, by_class, int(wanted.sum()), cells)


def _views(shards: "TokenShards", view: str | None) -> list[int]:
    names = [str(one["name"]) for one in shards.views]
    if view is None:
        return list(range(len(names)))
    if view not in names:
        raise UsageError(f"{shards.path} has no view {view!r}; it has {', '.join(names)}")
    return [names.index(view)]


def _count_by_class(ids_NVL: np.ndarray, label_N: np.ndarray, table_CK: np.ndarray) -> None:
    """Add the ids of each labelled row to its class; a class at a time, so that its counts stay in cache."""
    order = np.argsort(label_N, kind="stable")
    classes, starts = np.unique(label_N[order], return_index=True)
    for label, rows in zip(classes.tolist(), np.split(order, starts[1:]), strict=True):
        if label >= 0:
            table_CK[label] += np.bincount(ids_NVL[rows].reshape(-1), minlength=table_CK.shape[1]).astype(
                table_CK.dtype
            )


def class_average_top(table_CK: np.ndarray, top: int) -> np.ndarray:
    """(min(top, K),) probabilities, falling: of each class's most frequent id, its second, ..., averaged over classes.

    LEASE, figure D.2. Classes without images do not count; nan where there are none at all.
    """
    images_C = table_CK.sum(axis=1, dtype=np.float64)
    present = np.flatnonzero(images_C)
    if not present.size:
        return np.full(min(top, table_CK.shape[1]), np.nan)
    total = np.zeros(min(top, table_CK.shape[1]))
    for label in present:
        total += -np.sort(-table_CK[label].astype(np.float64))[: len(total)] / images_C[label]
    return total / present.size

"""What sampling starts from: an empty grid, or the tokens of real images with some cells hidden.

N images, B of a batch, L = G x G cells.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from semdict.pipeline.common.errors import UsageError
from semdict.train.engine.rng import Stream, numpy_generator, permutation


@dataclass(frozen=True)
class Context:
    """Real images: gen (N, L) int64, disc (N, L) int64 or None, labels (N,), rows of the manifest (N,)."""

    gen: np.ndarray
    disc: np.ndarray | None
    labels: np.ndarray
    rows: np.ndarray


def load_context(path: Path, split: str, count: int, classes: list[int]) -> Context:
    """`count` good rows of a split (of these classes, [] = all), in their first view.

    The rows are a random subset, since splits are sorted by class; it is the same for every seed, and a larger `count`
    extends it. UsageError when there are too few.
    """
    from semdict.pipeline.shards import open_shards

    loaded = open_shards(path).load(split)
    good = np.flatnonzero(np.isin(loaded.label, classes)) if classes else np.arange(len(loaded.rows))
    if count > len(good):
        which = f" of the classes {classes}" if classes else ""
        raise UsageError(
            f"generate.images is {count}, split {split!r} of {path} has {len(good)} images{which}; ask for fewer"
        )
    subset = good[permutation(len(good), Stream.CONTEXT_ROWS)[:count]]
    disc = None if loaded.disc is None else loaded.disc[subset, 0].astype(np.int64)
    return Context(loaded.gen[subset, 0].astype(np.int64), disc, loaded.label[subset], loaded.rows[subset])


def box_cells(box: list[int], grid: int) -> Tensor:
    """(L,) bool: the cells of [row, column, height, width]; UsageError when the box is empty or leaves the grid."""
    row, column, height, width = box
    if not (height and width and row + height <= grid and column + width <= grid):
        raise UsageError(f"generate.box {box} (row, column, height, width) is empty or leaves the {grid} x {grid} grid")
    cells = torch.zeros(grid, grid, dtype=torch.bool)
    cells[row : row + height, column : column + width] = True
    return cells.flatten()


def hidden_cells(task: str, grid: int, box: list[int], ratio: float, seed: int, numbers: list[int]) -> Tensor:
    """(B, L) bool: cells to fill. inpaint: inside the box; outpaint: outside; reconstruct: ceil(ratio L) at random,
    a function of (seed, image number); any other task: all.
    """
    cells = grid**2
    if task == "inpaint":
        return box_cells(box, grid).expand(len(numbers), -1)
    if task == "outpaint":
        return ~box_cells(box, grid).expand(len(numbers), -1)
    if task != "reconstruct":
        return torch.ones(len(numbers), cells, dtype=torch.bool)
    hidden = torch.zeros(len(numbers), cells, dtype=torch.bool)
    for i, number in enumerate(numbers):
        rng = numpy_generator(seed, Stream.CONTEXT_MASKS, number)
        hidden[i, rng.permutation(cells)[: int(np.ceil(ratio * cells))]] = True
    return hidden

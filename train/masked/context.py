"""What an image starts from: nothing, or the tokens of a real one with some cells hidden."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from semdict.pipeline.common.errors import UsageError
from semdict.train.engine.rng import Stream, numpy_generator, permutation


@dataclass(frozen=True)
class Known:
    """Tokens of the images that a task starts from: gen (N, L), words (N, L) or None, labels, manifest rows (N,)."""

    gen: np.ndarray
    words: np.ndarray | None
    labels: np.ndarray
    rows: np.ndarray


def known_images(path: Path, split: str, count: int, classes: list[int]) -> Known:
    """`count` good rows of a split (of these classes, [] = all), in their first view; a mix, since splits are sorted by
    class, and the same mix for every seed, of which a larger `count` takes more. UsageError when there are too few.
    """
    from semdict.pipeline.shards import open_shards

    loaded = open_shards(path).load(split)
    at = np.flatnonzero(np.isin(loaded.label, classes)) if classes else np.arange(len(loaded.rows))
    if count > len(at):
        which = f" of the classes {classes}" if classes else ""
        raise UsageError(
            f"generate.images is {count}, split {split!r} of {path} has {len(at)} images{which}; ask for fewer"
        )
    at = at[permutation(len(at), Stream.CONTEXT_ROWS)[:count]]
    words = None if loaded.disc is None else loaded.disc[at, 0].astype(np.int64)
    return Known(loaded.gen[at, 0].astype(np.int64), words, loaded.label[at], loaded.rows[at])


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
    from (seed, number); anything else: all.
    """
    cells = grid**2
    if task == "inpaint":
        return box_cells(box, grid).expand(len(numbers), -1)
    if task == "outpaint":
        return ~box_cells(box, grid).expand(len(numbers), -1)
    if task != "reconstruct":
        return torch.ones(len(numbers), cells, dtype=torch.bool)
    hidden = torch.zeros(len(numbers), cells, dtype=torch.bool)
    for place, number in enumerate(numbers):
        rng = numpy_generator(seed, Stream.CONTEXT_MASKS, number)
        hidden[place, rng.permutation(cells)[: int(np.ceil(ratio * cells))]] = True
    return hidden

"""Shared by the measures: class agreement, accuracy, nearest neighbours by cosine, CSV files.

N training images, M test images, T of a block, E feature width, k neighbours.
"""

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from semdict.pipeline.common.errors import ShardError, UsageError
from semdict.pipeline.common.files import atomic_write
from semdict.pipeline.common.nearest import exact_float32

TEST_ROWS, TRAIN_ROWS = 1024, 65536  # of one block of cosines


class Labelled(Protocol):
    """Images with labels: a source, its features, a tokenizer's latents."""

    labels: np.ndarray  # (N,) int64, all >= 0
    names: list[str]  # of the classes, by label


def same_classes(train: Labelled, test: Labelled) -> int:
    """Number of classes, the largest training label + 1.

    ShardError names the test classes that have no training images, and those that have another label in training.
    """
    train_labels, test_labels = np.unique(train.labels).tolist(), np.unique(test.labels).tolist()
    trained = {(train.names[label], label) for label in train_labels}
    missing = [label for label in test_labels if (test.names[label], label) not in trained]
    if not missing:
        return train_labels[-1] + 1
    relabelled = [label for label in missing if test.names[label] in {name for name, _ in trained}]
    if relabelled:
        name = test.names[relabelled[0]]
        number = next(label for other, label in trained if other == name)
        raise ShardError(
            f"class {name!r} has label {number} in training and {relabelled[0]} in the test set; make both splits "
            "with one manifest, which numbers the classes of all splits together"
        )
    raise ShardError(
        f"{len(missing)} of {len(test_labels)} test classes have no training images: "
        f"{_listing([test.names[label] for label in missing])}; training classes are "
        f"{_listing([train.names[label] for label in train_labels])}. A score needs training images of every test "
        "class, under the same name: mend the splits, or choose others (train_splits, test_splits)"
    )


def _listing(names: list[str]) -> str:
    """The first names, quoted, and how many follow."""
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(map(repr, names[:4])) + more


def top_accuracy(ranked_M5: Tensor, labels_M: np.ndarray) -> dict[str, float]:
    """top1 and top5: per cent of the images whose label is the first, or among the first five, ranked class."""
    right_M5 = ranked_M5 == torch.from_numpy(np.asarray(labels_M, np.int64))[:, None]
    hits = {"top1": right_M5[:, 0], "top5": right_M5.any(dim=1)}
    return {name: 100.0 * float(hit_M.double().mean()) for name, hit_M in hits.items()}


def as_tensor(array: np.ndarray) -> Tensor:
    """A tensor that shares memory with the array (or its file); a read-only array is copied."""
    return torch.from_numpy(array if array.flags.writeable else np.array(array))


def cosine_neighbours(
    train_NE: np.ndarray, test_ME: np.ndarray, k: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """(M, k) float32 cosines and int64 training rows of the k nearest, the nearest first, on the CPU.

    The training features are read once, 65,536 at a time, and compared with 1,024 test images at a time, which bounds
    memory. UsageError when there are fewer than k rows.
    """
    if not 1 <= k <= len(train_NE):
        raise UsageError(f"k {k} must be between 1 and the {len(train_NE)} training images there are")
    device = torch.device(device)
    tests = F.normalize(as_tensor(test_ME).to(device).float()).split(TEST_ROWS)
    best = [(test.new_empty(len(test), 0), test.new_empty(len(test), 0, dtype=torch.int64)) for test in tests]
    with exact_float32():
        for number, block in enumerate(as_tensor(train_NE).split(TRAIN_ROWS)):
            train = F.normalize(block.to(device).float())
            for i, test in enumerate(tests):
                best[i] = _merge(best[i], test @ train.T, number * TRAIN_ROWS, k)
    return torch.cat([cosines for cosines, _ in best]).cpu(), torch.cat([rows for _, rows in best]).cpu()


def _merge(best: tuple[Tensor, Tensor], cosine_TN: Tensor, first: int, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest among the best so far and a block of training rows from `first` on."""
    cosines, rows = cosine_TN.topk(min(k, cosine_TN.shape[1]))
    cosines, rows = torch.cat([best[0], cosines], dim=1), torch.cat([best[1], rows + first], dim=1)
    cosines, order = cosines.topk(min(k, cosines.shape[1]))
    return cosines, rows.gather(1, order)


def write_table(path: Path, head: list[str], rows: Iterable[Iterable[Any]]) -> None:
    """Write a CSV file, whole or not at all."""
    with atomic_write(path) as staged, staged.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(head)
        writer.writerows(rows)


def write_curve(path: Path, curve: list[dict[str, float]]) -> None:
    """Write a training curve, one row per epoch; a cell is empty where its number was not measured."""
    head = list(dict.fromkeys(name for row in curve for name in row))
    write_table(path, head, [[row.get(name, "") for name in head] for row in curve])


def write_confusion(path: Path, names: list[str], labels: Iterable[int], predicted: Iterable[int]) -> None:
    """Write actual,predicted by class name, one row per test image: the input of `dvc plots`' confusion matrix."""
    rows = ((names[a], names[p]) for a, p in zip(labels, predicted, strict=True))
    write_table(path, ["actual", "predicted"], rows)

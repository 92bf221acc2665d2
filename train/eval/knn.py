"""Nearest-neighbour classification on frozen features (Wu et al., arXiv:1805.01978), also of shifted datasets.

N training images, M test images, E feature width, C classes, k neighbours.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from semdict.pipeline.common.errors import UsageError
from semdict.pipeline.common.nearest import exact_float32
from semdict.train.eval.class_map import ClassMap, load_class_map
from semdict.train.eval.common import Setup, add_common_arguments, same_classes, write_confusion
from semdict.train.eval.features import FeatureSet
from semdict.train.eval.linear_head import per_cent, shared

if TYPE_CHECKING:
    from semdict.pipeline.config.schema.evaluate import SecondSet

EXAMPLE = """examples:
  semdict evaluate knn --model runs/demo/lease --shards shards/demo
  semdict evaluate knn --model runs/demo/lease --set evaluate.knn.vote=majority --set evaluate.knn.k=5
  semdict evaluate knn --model runs/in1k/lease --set evaluate.knn.second.imagenet-a.shards=shards/imagenet-a \\
    --set evaluate.knn.second.imagenet-a.class_map=imagenet-a.yaml

A class map is YAML or JSON: class of the second dataset -> training class, or a list of them.
Writes knn.json and knn_confusion.csv."""

TEST_ROWS, TRAIN_ROWS = 1024, 65536  # of one block of similarities


def neighbours(
    train_NE: np.ndarray, test_ME: np.ndarray, k: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """(M, k) float32 cosines and int64 training rows of the k nearest, the nearest first, on the CPU.

    The training features are read once, 65,536 at a time, and meet 1,024 test images at a time: no larger block of
    similarities ever exists. UsageError when there are fewer than k rows.
    """
    if not 1 <= k <= len(train_NE):
        raise UsageError(f"k {k} must be between 1 and the {len(train_NE)} training images there are")
    device = torch.device(device)
    asked = F.normalize(shared(test_ME).to(device).float()).split(TEST_ROWS)
    best = [(part.new_empty(len(part), 0), part.new_empty(len(part), 0, dtype=torch.int64)) for part in asked]
    with exact_float32():
        for number, block in enumerate(shared(train_NE).split(TRAIN_ROWS)):
            bank = F.normalize(block.to(device).float())
            for i, part in enumerate(asked):
                best[i] = _better(best[i], part @ bank.T, number * TRAIN_ROWS, k)
    return torch.cat([similar for similar, _ in best]).cpu(), torch.cat([rows for _, rows in best]).cpu()


def _better(best: tuple[Tensor, Tensor], similar_TB: Tensor, first: int, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest among those so far and a block of training rows from `first` on."""
    found, at = similar_TB.topk(min(k, similar_TB.shape[1]))
    similar, rows = torch.cat([best[0], found], dim=1), torch.cat([best[1], at + first], dim=1)
    similar, kept = similar.topk(min(k, similar.shape[1]))
    return similar, rows.gather(1, kept)


def vote(
    similar_Mk: Tensor, labels_Mk: Tensor, classes: int, temperature: float = 0.07, weighted: bool = True
) -> Tensor:
    """(M, min(5, C)) int64 classes by votes, most first, -1 behind the last class that has a vote.

    A neighbour's vote is exp(cosine / temperature), or 1; of equal classes the lower number comes first.
    """
    beyond_Mk = similar_Mk.double() - similar_Mk.double().amax(dim=1, keepdim=True)  # nearest = 1: no underflow
    weight = (beyond_Mk / temperature).exp() if weighted else torch.ones_like(beyond_Mk)
    votes_MC = torch.zeros(len(labels_Mk), classes, dtype=torch.float64).scatter_add_(1, labels_Mk, weight)
    top, ranked = votes_MC.sort(dim=1, descending=True, stable=True)
    return torch.where(top > 0, ranked, -1)[:, :5]


def knn(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    k: int = 20,
    temperature: float = 0.07,
    weighted: bool = True,
    classes: int | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """(M, min(5, C)) int64 classes of the test images, most likely first; arrays in, classes out.

    train_features (N, E), test_features (M, E); train_labels (N,) whole numbers in [0, classes); classes None = the
    largest label + 1. Features need no normalisation: neighbours are nearest by cosine.
    """
    labels = torch.from_numpy(np.asarray(train_labels, np.int64))
    similar_Mk, rows_Mk = neighbours(train_features, test_features, k, device)
    count = classes or int(labels.max()) + 1
    parts = zip(similar_Mk.split(TEST_ROWS), rows_Mk.split(TEST_ROWS), strict=True)
    return torch.cat([vote(similar, labels[rows], count, temperature, weighted) for similar, rows in parts])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, on what, and where its scores go."""
    add_common_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Vote on the test set, then on every second dataset, and write the scores."""
    setup = Setup.of(args)
    given = setup.given.knn
    source, test_source = setup.source(setup.given.train_splits), setup.source(setup.given.test_splits)
    classes = same_classes(source, test_source)
    test = setup.test_set(test_source)
    train = setup.store.get(source, setup.test_views(source))
    seconds = {name: load_second(setup, name, second, train) for name, second in given.second.items()}

    def classify(bank: np.ndarray, labels: np.ndarray, asked: np.ndarray) -> Tensor:
        weighted = given.vote == "weighted"
        return knn(bank, labels, asked, given.k, given.temperature, weighted, classes, setup.device)

    ranked = classify(train.first, train.labels, test.first)
    scores = per_cent(ranked, test.labels)
    about: dict[str, Any] = {}
    for name, (second, mapping) in seconds.items():
        scores[f"{name}_top1"], about[name] = second_score(train, second, mapping, classify)
    write_confusion(setup.out / "knn_confusion.csv", source.names, test.labels, ranked[:, 0].tolist())
    protocol = setup.protocol(
        measure="k nearest neighbours by cosine", train=train.about, test=test.about, classes=classes, k=given.k,
        temperature=given.temperature if given.vote == "weighted" else None, vote=given.vote, second=about,
    )  # fmt: skip
    setup.write("knn", scores, protocol)
    return 0


def load_second(setup: Setup, name: str, second: "SecondSet", train: FeatureSet) -> tuple[FeatureSet, ClassMap]:
    """Features of a second dataset and how its classes map, both checked before anything is voted on."""
    if second.shards is not None:
        source: Any = setup.token_source(Path(second.shards), second.splits)
        views = [second.view]
    else:
        source = setup.image_source(Path(second.manifest), second.images, second.splits)
        views = source.views
    mapping = load_class_map(name, second.class_map, source.names, source.labels, train.names, train.labels)
    return setup.store.get(source, views), mapping


def second_score(
    train: FeatureSet, second: FeatureSet, mapping: ClassMap,
    classify: Callable[[np.ndarray, np.ndarray, np.ndarray], Tensor],
) -> tuple[float, dict[str, Any]]:  # fmt: skip
    """top1, per cent of the second dataset's mapped images, against the training images of the mapped classes.

    A prediction is right when it is among the training classes that the image's own class maps to.
    """
    allowed = mapping.training_classes()
    bank = np.flatnonzero(np.isin(train.labels, allowed))
    asked = np.flatnonzero(np.isin(second.labels, list(mapping.targets)))
    if not len(bank) or not len(asked):
        raise UsageError(f"{mapping.name}: no image is left after mapping ({len(asked)} asked, bank of {len(bank)})")
    predicted = classify(train.first[bank], train.labels[bank], second.first[asked])[:, 0].tolist()
    hits = [p in mapping.targets[label] for p, label in zip(predicted, second.labels[asked].tolist(), strict=True)]
    about = {**second.about, "class_map": mapping.path, "mapped_classes": len(mapping.targets),
             "training_classes": len(allowed), "bank": "training images of the mapped classes",
             "images": len(asked), "images_of_unmapped_classes": len(second.labels) - len(asked)}  # fmt: skip
    return 100.0 * float(np.mean(hits)), about

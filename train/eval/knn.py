"""`semdict evaluate knn`: k nearest neighbours on frozen features (Wu et al., arXiv:1805.01978), also shifted datasets.

N training images, M test images, E feature width, C classes, k neighbours.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from semdict.pipeline.common.errors import UsageError
from semdict.train.eval.class_map import ClassMap, load_class_map
from semdict.train.eval.common import TEST_ROWS, cosine_neighbours, top_accuracy, write_confusion
from semdict.train.eval.features import FeatureSet
from semdict.train.eval.setup import Setup, add_common_arguments

if TYPE_CHECKING:
    from semdict.pipeline.config.schema.evaluate import SecondSet

EXAMPLE = """examples:
  semdict evaluate knn --model runs/demo/lease --shards shards/demo
  semdict evaluate knn --model runs/demo/lease --set evaluate.knn.vote=majority --set evaluate.knn.k=5
  semdict evaluate knn --model runs/in1k/lease --set evaluate.knn.second.imagenet-a.shards=shards/imagenet-a \\
    --set evaluate.knn.second.imagenet-a.class_map=imagenet-a.yaml

A class map is YAML or JSON: class of the second dataset -> training class, or a list of them.
Writes knn.json and knn_confusion.csv."""

Classify = Callable[[np.ndarray, np.ndarray, np.ndarray], Tensor]  # training features, their labels, test features


def vote(
    cosine_Mk: Tensor, labels_Mk: Tensor, classes: int, temperature: float = 0.07, weighted: bool = True
) -> Tensor:
    """(M, min(5, C)) int64 classes by votes, most first, -1 after the last class that has a vote.

    A neighbour's vote is exp(cosine / temperature), or 1; of equal classes the lower number comes first.
    """
    relative_Mk = cosine_Mk.double() - cosine_Mk.double().amax(dim=1, keepdim=True)  # nearest = 1: no underflow
    weight = (relative_Mk / temperature).exp() if weighted else torch.ones_like(relative_Mk)
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
    """(M, min(5, C)) int64 classes of the test images, most likely first.

    train_features (N, E), test_features (M, E); train_labels (N,) whole numbers in [0, classes); classes None = the
    largest label + 1. Features need no normalisation: neighbours are nearest by cosine.
    """
    labels = torch.from_numpy(np.asarray(train_labels, np.int64))
    cosine_Mk, rows_Mk = cosine_neighbours(train_features, test_features, k, device)
    count = classes or int(labels.max()) + 1
    parts = zip(cosine_Mk.split(TEST_ROWS), rows_Mk.split(TEST_ROWS), strict=True)
    return torch.cat([vote(cosines, labels[rows], count, temperature, weighted) for cosines, rows in parts])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, data and score files."""
    add_common_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Classify the test set, then every second dataset, and write the scores."""
    setup = Setup.of(args)
    cfg = setup.cfg.knn
    source, test_source, classes = setup.sources()
    test = setup.test_set(test_source)
    train = setup.store.get(source, setup.test_views(source))
    seconds = {name: load_second(setup, name, second, train) for name, second in cfg.second.items()}

    def classify(features: np.ndarray, labels: np.ndarray, test_features: np.ndarray) -> Tensor:
        weighted = cfg.vote == "weighted"
        return knn(features, labels, test_features, cfg.k, cfg.temperature, weighted, classes, setup.device)

    ranked = classify(train.first, train.labels, test.first)
    scores = top_accuracy(ranked, test.labels)
    about: dict[str, Any] = {}
    for name, (second, class_map) in seconds.items():
        scores[f"{name}_top1"], about[name] = second_score(train, second, class_map, classify)
    write_confusion(setup.out / "knn_confusion.csv", source.names, test.labels, ranked[:, 0].tolist())
    protocol = setup.protocol(
        measure="k nearest neighbours by cosine", train=train.about, test=test.about, classes=classes, k=cfg.k,
        temperature=cfg.temperature if cfg.vote == "weighted" else None, vote=cfg.vote, second=about,
    )  # fmt: skip
    setup.write("knn", scores, protocol)
    return 0


def load_second(setup: Setup, name: str, second: "SecondSet", train: FeatureSet) -> tuple[FeatureSet, ClassMap]:
    """Features of a second dataset and its class map; both are checked before anything is classified."""
    if second.shards is not None:
        source: Any = setup.token_source(Path(second.shards), second.splits)
        views = [second.view]
    else:
        source = setup.image_source(Path(second.manifest), second.images, second.splits)
        views = source.views
    class_map = load_class_map(name, second.class_map, source.names, source.labels, train.names, train.labels)
    return setup.store.get(source, views), class_map


def second_score(
    train: FeatureSet, second: FeatureSet, class_map: ClassMap, classify: Classify
) -> tuple[float, dict[str, Any]]:
    """top1, per cent of the second dataset's mapped images, against the training images of the mapped classes.

    A prediction is right when it is among the training classes that the image's own class maps to.
    """
    allowed = class_map.training_classes()
    rows = np.flatnonzero(np.isin(train.labels, allowed))
    mapped = np.flatnonzero(np.isin(second.labels, list(class_map.targets)))
    if not len(rows) or not len(mapped):
        raise UsageError(
            f"{class_map.name}: the class map leaves {len(mapped)} test images and {len(rows)} training images"
        )
    predicted = classify(train.first[rows], train.labels[rows], second.first[mapped])[:, 0].tolist()
    labels = second.labels[mapped].tolist()
    right = [p in class_map.targets[label] for p, label in zip(predicted, labels, strict=True)]
    about = {**second.about, "class_map": class_map.path, "mapped_classes": len(class_map.targets),
             "training_classes": len(allowed), "bank": "training images of the mapped classes",
             "images": len(mapped), "images_of_unmapped_classes": len(second.labels) - len(mapped)}  # fmt: skip
    return 100.0 * float(np.mean(right)), about

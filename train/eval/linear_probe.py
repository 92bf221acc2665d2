"""Linear probe on frozen features (LEASE and Sorcen, Tables A.2), as numbers from arrays and as a command.

N training images, V views, M test images, E feature width.
"""

import argparse
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from semdict.train.eval.common import Setup, add_common_arguments, same_classes, write_confusion, write_curve
from semdict.train.eval.features import encoder_features
from semdict.train.eval.image_source import RandomCropFeatures
from semdict.train.eval.linear_head import (
    ArrayBatches,
    Batches,
    Curve,
    HeadPlan,
    LinearHead,
    fit_head,
    per_cent,
    predict,
)

EXAMPLE = """examples:
  semdict evaluate probe --model runs/demo/lease --shards shards/demo
  semdict evaluate probe --model weights/lease-vit-b.pth --shards shards/in1k --set evaluate.dtype=float16
  semdict evaluate probe --model runs/in1k/lease --set evaluate.source=images     the published protocol, VQGAN online

Writes probe.json, probe_curve.csv and probe_confusion.csv. Features of a shard directory's views are kept in work/."""


@dataclass(frozen=True)
class ProbeResult:
    """top1, top5: per cent of the test images after the last epoch. curve: per epoch loss (nats), top1, top5.

    predicted: (M,) int64 class of each test image.
    """

    top1: float
    top5: float
    loss: float
    curve: Curve
    predicted: np.ndarray
    head: LinearHead


def probe(
    train_features: np.ndarray | list[np.ndarray],
    train_labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
    plan: HeadPlan | None = None,
    classes: int | None = None,
    device: torch.device | str = "cpu",
    eval_every: int = 1,
) -> ProbeResult:
    """Accuracy of a linear classifier on any frozen features; arrays in, numbers out.

    train_features (N, E), or (N, V, E) or a list of V (N, E), of which one view per image and epoch is drawn;
    test_features (M, E); floats of any precision, memory-mapped or not. Labels (N,), (M,) whole numbers in
    [0, classes); classes None = the largest training label + 1. plan None = Tables A.2. UsageError when the batch
    exceeds N. The same seed gives the same result.
    """
    plan = plan or HeadPlan()
    batches = ArrayBatches(train_features, train_labels, plan.batch, plan.seed, device)
    count = classes or int(np.max(train_labels)) + 1
    return probe_batches(batches, test_features, test_labels, plan, count, device, eval_every)


def probe_batches(
    batches: Batches, test_features: np.ndarray, test_labels: np.ndarray, plan: HeadPlan, classes: int,
    device: torch.device | str = "cpu", eval_every: int = 1,
) -> ProbeResult:  # fmt: skip
    """The same for training features that come from anywhere, such as crops made anew every epoch."""

    def watch(epoch: int, head: LinearHead) -> dict[str, float]:
        if epoch % eval_every and epoch != plan.epochs:
            return {}
        return per_cent(predict(head, test_features, device), test_labels)

    head, curve = fit_head(batches, classes, plan, device, watch)
    ranked = predict(head, test_features, device)
    return ProbeResult(**per_cent(ranked, test_labels), loss=curve[-1]["loss"], curve=curve,
                       predicted=ranked[:, 0].numpy(), head=head)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, on what, and where its scores go."""
    add_common_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Probe, and write scores, curve and confusion."""
    setup = Setup.of(args)
    given = setup.given.probe
    source, test_source = setup.source(setup.given.train_splits), setup.source(setup.given.test_splits)
    classes = same_classes(source, test_source)
    test = setup.test_set(test_source)
    plan = HeadPlan(**{name: getattr(given, name) for name in HeadPlan.__dataclass_fields__})
    batches, shown = training_batches(setup, source, plan, given.embedding_dropout)
    result = probe_batches(batches, test.first, test.labels, plan, classes, setup.device, given.eval_every)
    scores = {"top1": result.top1, "top5": result.top5, "loss": result.loss}
    protocol = setup.protocol(measure="linear probe", train=shown, test=test.about, classes=classes, **asdict(plan))
    write_curve(setup.out / "probe_curve.csv", result.curve)
    write_confusion(setup.out / "probe_confusion.csv", source.names, test.labels, result.predicted)
    setup.write("probe", scores, protocol)
    return 0


def training_batches(
    setup: Setup, source: Any, plan: HeadPlan, dropout: float, within: np.ndarray | None = None
) -> tuple[Batches, dict[str, Any]]:
    """Batches for a head and what they are: cached features of token views, or new crops of images every epoch.

    within: positions of the images to use, all by default. With images the embedding's dropout is on, as published;
    cached features have none.
    """
    if setup.given.source == "tokens":
        train = setup.train_set(source)
        at = slice(None) if within is None else within
        views = [rows[at] for rows in train.views.values()]
        batches = ArrayBatches(views, train.labels[at], plan.batch, plan.seed, setup.device)
        return batches, {**train.about, "images": len(batches.labels), "features": "cached", "embedding_dropout": 0.0}
    features = encoder_features(setup.encoder.model, setup.given.precision, dropout)
    batches = RandomCropFeatures(source, features, setup.encoder.model.config.width, plan.batch, plan.seed, within)
    about = {"views": ["random resized crop and flip, new every epoch"], "features": "made every epoch"}
    return batches, {**source.about, **about, "images": len(batches.labels), "embedding_dropout": dropout}

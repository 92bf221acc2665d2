"""`semdict evaluate probe`: linear probe on frozen features (LEASE and Sorcen, tables A.2), also as a function.

N training images, V views, M test images, E feature width.
"""

import argparse
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from semdict.train.eval.common import Setup, add_common_arguments, write_confusion, write_curve
from semdict.train.eval.features import encoder_features
from semdict.train.eval.image_source import RandomCropFeatures
from semdict.train.eval.linear_head import (
    ArrayBatches,
    Batches,
    Curve,
    HeadConfig,
    LinearHead,
    fit_head,
    predict,
    top_accuracy,
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


def linear_probe(
    train_features: np.ndarray | list[np.ndarray],
    train_labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
    cfg: HeadConfig | None = None,
    classes: int | None = None,
    device: torch.device | str = "cpu",
    eval_every: int = 1,
) -> ProbeResult:
    """Accuracy of a linear classifier on any frozen features.

    train_features (N, E), or (N, V, E) or a list of V (N, E) with one view per image and epoch, chosen at random;
    test_features (M, E); floats of any precision, memory-mapped or not. Labels (N,), (M,) whole numbers in
    [0, classes); classes None = the largest training label + 1. cfg None = tables A.2. UsageError when the batch
    exceeds N. The same seed gives the same result.
    """
    cfg = cfg or HeadConfig()
    batches = ArrayBatches(train_features, train_labels, cfg.batch, cfg.seed, device)
    count = classes or int(np.max(train_labels)) + 1
    return fit_probe(batches, test_features, test_labels, cfg, count, device, eval_every)


def fit_probe(
    batches: Batches, test_features: np.ndarray, test_labels: np.ndarray, cfg: HeadConfig, classes: int,
    device: torch.device | str = "cpu", eval_every: int = 1,
) -> ProbeResult:  # fmt: skip
    """`linear_probe` for training features that `batches` yields, such as those of new crops in every epoch."""

    def evaluate(epoch: int, head: LinearHead) -> dict[str, float]:
        if epoch % eval_every and epoch != cfg.epochs:
            return {}
        return top_accuracy(predict(head, test_features, device), test_labels)

    head, curve = fit_head(batches, classes, cfg, device, evaluate)
    ranked = predict(head, test_features, device)
    return ProbeResult(**top_accuracy(ranked, test_labels), loss=curve[-1]["loss"], curve=curve,
                       predicted=ranked[:, 0].numpy(), head=head)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, data and score files."""
    add_common_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Probe; write scores, curve and confusion."""
    setup = Setup.of(args)
    cfg = setup.cfg.probe
    source, test_source, classes = setup.sources()
    test = setup.test_set(test_source)
    head_config = HeadConfig(**{name: getattr(cfg, name) for name in HeadConfig.__dataclass_fields__})
    batches, about = training_batches(setup, source, head_config, cfg.embedding_dropout)
    result = fit_probe(batches, test.first, test.labels, head_config, classes, setup.device, cfg.eval_every)
    scores = {"top1": result.top1, "top5": result.top5, "loss": result.loss}
    optimisation = asdict(head_config)
    protocol = setup.protocol(measure="linear probe", train=about, test=test.about, classes=classes, **optimisation)
    write_curve(setup.out / "probe_curve.csv", result.curve)
    write_confusion(setup.out / "probe_confusion.csv", source.names, test.labels, result.predicted)
    setup.write("probe", scores, protocol)
    return 0


def training_batches(
    setup: Setup, source: Any, cfg: HeadConfig, dropout: float, subset: np.ndarray | None = None
) -> tuple[Batches, dict[str, Any]]:
    """Batches for a head, and their entry in score files: cached features of token views, or new crops every epoch.

    subset: positions of the images to use, all by default. dropout: of the embedding with source images, as published;
    cached features have none.
    """
    if setup.cfg.source == "tokens":
        train = setup.train_set(source)
        rows = slice(None) if subset is None else subset
        views = [features[rows] for features in train.views.values()]
        batches = ArrayBatches(views, train.labels[rows], cfg.batch, cfg.seed, setup.device)
        return batches, {**train.about, "images": len(batches.labels), "features": "cached", "embedding_dropout": 0.0}
    features = encoder_features(setup.encoder.model, setup.cfg.precision, dropout)
    batches = RandomCropFeatures(source, features, setup.encoder.model.config.width, cfg.batch, cfg.seed, subset)
    about = {"views": ["random resized crop and flip, new every epoch"], "features": "made every epoch"}
    return batches, {**source.about, **about, "images": len(batches.labels), "embedding_dropout": dropout}

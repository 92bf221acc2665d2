"""`semdict evaluate probe`: linear probe on frozen features (LEASE and Sorcen, tables A.2)."""

import argparse
import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from semdict.pipeline.common.errors import UsageError
from semdict.train.engine.rng import Stream, permutation, torch_seed
from semdict.train.eval.common import write_confusion, write_curve
from semdict.train.eval.features import encoder_features
from semdict.train.eval.linear_head import ArrayBatches, Batches, HeadConfig, fit_probe
from semdict.train.eval.setup import Setup, add_common_arguments
from semdict.train.eval.sources import ImageSource

EXAMPLE = """examples:
  semdict evaluate probe --model runs/demo/lease --shards shards/demo
  semdict evaluate probe --model weights/lease-vit-b.pth --shards shards/in1k --set evaluate.dtype=float16
  semdict evaluate probe --model runs/in1k/lease --set evaluate.source=images     the published protocol, VQGAN online

Writes probe.json, probe_curve.csv and probe_confusion.csv. Features of a shard directory's views are kept in work/."""
ROWS = 128  # images of a training batch that share a forward pass and its dropout; changes the result


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
    result = fit_probe(batches, test.first, test.labels, head_config, classes, setup.device, cfg.eval_every, "probe")
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


class RandomCropFeatures:
    """Training batches for a head: features of new random crops every epoch, as in the published probe.

    features: tokens (B, L) -> (B, E), called with torch's generator seeded from (seed, epoch, part) for its dropout.
    Yields (features (B, E), labels (B,)); within: positions of the images to use, all by default.
    """

    def __init__(
        self, source: ImageSource, features: Callable[[Tensor], Tensor], width: int, batch: int, seed: int,
        within: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        self.source = source if within is None else source.narrowed(within)
        count = len(self.source.labels)
        if not 2 <= batch <= count:
            raise UsageError(f"batch {batch} must be between 2 and the {count} images there are")
        self.features, self.width, self.batch, self.seed = features, width, batch, seed
        self.steps = count // batch
        self.labels = torch.from_numpy(self.source.labels).to(source.device)

    def __call__(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = permutation(len(self.labels), self.seed, Stream.CROP_ORDER, epoch)[: self.steps * self.batch]
        cuts = range(ROWS, self.batch, ROWS)
        parts = [part for batch in order.reshape(self.steps, self.batch) for part in np.split(batch, cuts)]
        crops = enumerate(self.source.random_crops(parts, epoch, self.seed))
        for _ in range(self.steps):
            features, labels = [], []
            for number, (tokens_BL, positions) in itertools.islice(crops, len(cuts) + 1):
                torch.manual_seed(torch_seed(self.seed, Stream.CROP_DROPOUT, epoch, number))
                features.append(self.features(tokens_BL))
                labels.append(self.labels[torch.from_numpy(positions).to(self.labels.device)])
            yield torch.cat(features), torch.cat(labels)

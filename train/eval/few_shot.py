"""`semdict evaluate few-shot`: linear probe on a few images per class (LEASE, table A.4; Sorcen, table A.3).

C classes.
"""

import argparse
import statistics
from typing import TYPE_CHECKING, Any

import numpy as np

from semdict.pipeline.common.errors import UsageError
from semdict.pipeline.common.progress import progress
from semdict.train.engine.rng import Stream, permutation
from semdict.train.eval.common import write_table
from semdict.train.eval.linear_head import HeadConfig, fit_probe
from semdict.train.eval.linear_probe import training_batches
from semdict.train.eval.setup import Setup, add_common_arguments

if TYPE_CHECKING:
    from semdict.pipeline.config.schema.evaluate import EvaluateFewShot

EXAMPLE = """examples:
  semdict evaluate few-shot --model runs/demo/lease --shards shards/demo
  semdict evaluate few-shot --model runs/demo/lease --set evaluate.few_shot.shots=[4,8]

Writes few_shot.json (mean and sample standard deviation over the seeds) and few_shot.csv (bars)."""


def balanced_subset(labels: np.ndarray, shots: int, seed: int) -> np.ndarray:
    """(C * shots,) int64 ascending positions: `shots` images of every class that occurs, random by (seed, class).

    The subsets of a seed are nested: its 4 images of a class are among its 8. UsageError names a class that has too
    few images.
    """
    subset = []
    for label in np.unique(labels).tolist():
        positions = np.flatnonzero(labels == label)
        if len(positions) < shots:
            raise UsageError(f"class {label} has {len(positions)} training images, fewer than {shots} shots")
        subset.append(positions[permutation(len(positions), seed, Stream.FEW_SHOT, label)[:shots]])
    return np.sort(np.concatenate(subset))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, data and score files."""
    add_common_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Probe with every number of shots and every seed; write means, spreads and bars."""
    setup = Setup.of(args)
    cfg = setup.cfg.few_shot
    source, test_source, classes = setup.sources()
    test = setup.test_set(test_source)
    subsets = {(n, seed): balanced_subset(source.labels, n, seed) for n in cfg.shots for seed in cfg.seeds}
    top1: dict[int, list[float]] = {n: [] for n in cfg.shots}
    about: dict[str, Any] = {}
    with progress(len(subsets), "few-shot", "probe") as bar:
        for (shots, seed), subset in subsets.items():
            head_config = head_config_of(cfg, seed)
            batches, about = training_batches(setup, source, head_config, cfg.embedding_dropout, subset)
            result = fit_probe(batches, test.first, test.labels, head_config, classes, setup.device, cfg.epochs)
            top1[shots].append(result.top1)
            bar.update(1)
    scores = summary(top1)
    write_table(
        setup.out / "few_shot.csv",
        ["shots", "top1", "std"],
        [[n, scores[f"top1_{n}_shot"], scores[f"std_{n}_shot"]] for n in cfg.shots],
    )
    optimisation = {name: getattr(cfg, name) for name in HeadConfig.__dataclass_fields__ if name != "seed"}
    protocol = setup.protocol(
        measure="few-shot linear probe", train=about, test=test.about, classes=classes, shots=cfg.shots,
        seeds=cfg.seeds, runs={f"{n}_shot": values for n, values in top1.items()}, **optimisation,
    )  # fmt: skip
    setup.write("few_shot", scores, protocol)
    return 0


def head_config_of(cfg: "EvaluateFewShot", seed: int) -> HeadConfig:
    """The section's settings with one of its seeds."""
    fields = {name: getattr(cfg, name) for name in HeadConfig.__dataclass_fields__ if name != "seed"}
    return HeadConfig(**fields, seed=seed)


def summary(top1: dict[int, list[float]]) -> dict[str, float]:
    """Mean and sample standard deviation (0 for one seed) of each number of shots."""
    scores = {}
    for shots, values in top1.items():
        scores[f"top1_{shots}_shot"] = statistics.fmean(values)
        scores[f"std_{shots}_shot"] = statistics.stdev(values) if len(values) > 1 else 0.0
    return scores

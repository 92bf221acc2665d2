"""Linear probe on a few images per class (LEASE, Table A.4; Sorcen, Table A.3), several draws of them.

N training images, V views, M test images, E feature width.
"""

import argparse
import statistics
from typing import Any

import numpy as np

from semdict.pipeline.common.errors import UsageError
from semdict.train.engine.rng import Stream, permutation
from semdict.train.eval.common import Setup, add_common_arguments, same_classes, write_table
from semdict.train.eval.linear_head import HeadPlan
from semdict.train.eval.linear_probe import ProbeResult, probe_batches, training_batches

EXAMPLE = """examples:
  semdict evaluate few-shot --model runs/demo/lease --shards shards/demo
  semdict evaluate few-shot --model runs/demo/lease --set evaluate.few_shot.shots=[4,8]

Writes few_shot.json (mean and sample standard deviation over the seeds) and few_shot.csv (bars)."""


def balanced(labels: np.ndarray, shots: int, seed: int) -> np.ndarray:
    """(C * shots,) int64 ascending positions: `shots` images of every class that occurs, drawn from (seed, class).

    The draws of a seed are nested: its 4 images of a class are among its 8. UsageError names a class that has too few.
    """
    chosen = []
    for label in np.unique(labels).tolist():
        mine = np.flatnonzero(labels == label)
        if len(mine) < shots:
            raise UsageError(f"class {label} has {len(mine)} training images, {shots} shots were asked for")
        chosen.append(mine[permutation(len(mine), seed, Stream.FEW_SHOT, label)[:shots]])
    return np.sort(np.concatenate(chosen))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, on what, and where its scores go."""
    add_common_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Every number of shots with every seed; write means, spreads and bars."""
    setup = Setup.of(args)
    given = setup.given.few_shot
    source, test_source = setup.source(setup.given.train_splits), setup.source(setup.given.test_splits)
    classes = same_classes(source, test_source)
    test = setup.test_set(test_source)
    subsets = {(n, seed): balanced(source.labels, n, seed) for n in given.shots for seed in given.seeds}
    found: dict[int, list[float]] = {n: [] for n in given.shots}
    shown: dict[str, Any] = {}
    for (shots, seed), within in subsets.items():
        plan = head_plan(given, seed)
        batches, shown = training_batches(setup, source, plan, given.embedding_dropout, within)
        result: ProbeResult = probe_batches(
            batches, test.first, test.labels, plan, classes, setup.device, eval_every=given.epochs
        )
        found[shots].append(result.top1)
    scores = summary(found)
    write_table(
        setup.out / "few_shot.csv",
        ["shots", "top1", "std"],
        [[n, scores[f"top1_{n}_shot"], scores[f"std_{n}_shot"]] for n in given.shots],
    )
    plan = {name: getattr(given, name) for name in HeadPlan.__dataclass_fields__ if name != "seed"}
    protocol = setup.protocol(
        measure="few-shot linear probe", train=shown, test=test.about, classes=classes, shots=given.shots,
        seeds=given.seeds, runs={f"{n}_shot": values for n, values in found.items()}, **plan,
    )  # fmt: skip
    setup.write("few_shot", scores, protocol)
    return 0


def head_plan(given: Any, seed: int) -> HeadPlan:
    """The section's settings with one of its seeds."""
    fields = {name: getattr(given, name) for name in HeadPlan.__dataclass_fields__ if name != "seed"}
    return HeadPlan(**fields, seed=seed)


def summary(found: dict[int, list[float]]) -> dict[str, float]:
    """Mean and sample standard deviation (0 for one seed) of each number of shots."""
    scores = {}
    for shots, values in found.items():
        scores[f"top1_{shots}_shot"] = statistics.fmean(values)
        scores[f"std_{shots}_shot"] = statistics.stdev(values) if len(values) > 1 else 0.0
    return scores

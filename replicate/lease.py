"""LEASE's ablations at small scale, on the token set of params.yaml: `python -m replicate.lease`.

Each row is trained with every seed by `semdict pretrain`, sampled by `semdict generate` and scored by `semdict
evaluate`; this file computes only means, standard deviations and differences. Finished steps are skipped, so an
interrupted comparison continues. Writes reports/<preset>/replicate/lease.json and lease.md.
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from replicate.common import compare, markdown, plus_minus, publish, read, semdict, sets
from replicate.variants import COMPONENTS, NEIGHBOUR_COUNTS, Variant
from semdict.pipeline.config import paths
from semdict.pipeline.config.params import load_params

SHORT = ("pretrain.warmup_epochs=1", "pretrain.sorcen.echo_warmup_epochs=3")  # a tenth, three tenths of 10 epochs
QUIET = ("runtime.picture_every=0", "runtime.tensorboard=false")


def score(variant: Variant, seed: int, args: argparse.Namespace, root: Path) -> dict[str, float]:
    """Train, sample and score one row with one seed: probe (per cent), teacher Frechet distance, losses."""
    here = root / f"{variant.name}-{seed}"
    params = ["--params", args.params]
    changes = [f"pretrain.seed={seed}", f"pretrain.epochs={args.epochs}", *SHORT, *QUIET, *variant.changes]
    run, reports, samples = here / "run", here / "reports", here / "samples"
    train = ["pretrain", "--objective", variant.objective, "--out", run, "--reports", reports, "--resume"]
    semdict(*train, *params, *sets(changes))
    sampling = [f"generate.images={args.samples}", f"generate.seed={seed}"]
    semdict("generate", "--model", run, "--out", samples, "--resume", *params, *sets(sampling))
    if not (here / "probe.json").exists():
        semdict("evaluate", "probe", "--model", run, "--out", here, *params)
    if not (here / "distance.json").exists():
        reference = paths.manifest(args.preset)
        images = ["--protocol", "teacher", "--samples", samples, "--reference", reference]
        semdict("evaluate", "fid", *images, "--out", here / "distance.json", *params)
    final = read(reports / "metrics.json")["final"]
    return {
        "probe": read(here / "probe.json")["top1"],
        "teacher_frechet_distance": read(here / "distance.json")["teacher_frechet_distance"],
        "reconstruction": final["reconstruction"],
    }


def table(results: dict[str, Any], variants: Iterable[Variant], first: str) -> str:
    """A row per variant: mean and standard deviation over seeds, beside the paper's numbers."""
    head = [first, "probe, %", "teacher Fréchet distance", "paper: probe, %", "paper: FID"]
    rows = [
        [
            row["title"], plus_minus(row["probe"]), plus_minus(row["teacher_frechet_distance"], 3),
            *(f"{row['paper'][name]:.2f}" if name in row["paper"] else "–" for name in ("probe", "fid")),
        ]
        for row in (results[variant.name] for variant in variants)
    ]  # fmt: skip
    return markdown(head, rows)


def text(results: dict[str, Any]) -> str:
    """Both tables in Markdown, from the content of lease.json."""
    settings = results["settings"]
    title = "## What each objective adds (preset {preset}, {seeds} seeds, {epochs} epochs, {samples} samples)\n"
    return "\n".join(
        [
            title.format(**settings),
            table(results["components"], COMPONENTS, "objective"),
            f"LEASE is {results['probe_gain']:+.2f} points from reconstruction only; in the paper +2.49.\n",
            "## Number of neighbours\n",
            table(results["neighbours"], NEIGHBOUR_COUNTS, "neighbours"),
        ]
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m replicate.lease", description=__doc__.splitlines()[0])
    parser.add_argument("--params", default=Path("params.yaml"), type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--samples", type=int, default=240, help="generated images per run")
    args = parser.parse_args(argv)
    args.preset = load_params(args.params).preset
    root = Path("work") / "replicate" / args.preset
    components, neighbours = (
        compare(variants, args.seeds, lambda variant, seed: score(variant, seed, args, root))
        for variants in (COMPONENTS, NEIGHBOUR_COUNTS)
    )
    gain = components["lease"]["probe"]["mean"] - components["rec"]["probe"]["mean"]
    settings = {name: getattr(args, name) for name in ("preset", "seeds", "epochs", "samples")}
    results = {"settings": settings, "components": components, "neighbours": neighbours, "probe_gain": gain}
    publish(Path("reports") / args.preset / "replicate", "lease", results, text(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())

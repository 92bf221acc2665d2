"""LEASE's ablations on photographs, on the token set of params.yaml: `python -m replicate.photographs`.

Trains every row with every seed by `semdict pretrain`, scores it by `semdict evaluate` (linear probe, k nearest
neighbours, few-shot probe) and samples from it by `semdict generate`; distances are in the teacher's features. Finished
steps are skipped, so an interrupted comparison continues, and the result file holds the runs that are complete.
Writes docs/results/<preset>.json.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from replicate.common import markdown, plus_minus, read, semdict, sets, spread
from replicate.variants import COMPONENTS, Variant
from semdict.pipeline.common.files import write_json
from semdict.pipeline.config import paths
from semdict.pipeline.config.params import load_params

SMALLER = (
    Variant("neighbours-0", "LEASE, no neighbours", "lease", ("pretrain.lease.neighbours=0",)),
    Variant("neighbours-15", "LEASE, 15 neighbours", "lease", ("pretrain.lease.neighbours=15",)),
    Variant("lambda-0.1", "LEASE, lambda 0.1", "lease", ("pretrain.lambda=0.1",)),
    Variant("lambda-1", "LEASE, lambda 1", "lease", ("pretrain.lambda=1",)),
)
ROWS = {variant.name: variant for variant in (*COMPONENTS, *SMALLER)}
NAMES = {"rec": "reconstruction"}  # a row's name in the result file where it differs
SCORES = {
    "probe_top1": "probe, %",
    "knn_top1": "k-NN, %",
    "few_shot_16": "16-shot, %",
    "distance": "teacher Fréchet distance",
    "precision": "precision",
    "recall": "recall",
    "reconstruction": "reconstruction, nats",
}
QUIET = ("runtime.picture_every=0", "runtime.tensorboard=false")


class Comparison:
    """The runs of one preset: each has a folder in work/photographs/<preset>, named by row and seed."""

    def __init__(self, params: Path, samples: int, changes: list[str]) -> None:
        self.path, self.samples, self.changes = params, samples, changes
        self.params = load_params(params, changes)
        self.preset = self.params.preset
        self.root = Path("work") / "photographs" / self.preset
        self.out = Path("docs") / "results" / f"{self.preset}.json"

    def train_and_score(self, variant: Variant, seed: int) -> None:
        """Train, sample and score one row with one seed; what is there already is kept."""
        here = self.root / f"{variant.name}-{seed}"
        run, samples, params = here / "run", here / "samples", ["--params", self.path, *sets(self.changes)]
        changes = [f"pretrain.seed={seed}", *QUIET, *variant.changes]
        train = ["pretrain", "--objective", variant.objective, "--out", run, "--reports", here / "reports", "--resume"]
        semdict(*train, *params, *sets(changes))
        for measure, file in (("probe", "probe.json"), ("knn", "knn.json"), ("few-shot", "few_shot.json")):
            if not (here / file).exists():
                semdict("evaluate", measure, "--model", run, "--out", here, *params)
        sampling = [f"generate.images={self.samples}", f"generate.seed={seed}"]
        semdict("generate", "--model", run, "--out", samples, "--resume", *params, *sets(sampling))
        if not (here / "distance.json").exists():
            images = ["--protocol", "teacher", "--samples", samples, "--reference", paths.manifest(self.preset)]
            semdict("evaluate", "fid", *images, "--out", here / "distance.json", *params)

    def complete(self) -> Iterator[dict[str, Any]]:
        """The scores of every run whose last score is there, rows in the order of ROWS."""
        for name in ROWS:
            for seed in range(100):
                here = self.root / f"{name}-{seed}"
                if (here / "distance.json").exists():
                    yield {"row": NAMES.get(name, name), "seed": seed, **self.scores(here)}

    def scores(self, here: Path) -> dict[str, float]:
        """The figures of one run, out of the files that the commands wrote."""
        final, distance = read(here / "reports" / "metrics.json"), read(here / "distance.json")
        few_shot = read(here / "few_shot.json")
        return {
            "probe_top1": read(here / "probe.json")["top1"],
            "knn_top1": read(here / "knn.json")["top1"],
            **{f"few_shot_{n}": few_shot[f"top1_{n}_shot"] for n in self.params.evaluate.few_shot.shots},
            "distance": distance["teacher_frechet_distance"],
            "precision": distance["teacher_precision"],
            "recall": distance["teacher_recall"],
            "reconstruction": final["final"]["reconstruction"],
            "steps": final["steps"],
        }

    def settings(self) -> dict[str, Any]:
        """Data, teacher and sizes that the figures belong to."""
        params, pretrain = self.params, self.params.pretrain
        keys = ("width", "depth", "heads", "decoder_width", "decoder_depth", "epochs", "batch", "base_lr")
        return {
            "preset": self.preset,
            "pixels": params.pixels.size,
            "teacher": params.features.model,
            "words": params.kmeans.k,
            "samples": self.samples,
            "lambda": pretrain.contrast_weight,
            **{key: getattr(pretrain, key) for key in keys},
        }


def table(results: dict[str, Any]) -> str:
    """Markdown: mean and standard deviation of every score by row, beside the paper's probe and FID."""
    runs, lines = results["runs"], []
    scores = {score: title for score, title in SCORES.items() if all(score in run for run in runs)}
    titles = {NAMES.get(name, name): (variant.title, variant.paper) for name, variant in ROWS.items()}
    for row, (title, paper) in titles.items():
        mine = [run for run in runs if run["row"] == row]
        if not mine:
            continue
        cells = [plus_minus(spread(run[score] for run in mine)) for score in scores]
        printed = [f"{paper[name]:.2f}" if name in paper else "–" for name in ("probe", "fid")]
        lines.append([title, str(len(mine)), *cells, *printed])
    return markdown(["row", "seeds", *scores.values(), "paper: probe, %", "paper: FID"], lines)


def text(results: dict[str, Any]) -> str:
    """Heading, settings and table in Markdown, from the content of the result file."""
    about, runs = results["settings"], results["runs"]
    title = (
        f"## On photographs (preset {about['preset']}, {about['pixels']} pixels, {about['words']:,} words of "
        f"{about['teacher']})\n"
    )
    model = (
        f"Width {about['width']}, depth {about['depth']} + {about['decoder_depth']}, {about['epochs']} epochs at batch "
        f"{about['batch']}, base learning rate {about['base_lr']:g}, lambda {about['lambda']:g}; probe, k-NN and "
        f"few-shot on features of the validation split; {about['samples']:,} samples against the validation images."
    )
    means = {}
    for row in ("reconstruction", "lease"):
        values = [run["probe_top1"] for run in runs if run["row"] == row]
        means[row] = spread(values)["mean"] if values else None
    lines = [title, f"{model}\n", table(results)]
    if None not in means.values():
        gain = means["lease"] - means["reconstruction"]
        lines.append(f"LEASE is {gain:+.2f} points from reconstruction only; in the paper +2.49.\n")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m replicate.photographs", description=__doc__.splitlines()[0])
    parser.add_argument("--params", default=Path("params.yaml"), type=Path)
    parser.add_argument("--rows", nargs="+", default=[v.name for v in COMPONENTS], choices=ROWS, metavar="ROW",
                        help=f"of {', '.join(ROWS)}; by default the first five")  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=1000, help="generated images per run")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="for every run")
    args = parser.parse_args(argv)
    comparison = Comparison(args.params, args.samples, args.set)
    for seed in args.seeds:  # a seed of every row before the next one: an interrupted comparison is still even
        for row in args.rows:
            comparison.train_and_score(ROWS[row], seed)
            results = {"settings": comparison.settings(), "runs": list(comparison.complete())}
            write_json(comparison.out, results)
            print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())

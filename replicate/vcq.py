"""VCQ's comparison of schedules at small scale, on the images of params.yaml: `python -m replicate.vcq`.

Trains tokenizer and autoregressive model with the constant, linear, cosine and power schedules for equal numbers of
steps, and samples with and without guidance, all by `semdict` commands; this file computes only means and standard
deviations. Finished steps are skipped, so an interrupted comparison continues. Writes
reports/<preset>/replicate/vcq.json and vcq.md.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from replicate.common import compare, markdown, plus_minus, publish, read, semdict, sets
from replicate.variants import SCHEDULES, Variant
from semdict.pipeline.config.params import load_params

SCORES = {  # our name -> key in evaluate.json, title of the column, digits
    "psnr": ("psnr", "PSNR, dB", 2),
    "reconstruction": ("reconstruction_teacher_frechet_distance", "rec. distance", 2),
    "unguided": ("unguided_teacher_frechet_distance", "samples, unguided", 2),
    "guided": ("guided_teacher_frechet_distance", "samples, guided", 2),
}
INFORMATION = ("k_mean", "capacity_bits", "t_star", "spent_at", "nll_bits_held_out")  # keys of entropy.json
QUIET = ("runtime.tensorboard=false",)
POOLS = tuple(f"{feature}_{pool}" for feature in ("pre", "code") for pool in ("mean", "concat"))


def score(variant: Variant, seed: int, args: argparse.Namespace, root: Path) -> dict[str, float]:
    """Train the tokenizer, encode, train the AR model, sample and evaluate: one schedule with one seed."""
    here = root / f"{variant.name}-{seed}"
    tokenizer, tokens, model = here / "vcq", here / "tokens", here / "ar"
    changes = sets([*variant.changes, *QUIET, *(f"{section}.seed={seed}" for section in ("vcq", "ar", "ar_sample"))])
    settings = ["--params", args.params, *changes]
    semdict("vcq", "train", "--resume", "--out", tokenizer, "--reports", here / "vcq-report", *settings)
    if not tokens.exists():
        semdict("vcq", "encode", "--tokenizer", tokenizer, "--out", tokens, "--reports", here / "encode", *settings)
    semdict("ar", "train", "--resume", "--shards", tokens, "--out", model, "--reports", here / "ar-report", *settings)
    samples = []
    for guidance in ("guided", "unguided"):
        out = here / guidance
        if not out.exists():
            models = ["--model", model, "--tokenizer", tokenizer]
            semdict("ar", "sample", "--draw", guidance, *models, "--out", out, *settings)
        samples += ["--samples", f"{guidance}={out}"]
    if not (here / "evaluate.json").exists():
        semdict("vcq", "evaluate", "--tokenizer", tokenizer, *samples, "--out", here, *settings)
    if not (here / "entropy.json").exists():
        semdict("entropy", tokens, "--split", "train", "--ar", model, "--out", here, "--params", args.params)
    return row_values(read(here / "evaluate.json"), read(here / "entropy.json")[f"{tokens.name}-gen"], args.first)


def row_values(scores: dict[str, float], entropy: dict[str, float], first: list[int]) -> dict[str, float]:
    """The numbers of one run that the tables show."""
    probes = {f"{pool}_{k}": scores[f"probe_{pool}_{k}_top1"] for pool in POOLS for k in first}
    information = {name: entropy[name] for name in INFORMATION}
    return {name: scores[key] for name, (key, _, _) in SCORES.items()} | probes | information


def scores_table(schedules: dict[str, Any]) -> str:
    """Scores of reconstructions and samples, beside the paper's table 4."""
    paper = ("psnr", "rfid", "gfid_unguided", "gfid")
    head = ["schedule", "mean K", "t*", *(title for _, title, _ in SCORES.values()), "bits per validation image"]
    head += [f"paper: {name}" for name in ("PSNR", "rFID", "gFID w/o CFG", "gFID")]
    rows = [
        [
            row["title"], f"{row['k_mean']['mean']:.0f}", f"{row['t_star']['mean']:.0f}",
            *(plus_minus(row[name], digits) for name, (_, _, digits) in SCORES.items()),
            plus_minus(row["nll_bits_held_out"], 1), *(f"{row['paper'][name]:.2f}" for name in paper),
        ]
        for row in (schedules[variant.name] for variant in SCHEDULES)
    ]  # fmt: skip
    return markdown(head, rows)


def probe_table(schedules: dict[str, Any], first: list[int]) -> str:
    """Linear probe of the first k tokens, before (pre) and after (code) quantization, beside the paper's table 6."""
    titles = {"pre": "before", "code": "after"}
    head = ["schedule", "k"]
    head += [f"{titles[feature]}, {pool}" for feature, pool in (name.split("_") for name in POOLS)]
    rows = []
    for row in (schedules[variant.name] for variant in SCHEDULES):
        for k, printed in zip(first, ("10", "256"), strict=False):
            cells = [plus_minus(row[f"{pool}_{k}"], 1) for pool in POOLS]
            rows.append([row["title"], str(k), *cells, f"{row['paper'][f'first_{printed}']:.2f} (k = {printed})"])
    return markdown([*head, "paper"], rows)


def text(results: dict[str, Any]) -> str:
    """Both tables in Markdown, from the content of vcq.json."""
    settings, schedules = results["settings"], results["schedules"]
    count = f"{settings['seeds']} seed{'s' * (settings['seeds'] > 1)}"
    return "\n".join(
        [
            f"## Schedules (preset {settings['preset']}, {count})\n",
            scores_table(schedules),
            "Distances are Fréchet distances in the teacher's features, not FID.\n",
            "## Linear probe of the first k tokens, top-1 in per cent\n",
            probe_table(schedules, settings["first"]),
        ]
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m replicate.vcq", description=__doc__.splitlines()[0])
    parser.add_argument("--params", default=Path("params.yaml"), type=Path)
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args(argv)
    params = load_params(args.params)
    args.preset, args.first = params.preset, params.vcq_evaluate.probe.first
    root = Path("work") / "replicate" / f"{args.preset}-vcq"
    schedules = compare(SCHEDULES, args.seeds, lambda variant, seed: score(variant, seed, args, root))
    settings = {"preset": args.preset, "seeds": args.seeds, "first": args.first}
    results = {"settings": settings, "schedules": schedules}
    publish(Path("reports") / args.preset / "replicate", "vcq", results, text(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`semdict entropy`: how fast token sets run out of information along the sequence, as table, figure and CSV."""

import argparse
import csv
import sys
from pathlib import Path

from semdict.pipeline.analysis.curves import EntropyCurves, curves_of, read_nll, sets_of
from semdict.pipeline.common.errors import UsageError
from semdict.pipeline.common.files import atomic_write, write_json
from semdict.pipeline.config.params import add_params_arguments, params_of

EXAMPLE = """examples:
  semdict entropy shards/demo shards/demo-vcq --ar runs/demo/ar
  semdict entropy shards/in1k-vcq-base --split train --view ten-crop-4 --out reports/centre

Takes any shard directory, both codebooks of a pair. Writes entropy.json, entropy.png and one NAME-gen.csv or
NAME-disc.csv per codebook. Every view is a sequence of its own unless --view names one; --ar adds the negative
log-likelihood of an autoregressive model at each position, to the set that has its codebook sizes."""

ROWS = (
    ("sequences N", "sequences", ",d"),
    ("log2 N, bits", "log2_n", ".2f"),
    ("codes, first position", "k_min", ",d"),
    ("codes, largest", "k_max", ",d"),
    ("codes, mean", "k_mean", ",.1f"),
    ("capacity I(L), bits", "capacity_bits", ",.1f"),
    ("N / K", "n_over_k_to_1", ".3g"),
    ("N / K^2", "n_over_k_to_2", ".3g"),
    ("N / K^3", "n_over_k_to_3", ".3g"),
    ("t* with one size K (eq. 1)", "t_star_one_size", "d"),
    ("t* of these sizes (eq. 2)", "t_star", "d"),
    ("joint entropy, bits", "joint_bits", ".2f"),
    ("99 % spent after", "spent_at", "d"),
    ("  uniform noise", "spent_at_uniform_null", "d"),
    ("  shuffled columns", "spent_at_shuffled_null", "d"),
    ("model, bits an image, training", "nll_bits_train", ",.1f"),
    ("model, bits an image, held out", "nll_bits_held_out", ",.1f"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Token sets, the rows to use, and the output folder."""
    parser.add_argument("dirs", nargs="+", type=Path, metavar="DIR", help="token shards of any kind")
    add_params_arguments(parser)
    parser.add_argument("--split", help="one split only (default: all rows)")
    parser.add_argument("--view", help="one view only (default: every view is a sequence)")
    parser.add_argument("--ar", type=Path, action="append", default=[], metavar="RUN", help="run of `semdict ar train`")
    parser.add_argument("--out", type=Path, help="default: reports/<preset>/entropy")
    parser.add_argument("--seed", type=int, default=0, help="of the null curves")


def run(args: argparse.Namespace) -> int:
    """Measure every codebook, print the table, write JSON, CSV and the figure."""
    from semdict.pipeline.analysis.entropy_figures import plot_curves
    from semdict.pipeline.shards import open_shards

    out = args.out or Path("reports") / params_of(args).preset / "entropy"
    sets: list[EntropyCurves] = []
    for path in args.dirs:
        for name, (tokens, sizes) in sets_of(open_shards(path), args.split, args.view).items():
            sets.append(curves_of(f"{path.resolve().name}-{name}", tokens, sizes, args.seed))
    names = [curves.name for curves in sets]
    if len(set(names)) < len(names):
        raise UsageError(f"two sets would have one name in {', '.join(names)}; rename a directory")
    for path in args.ar:
        add_nll(sets, path)
    for curves in sets:
        write_csv(out / f"{curves.name}.csv", *curves.table())
    about = {"split": args.split or "all", "view": args.view or "all", "seed": args.seed}
    write_json(out / "entropy.json", {**{c.name: c.numbers() for c in sets}, "about": [about]})
    plot_curves(out / "entropy.png", sets)
    print(as_table(sets))
    print(f"entropy: {out}/entropy.png", file=sys.stderr)
    return 0


def add_nll(sets: list[EntropyCurves], run_path: Path) -> None:
    """Add a model's curves to the one set that has its codebook sizes; UsageError if none or several have."""
    sizes, nll = read_nll(run_path)
    fitting = [curves for curves in sets if curves.name.endswith("-gen") and tuple(curves.sizes) == sizes]
    if len(fitting) != 1:
        raise UsageError(
            f"{run_path} has {len(sizes)} positions of up to {max(sizes)} codes, as {len(fitting)} sets have"
        )
    fitting[0].nll = nll


def as_table(sets: list[EntropyCurves]) -> str:
    """Plain text, one column per codebook; a dash for a number that does not exist."""
    numbers = [curves.numbers() for curves in sets]
    lines = [["", *(curves.name for curves in sets)]]
    for title, key, form in ROWS:
        if any(key in column for column in numbers):
            cells = [column.get(key) for column in numbers]
            lines.append([title, *("-" if cell is None else format(cell, form) for cell in cells)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in lines
    )


def write_csv(path: Path, head: list[str], rows: list[list[float]]) -> None:
    """A CSV file, whole or not at all."""
    with atomic_write(path) as staged, staged.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(head)
        writer.writerows(rows)

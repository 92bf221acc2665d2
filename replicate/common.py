"""Shared by the comparisons: running `semdict` commands, statistics over seeds, Markdown tables."""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from replicate.variants import Variant
from semdict.cli import main
from semdict.pipeline.common.files import atomic_write, write_json


def semdict(*arguments: str | Path | int) -> None:
    """Run one command in this process, as typed on the command line; SystemExit if it fails."""
    line = [str(argument) for argument in arguments]
    started = time.monotonic()
    print(f"$ semdict {' '.join(line)}", file=sys.stderr, flush=True)
    if status := main(line):
        raise SystemExit(f"semdict {line[0]} ended with {status}; mend it and run the same command again")
    print(f"  {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)


def sets(changes: Iterable[str]) -> list[str]:
    """`--set` before each change."""
    return [part for change in changes for part in ("--set", change)]


def read(path: Path) -> dict[str, Any]:
    """The content of a JSON file."""
    return json.loads(path.read_text())


def spread(values: Iterable[float]) -> dict[str, float]:
    """Mean, sample standard deviation (0 for one value) and count."""
    values = list(values)
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else 0.0,
        "runs": len(values),
    }


def plus_minus(cell: dict[str, float], digits: int = 2) -> str:
    """The text "mean ± std" of a `spread`; the mean alone for a single run."""
    mean = f"{cell['mean']:.{digits}f}"
    return mean if cell["runs"] == 1 else f"{mean} ± {cell['std']:.{digits}f}"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def compare(variants: Iterable[Variant], seeds: int, score: Callable[[Variant, int], dict[str, float]]) -> dict:
    """Name of each variant -> title, the paper's numbers, the scores of every seed, and their `spread`."""
    table = {}
    for variant in variants:
        runs = [score(variant, seed) for seed in range(seeds)]
        means = {name: spread(run[name] for run in runs) for name in runs[0]}
        table[variant.name] = {"title": variant.title, "paper": variant.paper, "runs": runs, **means}
    return table


def publish(out: Path, name: str, results: dict[str, Any], text: str) -> None:
    """Write <name>.json and <name>.md, and print the text."""
    write_json(out / f"{name}.json", results)
    with atomic_write(out / f"{name}.md") as staged:
        staged.write_text(text)
    print(text)

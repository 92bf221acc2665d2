"""Run the package's own commands one after the other, each skipped when its result is there."""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from replicate.variants import Variant
from semdict.cli import main
from semdict.pipeline.common.files import write_aside, write_json


def semdict(*arguments: str | Path | int) -> None:
    """One command in this process, as a user would type it; ends the comparison when it fails."""
    line = [str(argument) for argument in arguments]
    started = time.monotonic()
    print(f"$ semdict {' '.join(line)}", file=sys.stderr, flush=True)
    if status := main(line):
        raise SystemExit(f"semdict {line[0]} ended with {status}; mend it and run the same command again")
    print(f"  {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)


def sets(changes: Iterable[str]) -> list[str]:
    """--set for each of them."""
    return [part for change in changes for part in ("--set", change)]


def read(path: Path) -> dict[str, Any]:
    """A JSON file."""
    return json.loads(path.read_text())


def spread(values: Iterable[float]) -> dict[str, float]:
    """Mean, sample standard deviation (0 for one value) and count."""
    found = list(values)
    return {
        "mean": statistics.fmean(found),
        "std": statistics.stdev(found) if len(found) > 1 else 0.0,
        "runs": len(found),
    }


def plus_minus(cell: dict[str, float], digits: int = 2) -> str:
    """ "mean ± std" of `spread`; the value alone where there was one run."""
    mean = f"{cell['mean']:.{digits}f}"
    return mean if cell["runs"] == 1 else f"{mean} ± {cell['std']:.{digits}f}"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def compare(variants: Iterable[Variant], seeds: int, score: Callable[[Variant, int], dict[str, float]]) -> dict:
    """Row name -> title, the paper's numbers, every seed's numbers, and their mean and spread."""
    found = {}
    for variant in variants:
        runs = [score(variant, seed) for seed in range(seeds)]
        means = {name: spread(run[name] for run in runs) for name in runs[0]}
        found[variant.name] = {"title": variant.title, "paper": variant.paper, "runs": runs, **means}
    return found


def publish(out: Path, name: str, numbers: dict[str, Any], text: str) -> None:
    """Write <name>.json and <name>.md, and print the text."""
    write_json(out / f"{name}.json", numbers)
    with write_aside(out / f"{name}.md") as aside:
        aside.write_text(text)
    print(text)

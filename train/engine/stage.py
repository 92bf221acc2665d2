"""A trainer's run as a stage: nothing to do, continue or begin; complete and publish. The same for every trainer."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from semdict.pipeline.common.files import write_json
from semdict.train.engine import dist
from semdict.train.engine.run import Place, held


def add_run_arguments(parser: argparse.ArgumentParser, out: str) -> None:
    """--params, --set, --out, --reports, --work, --resume; `out` names the default folder in the help."""
    parser.add_argument("--params", default="params.yaml", type=Path, help="default: params.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a parameter")
    parser.add_argument("--out", type=Path, help=f"the complete run (default runs/<preset>/{out})")
    parser.add_argument("--reports", type=Path, help=f"metrics.json and plots (default reports/<preset>/{out})")
    parser.add_argument("--work", default="work", type=Path, help="where a run waits until it is complete")
    parser.add_argument("--resume", action="store_true", help="continue a killed run; keep a complete one as it is")


def run_stage(
    place: Place, world: dist.World, resume: bool, reports: Path, train: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """Call `train` unless this very run is complete; publish and return its card.

    `train` fills place.folder, returns the numbers of metrics.json on every rank, and continues from a checkpoint where
    there is one. UsageError when `place.out` holds another run.
    """
    card = place.published(resume)
    if card is not None:
        say(world, place, f"{place.out} is complete with these settings; nothing to do")
        return card
    with held(place, world, resume):
        card = place.card(place.folder)
        if card is None:
            others = place.unfinished_others()
            if (place.folder / "checkpoints").exists():
                say(world, place, f"continuing in {place.folder}")
            elif resume and others:
                say(world, place, f"starting anew; unfinished, of other settings: {', '.join(others)}")
            metrics = train()
            card = place.complete({"metrics": metrics}) if world.first else {"metrics": metrics}
        if world.first:
            write_json(reports / "metrics.json", card["metrics"])
            place.publish()
        dist.barrier()
    final = ", ".join(f"{name} {value:.4f}" for name, value in card["metrics"].get("final", {}).items())
    say(world, place, f"{place.out} is complete{': ' + final if final else ''}")
    return card


def say(world: dist.World, place: Place, text: str) -> None:
    """One line, from rank 0."""
    if world.first:
        print(f"{place.kind}: {text}", file=sys.stderr)

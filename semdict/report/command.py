"""`semdict report`: write the page."""

import argparse
from pathlib import Path

from semdict.pipeline.config.params import add_params_arguments, params_of

EXAMPLE = """examples:
  semdict report
  semdict report --preset in1k --out /tmp/in1k.html

One file that needs nothing else: pictures and curves are inside it. Shows what is there and names what is not, with the
command that makes it. Reads reports/PRESET and runs/PRESET and computes nothing."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Whose results, and where the page goes."""
    add_params_arguments(parser)
    parser.add_argument("--preset", help="default: the preset of params.yaml")
    parser.add_argument("--out", type=Path, help="default: reports/PRESET/report.html")


def run(args: argparse.Namespace) -> int:
    """Read, arrange, write."""
    from semdict.report.page import write_page
    from semdict.report.results import Results

    preset = args.preset or params_of(args).preset
    out = args.out or Path("reports") / preset / "report.html"
    missing = write_page(Results(preset), out)
    print(out)
    if missing:
        print(f"{len(missing)} results are not there yet; the page names them and what makes them")
    return 0

"""`semdict report`: writes the page."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from semdict.pipeline.config.params import add_params_arguments, params_of

if TYPE_CHECKING:
    from semdict.report.results import Results
    from semdict.report.sections import Missing

EXAMPLE = """examples:
  semdict report
  semdict report --preset in1k --out /tmp/in1k.html

Writes one self-contained file of less than 10 MB: all pictures and interactive charts are inside, it opens without a
network. Shows the results that exist in reports/PRESET, runs/PRESET and shards/PRESET, runs and samples of any name
among them, and lists what was begun and is not complete with the commands that complete it. Patches of words are cut
from the images where these are on this machine. Trains and scores nothing."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which results to show, and where to write the page."""
    add_params_arguments(parser)
    parser.add_argument("--preset", help="default: the preset of params.yaml")
    parser.add_argument("--out", type=Path, help="default: reports/PRESET/report.html")


def run(args: argparse.Namespace) -> int:
    """Read the results and write the page."""
    from semdict.pipeline.common.publish import check_output
    from semdict.report.results import Results

    preset = args.preset or params_of(args).preset
    out = args.out or Path("reports") / preset / "report.html"
    check_output(out, "html")
    missing = write_page(Results(preset), out)
    print(out)
    if missing:
        print(f"{len(missing)} results are missing; the page lists them with the commands that compute them")
    return 0


def render(results: "Results") -> str:
    """HTML of all results there are; equal results give equal text."""
    import jinja2
    from plotly.offline import get_plotlyjs

    from semdict import __version__
    from semdict.report.sections import Page, absent, head

    page = Page(results)
    loader = jinja2.PackageLoader("semdict.report", package_path="")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    sections = page.sections()
    return environment.get_template("page.html").render(
        preset=results.preset,
        version=__version__,
        title=page.title,
        licence=page.set_summary.get("licence"),
        head=head(page),
        sections=sections,
        missing=absent(results),
        plotly=get_plotlyjs() if any(section.charts for section in sections) else "",
    )


def write_page(results: "Results", out: Path) -> list["Missing"]:
    """Write the page, unless it would not change; returns the missing results. UsageError if `out` is another file."""
    from semdict.pipeline.common.files import atomic_write
    from semdict.pipeline.common.publish import check_output
    from semdict.report.sections import absent

    out = check_output(out, "html")
    text = render(results)
    if not out.exists() or out.read_text() != text:
        with atomic_write(out) as staged:
            staged.write_text(text)
    return absent(results)

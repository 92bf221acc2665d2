"""The page itself: sections through a template, written whole or not at all."""

from pathlib import Path

import jinja2

from semdict import __version__
from semdict.pipeline.common.files import write_aside
from semdict.report.results import Results
from semdict.report.sections import Missing, absent, sections


def render(results: Results) -> str:
    """HTML of everything that is there; the same text for the same results."""
    loader = jinja2.PackageLoader("semdict.report", package_path="")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.get_template("page.html")
    found = {"sections": sections(results), "missing": absent(results)}
    return page.render(preset=results.preset, version=__version__, **found)


def write_page(results: Results, out: Path) -> list[Missing]:
    """Write the page, untouched when nothing changed; what is not there yet."""
    text = render(results)
    if not out.exists() or out.read_text() != text:
        out.parent.mkdir(parents=True, exist_ok=True)
        with write_aside(out) as aside:
            aside.write_text(text)
    return absent(results)

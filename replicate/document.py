"""Copies the comparisons' results into the documents: `python -m replicate.document` after `make replicate`.

Copies what is in reports/demo/replicate/ to docs/results/, and rewrites the tables of docs/replicate.md from there.
"""

import json
from pathlib import Path

from replicate import lease, photographs, vcq
from semdict.pipeline.common.files import write_json
from tools.doc_tables import rewrite

REPORTS, RESULTS, DOCUMENT = Path("reports/demo/replicate"), Path("docs/results"), Path("docs/replicate.md")
TEXTS = {"lease": lease.text, "vcq": vcq.text, "imagenette": photographs.text}


def tables(results: Path) -> dict[str, str]:
    """Name of each comparison -> its tables in Markdown, from <results>/NAME.json."""
    return {name: text(json.loads((results / f"{name}.json").read_text())) for name, text in TEXTS.items()}


def main() -> None:
    """Copy the results and rewrite the document."""
    RESULTS.mkdir(exist_ok=True)
    for name in TEXTS:
        if not (REPORTS / f"{name}.json").exists():
            continue
        write_json(RESULTS / f"{name}.json", json.loads((REPORTS / f"{name}.json").read_text()))
    rewrite(DOCUMENT, tables(RESULTS))


if __name__ == "__main__":
    main()

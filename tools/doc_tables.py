"""Tables inside documents, generated from result files: a table replaces what is between its two comment lines.

The lines are `<!-- NAME -->` and `<!-- end NAME -->`.
"""

from collections.abc import Mapping
from pathlib import Path

from semdict.pipeline.common.files import atomic_write


def replace_tables(document: str, tables: Mapping[str, str]) -> str:
    """The document with each named table replaced; ValueError if its comment lines are missing or out of order."""
    for name, table in tables.items():
        first, last = f"<!-- {name} -->\n", f"<!-- end {name} -->"
        if not 0 <= document.find(first) < document.find(last):
            raise ValueError(f"no {first.strip()} ... {last} to put the table {name!r} between")
        before, rest = document.split(first, 1)
        document = f"{before}{first}{table}{last}{rest.split(last, 1)[1]}"
    return document


def rewrite(path: Path, tables: Mapping[str, str]) -> None:
    """`replace_tables` on a file, which is replaced atomically; the ValueError names the file."""
    try:
        document = replace_tables(path.read_text(), tables)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    with atomic_write(path) as staged:
        staged.write_text(document)

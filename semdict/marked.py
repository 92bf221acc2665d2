"""Tables in documents, made anew from result files between the marks `<!-- NAME -->` and `<!-- end NAME -->`."""

from collections.abc import Mapping
from pathlib import Path

from semdict.pipeline.common.files import write_aside


def with_blocks(document: str, blocks: Mapping[str, str]) -> str:
    """The document with what lies between the marks of every named block replaced; ValueError for marks not there."""
    for name, block in blocks.items():
        first, last = f"<!-- {name} -->\n", f"<!-- end {name} -->"
        if not 0 <= document.find(first) < document.find(last):
            raise ValueError(f"no {first.strip()} ... {last} to put the block {name!r} between")
        before, rest = document.split(first, 1)
        document = f"{before}{first}{block}{last}{rest.split(last, 1)[1]}"
    return document


def rewrite(path: Path, blocks: Mapping[str, str]) -> None:
    """`with_blocks` on a file, which is replaced whole; ValueError names the file."""
    try:
        written = with_blocks(path.read_text(), blocks)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    with write_aside(path) as aside:
        aside.write_text(written)

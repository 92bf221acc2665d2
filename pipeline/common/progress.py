"""Progress of long work on stderr: a bar on a terminal, a line every half minute where the output is a file."""

import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from tqdm import tqdm

LINE_SECONDS = 30.0
LINE = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


def progress(total: int, label: str, unit: str = "img", done: int = 0, quiet: bool = False) -> "tqdm":
    """A tqdm bar over `total` units of which `done` are done; a context manager with `update(n)`.

    `quiet` shows nothing. On a terminal the bar stays after the end.
    """
    from tqdm import tqdm

    common = {"total": total, "desc": label, "unit": unit, "initial": done, "disable": quiet, "smoothing": 0.05}
    if sys.stderr.isatty():
        return tqdm(**common, file=sys.stderr, dynamic_ncols=True)
    rare = {"mininterval": LINE_SECONDS, "maxinterval": LINE_SECONDS, "miniters": 1}
    return tqdm(**common, **rare, file=_Lines(sys.stderr), bar_format=LINE)


class _Lines:
    """A text stream that turns each redrawn bar into a line of its own."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> None:
        if line := text.replace("\r", "").strip():
            self.stream.write(line + "\n")

    def flush(self) -> None:
        self.stream.flush()

"""Cuts the documents' pictures from the demo's results: `python -m demo.figures` after `make demo`."""

from pathlib import Path
from typing import NamedTuple

from PIL import Image

from semdict.pipeline.common.files import atomic_write

REPORTS, RUNS, TARGETS = Path("reports/demo"), Path("runs/demo"), Path("docs/figures")


class Figure(NamedTuple):
    """A picture of the demo, and the ones of its `bands` of equal height that are shown; 1 band = the whole picture."""

    source: Path
    name: str
    bands: int = 1
    shown: tuple[int, ...] = (0,)


FIGURES = (
    Figure(REPORTS / "reconstructions.png", "tokens.png", 4, (0, 2)),  # two textures, different discriminative tokens
    Figure(RUNS / "lease-samples" / "grid.png", "samples.png", 4, (0, 2)),
    Figure(REPORTS / "lease-samples" / "nearest.png", "nearest.png"),
    Figure(REPORTS / "vcq" / "reconstructions.png", "vcq_reconstructions.png", 2, (0,)),
    Figure(RUNS / "ar-samples-guided" / "grid.png", "ar_samples.png", 4, (0, 2)),
    Figure(REPORTS / "entropy" / "entropy.png", "entropy.png"),
)


def cut(figure: Figure, target: Path) -> None:
    """Write the shown bands below each other, in 256 colours."""
    with Image.open(figure.source) as grid:
        height = grid.height // figure.bands
        sheet = Image.new("RGB", (grid.width, height * len(figure.shown)), "white")
        for position, band in enumerate(figure.shown):
            sheet.paste(grid.crop((0, band * height, grid.width, (band + 1) * height)), (0, position * height))
    with atomic_write(target) as staged:
        sheet.quantize(256, dither=Image.Dither.NONE).save(staged, format="PNG", optimize=True)


def main() -> None:
    """Write every figure."""
    for figure in FIGURES:
        cut(figure, TARGETS / figure.name)


if __name__ == "__main__":
    main()

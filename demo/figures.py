"""The README's picture, cut from what the demo's encode stage keeps; `python -m demo.figures` after `make demo`."""

from pathlib import Path

from PIL import Image

from pipeline.files import write_aside

SOURCE, TARGET = Path("reports/demo/reconstructions.png"), Path("docs/figures/tokens.png")
BANDS, SHOWN = 4, (0, 2)  # the grid's bands of eight images; two textures are enough to see the words differ


def main() -> None:
    """Stack the shown bands of the stage's grid."""
    with Image.open(SOURCE) as grid:
        height = grid.height // BANDS
        figure = Image.new("RGB", (grid.width, height * len(SHOWN)), "white")
        for place, band in enumerate(SHOWN):
            figure.paste(grid.crop((0, band * height, grid.width, (band + 1) * height)), (0, place * height))
    with write_aside(TARGET) as aside:
        figure.quantize(256, dither=Image.Dither.NONE).save(aside, format="PNG", optimize=True)


if __name__ == "__main__":
    main()

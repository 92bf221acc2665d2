"""Images inside the page, as data URIs: curves as SVG, pictures as JPEG."""

import base64
import io
from pathlib import Path

from semdict.report.results import Curve

# Okabe and Ito's colours, which colour-blind readers can tell apart
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
WIDTH, HEIGHT = 1280, 1600  # pixels; larger pictures are shrunk


def chart(title: str, curves: dict[str, Curve], chance: float | None = None) -> str:
    """Data URI of one panel: a line per curve, the chance value dashed; equal curves give equal bytes."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 2.7), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    for colour, (name, curve) in zip(COLOURS * (1 + len(curves) // len(COLOURS)), curves.items(), strict=False):
        axes.plot(curve.x, curve.y, color=colour, lw=1.5, label=name)
    if chance is not None:
        axes.axhline(chance, color="#888888", lw=1, ls="--", label=f"chance {chance:.2f}")
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(next(iter(curves.values())).x_name, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    if len(curves) > 1 or chance is not None:
        axes.legend(fontsize=8, framealpha=0.9, edgecolor="none")
    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "semdict", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def inline(path: Path) -> str:
    """Data URI of a picture file as JPEG, at most WIDTH x HEIGHT pixels."""
    from PIL import Image

    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    picture.thumbnail((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=88, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()

"""Curves as SVG inside a page."""

import base64
import io

from semdict.report.results import Curve

# Okabe and Ito's colours, which stay apart for colour-blind readers
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def chart(title: str, curves: dict[str, Curve], chance: float | None = None) -> str:
    """A data URI of one panel: name -> curve, the chance value as a dashed line; the same bytes for the same curves."""
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
    written = io.BytesIO()
    with rc_context({"svg.hashsalt": "semdict", "svg.fonttype": "none"}):
        figure.savefig(written, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(written.getvalue()).decode()

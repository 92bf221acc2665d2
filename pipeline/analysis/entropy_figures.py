"""Figure 2 of arXiv:2605.06207 for any token set: bits that remain at each position, measured and of noise."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from semdict.pipeline.analysis.curves import EntropyCurves
from semdict.pipeline.common.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, distinct for colour-blind readers; later curves lie above earlier ones.
REMAINING = {
    "capacity": ("#0072B2", "--", r"capacity: $\log_2 N - I(t)$"),
    "uniform_null": ("#BBBBBB", "-", r"null: uniform noise over $K_t$"),
    "shuffled_null": ("#E69F00", "-.", "null: columns shuffled"),
    "remaining": ("#D55E00", "-", "measured"),
}
NLL = {"train": ("#56B4E9", "AR model, training images"), "held_out": ("#CC79A7", "AR model, held-out images")}
WIDTHS = {"uniform_null": 5.0}  # visible under another curve
FLAT = 0.02  # bits: a curve that changes by less is flat


def plot_curves(path: Path, sets: list[EntropyCurves]) -> None:
    """A PNG with one row of two panels per set: bits left before position t (its start), bits of each position."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.7 * len(sets)), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(sets), 2, squeeze=False)
    for (left, right), curves in zip(panels, sets, strict=True):
        _remaining(left, curves)
        _per_position(right, curves)
    with atomic_write(path) as staged:
        figure.savefig(staged, format="png")


def _remaining(axes: "Axes", curves: EntropyCurves) -> None:
    """The cliff: up to the position from which all curves are flat."""
    remaining = curves.remaining()
    end = max(_flat_from(bits) for bits in remaining.values())
    positions = np.arange(end + 1)
    for name, (colour, style, label) in REMAINING.items():
        line = {"lw": 2.2, "marker": "o", "ms": 4} if name == "remaining" else {"lw": WIDTHS.get(name, 1.8)}
        axes.plot(positions, _with_end(remaining[name], end), style, color=colour, label=label, **line)
    t_star = curves.numbers()["t_star"]
    if t_star is not None:
        axes.axvline(t_star, color="black", lw=0.8, ls=":", label=f"$t^*$ = {t_star} (equation 2)")
    axes.set_title(f"{curves.name}: N = {curves.rows:,}, K = {_range(curves.sizes)}", fontsize=10, loc="left")
    axes.set_xlabel("positions read, t")
    axes.set_ylabel("bits that remain")
    axes.xaxis.get_major_locator().set_params(integer=True)
    _finish(axes)


def _per_position(axes: "Axes", curves: EntropyCurves) -> None:
    """Of each position: capacity, conditional entropy, and a model's negative log-likelihood."""
    positions = np.arange(len(curves.sizes))
    capacity = np.log2(curves.sizes)
    axes.plot(positions, capacity, "--", color=REMAINING["capacity"][0], lw=1.5, label=r"capacity: $\log_2 K_t$")
    for kind, bits in curves.nll.items():
        colour, label = NLL.get(kind, ("black", kind))
        axes.plot(positions, bits, color=colour, lw=1.0, label=f"{label}: {bits.sum():,.0f} bits in all")
    total = curves.entropy.sum()
    label = f"measured $H(x_t | x_{{<t}})$: {total:.1f} bits in all"
    axes.plot(positions, curves.entropy, color=REMAINING["remaining"][0], lw=2.2, label=label)
    axes.set_title("per position", fontsize=10, loc="left")
    axes.set_xlabel("position t")
    axes.set_ylabel("bits")
    _finish(axes)


def _flat_from(bits: np.ndarray) -> int:
    """The position from which a curve of remaining bits is flat, plus one; at most the length."""
    moving = np.flatnonzero(np.abs(bits - bits[-1]) > FLAT)
    return min(len(bits), int(moving[-1]) + 2) if len(moving) else 1


def _with_end(bits: np.ndarray, end: int) -> np.ndarray:
    """(end + 1,) values; the last one is repeated beyond the sequence."""
    return np.append(bits, bits[-1])[: end + 1]


def _range(sizes: np.ndarray) -> str:
    low, high = int(sizes.min()), int(sizes.max())
    return f"{high:,}" if low == high else f"{low:,}..{high:,}"


def _finish(axes: "Axes") -> None:
    axes.set_ylim(bottom=0)
    axes.margins(x=0.01)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, framealpha=0.9, edgecolor="none")

"""Figures D.1 to D.3 of LEASE for any token set with two codebooks."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from semdict.pipeline.common.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {"gen": "#0072B2", "disc": "#D55E00"}  # Okabe and Ito's
TITLES = {"gen": "generative codebook", "disc": "discriminative codebook"}
PANELS = {  # direction -> the codebook whose tokens are counted, title
    "gen_given_disc": ("disc", "H(GEN | DISC): of each discriminative token"),
    "disc_given_gen": ("gen", "H(DISC | GEN): of each generative token"),
}
BINS = 60


def new_figure(width: float, height: float) -> "Figure":
    """A figure that needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    return figure


def save(figure: "Figure", path: Path, caption: str) -> None:
    """Write a PNG with its caption below, whole or not at all."""
    figure.supxlabel(caption, fontsize=9, x=0.01, ha="left", color="#333333")
    with atomic_write(path) as staged:
        figure.savefig(staged, format="png")


def plot_entropies(
    path: Path, measured: dict[str, np.ndarray], null: dict[str, np.ndarray], bound: float, sizes: dict[str, int]
) -> None:
    """Figure D.1: histograms of both conditional entropies in nats, and of tokens without any relation."""
    figure = new_figure(11, 4.2)
    panels = figure.subplots(1, 2)
    for axes, (name, (codebook, title)) in zip(panels, PANELS.items(), strict=True):
        used, unrelated = (values[np.isfinite(values)] for values in (measured[name], null[name]))
        limit = math.log(max(2, sizes["gen" if codebook == "disc" else "disc"]))
        edges = np.linspace(0, limit, BINS + 1)
        axes.hist(used, edges, color=COLOURS[codebook], label=f"measured, mean {used.mean():.2f} nats")
        label = f"same counts, no relation, mean {unrelated.mean():.2f} nats"
        axes.hist(unrelated, edges, histtype="step", color="black", lw=1.2, label=label)
        under = int((used < bound).sum())
        if bound < limit:
            axes.axvline(bound, color="#666666", ls=":", label=f"{under:,} of {len(used):,} under {bound:g} nats")
        axes.axvline(limit, color="#666666", lw=0.8, ls="--", label=f"largest possible, {limit:.2f} nats")
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("nats")
        axes.set_ylabel("tokens")
        finish(axes)
        axes.legend(fontsize=8, loc="upper left", framealpha=0.9, edgecolor="none")
    save(figure, path, "Uncertainty about a cell's token of one codebook that remains when that of the other is known.")


def plot_class_tokens(path: Path, tops: dict[str, np.ndarray]) -> None:
    """Figure D.2: probability of a class's most frequent tokens, averaged over the classes."""
    figure = new_figure(7, 4)
    axes = figure.subplots()
    for name, top in tops.items():
        ranks = np.arange(1, len(top) + 1)
        label = f"{TITLES[name]}: {top.sum():.1%} in the first {len(top)}"
        axes.plot(ranks, top, color=COLOURS[name], marker="o", ms=3.5, lw=1.8, label=label)
    axes.set_xlabel("rank of the token within its class")
    axes.set_ylabel("probability, mean over classes")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylim(bottom=0)
    finish(axes)
    axes.legend(fontsize=9, edgecolor="none")
    save(figure, path, "Share of a class's cells taken by its most frequent token, its second, ...; mean over classes.")


def plot_pmi(path: Path, gen_ids: np.ndarray, disc_ids: np.ndarray, pmi: np.ndarray, min_count: int) -> None:
    """Figure D.3: pointwise mutual information of the ids of the strongest pairs; negative values are drawn as 0."""
    figure = new_figure(8.5, 8)
    axes = figure.subplots()
    if not pmi.size:
        axes.text(0.5, 0.5, f"no pair occurs {min_count} times", ha="center", transform=axes.transAxes)
    else:
        shown = np.where(np.isfinite(pmi), np.maximum(pmi, 0), 0)
        image = axes.imshow(shown, cmap="magma", vmin=0, interpolation="nearest", aspect="auto")
        figure.colorbar(image, ax=axes, label="PMI, nats", shrink=0.8)
        for ticks, ids in ((axes.set_xticks, disc_ids), (axes.set_yticks, gen_ids)):
            ticks(np.arange(len(ids)), ids.tolist(), fontsize=6, rotation=90 if ids is disc_ids else 0)
    axes.set_xlabel("discriminative token")
    axes.set_ylabel("generative token")
    caption = f"Tokens of the pairs with the highest PMI, among pairs that occur at least {min_count} times; "
    save(figure, path, caption + "black: PMI of 0 or less, or never on one cell.")


def finish(axes: Any) -> None:
    """Light grid, no box."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)

"""Plotly figures as plain dictionaries: lines, rank-frequency curves of codebooks, confusion matrices, bars.

page.js draws them and adds the colours of the page's light or dark theme.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from semdict.report.parts import Chart, duration
from semdict.report.results import Confusion, Curve

# Okabe and Ito's colours, which colour-blind readers can tell apart
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
POINTS = 400  # of a line; longer curves are thinned
MATRIX_CLASSES = 40  # larger confusion matrices are shown as a list of pairs


def lines(
    title: str,
    curves: Mapping[str, Curve],
    chance: float | None = None,
    y_title: str = "",
    log: str = "",
    order: Sequence[str] = (),
) -> Chart | None:
    """One line per curve, the chance value dashed; None without points.

    log: axes of logarithmic scale, of "xy". order: names whose positions decide the colours, so that a run has the same
    colour in every chart.
    """
    drawn = {name: curve for name, curve in curves.items() if curve.x}
    if not drawn:
        return None
    names = list(order or drawn)
    data = [
        {
            "type": "scatter",
            "mode": "lines" if len(curve.x) > 1 else "markers",
            "name": name,
            "x": rounded(thinned(curve.x)),
            "y": rounded(thinned(curve.y)),
            "line": {"color": COLOURS[(names.index(name) if name in names else 0) % len(COLOURS)], "width": 2},
        }
        for name, curve in drawn.items()
    ]
    layout: dict[str, Any] = {
        "xaxis": {"title": {"text": next(iter(drawn.values())).x_name.replace("_", " ")}},
        "yaxis": {"title": {"text": y_title}},
        "showlegend": len(data) > 1 or chance is not None,
    }
    for axis in log:
        layout[f"{axis}axis"]["type"] = "log"
    if chance is not None:
        ends = [min(min(curve.x) for curve in drawn.values()), max(max(curve.x) for curve in drawn.values())]
        line = {"color": "#888888", "width": 1.5, "dash": "dash"}
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": f"chance {chance:.2f}",
                "x": ends,
                "y": [chance] * 2,
                "line": line,
            }
        )
    return Chart(title, {"data": data, "layout": layout})


def usage(counts: Mapping[str, np.ndarray]) -> Chart:
    """Share of all tokens per codebook entry, entries by falling share; (K,) counts of each codebook."""
    curves = {}
    for name, counted in counts.items():
        shares = np.sort(counted)[::-1] / max(1, counted.sum())
        used = shares[shares > 0]
        ranks = np.unique(np.geomspace(1, len(used), POINTS).astype(int)) if len(used) else np.zeros(0, int)
        curves[name] = Curve("share", "rank of the entry", ranks.tolist(), used[ranks - 1].tolist())
    chart = lines("Codebook usage: share of all tokens, by rank", curves, y_title="share of tokens", log="xy")
    return chart or Chart("Codebook usage", {"data": [], "layout": {}})


def confusion(title: str, matrix: Confusion) -> Chart:
    """Share of each class's images (rows) per predicted class (columns), in percent."""
    shares = 100 * matrix.counts / np.maximum(1, matrix.counts.sum(axis=1, keepdims=True))
    heat = {
        "type": "heatmap",
        "x": matrix.classes,
        "y": matrix.classes,
        "z": np.round(shares, 1).tolist(),
        "zmin": 0,
        "zmax": 100,
        "colorscale": [[0, "rgba(0,114,178,0)"], [1, "#0072B2"]],
        "showscale": False,
        "hovertemplate": "%{y} taken for %{x}: %{z} %<extra></extra>",
    }
    axes = {
        "xaxis": {"title": {"text": "predicted"}, "type": "category", "tickangle": -45, "showgrid": False},
        "yaxis": {"title": {"text": "actual"}, "type": "category", "autorange": "reversed", "showgrid": False},
    }
    return Chart(title, {"data": [heat], "layout": {**axes, "showlegend": False, "height": 380}})


def times(stages: Mapping[str, float]) -> Chart:
    """Seconds per stage as horizontal bars, in the order given."""
    bar = {
        "type": "bar",
        "orientation": "h",
        "y": list(stages),
        "x": rounded(stages.values()),
        "text": [duration(seconds) for seconds in stages.values()],
        "hoverinfo": "text+y",
        "marker": {"color": COLOURS[0]},
    }
    layout = {
        "xaxis": {"title": {"text": "seconds"}},
        "yaxis": {"autorange": "reversed", "type": "category"},
        "showlegend": False,
        "height": 90 + 26 * len(stages),
    }
    return Chart("Time per stage", {"data": [bar], "layout": layout}, wide=True)


def thinned(values: Sequence[float]) -> list[float]:
    """At most POINTS of the values, evenly spaced, the first and the last among them."""
    if len(values) <= POINTS:
        return list(values)
    return [values[i] for i in np.linspace(0, len(values) - 1, POINTS).astype(int)]


def rounded(values: Any) -> list[float]:
    """Five significant digits: enough for a picture, a third of the bytes."""
    return [float(f"{value:.5g}") for value in values]

"""`semdict evaluate umap`: two-dimensional pictures of an encoder's latents by UMAP (Sorcen, figures F.1 and F.2).

N images, E feature width.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from semdict.pipeline.common.errors import UsageError, suggestion
from semdict.pipeline.common.files import atomic_write
from semdict.train.eval.features import FeatureSet
from semdict.train.eval.setup import Setup, add_common_arguments

if TYPE_CHECKING:
    from semdict.pipeline.config.schema.evaluate import EvaluateUmap

EXAMPLE = """examples:
  semdict evaluate umap --model runs/in1k/lease
  semdict evaluate umap --model runs/in1k/mage --set evaluate.umap.classes=[n01440764,n02102040,n03888257]

Needs umap-learn: pip install 'semdict[umap]'. Writes umap.png and umap.parquet (x, y, label, class, deviation) of all
test images, coloured by their distance from the mean latent; with evaluate.umap.classes also umap_classes.png and
umap_classes.parquet of the training images of those classes, coloured by class. umap.json states the protocol."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, data and output folder."""
    add_common_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Embed the test images, and the training images of the classes that are named; write pictures and coordinates."""
    require_umap()
    setup = Setup.of(args)
    cfg = setup.cfg.umap
    test_source = setup.source(setup.cfg.test_splits)
    test = setup.test_set(test_source)
    deviation = deviations(test.first)
    points = embed(np.concatenate([test.first, test.first.mean(axis=0, keepdims=True)]), cfg)
    write_points(setup.out / "umap.parquet", points[:-1], test.labels, test.names, deviation)
    draw_deviation(setup.out / "umap.png", points[:-1], points[-1], deviation, setup.encoder.name)
    about: dict[str, Any] = {"test": test.about}
    if cfg.classes:
        train_source = setup.source(setup.cfg.train_splits)
        named = of_classes(setup.store.get(train_source, setup.test_views(train_source)), cfg.classes)
        points = embed(named.first, cfg)
        write_points(setup.out / "umap_classes.parquet", points, named.labels, named.names, deviations(named.first))
        draw_classes(setup.out / "umap_classes.png", points, named, setup.encoder.name)
        about["train"] = {**named.about, "images": len(named.labels)}
    protocol = setup.protocol(measure="UMAP of the latents", **about, **cfg.model_dump())
    setup.write("umap", {"umap_images": float(len(test.labels))}, protocol)
    print(f"umap: {setup.out}/umap.png", file=sys.stderr)
    return 0


def require_umap() -> None:
    """UsageError with the command that installs umap-learn where it is missing."""
    from importlib.util import find_spec

    if find_spec("umap") is None:
        raise UsageError("UMAP needs the package umap-learn; pip install 'semdict[umap]'")


def embed(features_NE: np.ndarray, cfg: "EvaluateUmap") -> np.ndarray:
    """(N, 2) float32 coordinates; the same for the same seed. UsageError for fewer images than neighbours."""
    import umap

    if len(features_NE) <= cfg.neighbours:
        raise UsageError(
            f"{len(features_NE)} images are too few for evaluate.umap.neighbours {cfg.neighbours}; lower it"
        )
    reducer = umap.UMAP(
        n_neighbors=cfg.neighbours, min_dist=cfg.min_dist, metric=cfg.metric, random_state=cfg.seed, n_jobs=1
    )
    return reducer.fit_transform(np.asarray(features_NE, np.float32)).astype(np.float32)


def deviations(features_NE: np.ndarray) -> np.ndarray:
    """(N,) distances from the mean latent in units of their root mean square, the standard deviation of the set."""
    centred = np.asarray(features_NE, np.float64) - np.asarray(features_NE, np.float64).mean(axis=0)
    distance = np.sqrt((centred**2).sum(axis=1))
    return distance / max(1e-12, float(np.sqrt((distance**2).mean())))


def of_classes(features: FeatureSet, classes: list[str]) -> FeatureSet:
    """The images of some classes, by name; UsageError for a name that no image has."""
    known = {features.names[label]: int(label) for label in np.unique(features.labels)}
    for name in classes:
        if name not in known:
            raise UsageError(f"evaluate.umap.classes: there are no images of {name!r}; {suggestion(name, known)}")
    rows = np.flatnonzero(np.isin(features.labels, [known[name] for name in classes]))
    return FeatureSet({"named": features.first[rows]}, features.labels[rows], features.names, features.about)


def write_points(path: Path, points: np.ndarray, labels: np.ndarray, names: list[str], deviation: np.ndarray) -> None:
    """A Parquet file with one row per image, in the order of the features."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {
        "x": pa.array(points[:, 0]), "y": pa.array(points[:, 1]), "label": pa.array(labels.astype(np.int32)),
        "class": pa.array([names[label] for label in labels.tolist()]), "deviation": pa.array(deviation),
    }  # fmt: skip
    with atomic_write(path) as staged:
        pq.write_table(pa.table(columns), staged)


def draw_deviation(path: Path, points: np.ndarray, mean: np.ndarray, deviation: np.ndarray, name: str) -> None:
    """Figure F.1: every image a point, coloured by its distance from the mean latent, which is the black dot."""
    figure, axes = _axes()
    colours = axes.scatter(*points.T, c=deviation, s=_size(len(points)), cmap="viridis", linewidths=0, rasterized=True)
    axes.plot(*mean, "o", color="black", ms=7, label="mean latent")
    figure.colorbar(colours, ax=axes, label="distance from the mean, standard deviations", shrink=0.8)
    axes.set_title(f"{name}: {len(points):,} images", fontsize=10, loc="left")
    axes.legend(fontsize=8, edgecolor="none")
    _save(figure, path)


def draw_classes(path: Path, points: np.ndarray, features: FeatureSet, name: str) -> None:
    """Figure F.2: images of some classes, coloured by class."""
    from matplotlib import colormaps

    figure, axes = _axes()
    present = np.unique(features.labels)
    palette = colormaps["tab10" if len(present) <= 10 else "tab20"]
    for number, label in enumerate(present):
        rows = features.labels == label
        colour = palette(number % palette.N)
        axes.scatter(*points[rows].T, s=_size(len(points)), color=colour, linewidths=0, label=features.names[label])
    axes.set_title(f"{name}: {len(points):,} images of {len(present)} classes", fontsize=10, loc="left")
    axes.legend(fontsize=8, edgecolor="none", loc="center left", bbox_to_anchor=(1, 0.5), markerscale=2)
    _save(figure, path)


def _axes() -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5.6), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_xticks([])
    axes.set_yticks([])
    return figure, axes


def _size(count: int) -> float:
    """Area of a point in square points: fewer images, larger points."""
    return float(np.clip(40_000 / max(1, count), 1.5, 30))


def _save(figure: Any, path: Path) -> None:
    with atomic_write(path) as staged:
        figure.savefig(staged, format="png")

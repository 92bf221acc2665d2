"""Stage `kmeans`: sampled teacher features to the (K, D) dictionary of discriminative words."""

import argparse
import sys
from pathlib import Path

import numpy as np

from semdict.pipeline.common.errors import SemdictError, WeightsError
from semdict.pipeline.common.files import atomic_write, write_json
from semdict.pipeline.common.publish import check_output
from semdict.pipeline.common.safeload import load_array
from semdict.pipeline.config import paths as places
from semdict.pipeline.config.params import add_params_arguments, params_of
from semdict.pipeline.config.schema import Params
from semdict.pipeline.execute.locks import interrupt_on_signals, lock
from semdict.pipeline.execute.store import WORK
from semdict.pipeline.kmeans.clustering import train_centroids

EXAMPLE = """example:
  semdict kmeans                                   what `dvc repro kmeans` runs
  semdict kmeans --set kmeans.centroids=km_16k.npy plug in an existing dictionary"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Paths default to the preset's own."""
    add_params_arguments(parser)
    parser.add_argument("--features", type=Path, help="default: data/<preset>/features.zarr")
    parser.add_argument("--out", type=Path, help="default: data/<preset>/kmeans/centroids.npy")
    parser.add_argument("--reports", type=Path, help="default: reports/<preset>")
    parser.add_argument("--work", type=Path, default=WORK, help="where the lock lies (default: work)")


def run(args: argparse.Namespace) -> int:
    """Cluster, or take over the dictionary that the user has."""
    settings = params_of(args)
    out = args.out or places.centroids(settings.preset)
    check_output(out, "array")
    reports = args.reports or Path("reports") / settings.preset
    with lock(f"kmeans-{settings.preset}", args.work), interrupt_on_signals():
        if settings.kmeans.centroids:
            _plug_in(settings, out, reports)
        else:
            _cluster(settings, args.features or places.features(settings.preset), out, reports)
    return 0


def _plug_in(settings: Params, out: Path, reports: Path) -> None:
    """Check an existing dictionary and copy it; words keep their numbers."""
    path = settings.kmeans.centroids or ""
    centroids = load_array(path)
    if centroids.ndim != 2 or not np.issubdtype(centroids.dtype, np.floating):
        raise WeightsError(f"{path} holds {centroids.dtype} {centroids.shape}, a dictionary is float (K, D)")
    if len(centroids) != settings.kmeans.k:
        raise WeightsError(f"{path} holds {len(centroids)} words, kmeans.k says {settings.kmeans.k}; make them agree")
    if not np.isfinite(centroids).all():
        row = int(np.flatnonzero(~np.isfinite(centroids).all(axis=1))[0])
        raise WeightsError(f"{path}: word {row} holds NaN or Inf")
    _write(out, centroids.astype(np.float32), reports, {"engine": f"given: {Path(path).name}"}, [])


def _cluster(settings: Params, features: Path, out: Path, reports: Path) -> None:
    """K-means on the sample, on a GPU where FAISS or torch has one."""
    import zarr

    if not (features / "features").exists():
        raise SemdictError(f"{features} holds no sampled features; run `dvc repro sample_features`")
    array = zarr.open_array(features / "features", mode="r")
    chosen = settings.kmeans
    result = train_centroids(
        array[:],
        chosen.k,
        iterations=chosen.iterations,
        seed=chosen.seed,
        engine=chosen.engine,
        max_points_per_centroid=chosen.max_points_per_centroid,
        device=settings.runtime.device,
    )
    metrics = {
        "engine": result.engine,
        "points": int(array.shape[0]),
        "words": int(chosen.k),
        "objective": float(result.objective[-1]),
        "splits": int(np.sum(result.splits)),
        "imbalance": float(np.atleast_1d(result.imbalance)[-1]),
    }
    _write(out, result.centroids, reports, metrics, list(result.objective))


def _write(out: Path, centroids: np.ndarray, reports: Path, metrics: dict, objective: list[float]) -> None:
    """centroids.npy, kmeans.json (metrics) and kmeans_objective.csv (a DVC plot)."""
    with atomic_write(reports / "kmeans_objective.csv") as tmp_path:
        lines = [f"{i},{value:.9g}" for i, value in enumerate(objective)]
        tmp_path.write_text("\n".join(["iteration,objective", *lines]) + "\n")
    write_json(reports / "kmeans.json", metrics)
    with atomic_write(out) as tmp_path, tmp_path.open("wb") as file:
        np.save(file, np.ascontiguousarray(centroids, dtype=np.float32))
    print(f"{out}: {centroids.shape[0]} words of width {centroids.shape[1]} ({metrics['engine']})", file=sys.stderr)

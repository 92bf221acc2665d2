"""Stage `kmeans`: sampled teacher features to the (K, D) centroids of the discriminative codebook."""

import argparse
import sys
from pathlib import Path

import numpy as np

from semdict.pipeline.common.digests import check_sums, forget_digest, record_digest
from semdict.pipeline.common.errors import SemdictError, WeightsError
from semdict.pipeline.common.files import atomic_write, write_json
from semdict.pipeline.common.publish import check_output
from semdict.pipeline.common.safeload import load_centroids
from semdict.pipeline.config import paths
from semdict.pipeline.config.params import add_params_arguments, params_of
from semdict.pipeline.config.schema import Params
from semdict.pipeline.execute.locks import interrupt_on_signals, lock
from semdict.pipeline.execute.store import WORK
from semdict.pipeline.kmeans.clustering import train_centroids

EXAMPLE = """example:
  semdict kmeans                                   what `dvc repro kmeans` runs
  semdict kmeans --set kmeans.centroids=km_16k.npy use existing centroids"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Paths default to the preset's own."""
    add_params_arguments(parser)
    parser.add_argument("--features", type=Path, help="default: data/<preset>/features.zarr")
    parser.add_argument("--out", type=Path, help="default: data/<preset>/kmeans/centroids.npy")
    parser.add_argument("--reports", type=Path, help="default: reports/<preset>")
    parser.add_argument("--work", type=Path, default=WORK, help="where the lock lies (default: work)")


def run(args: argparse.Namespace) -> int:
    """Cluster the sampled features, or copy the centroids that kmeans.centroids names."""
    params = params_of(args)
    out = args.out or paths.centroids(params.preset)
    check_output(out, "array")
    reports = args.reports or Path("reports") / params.preset
    with lock(f"kmeans-{params.preset}", args.work), interrupt_on_signals():
        if params.kmeans.centroids:
            centroids = existing_centroids(params.kmeans.centroids, params.kmeans.k)
            _write(out, centroids, reports, {"engine": f"file {Path(params.kmeans.centroids).name}"}, [])
        else:
            _cluster(params, args.features or paths.features(params.preset), out, reports)
    return 0


def existing_centroids(path: str, k: int) -> np.ndarray:
    """(K, D) float32 centroids of a .npy file, in their order; WeightsError if they are not k finite rows."""
    centroids = load_centroids(path)
    if len(centroids) != k:
        raise WeightsError(f"{path} holds {len(centroids)} centroids, kmeans.k is {k}; make them agree")
    return centroids


def _cluster(params: Params, features: Path, out: Path, reports: Path) -> None:
    """K-means on the sample, on a GPU if FAISS or torch has one."""
    import zarr

    if not (features / "features").exists():
        raise SemdictError(f"{features} holds no sampled features; run `dvc repro sample_features`")
    check_sums(features, "run `dvc repro -f sample_features`")
    array = zarr.open_array(features / "features", mode="r")
    cfg = params.kmeans
    result = train_centroids(
        array,
        cfg.k,
        iterations=cfg.iterations,
        seed=cfg.seed,
        engine=cfg.engine,
        max_points_per_centroid=cfg.max_points_per_centroid,
        device=params.runtime.device,
    )
    metrics = {
        "engine": result.engine,
        "points": int(array.shape[0]),
        "centroids": int(cfg.k),
        "objective": float(result.objective[-1]),
        "splits": int(np.sum(result.splits)),
        "imbalance": float(np.atleast_1d(result.imbalance)[-1]),
    }
    _write(out, result.centroids, reports, metrics, list(result.objective))


def _write(out: Path, centroids: np.ndarray, reports: Path, metrics: dict, objective: list[float]) -> None:
    """Write centroids.npy with its digest, kmeans.json (metrics) and kmeans_objective.csv (a DVC plot)."""
    with atomic_write(reports / "kmeans_objective.csv") as tmp_path:
        lines = [f"{i},{value:.9g}" for i, value in enumerate(objective)]
        tmp_path.write_text("\n".join(["iteration,objective", *lines]) + "\n")
    write_json(reports / "kmeans.json", metrics)
    forget_digest(out)
    with atomic_write(out) as tmp_path, tmp_path.open("wb") as file:
        np.save(file, np.ascontiguousarray(centroids, dtype=np.float32))
    record_digest(out)
    print(f"{out}: {centroids.shape[0]} centroids of width {centroids.shape[1]} ({metrics['engine']})", file=sys.stderr)

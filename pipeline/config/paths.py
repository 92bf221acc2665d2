"""Where a stage leaves what other stages read.

Each is a folder of its own, never a bare file: `make preset` makes them empty beforehand, and then `dvc repro --dry`,
which hashes every dependency before it prints a stage, can show a graph of which nothing has run yet.
"""

from pathlib import Path

DATA = Path("data")


def manifest(preset: str) -> Path:
    """The manifest of a preset's images."""
    return DATA / preset / "manifest" / "manifest.parquet"


def features(preset: str) -> Path:
    """The sampled patch features, a zarr folder."""
    return DATA / preset / "features.zarr"


def centroids(preset: str) -> Path:
    """The discriminative codebook."""
    return DATA / preset / "kmeans" / "centroids.npy"

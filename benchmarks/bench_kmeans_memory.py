"""K-means memory when the dataset grows tenfold: the sample is bounded, so the peak must not grow.

    python -m benchmarks.bench_kmeans_memory

Each size runs in a separate process; the figure is its peak resident memory above that of a process that only imports
the same modules. Ours samples a fixed number of patches evenly over all images (`sample_features`) and clusters them;
the baseline keeps the features of every patch and passes them to FAISS, as the published scripts do. Features are
random, so that only their handling is measured.
"""

import resource
import sys

import faiss
import numpy as np

from benchmarks.report import arguments, in_child, machine, publish
from semdict.pipeline.kmeans.clustering import train_centroids
from semdict.pipeline.kmeans.sample_features import points_per_row, positions_of

K, WIDTH, PATCHES, ITERATIONS, POINTS = 256, 64, 256, 5, 65_536


def features_of(image: int) -> np.ndarray:
    """(PATCHES, WIDTH) float32 random features that stand for the teacher's features of one image."""
    return np.random.default_rng(image).standard_normal((PATCHES, WIDTH), dtype=np.float32)


def ours(images: int) -> None:
    """The sampling of `semdict sample-features`, then the k-means of `semdict kmeans`."""
    counts = points_per_row(images, POINTS, PATCHES)
    sample = np.empty((int(counts.sum()), WIDTH), np.float16)
    start = 0
    for image, count in enumerate(counts):
        sample[start : start + count] = features_of(image)[positions_of(image, int(count), PATCHES, seed=0)]
        start += count
    train_centroids(sample, K, iterations=ITERATIONS, engine="faiss", device="cpu")


def plain(images: int) -> None:
    """K-means over every patch of every image."""
    features = np.concatenate([features_of(image) for image in range(images)])
    faiss.Kmeans(WIDTH, K, niter=ITERATIONS, seed=1).train(features)


KINDS = {"ours": ours, "plain": plain, "idle": lambda images: None}


def child(kind: str, images: str) -> None:
    """Run one kind and print this process's peak memory in MB."""
    KINDS[kind](int(images))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def peak(kind: str, images: int) -> float:
    return float(in_child("benchmarks.bench_kmeans_memory", "--child", kind, str(images)).split()[-1])


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:4])
        return
    parser = arguments(__doc__, "kmeans_memory")
    args = parser.parse_args()
    images = [200, 2_000] if args.small else [1_500, 15_000]
    figures = {**machine(), "k": K, "width": WIDTH, "images": images, "points": POINTS}
    idle = peak("idle", 0)
    for kind in ("ours", "plain"):
        small, large = (round(peak(kind, n) - idle, 1) for n in images)
        figures[kind] = {"mb": [small, large], "growth": round(large / small, 2)}
    publish(args.out, figures)


if __name__ == "__main__":
    main()

"""k-means against brute force, the two engines against each other, and the golden assignment."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from semdict.pipeline.common import nearest as search
from semdict.pipeline.common.errors import SemdictError, WeightsError
from semdict.pipeline.kmeans import clustering, faiss_engine
from semdict.pipeline.kmeans.clustering import assign, train_centroids
from semdict.pipeline.kmeans.stage import existing_centroids

ENGINES = ("faiss", "torch")


def blobs(points: int = 600, width: int = 8, centres: int = 12, seed: int = 0) -> np.ndarray:
    """Points around centres of very unequal size."""
    rng = np.random.default_rng(seed)
    share = np.arange(1, centres + 1) / np.arange(1, centres + 1).sum()
    middles = rng.normal(size=(centres, width)) * 4
    noise = rng.normal(size=(points, width), scale=0.3)
    return (middles[rng.choice(centres, points, p=share)] + noise).astype(np.float32)


def plain_lloyd(points: np.ndarray, centroids: np.ndarray, iterations: int) -> tuple[np.ndarray, list[float]]:
    """Lloyd's iteration in float64 with all distances; for data where no cluster gets empty."""
    points, centroids, curve = points.astype(np.float64), centroids.astype(np.float64), []
    for _ in range(iterations):
        distances = np.square(points[:, None] - centroids[None]).sum(-1)
        ids = distances.argmin(1)
        curve.append(distances.min(1).mean())
        centroids = np.stack([points[ids == word].mean(0) for word in range(len(centroids))])
    return centroids, curve


@pytest.mark.golden
def test_golden_assignment(golden):
    io = np.load(golden / "kmeans_assign.npz")
    ids = assign(torch.from_numpy(io["features"]), torch.from_numpy(io["centroids"]))
    assert ids.dtype == torch.int64 and ids.shape == (2000,)
    assert np.array_equal(ids.numpy(), io["ids"])
    assert np.array_equal(assign(io["features"], io["centroids"]), io["ids"])
    cosine = torch.nn.functional.normalize(torch.from_numpy(io["features"]))
    words = torch.nn.functional.normalize(torch.from_numpy(io["centroids"]))
    assert (assign(cosine, words).numpy() != io["ids"]).sum() > 100, "these numbers would not notice cosine"


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 30), st.integers(1, 9), st.integers(0, 10**6), st.integers(1, 64))
def test_assignment_is_the_float64_argmin(points, words, width, seed, cells):
    rng = np.random.default_rng(seed)
    x, c = rng.normal(size=(points, width)), rng.normal(size=(words, width)) * 2
    x, c = x.astype(np.float32), c.astype(np.float32)
    distances = np.square(x[:, None].astype(np.float64) - c[None]).sum(-1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "CPU_CELLS", cells)  # chunks of a few rows: their edges must not show
        got = assign(torch.from_numpy(x), torch.from_numpy(c)).numpy()
    assert np.allclose(distances[np.arange(points), got], distances.min(1), atol=1e-4)


def test_ties_go_to_the_lowest_id():
    codes = torch.tensor([[5.0, 5.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [-1.0, 0.0]])
    points = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0], [0.9, 0.1]]).repeat(500, 1)
    assert assign(points, codes).tolist() == [1, 1, 1, 1] * 500
    assert assign(points.half(), codes).tolist() == [1, 1, 1, 1] * 500


def test_assignment_ignores_autocast_and_leaves_precision_as_it_was():
    rng = torch.Generator().manual_seed(0)
    points, codes = torch.randn(500, 64, generator=rng), torch.randn(200, 64, generator=rng)
    want = (points.double()[:, None] - codes.double()).square().sum(-1).argmin(1)
    before = torch.get_float32_matmul_precision()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(assign(points, codes), want)
        assert not torch.equal((codes.square().sum(1) - 2 * (points @ codes.T)).argmin(1), want), "proves nothing"
    assert torch.get_float32_matmul_precision() == before


def test_assignment_makes_no_points_by_centroids_tensor():
    points, codes = torch.zeros(60_000, 4), torch.randn(2048, 4)  # (N, K) float32 would be 490 MB, (N, K, D) 2 GB
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        assign(points, codes)
    peak = max(event.cpu_memory_usage / max(event.count, 1) for event in profile.key_averages())
    assert 0 < peak <= 80e6


def test_assignment_refuses_points_without_a_nearest_centroid():
    points = np.zeros((7, 3), np.float32)
    points[4, 1] = np.nan
    for bad in (points, torch.from_numpy(points)):
        with pytest.raises(SemdictError, match="row 4"):
            assign(bad, np.ones((2, 3), np.float32))
    with pytest.raises(SemdictError, match=r"\(7, 3\).*\(2, 5\)"):
        assign(torch.zeros(7, 3), torch.zeros(2, 5))


@pytest.mark.parametrize("engine", ENGINES)
def test_training_is_lloyds_iteration(engine):
    points = blobs()
    start = points[np.random.default_rng(1).choice(len(points), 9, replace=False)]
    want, curve = plain_lloyd(points, start, 6)
    got = train_centroids(points, 9, iterations=6, engine=engine, init=start, device="cpu")
    assert got.objective == pytest.approx(curve, rel=1e-3)
    ids = np.square(points[:, None].astype(np.float64) - want[None]).sum(-1).argmin(1)
    order = np.argsort(-np.bincount(ids, minlength=9), kind="stable")
    assert np.allclose(got.centroids, want[order], atol=1e-4)
    assert got.splits == [0] * 6 and got.engine.startswith(engine) and got.points == 600


def test_engines_agree_even_where_clusters_run_empty():
    points = blobs(seed=2)
    start = points[:20].copy()
    start[[3, 7, 11]] += 1e3  # nobody is near these
    one, two = (train_centroids(points, 20, 8, engine=engine, init=start, device="cpu") for engine in ENGINES)
    assert one.splits == two.splits and one.splits[0] == 3
    assert np.allclose(one.centroids, two.centroids, atol=1e-3)
    assert one.objective == pytest.approx(two.objective, rel=1e-3)
    assert one.imbalance == pytest.approx(two.imbalance, rel=1e-3)
    assert np.array_equal(one.counts, two.counts) and one.counts.min() > 0


def test_engines_start_alike_without_init():
    points = blobs(seed=5)
    one, two = (train_centroids(points, 15, 5, seed=4, engine=engine, device="cpu") for engine in ENGINES)
    assert np.allclose(one.centroids, two.centroids, atol=1e-3)
    other = train_centroids(points, 15, 5, seed=5, engine="torch", device="cpu")
    assert not np.allclose(other.centroids, two.centroids, atol=1e-3)


@pytest.mark.parametrize("engine", ENGINES)
def test_centroids_are_numbered_by_falling_frequency(engine):
    points = blobs(seed=7)
    got = train_centroids(points, 12, 5, engine=engine, device="cpu")
    counts = np.bincount(assign(points, got.centroids), minlength=12)
    assert np.array_equal(counts, got.counts) and (np.diff(counts) <= 0).all() and counts[0] > counts[-1]
    assert got.centroids.dtype == np.float32 and got.objective[-1] < got.objective[0]


@pytest.mark.parametrize("engine", ENGINES)
def test_same_seed_same_bytes(engine):
    runs = [train_centroids(blobs(), 10, 4, seed=3, engine=engine, device="cpu") for _ in range(2)]
    assert runs[0].centroids.tobytes() == runs[1].centroids.tobytes() and runs[0].objective == runs[1].objective


def test_torch_engine_does_not_depend_on_its_chunks(monkeypatch):
    points = blobs()
    whole = train_centroids(points, 10, 4, engine="torch", device="cpu")
    monkeypatch.setattr(search, "CPU_CELLS", 70)
    monkeypatch.setattr(clustering, "SLAB_BYTES", 500)
    parts = train_centroids(points, 10, 4, engine="torch", device="cpu")
    assert np.allclose(whole.centroids, parts.centroids, atol=1e-6) and np.array_equal(whole.counts, parts.counts)


@pytest.mark.parametrize("engine", ENGINES)
def test_half_precision_memory_maps_are_sampled(tmp_path, engine, monkeypatch):
    points = blobs(3000).astype(np.float16)
    points.tofile(tmp_path / "features")
    stored = np.memmap(tmp_path / "features", dtype=np.float16, mode="r", shape=points.shape)
    monkeypatch.setattr(clustering, "SLAB_BYTES", 8 * 4 * 100)
    got = train_centroids(stored, 6, 4, engine=engine, max_points_per_centroid=50, device="cpu")
    assert got.points == 300 == got.counts.sum()
    drawn = np.sort(np.random.default_rng(0).choice(3000, 300, replace=False, shuffle=False))
    same = train_centroids(points[drawn].astype(np.float32), 6, 4, engine=engine, device="cpu")
    assert np.array_equal(got.centroids, same.centroids)
    tensors = train_centroids(torch.from_numpy(points), 6, 4, engine=engine, max_points_per_centroid=50, device="cpu")
    assert np.array_equal(got.centroids, tensors.centroids)


def test_zarr_features(tmp_path):
    zarr = pytest.importorskip("zarr")
    points = blobs(500).astype(np.float16)
    stored = zarr.create_array(str(tmp_path / "f.zarr"), data=points, chunks=(64, 8))
    got = train_centroids(stored, 6, 3, engine="torch", device="cpu")
    assert np.array_equal(got.centroids, train_centroids(points, 6, 3, engine="torch", device="cpu").centroids)


def test_reading_memory_is_flat(tmp_path, monkeypatch):
    """Ten times the features, the same sample: no slab read is larger."""
    reads = []

    class Counting:
        shape, dtype = (50_000, 16), np.dtype(np.float16)

        def __getitem__(self, rows):
            reads.append(rows.stop - rows.start)
            return np.random.default_rng(rows.start).normal(size=(rows.stop - rows.start, 16)).astype(np.float16)

    monkeypatch.setattr(clustering, "SLAB_BYTES", 16 * 4 * 1000)
    got = train_centroids(Counting(), 8, 2, engine="torch", max_points_per_centroid=40, device="cpu")
    assert got.points == 320 and max(reads) == 1000


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_features_that_are_not_finite_are_refused_by_row(engine, bad, monkeypatch):
    monkeypatch.setattr(clustering, "SLAB_BYTES", 8 * 4 * 100)
    points = blobs()
    points[433, 5] = bad
    with pytest.raises(SemdictError, match="row 433 "):
        train_centroids(points, 5, 2, engine=engine, device="cpu")


@pytest.mark.parametrize("engine", ENGINES)
def test_too_few_distinct_points(engine):
    points = np.repeat(blobs(7), 30, axis=0)
    with pytest.raises(SemdictError, match=r"8 distinct points.*210 points has 7"):
        train_centroids(points, 8, 2, engine=engine, device="cpu")
    got = train_centroids(points, 7, 3, engine=engine, device="cpu")
    assert got.objective[-1] == pytest.approx(0, abs=1e-4) and got.counts.tolist() == [30] * 7


@pytest.mark.parametrize("engine", ENGINES)
def test_as_many_centroids_as_points(engine):
    points = blobs(9)
    got = train_centroids(points, 9, 2, engine=engine, device="cpu")
    assert got.counts.tolist() == [1] * 9 and len(got.objective) == 2
    assert {row.tobytes() for row in got.centroids} == {row.tobytes() for row in points}


def test_wrong_arguments_are_refused():
    with pytest.raises(SemdictError, match="auto, faiss or torch"):
        train_centroids(blobs(), 3, engine="scikit")
    with pytest.raises(SemdictError, match=r"\(3, 4\), expected \(3, 8\)"):
        train_centroids(blobs(), 3, init=np.zeros((3, 4)), device="cpu")
    if not torch.cuda.is_available():
        with pytest.raises(SemdictError, match="no such GPU"):
            train_centroids(blobs(), 3, device="cuda")


def test_faiss_is_tried_on_a_gpu_in_a_process_of_its_own(monkeypatch):
    """Some GPU builds abort the process where they lack kernels for the GPU; the trial reports that instead."""
    faiss_engine.faiss_gpu_error.cache_clear()
    if not torch.cuda.is_available():
        assert faiss_engine.faiss_gpu_error() != ""
    trials = {"import os; os.abort()": "status -6", "raise RuntimeError('no kernel image')": "no kernel", "pass": ""}
    for script, reason in trials.items():
        faiss_engine.faiss_gpu_error.cache_clear()
        monkeypatch.setattr(faiss_engine, "GPU_TRIAL", script)
        error = faiss_engine.faiss_gpu_error()
        assert reason in error and bool(error) == bool(reason)
    faiss_engine.faiss_gpu_error.cache_clear()


def test_a_gpu_that_faiss_cannot_use_is_left_to_torch(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(clustering, "faiss_gpu_error", lambda _: "no kernel image")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert clustering._select_engine("auto", "auto")[1:] == (f"torch {torch.__version__} cuda", ["cuda"])
    assert "no kernel image" in capsys.readouterr().err
    assert clustering._select_engine("faiss", "auto")[2] == ["cpu"]
    with pytest.raises(SemdictError, match=r"no kernel image.*kmeans\.engine: torch"):
        clustering._select_engine("faiss", "cuda")


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (np.zeros((3, 4), np.int64), r"int64 \(3, 4\)"),
        (np.zeros(12), r"float64 \(12,\)"),
        (np.ones((4, 4), np.float16), "4 centroids, kmeans.k is 3"),
        (np.array([[1.0], [1e306], [2.0]]), "centroid 1 holds NaN, Inf or more than float32"),
        (np.array([[1.0], [2.0], [np.nan]], np.float32), "centroid 2"),
    ],
)
def test_existing_centroids_are_checked_as_they_are_used(tmp_path, stored, message):
    np.save(tmp_path / "c.npy", stored)
    with pytest.raises(WeightsError, match=message):
        existing_centroids(str(tmp_path / "c.npy"), 3)
    np.save(tmp_path / "c.npy", np.arange(6.0).reshape(3, 2))
    assert existing_centroids(str(tmp_path / "c.npy"), 3).dtype == np.float32


def test_without_faiss_the_torch_engine_is_used_and_faiss_is_imported_late():
    code = (
        "import sys; import semdict.pipeline.kmeans.clustering as km; assert 'faiss' not in sys.modules\n"
        "km.importlib.util.find_spec = lambda name: None\n"
        "import numpy as np; x = np.random.default_rng(0).normal(size=(50, 4))\n"
        "assert km.train_centroids(x, 3, 2).engine.startswith('torch')\n"
        "try: km.train_centroids(x, 3, 2, engine='faiss')\n"
        "except km.SemdictError as error: assert 'not installed' in str(error)\n"
        "else: raise SystemExit('faiss was promised')\n"
        "assert 'faiss' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

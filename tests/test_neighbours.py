"""The neighbour table that travels with token shards."""

import numpy as np
import pytest

from semdict.pipeline.shards import open_shards
from tests.token_sets import make_set, write


def test_neighbours_are_those_of_brute_force(tmp_path):
    rng = np.random.default_rng(0)
    centroids = rng.standard_normal((300, 8)) * rng.uniform(0.1, 9, (300, 1))
    shards = open_shards(write(tmp_path / "s", *make_set(), centroids=centroids.astype(np.float32)))
    unit = centroids / np.linalg.norm(centroids, axis=1, keepdims=True)
    cosine = unit @ unit.T
    want = np.argsort(-cosine, axis=1)[:, :6]
    ids, weights = shards.neighbours
    assert np.array_equal(ids, want) and np.array_equal(ids[:, 0], np.arange(300))
    near = np.exp(np.take_along_axis(cosine, want, 1) / 0.1)
    assert np.allclose(weights, near / near.sum(axis=1, keepdims=True), atol=1e-5)
    assert np.array_equal(shards.centroids, centroids.astype(np.float32))


def test_duplicate_centroids_keep_self_first():
    from semdict.pipeline.kmeans.neighbours import neighbour_table

    centroids = np.repeat(np.eye(4, dtype=np.float32), 3, axis=0)
    ids, weights = neighbour_table(centroids, rows=5)
    assert np.array_equal(ids[:, 0], np.arange(12)) and np.allclose(weights.sum(axis=1), 1)
    assert ids[4].tolist()[:3] == [4, 3, 5]


@pytest.mark.golden
def test_neighbours_equal_the_published_code(golden):
    from semdict.pipeline.kmeans.neighbours import neighbour_table

    want = np.load(golden / "lease_neighbours.npz")
    ids, weights = neighbour_table(np.load(golden / "lease_dictionary_raw.npy"))
    assert np.array_equal(ids, want["neighbour_idx"])
    assert np.abs(weights - want["neighbour_weights"]).max() < 5e-6

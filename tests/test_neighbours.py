"""The neighbour table: stored in token shards, and computed by the trainer for its own size and temperature."""

import numpy as np
import pytest
import torch

from semdict.pipeline.common.errors import WeightsError
from semdict.pipeline.kmeans.neighbours import neighbour_table
from semdict.pipeline.shards import open_shards
from semdict.train.masked import losses
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


def test_trainer_and_shards_have_one_table(tmp_path):
    """At the stored size and temperature the trainer's table is the stored one, bit by bit."""
    centroids = np.random.default_rng(1).standard_normal((300, 8)).astype(np.float32)
    shards = open_shards(write(tmp_path / "s", *make_set(), centroids=centroids))
    ids, weights = losses.neighbour_table(torch.from_numpy(centroids))
    assert np.array_equal(ids.numpy(), shards.neighbours[0]) and np.array_equal(weights.numpy(), shards.neighbours[1])


def test_centroids_without_direction_are_refused(tmp_path):
    """Zero, NaN, and numbers that are infinite once stored as float32: named, and nothing is written."""
    for value in (0.0, np.nan, 1e306):
        centroids = np.ones((300, 4))
        centroids[7] = value
        with pytest.raises(WeightsError, match="centroid 7 is zero or not finite"):
            write(tmp_path / "s", *make_set(), centroids=centroids)
    assert list(tmp_path.iterdir()) == []


def test_duplicate_centroids_keep_self_first():
    centroids = np.repeat(np.eye(4, dtype=np.float32), 3, axis=0)
    ids, weights = neighbour_table(centroids, rows=5)
    assert np.array_equal(ids[:, 0], np.arange(12)) and np.allclose(weights.sum(axis=1), 1)
    assert ids[4].tolist()[:3] == [4, 3, 5]


@pytest.mark.golden
def test_neighbours_equal_the_published_code(golden):
    want = np.load(golden / "lease_neighbours.npz")
    ids, weights = neighbour_table(np.load(golden / "lease_dictionary_raw.npy"))
    assert np.array_equal(ids, want["neighbour_idx"])
    assert np.abs(weights - want["neighbour_weights"]).max() < 5e-6

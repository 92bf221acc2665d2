"""Token ids, chunk bytes and a model's logits are what they were at commit 8cb5376, before the code was moved."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from semdict.pipeline.shards import open_shards
from semdict.train.masked.model import MaskedTokenTransformer, model_config
from semdict.train.masked.released import load_released, save_released
from tests import tiny

STORED = Path(__file__).resolve().parent / "data" / "results_8cb5376.npz"


@pytest.fixture(scope="module")
def stored() -> dict[str, np.ndarray]:
    with np.load(STORED, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


@pytest.fixture(scope="module")
def token_set(tmp_path_factory) -> Path:
    """Twelve images, random tokenizers, two views: encoded as the stored set was."""
    root = tmp_path_factory.mktemp("same")
    tiny.make_world(root, encode={"views": ["centre", "flip"]})
    tiny.run_until_centroids(root)
    assert tiny.semdict(root, "encode") == 0
    return root / "shards" / "tiny"


def test_ids_are_the_stored_ones(token_set, stored):
    shards = open_shards(token_set)
    np.testing.assert_array_equal(shards.gen[:], stored["gen"])
    np.testing.assert_array_equal(shards.disc[:], stored["disc"])


def test_chunk_and_codebook_files_have_the_stored_bytes(token_set, stored):
    wanted = dict(reversed(line.split("  ")) for line in stored["files"].tolist())
    assert len(wanted) > 10
    assert {name: hashlib.sha256((token_set / name).read_bytes()).hexdigest() for name in wanted} == wanted


def test_a_released_model_gives_the_stored_numbers(tmp_path, stored):
    """Initial weights from a seed, through the released layout and back, to logits and probe features."""
    sizes = {"width": 32, "depth": 2, "heads": 2, "decoder_width": 32, "decoder_depth": 1, "decoder_heads": 2}
    model = MaskedTokenTransformer(model_config("mage", "tiny", 1024, grid=16, **sizes), 7).eval()
    save_released(model, tmp_path / "mage.pth", "mage")
    released = load_released(tmp_path / "mage.pth", num_heads=2, decoder_num_heads=2)
    rng = np.random.default_rng(0)
    rng.integers(0, 1024, (2, 256))  # the stored tokens came first
    with torch.no_grad():
        logits = released.logits(torch.from_numpy(stored["tokens"].astype(np.int64)))[:, ::64]
        features = released.features(torch.from_numpy(rng.integers(0, 1024, (2, 256))))
    np.testing.assert_allclose(logits.numpy(), stored["logits"], atol=2e-6)
    np.testing.assert_allclose(features.numpy(), stored["features"], atol=2e-6)

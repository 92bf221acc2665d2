"""A tokenizer and a teacher with its codebook, opened together: halves that fit, and halves that are refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from semdict.pipeline.common.errors import WeightsError
from semdict.pipeline.common.nearest import nearest
from semdict.pipeline.tokenizers import load_features, load_tokenizer
from semdict.pipeline.tokenizers.pair import PairSpec
from semdict.train.engine.model_file import save_model
from semdict.train.vcq.tokenizer import PRESETS, Tokenizer1d
from tests.tiny import TEACHER, make_teacher


@pytest.fixture
def spec(tmp_path) -> PairSpec:
    """A VCQ run of 32-pixel images and 16 tokens, and a teacher on 4 x 4 cells, from files."""
    (tmp_path / "vcq").mkdir()
    save_model(tmp_path / "vcq" / "tokenizer.pt", Tokenizer1d(PRESETS["tiny"], seed=1), {})
    torch.manual_seed(0)
    make_teacher(tmp_path / "teacher.pth")
    np.save(tmp_path / "centroids.npy", np.random.default_rng(0).normal(size=(10, 24)).astype(np.float32))
    return PairSpec(
        tokenizer={"path": str(tmp_path / "vcq")},
        features={**TEACHER, "weights": str(tmp_path / "teacher.pth")},
        centroids=str(tmp_path / "centroids.npy"),
        device="cpu",
        image_size=32,
    )


def test_a_vcq_run_is_the_generative_half(spec):
    pair = spec.open()
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    tokens = pair.tokens(images)
    alone = load_tokenizer(**spec.tokenizer)
    assert torch.equal(tokens["gen"], alone.encode(images)) and pair.grid == (4, 4)
    features = load_features(**spec.features, image_size=56)(images)
    assert torch.equal(tokens["disc"].flatten(), nearest(features.flatten(0, 1), pair.centroids))
    assert pair.decode(tokens["gen"]).shape == images.shape
    assert pair.gen_sizes == alone.codebook_sizes.tolist() and len(pair.gen_sizes) == 16
    assert alone.identity["layout"] == "semdict-vcq-1" and len(alone.identity["sha256"]) == 64


def test_equal_codebooks_at_all_positions_are_one_number(spec, tmp_path):
    config = replace(PRESETS["tiny"], schedule="constant", latent_queries=False)
    save_model(tmp_path / "vcq" / "tokenizer.pt", Tokenizer1d(config), {})
    pair = spec.open()
    assert pair.gen_sizes == 64 and pair.tokenizer.grid(32) == (4, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 70}, r"vcq gives 16 cells for images of 32 pixels, .* at 70 pixels gives 5x5: .* to 56, or"),
        ({"image_size": 60}, r"features\.image_size 60 is no multiple of the stride 14 .* 4x4 cells need 56"),
    ],
)
def test_a_teacher_of_another_grid_is_refused(spec, change, message):
    with pytest.raises(WeightsError, match=message):
        replace(spec, features={**spec.features, **change}).open()


def test_images_of_another_size_are_refused(spec):
    with pytest.raises(WeightsError, match="image size 64 is not the 32 that the tokenizer was trained for"):
        replace(spec, image_size=64).open()


def test_centroids_of_another_teacher_are_refused(spec, tmp_path):
    np.save(tmp_path / "centroids.npy", np.zeros((10, 32), np.float32))
    with pytest.raises(WeightsError, match=r"centroids of width 32, .* features of width 24"):
        spec.open()


def test_centroids_beyond_float32_are_refused(spec, tmp_path):
    np.save(tmp_path / "centroids.npy", np.full((10, 24), 1e306))
    with pytest.raises(WeightsError, match="more than float32 can"), np.errstate(over="ignore"):
        spec.open()

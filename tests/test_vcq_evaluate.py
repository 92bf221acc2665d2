"""First-k features and probe (V5), and the list of the paper's contradictions."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from semdict.pipeline.common.errors import ManifestError, ShardError, UsageError
from semdict.pipeline.config.schema.vcq import FirstK
from semdict.train.eval.vcq_latents import Latents
from semdict.train.eval.vcq_scores import first_features, first_k_probe, sample_folders
from semdict.train.vcq.schedule import codebook_sizes
from tests import tiny

L, D, K, CLASSES = 16, 4, 32, 5
DEFAULTS = tiny.base()["vcq_evaluate"]["probe"]
PLAN = FirstK(**{**DEFAULTS, "first": [3, L], "epochs": 60, "batch": 64, "base_lr": 100.0, "warmup_epochs": 4})


def codes(seed=0):
    return np.random.default_rng(seed).standard_normal((K, D)).astype(np.float32)


def latents(n=400, seed=0, informative=True, sizes=None):
    """Tokens whose third position is the class if `informative`; z is the code and a little noise."""
    rng = np.random.default_rng(seed)
    sizes = codebook_sizes("cosine", L, 8, K).numpy() if sizes is None else sizes
    labels = rng.integers(0, CLASSES, n)
    ids = (rng.random((n, L)) * sizes).astype(np.uint16)
    if informative:
        ids[:, 2] = labels
    z = codes()[ids] + 0.05 * rng.standard_normal((n, L, D))
    return Latents(ids, z.astype(np.float16), np.arange(n), labels, [f"c{label}" for label in range(10)])


@pytest.mark.parametrize("feature", ["pre", "code"])
def test_features_are_the_first_positions_and_no_others(feature):
    some = latents()
    whole = first_features(some, codes(), L, feature, "concat")
    assert whole.shape == (400, L * D)
    first = first_features(some, codes(), 3, feature, "concat")
    assert np.array_equal(first, whole[:, : 3 * D])
    want = codes().astype(np.float16)[some.ids] if feature == "code" else some.z
    assert np.array_equal(first.reshape(400, 3, D), want[:, :3])
    mean = first_features(some, codes(), 3, feature, "mean")
    np.testing.assert_allclose(mean, want[:, :3].astype(np.float64).mean(axis=1), atol=1e-3)


def test_probe_finds_the_class_in_a_token_and_is_at_chance_without():
    scores = first_k_probe(latents(seed=1), latents(seed=2), codes(), PLAN)
    assert len(scores) == 2 * 2 * 2 * 2
    assert scores["probe_code_concat_3_top1"] > 95
    assert scores["probe_pre_concat_3_top1"] > 95
    assert all(value == 100 for name, value in scores.items() if name.endswith("top5")), "five classes"
    chance = first_k_probe(latents(seed=1, informative=False), latents(seed=2, informative=False), codes(), PLAN)
    assert all(value < 32 for name, value in chance.items() if name.endswith("top1")), chance


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "power"])
@pytest.mark.parametrize("k", [2, 5, L])
def test_codes_span_no_more_than_their_sizes_allow(kind, k):
    """Affine rank of concatenated codes <= min(k D, sum of (K_t - 1)) (section 5.2); reached with enough images."""
    sizes = codebook_sizes(kind, L, 2, K).numpy()
    some = latents(3000, informative=False, sizes=sizes)
    rows = first_features(some, codes(), k, "code", "concat").astype(np.float64)
    rank = np.linalg.matrix_rank(rows - rows.mean(axis=0), tol=1e-6)
    assert rank == min(k * D, int(np.minimum(sizes[:k] - 1, D).sum()))
    assert rank <= min(k * D, int((sizes[:k] - 1).sum()))


def test_probe_refusals():
    some = latents(100)
    with pytest.raises(UsageError, match="the tokenizer has 16"):
        first_k_probe(some, some, codes(), PLAN.model_copy(update={"first": [17], "batch": 8}))
    unlabelled = latents(100)
    unlabelled.labels[3] = -1
    with pytest.raises(ManifestError, match="no label"):
        first_k_probe(some, unlabelled, codes(), PLAN)
    more = latents(100)
    more.labels[0] = 9
    with pytest.raises(ShardError, match="1 of 6 test classes have no training images: 'c9'"):
        first_k_probe(some, more, codes(), PLAN)


def test_sample_folders(tmp_path):
    (tmp_path / "drawn").mkdir()
    (tmp_path / "drawn" / "samples.npz").touch()
    (tmp_path / "pictures").mkdir()
    scores = sample_folders([f"guided={tmp_path}/drawn", f"plain={tmp_path}/pictures"])
    assert scores == {"guided": tmp_path / "drawn" / "samples.npz", "plain": tmp_path / "pictures"}
    for wrong in ("drawn", "=drawn", "a b=x", f"x={tmp_path}/none"):
        with pytest.raises(UsageError, match="--samples"):
            sample_folders([wrong])


def test_defaults_are_table_6():
    assert DEFAULTS["first"] == [10, 256]
    assert set(DEFAULTS["features"]) == {"pre", "code"}


def test_every_choice_that_the_code_names_is_listed():
    """docs/vcq.md lists D1-D13 and O1-O20 once each, and the code names no other."""
    root = Path(__file__).resolve().parent.parent
    keys = re.findall(r"^\| ([DO]\d+) \|", (root / "docs" / "vcq.md").read_text(), re.MULTILINE)
    assert keys == [f"D{i}" for i in range(1, 14)] + [f"O{i}" for i in range(1, 21)]
    texts = [path.read_text() for path in (root / "train").rglob("*.py")]
    named = {key for text in texts for key in re.findall(r"choices? ([DO]\d+)\b", text)}
    assert len(named) > 8 and named <= set(keys)
    assert torch.equal(codebook_sizes("cosine")[:3], torch.tensor([2, 2, 3])), "D1"
    assert codebook_sizes("power")[:5].tolist() == [2, 2, 2, 2, 3], "D2"

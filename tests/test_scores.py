"""Image scores against scipy, closed forms and torch-fidelity's own command line; ADM's file; wrong input."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from semdict.cli import main
from semdict.pipeline.common.errors import UsageError, WeightsError
from semdict.pipeline.config.params import load_params
from semdict.train.eval import image_scores
from semdict.train.eval.extractors import POOL, extract, inception
from semdict.train.eval.image_scores import frechet_distance
from semdict.train.eval.image_sets import open_images
from tests import tiny

SIDE, COUNT = 40, 6


def textures(seed: int, count: int = COUNT, shift: int = 0) -> np.ndarray:
    """(count, 40, 40, 3) uint8, smooth enough that features vary."""
    coarse = np.random.default_rng(seed).integers(0, 200, (count, 5, 5, 3)) + shift
    return coarse.astype(np.uint8).repeat(SIDE // 5, axis=1).repeat(SIDE // 5, axis=2)


def write_pngs(folder: Path, images: np.ndarray) -> Path:
    (folder / "images").mkdir(parents=True)
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / "images" / f"{number:06d}.png")
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Two folders of pictures, a manifest, a teacher, and Inception with random weights."""
    root = tiny.make_world(tmp_path_factory.mktemp("scores")).parent
    write_pngs(root / "one", textures(0))
    write_pngs(root / "two", textures(1, shift=40))
    (root / "one" / "generate.json").write_text(json.dumps({"seed": 3, "steps": 20, "uint8": "truncate"}))
    assert tiny.semdict(root, "manifest") == 0
    torch.manual_seed(0)
    net = FeatureExtractorInceptionV3.__new__(FeatureExtractorInceptionV3)
    loaded = torch.load
    torch.load = lambda *_, **__: (_ for _ in ()).throw(StopIteration)  # stops the constructor before it loads weights
    try:
        net.__init__("inception-v3-compat", ["2048"], feature_extractor_weights_path="none")
    except (StopIteration, RuntimeError):
        pass
    finally:
        torch.load = loaded
    for weight in net.parameters():
        if weight.ndim == 4:
            torch.nn.init.kaiming_normal_(weight)  # with the default initialisation, features vanish
    net.fc.weight.data.mul_(1e-4)
    torch.save(net.state_dict(), root / "inception.pth")
    return root


@pytest.fixture
def params(world):
    return load_params(world / "params.yaml", ["runtime.device=cpu", f"scores.inception={world / 'inception.pth'}",
                                               "scores.batch=6", "scores.kid_subsets=3"])  # fmt: skip


def images(world: Path, name: str, params):
    return open_images(world / name, params)


# --- the distance ---


def gaussian(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and covariance (D, D) in float64."""
    features = np.asarray(features, np.float64)
    return features.mean(axis=0), np.cov(features, rowvar=False).reshape(features.shape[1], -1)


def exact_distance(one: np.ndarray, other: np.ndarray) -> float:
    """The distance from features: tr (S1 S2)^(1/2) is the nuclear norm of the product of the centred features."""
    a, b = one - one.mean(0), other - other.mean(0)
    root = np.linalg.svd(a @ b.T, compute_uv=False).sum() / np.sqrt((len(a) - 1) * (len(b) - 1))
    difference = one.mean(0) - other.mean(0)
    return difference @ difference + a.var(0, ddof=1).sum() + b.var(0, ddof=1).sum() - 2 * root


def symmetric_distance(one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]) -> float:
    """The form with the symmetric matrix S1^(1/2) S2 S1^(1/2), eigenvalues below zero set to 0."""
    (m1, s1), (m2, s2) = one, other
    values, vectors = np.linalg.eigh(s1)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    middle = root @ s2 @ root
    roots = np.sqrt(np.linalg.eigvalsh((middle + middle.T) / 2).clip(min=0))
    return float((m1 - m2) @ (m1 - m2) + np.trace(s1) + np.trace(s2) - 2 * roots.sum())


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(4, 60), st.integers(0, 99))
def test_the_distance_is_exact_to_float64_rounding(width, count, seed):
    """Also with fewer images than widths, where the covariances are singular."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((width, width))
    one, other = rng.standard_normal((count, width)) @ mix, rng.standard_normal((70, width)) @ mix + 0.3
    scale = np.trace(np.atleast_2d(np.cov(one, rowvar=False)))
    got = frechet_distance(gaussian(one), gaussian(other))
    assert got == pytest.approx(exact_distance(one, other), rel=1e-6, abs=1e-6 * scale)
    assert got == pytest.approx(symmetric_distance(gaussian(one), gaussian(other)), rel=1e-6, abs=1e-6 * scale)
    assert frechet_distance(gaussian(one), gaussian(one)) == pytest.approx(0, abs=1e-6 * scale)


def test_known_gaussians():
    """Diagonal covariances: |difference|^2 + sum (s1 - s2)^2."""
    means, sigmas = (np.array([0.0, 1.0, -2.0]), np.array([3.0, 1.0, 0.0])), (np.array([1.0, 4.0, 0.0]), np.ones(3))
    distance = frechet_distance((means[0], np.diag(sigmas[0] ** 2)), (means[1], np.diag(sigmas[1] ** 2)))
    assert distance == pytest.approx(9 + 0 + 4 + 0 + 9 + 1, abs=1e-6)


def test_statistics_of_another_network_are_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(UsageError, match="another network"):
        frechet_distance(gaussian(rng.standard_normal((9, 3))), gaussian(rng.standard_normal((9, 4))))


# --- Inception's scores ---


def test_val50k_is_torch_fidelitys_command_line(world, params, tmp_path):
    """The same folders and the same (random) weights: the numbers of `fidelity --fid --kid --prc --isc`."""
    result = image_scores.val50k(images(world, "one", params), images(world, "two", params), params)
    assert not result.missing and result.extractor["name"] == "inception-v3-compat"
    command = [
        sys.executable, "-m", "torch_fidelity.fidelity", "--cpu", "--fid", "--kid", "--prc", "--isc", "--json",
        "--silent",
        "--feature-extractor", "inception-v3-compat", "--feature-layer-prc", "2048", "--no-cache", "--save-cpu-ram",
        "--feature-extractor-weights-path", str(world / "inception.pth"), "--batch-size", "6",
        "--isc-splits", str(COUNT),
        "--kid-subsets", "3", "--kid-subset-size", str(COUNT),
        "--input1", str(world / "one" / "images"), "--input2", str(world / "two" / "images"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout[done.stdout.index("{") :])
    assert theirs["frechet_inception_distance"] > 1e-4
    for key, name in image_scores.VAL50K.items():
        assert result.scores[name] == pytest.approx(theirs[key], rel=1e-5, abs=1e-9), name


def test_adm_compares_with_the_stored_statistics(world, params, tmp_path):
    """A statistics file made of the samples' own features gives 0; of others', the distance by scipy."""
    cpu = torch.device("cpu")
    network = inception(world / "inception.pth", cpu, (POOL,), "float64")
    own, other = (extract(images(world, name, params), network, cpu, 6)[POOL].numpy() for name in ("one", "two"))
    for name, features, pixels in (("same", own, textures(0)), ("other", other, textures(1, shift=40))):
        mu, sigma = gaussian(features)
        np.savez(tmp_path / f"{name}.npz", mu=mu, sigma=sigma, mu_s=mu[:7], sigma_s=sigma[:7, :7], arr_0=pixels)
    same = image_scores.adm(images(world, "one", params), tmp_path / "same.npz", params)
    assert same.scores["fid_adm"] == pytest.approx(0, abs=1e-4)
    assert same.scores["precision_adm"] == same.scores["recall_adm"] == 1
    result = image_scores.adm(images(world, "one", params), tmp_path / "other.npz", params)
    (m1, s1), (m2, s2) = gaussian(own), gaussian(other)
    want = (
        ((m1 - m2) ** 2).sum() + np.trace(s1 + s2) - 2 * np.sqrt(np.linalg.eigvals(s1 @ s2).astype(complex)).real.sum()
    )
    assert result.scores["fid_adm"] == pytest.approx(want, rel=1e-4)
    assert list(result.missing) == ["sfid_adm"]


def test_inception_score_of_sure_and_unsure_guesses():
    sure = np.eye(4).repeat(5, 0) * 100
    assert image_scores.adm_inception_score(torch.from_numpy(sure))[0] == pytest.approx(4, rel=1e-6)
    assert image_scores.adm_inception_score(torch.zeros(9, 4))[0] == pytest.approx(1)
    assert image_scores.adm_inception_score(torch.from_numpy(sure))[1] == 0


def test_adms_inception_score_is_of_consecutive_splits(monkeypatch):
    monkeypatch.setattr(image_scores, "ADM_SPLIT", 4)
    logits = torch.randn(10, 3, generator=torch.Generator().manual_seed(0)).double()
    want = []
    for part in (logits[:4], logits[4:8], logits[8:]):
        p = part.softmax(1)
        want.append((p * (p.log() - p.mean(0).log())).sum(1).mean().exp().item())
    assert image_scores.adm_inception_score(logits) == pytest.approx((np.mean(want), np.std(want)))


def test_without_weights_a_score_is_absent_with_its_reason(world, params):
    without = load_params(world / "params.yaml", ["runtime.device=cpu", "scores.inception=nowhere.pth"])
    result = image_scores.val50k(images(world, "one", params), images(world, "two", params), without)
    assert result.scores == {} and set(result.missing) == set(image_scores.VAL50K.values())
    assert all("nowhere.pth" in reason for reason in result.missing.values())


def test_weights_of_another_sum_are_refused(world, params):
    wrong = load_params(world / "params.yaml", [f"scores.inception={world / 'inception.pth'}",
                                                f"scores.inception_sha256={'a' * 64}"])  # fmt: skip
    with pytest.raises(WeightsError, match="SHA-256"):
        image_scores.val50k(images(world, "one", params), images(world, "two", params), wrong)


# --- precision and recall, the teacher ---


def test_precision_and_recall_by_brute_force(world, params):
    """Against the definition (Kynkaanniemi et al., arXiv:1904.06991) on the teacher's features."""
    from semdict.pipeline.tokenizers import load_features

    one, two = images(world, "one", params), images(world, "two", params)
    scores = image_scores.teacher(one, two, params).scores
    net = load_features(**params.features.model_dump(), near=params.pixels.size)
    a, b = (
        torch.cat([net(batch.float() / 255).mean(1) for _, batch in side.batches(1)]).double() for side in (one, two)
    )

    def covered(points, centres):
        radius = torch.cdist(centres, centres).sort(1).values[:, 3]
        return (torch.cdist(points, centres) <= radius + 1e-9).any(1).double().mean().item()

    assert scores["teacher_precision"] == pytest.approx(covered(a, b))
    assert scores["teacher_recall"] == pytest.approx(covered(b, a))
    want = exact_distance(a.numpy(), b.numpy())
    assert scores["teacher_frechet_distance"] == pytest.approx(want, rel=1e-3, abs=1e-4)


def test_a_set_against_itself(world, params):
    one = images(world, "one", params)
    result = image_scores.teacher(one, one, params).scores
    assert result["teacher_frechet_distance"] == pytest.approx(0, abs=1e-4)
    assert result["teacher_precision"] == result["teacher_recall"] == 1
    assert not any("fid" in name for name in result), "the teacher's distance is no FID"


# --- the commands ---


def fid(world: Path, *options: str) -> int:
    return tiny.semdict(
        world, "evaluate", "fid", *options, "--set", "runtime.device=cpu", "--set", "scores.split=train"
    )


def test_the_command_says_what_was_compared(world):
    assert fid(world, "--samples", "one", "--protocol", "teacher", "--out", "a.json") == 0
    result = json.loads((world / "a.json").read_text())
    about = result["protocol"][0]
    assert about["samples"]["images"] == COUNT and about["samples"]["sampling"]["seed"] == 3
    assert about["reference"]["images"] == 12 and about["reference"]["split"] == "train"
    assert about["extractor"]["name"].startswith("teacher") and len(about["extractor"]["sha256"]) == 64
    assert result["teacher_frechet_distance"] > 0 and result["missing"] == [{}]


def test_the_reference_is_cropped_as_mage_does(world):
    """A manifest as reference of val50k shows the very pixels that `evaluate reference` writes."""
    assert tiny.semdict(world, "evaluate", "reference", "--split", "train", "--out", "reference") == 0
    files = sorted((world / "reference" / "images").iterdir())
    assert len(files) == 12 and Image.open(files[0]).size == (256, 256)
    name = ["--samples", "one", "--protocol", "val50k", "--set", f"scores.inception={world / 'inception.pth'}"]
    assert fid(world, *name, "--reference", "reference", "--out", "b.json") == 0
    assert fid(world, *name, "--out", "c.json") == 0
    one, other = (json.loads((world / n).read_text())["fid_val50k"] for n in ("b.json", "c.json"))
    assert one == pytest.approx(other, rel=1e-6)


def test_nearest_training_images_are_found(world):
    """Samples that are training images are their own nearest neighbours, at cosine 1."""
    assert tiny.semdict(world, "evaluate", "reference", "--split", "train", "--out", "copies") == 0
    options = ["--samples", "copies", "--set", "scores.shown=5", "--set", "runtime.device=cpu", "--out", "near"]
    assert tiny.semdict(world, "evaluate", "nearest", "--reference", "copies", *options) == 0
    result = json.loads((world / "near" / "nearest.json").read_text())
    assert [pair["training"][0] for pair in result["pairs"]] == list(range(5))
    assert result["nearest_cosine"] == pytest.approx(1, abs=1e-5) and result["training_cosine"] < 0.9999
    assert Image.open(world / "near" / "nearest.png").size[1] > 4 * 128


@pytest.mark.parametrize("protocol", [("val50k",), ("adm", "--reference", "stats.npz")])
def test_without_any_score_the_status_is_1(world, capsys, protocol):
    np.savez(world / "stats.npz", mu=np.zeros(3), sigma=np.eye(3), arr_0=textures(0))
    options = ["--samples", "one", "--protocol", *protocol, "--set", "scores.inception=nowhere.pth"]
    assert fid(world, *options, "--out", "none.json") == 1
    assert "no score: scores.inception: nowhere.pth does not exist" in capsys.readouterr().err
    assert not (world / "none.json").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--samples", "nowhere"), ("nowhere", "does not exist")),
        (("--samples", "lossy"), (".jpg", "PNG")),
        (("--samples", "empty"), ("empty", "no PNG")),
        (("--samples", "objects.npz"), ("objects.npz", "nothing in it was executed")),
        (("--samples", "float.npz"), ("float.npz", "uint8")),
        (("--samples", "one", "--protocol", "adm"), ("adm", ".npz")),
        (("--samples", "one", "--protocol", "adm", "--reference", "float.npz"), ("float.npz", "mu")),
        (("--samples", "one", "--reference", "few"), ("too few",)),
        (("--samples", "mixed"), ("000000.png has 40 x 40 pixels", "000001.png has 40 x 24", "one size")),
        (("--samples", "zip.npz"), ("zip.npz", "nothing in it was executed")),
    ],
)
def test_mistakes_are_named(world, capsys, options, words):
    if not (world / "lossy").exists():
        for name in ("lossy", "empty"):
            (world / name).mkdir()
        Image.fromarray(textures(0)[0]).save(world / "lossy" / "a.jpg")
        np.savez(world / "objects.npz", arr_0=np.array([{"a": 1}], dtype=object))
        np.savez(world / "float.npz", arr_0=np.zeros((2, 4, 4, 3)))
        write_pngs(world / "few", textures(0, count=2))
        write_pngs(world / "mixed", textures(0))
        Image.fromarray(textures(0)[0][:24]).save(world / "mixed" / "images" / "000001.png")
        (world / "zip.npz").write_bytes(b"PK" + bytes(100))
    assert fid(world, "--protocol", "teacher", *options, "--out", "wrong.json") in (1, 2)
    error = capsys.readouterr().err
    assert all(word in error for word in words), error
    assert not (world / "wrong.json").exists()


def test_actions_have_help_with_an_example(capsys):
    for action in ("fid", "nearest", "reference"):
        with pytest.raises(SystemExit) as stopped:
            main(["evaluate", action, "--help"])
        assert stopped.value.code == 0 and "example" in capsys.readouterr().out

"""The demo's images and stand-in models: deterministic, balanced, neither trivial nor impossible, usable."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.spatial import ConvexHull

from demo import stand_ins, train_teacher, train_vqgan
from demo.data import as_float, load_split, psnr
from demo.images import CLASSES, SHAPES, picture, write_images
from semdict.pipeline.common.errors import WeightsError
from semdict.pipeline.tokenizers import load_features, load_tokenizer

UNSEEN = 987  # seed of images that are in no training set


def contents(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*.jpg")}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("drawn") / "images"
    write_images(folder, seed=UNSEEN, train=120, val=72, workers=1)
    return folder


@pytest.fixture(scope="module")
def crops(drawn):
    """{split: (images (N, 3, 256, 256) uint8, labels (N,))}"""
    return {split: load_split(drawn / split)[:2] for split in ("train", "val")}


def nearest_centroid_accuracy(train, train_labels, test, test_labels) -> float:
    centroids = torch.stack([train[train_labels == c].mean(0) for c in range(len(CLASSES))])
    return (torch.cdist(test, centroids).argmin(1) == test_labels).float().mean().item()


def ridge_accuracy(train, train_labels, test, test_labels, strength: float) -> float:
    mean, scale = train.mean(0), train.std(0) + 1e-6
    train, test = (train - mean) / scale, (test - mean) / scale
    target = torch.nn.functional.one_hot(train_labels, len(CLASSES)).float()
    gram = train @ train.T + strength * torch.eye(len(train))
    return ((test @ train.T @ torch.linalg.solve(gram, target)).argmax(1) == test_labels).float().mean().item()


def test_bytes_depend_only_on_the_seed(tmp_path):
    first, second, other = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    write_images(first, seed=3, train=24, val=12, workers=1)
    write_images(second, seed=3, train=24, val=12, workers=2)
    write_images(other, seed=4, train=24, val=12, workers=1)
    assert contents(first) == contents(second)
    assert len(set(contents(first).values())) == 36, "all images differ"
    assert not set(contents(first).values()) & set(contents(other).values())


def test_a_larger_set_starts_with_the_smaller_one(drawn, tmp_path):
    write_images(tmp_path / "few", seed=UNSEEN, train=13, val=1, workers=1)
    assert contents(tmp_path / "few").items() <= contents(drawn).items()


def test_classes_are_balanced_and_sizes_vary(drawn):
    paths = list(drawn.rglob("*.jpg"))
    for split, each in (("train", 10), ("val", 6)):
        assert {p.name: len(list(p.iterdir())) for p in (drawn / split).iterdir()} == dict.fromkeys(CLASSES, each)
    sizes = [Image.open(p).size for p in paths]
    assert all(256 <= min(size) <= 320 for size in sizes)
    square = sum(w == h for w, h in sizes) / len(sizes)
    assert 0.15 < square < 0.6 and any(w > h for w, h in sizes) and any(w < h for w, h in sizes)


def test_the_label_is_the_drawn_shape():
    """Discs are convex wherever the border cuts them; stars are not."""
    for index in range(24):
        drawn, label = picture(5, "val", index, (256, 256))
        points = np.argwhere(drawn.object > 0.5)
        solidity = len(points) / ConvexHull(points).volume
        convex = SHAPES[label % len(SHAPES)] == "disc"
        assert (solidity > 0.95) == convex, (CLASSES[label], solidity)


def test_colours_and_raw_pixels_do_not_predict_the_class(crops):
    (train, train_labels), (test, test_labels) = crops["train"], crops["val"]

    def histogram(images):
        ids = (images.long() // 64 * torch.tensor([16, 4, 1])[:, None, None]).sum(1).flatten(1)
        return torch.stack([torch.bincount(row, minlength=64) for row in ids]).float() / ids.shape[1]

    def small(images):
        return torch.nn.functional.avg_pool2d(images.float() / 255, 16).flatten(1)

    assert nearest_centroid_accuracy(histogram(train), train_labels, histogram(test), test_labels) < 0.25
    assert ridge_accuracy(small(train), train_labels, small(test), test_labels, 100.0) < 0.35


def test_patch_shares_follow_the_augmented_image():
    shares = torch.rand(4, 16, 16, generator=torch.Generator().manual_seed(0))
    images = (shares * 255).round().byte()[:, None].repeat_interleave(14, 2).repeat_interleave(14, 3)
    rng = torch.Generator().manual_seed(1)
    for _ in range(12):
        augmented, augmented_shares = train_teacher.augment(images.expand(-1, 3, -1, -1), shares, rng)
        seen = augmented[:, 0, 7::14, 7::14]
        brightness = seen.amax((1, 2)) / augmented_shares.amax((1, 2))
        assert torch.allclose(seen / brightness[:, None, None], augmented_shares, atol=0.01)


def test_vqgan_training_is_deterministic(crops, tmp_path):
    stages = tuple(train_vqgan.Stage(finest, steps=2 if finest else 1, batch=1, lr=1e-3) for finest in (2, 1, 0))
    plan = train_vqgan.Plan(stages=stages, warm_up=1)
    for name in ("a", "b"):
        model, _ = train_vqgan.train(crops["train"][0][:8], plan, seed=1)
        train_vqgan.save_half(model, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert load_tokenizer(tmp_path / "a").grid(256) == (16, 16)


@pytest.mark.parametrize(("rim", "seen"), [(1.0, True), (0.0, False)])
def test_the_border_signal_preserves_colours_through_the_group_norms(monkeypatch, rim, seen):
    """Uniform images of two greys: norms over pairs of channels remove the difference, the border signal keeps it."""
    monkeypatch.setattr(train_vqgan, "RIM", rim)
    torch.manual_seed(0)
    model = train_vqgan.MageTokenizer(train_vqgan.SIZES)
    train_vqgan.prepare(model)
    greys = torch.tensor([0.3, 0.6]).view(2, 1, 1, 1).expand(2, 3, 64, 64)
    with torch.no_grad():
        dark, light = train_vqgan.encode_from(model, greys, finest=2)[..., 2:-2, 2:-2]
    assert ((dark - light).abs().max() > 0.02) == seen


def test_unused_codes_are_replaced_and_used_ones_follow_their_latents():
    rng = torch.Generator().manual_seed(0)
    clusters = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    latents = clusters.repeat(100, 1) + 0.1 * torch.randn(300, 2, generator=rng)
    table = torch.full((3, 2), 50.0) + torch.arange(3.0)[:, None]  # all but one would stay unused
    codes = train_vqgan.Codes(table, decay=0.8, rng=rng)
    codes.remember(latents)
    codes.sums_KD = table.clone()
    for _ in range(200):
        codes.update(latents, train_vqgan.nearest(latents, table))
        codes.renew()
    assert sorted(table.round().abs().tolist()) == [[0, 0], [0, 10], [10, 0]]


def test_shipped_weights_are_small_and_match_their_checksums():
    files = [stand_ins.SHIPPED / name for name in ("vqgan.ckpt", "teacher.pth")]
    assert sum(file.stat().st_size for file in files) <= 8e6
    sums = dict(reversed(line.split()) for line in (stand_ins.SHIPPED / "SHA256SUMS").read_text().splitlines())
    assert sums == {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_a_damaged_shipped_file_is_refused(tmp_path):
    (tmp_path / "SHA256SUMS").write_text((stand_ins.SHIPPED / "SHA256SUMS").read_text())
    data = bytearray((stand_ins.SHIPPED / "teacher.pth").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "teacher.pth").write_bytes(data)
    with pytest.raises(WeightsError, match="make demo-weights"):
        stand_ins.copy_shipped(tmp_path / "teacher.pth", tmp_path / "out.pth")
    assert not (tmp_path / "out.pth").exists()


def test_a_stand_in_states_its_origin_and_scores(drawn, tmp_path, monkeypatch):
    monkeypatch.setattr(stand_ins, "SAMPLE", 4)
    out = tmp_path / "vqgan.ckpt"
    stand_ins.write_stand_in("vqgan", "shipped", drawn, out, seed=0)
    card = json.loads(out.with_suffix(".json").read_text())
    assert "demo vqgan" in card["stand_in"] and card["weights"] == "shipped" and card["psnr"] > 20
    assert card["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()


def test_shipped_vqgan_reconstructs_unseen_images(crops):
    model = load_tokenizer(stand_ins.SHIPPED / "vqgan.ckpt")
    assert (model.identity["layout"], model.codebook_size, model.grid(256)) == ("mage", 1024, (16, 16))
    images = as_float(crops["val"][0][::18])
    tokens = model.encode(images)
    assert len(tokens.unique()) > 250, "many codes are used"
    reached = psnr(images, model.decode(tokens)).mean()
    shuffled = tokens[:, torch.randperm(256, generator=torch.Generator().manual_seed(0))]
    blurred = images.mean((2, 3), keepdim=True).expand_as(images)
    assert reached > 20
    assert reached > psnr(images, model.decode(shuffled)).mean() + 6
    assert reached > psnr(images, blurred).mean() + 4
    assert reached > psnr(images, model.decode(model.encode(images * 2 - 1))).mean() + 6, "the range is [0, 1]"


def test_features_of_the_shipped_teacher_separate_classes_and_textures(crops):
    features = load_features(train_teacher.MODEL, stand_ins.SHIPPED / "teacher.pth", kwargs=train_teacher.KWARGS)
    assert (features.grid, features.dim) == ((16, 16), train_teacher.WIDTH)
    pooled = {}
    for split, (images, labels) in crops.items():
        patches = torch.cat([features(as_float(part)) for part in images.split(32)])
        pooled[split] = patches.mean(1), labels
    (train, train_labels), (test, test_labels) = pooled["train"], pooled["val"]
    assert ridge_accuracy(train, train_labels, test, test_labels, 10.0) > 0.4  # chance 0.083
    textures = train_labels // len(SHAPES), test_labels // len(SHAPES)
    assert ridge_accuracy(train, textures[0], test, textures[1], 10.0) > 0.65  # chance 0.167

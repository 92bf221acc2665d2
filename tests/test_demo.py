"""The demo's images and stand-in models: deterministic, balanced, neither trivial nor impossible, usable."""

import hashlib
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from demo import measure, stand_ins, train_teacher, train_vqgan
from demo.data import as_float, draw_training_set, load_split, psnr, save_half
from demo.images import CLASSES, GROUNDS, picture, write_images
from semdict.pipeline.common.errors import WeightsError
from semdict.pipeline.config.presets import render
from semdict.pipeline.tokenizers import load_features, load_tokenizer

ROOT = Path(__file__).parent.parent
UNSEEN = 987  # seed of images that are in no training set


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.tar")}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("drawn") / "images"
    write_images(folder, seed=UNSEEN, train=1200, val=240, workers=1)
    return folder


@pytest.fixture(scope="module")
def images(drawn):
    """{split: (images (N, 3, 64, 64) uint8, labels (N,))}"""
    return {split: load_split(drawn, split) for split in ("train", "val")}


def test_bytes_depend_only_on_the_seed(tmp_path):
    first, second, other = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    write_images(first, seed=3, train=24, val=12, workers=1)
    write_images(second, seed=3, train=24, val=12, workers=2)
    write_images(other, seed=4, train=24, val=12, workers=1)
    assert contents(first) == contents(second) and sorted(contents(first)) == ["train-000.tar", "val-000.tar"]
    assert not set(contents(first).values()) & set(contents(other).values())


def test_all_images_differ_and_classes_are_balanced(images):
    for split, count in (("train", 1200), ("val", 240)):
        rgb, labels = images[split]
        assert rgb.shape == (count, 3, 64, 64) and len(rgb.flatten(1).unique(dim=0)) == count
        assert torch.bincount(labels).tolist() == [count // len(CLASSES)] * len(CLASSES)


def test_a_larger_set_starts_with_the_smaller_one(images, tmp_path):
    write_images(tmp_path / "few", seed=UNSEEN, train=13, val=1, workers=1)
    few, labels = load_split(tmp_path / "few", "train")
    assert torch.equal(few, images["train"][0][:13]) and torch.equal(labels, images["train"][1][:13])


def test_drawn_training_images_are_those_of_the_split_teach():
    drawn = draw_training_set(24, seed=5, workers=1)
    expected, label = picture(5, "teach", 23)
    assert torch.equal(drawn.rgb[23], torch.from_numpy(expected.rgb).permute(2, 0, 1))
    assert drawn.labels[23] == label == 11 and drawn.ground[23] == expected.ground
    assert (drawn.thing[23] / 255 - torch.from_numpy(expected.thing)).abs().max() < 0.01


@pytest.mark.parametrize("name", CLASSES)
def test_every_thing_covers_a_good_part_of_the_image_and_lies_inside(name):
    for index in range(CLASSES.index(name), 240, len(CLASSES)):
        thing = picture(UNSEEN, "val", index)[0].thing
        assert 0.05 < thing.mean() < 0.5
        assert np.concatenate([thing[0], thing[-1], thing[:, 0], thing[:, -1]]).mean() < 0.2


def test_neither_colours_nor_grounds_predict_the_class(images):
    def colours(rgb):
        return measure.histogram((rgb.long() // 64 * torch.tensor([16, 4, 1])[:, None, None]).sum(1).flatten(1), 64)

    (train, labels), (test, test_labels) = images["train"], images["val"]
    assert measure.linear_accuracy(colours(train), labels, colours(test), test_labels, 1e-2) < 0.5
    grounds = torch.tensor([picture(UNSEEN, "val", index)[0].ground for index in range(240)])
    best = sum((torch.bincount(test_labels[grounds == g]).max()) for g in range(len(GROUNDS)))
    assert best / 240 < 0.35


def test_patch_targets_are_distributions_over_classes_and_grounds():
    share = torch.tensor([[0.25, 1.0], [0.0, 0.5]])
    targets = train_teacher.patch_targets(share, torch.tensor([3, 11]), torch.tensor([1, 2]))
    assert torch.equal(targets.sum(2), torch.ones(2, 2))
    assert targets[0, 0, 3] == 0.25 and targets[0, 0, 13] == 0.75 and targets[1, 1, 11] == targets[1, 1, 14] == 0.5


def test_teacher_training_is_deterministic():
    drawn, plan = draw_training_set(48, seed=1, workers=1), train_teacher.Plan(steps=2, batch=8)
    first, second = (train_teacher.train(drawn, plan, seed=1)[0].state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_vqgan_training_is_deterministic(images, tmp_path):
    stages = tuple(train_vqgan.Stage(finest, steps=2, batch=4, lr=1e-3) for finest in (1, 0))
    plan = train_vqgan.Plan(stages=stages, warm_up=1)
    for name in ("a", "b"):
        model, _ = train_vqgan.train(images["train"][0][:16], plan, seed=1)
        save_half({"state_dict": model.state_dict()}, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert load_tokenizer(tmp_path / "a").grid(64) == (8, 8)


@pytest.mark.parametrize(("rim", "seen"), [(1.0, True), (0.0, False)])
def test_the_border_signal_preserves_colours_through_the_group_norms(monkeypatch, rim, seen):
    """Uniform images of two greys: norms over pairs of channels remove the difference, the border signal keeps it."""
    monkeypatch.setattr(train_vqgan, "RIM", rim)
    torch.manual_seed(0)
    model = train_vqgan.MageTokenizer(train_vqgan.SIZES)
    train_vqgan.prepare(model)
    greys = torch.tensor([0.3, 0.6]).view(2, 1, 1, 1).expand(2, 3, 64, 64)
    with torch.no_grad():
        dark, light = train_vqgan.encode_from(model, greys, finest=0)[..., 2:-2, 2:-2]
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
    assert sum(file.stat().st_size for file in files) <= 4e6
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


def test_stored_halves_are_loaded_exactly():
    stored = torch.load(stand_ins.SHIPPED / "vqgan.ckpt", weights_only=True)["state_dict"]
    loaded = load_tokenizer(stand_ins.SHIPPED / "vqgan.ckpt").state_dict()
    assert all(tensor.dtype == torch.float16 and torch.equal(tensor.float(), loaded[n]) for n, tensor in stored.items())
    stored = torch.load(stand_ins.SHIPPED / "teacher.pth", weights_only=True)
    features = load_features(
        train_teacher.MODEL, stand_ins.SHIPPED / "teacher.pth", kwargs=train_teacher.KWARGS, grid=8
    )
    weight = features.backbone.network.patch_embed.proj.weight
    assert weight.dtype == torch.float32 and torch.equal(weight, stored["patch_embed.proj.weight"].float())


def test_shipped_vqgan_reconstructs_unseen_images(images):
    model = load_tokenizer(stand_ins.SHIPPED / "vqgan.ckpt")
    assert (model.identity["layout"], model.codebook_size, model.grid(64)) == ("mage", 256, (8, 8))
    originals = as_float(images["val"][0][:96])
    tokens = model.encode(originals)
    assert len(tokens.unique()) > 200, "many codes are used"
    reached = psnr(originals, model.decode(tokens)).mean()
    shuffled = tokens[:, torch.randperm(64, generator=torch.Generator().manual_seed(0))]
    blurred = originals.mean((2, 3), keepdim=True).expand_as(originals)
    assert reached > 23
    assert reached > psnr(originals, model.decode(shuffled)).mean() + 6
    assert reached > psnr(originals, blurred).mean() + 6
    assert reached > psnr(originals, model.decode(model.encode(originals * 2 - 1))).mean() + 6, "the range is [0, 1]"


def test_the_demo_is_as_hard_as_photographs(drawn):
    """The bounds are wider than what `python -m demo.measure` shows for the demo's 6,000 images: here are 1,200."""
    result = measure.measure(drawn, stand_ins.SHIPPED / "vqgan.ckpt", stand_ins.SHIPPED / "teacher.pth")
    assert result["teacher_features"] > 0.93 and result["discriminative_tokens"] > 0.8
    assert 0.2 < result["generative_tokens"] < 0.55


@pytest.mark.parametrize(
    ("preset", "accepted"), [("demo", True), ("in1k-mae", False), ("in1k", False)], ids=["demo", "in1k-mae", "in1k"]
)
def test_make_demo_starts_with_the_written_params_of_its_own_preset_only(tmp_path, preset, accepted):
    """The recipe's first line, run by a shell on params.yaml as `semdict preset` writes it."""
    (tmp_path / "params.yaml").write_text(render(preset))
    recipe = (ROOT / "Makefile").read_text().split("\ndemo:", 1)[1].splitlines()[1]
    guard = recipe.strip().removeprefix("@").replace("$$", "$")
    assert "params.yaml" in guard
    done = subprocess.run(["sh", "-c", guard], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) is accepted
    assert ("make preset NAME=demo" in done.stdout) is not accepted

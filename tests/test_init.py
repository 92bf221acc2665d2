"""`semdict init`: a folder of images becomes a preset that runs without an edited key."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from semdict.cli import main
from semdict.pipeline.common.errors import ParamsError, UsageError
from semdict.pipeline.config.params import validate
from semdict.pipeline.config.presets import resolve
from semdict.pipeline.manifest.shares import assign, shared_splits
from semdict.pipeline.manifest.sources import list_images
from semdict.pipeline.manifest.table import load_manifest
from semdict.pipeline.shards import open_shards, verify_shards
from semdict.project.images import find_splits, look_at
from semdict.project.init import write_preset
from semdict.project.models import TeacherChoice, TokenizerChoice
from semdict.project.overlay import overlay, power_of_two, text_of
from tests import tiny
from tests.test_dvc import call, project

ROOT = Path(__file__).resolve().parent.parent
SHARES = {"train": 0.9, "val": 0.1}


def make(root: Path, *names: str) -> Path:
    """A small image at each name; other suffixes become empty files."""
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".png":
            Image.new("RGB", (20, 20), (number, 0, 0)).save(path)
        else:
            path.touch()
    return root


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["train/a/1.png", "val/a/2.png"], {"train": "train", "val": "val"}),
        (["Training/a/1.png", "validation/a/2.png", "test/a/3.png"],
         {"train": "Training", "val": "validation", "test": "test"}),
        (["train/a/1.png", "test/a/2.png"], {"train": "train", "val": "test"}),
        (["train-00.tar", "train-01.tar", "val-00.tar"], {"train": "train*.tar", "val": "val*.tar"}),
        (["data/train-0-of-1.parquet", "data/test-0-of-1.parquet"],
         {"train": "data/train*.parquet", "val": "data/test*.parquet"}),
        (["train/a/1.png"], {"all": "train"}),
        (["cat/1.png", "dog/1.png"], {"all": ""}),
        (["a.tar", "b.tar"], {"all": ""}),
        (["1.png"], {"all": ""}),
    ],
)  # fmt: skip
def test_splits_are_recognised_by_their_names(tmp_path, names, splits):
    root = make(tmp_path, *names)
    assert find_splits(str(root)) == {split: str(root / path) for split, path in splits.items()}


def test_a_share_of_a_folder_depends_on_the_keys_alone():
    keys = [f"folder/{n}" for n in range(4000)]
    labels = [str(n % 10) for n in range(4000)]
    owners = dict(zip(keys, assign(keys, labels, SHARES), strict=True))
    assert 340 < sum(owners.values()) < 460, "a tenth, four standard deviations"
    more = keys[::2] + [f"new/{n}" for n in range(1000)]
    again = dict(zip(more, assign(more, ["0"] * len(more), SHARES), strict=True))
    assert all(owners[key] == again[key] for key in keys[::2]), "images that come and go move no other"
    assert assign(keys, labels, {"val": 0.1, "train": 0.9}) != list(owners.values()), "intervals follow the order"


def test_no_class_is_in_the_held_out_share_alone():
    keys = [str(n) for n in range(500)]
    owners = assign(keys, keys, SHARES)  # a class per image
    assert set(owners) == {0}
    pairs = [str(n // 2) for n in range(500)]
    owners = assign(keys, pairs, SHARES)
    held_out = {label for label, owner in zip(pairs, owners, strict=True) if owner == 1}
    assert held_out
    assert held_out <= {label for label, owner in zip(pairs, owners, strict=True) if owner == 0}


def test_shares_divide_a_listing_without_loss(tmp_path):
    root = make(tmp_path, *(f"c{n % 3}/{n:03d}.png" for n in range(90)))
    images = {"train": str(root), "val": str(root)}
    listing = list_images(images, shares=SHARES)
    whole = list_images({"all": str(root)})
    rows = listing.table.select(["split", "source"]).to_pylist()
    assert sorted(row["source"] for row in rows) == sorted(whole.table["source"].to_pylist())
    assert Counter(row["split"] for row in rows)["val"] > 0
    assert listing.classes == whole.classes
    assert shared_splits({"a": "x", "b": "y", "c": "x"}, {"a": 0.5, "c": 0.5}) == [{"a": 0.5, "c": 0.5}]


@pytest.mark.parametrize(
    ("images", "shares"),
    [
        ({"train": "x", "val": "x"}, {"train": 0.9}),
        ({"train": "x", "val": "x"}, {"train": 0.9, "val": 0.2}),
        ({"train": "x", "val": "y"}, {"train": 0.9, "val": 0.1}),
        ({"train": "x"}, {"other": 0.5}),
    ],
)
def test_shares_that_leave_images_over_are_refused(images, shares):
    tree = tiny.merged(tiny.preset("demo"), {})
    tree["manifest"] |= {"images": images, "shares": shares}
    with pytest.raises(ParamsError, match="must name every split of a folder and sum to 1"):
        validate(tree, "params")


@pytest.fixture
def presets(tmp_path, monkeypatch) -> Path:
    """The project's presets in a folder of their own."""
    shutil.copytree(ROOT / "presets", tmp_path / "presets")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "presets"


@pytest.mark.parametrize(("count", "classes"), [(12, 3), (40, 2), (1200, 10)])
def test_the_numbers_fit_the_images(presets, tmp_path, count, classes):
    """What the stages refuse: a batch or a number of shots above what there is, more words than features."""
    names = [f"images/c{n % classes}/{n:04d}.png" for n in range(count)]
    for name in names:  # listed by name, never opened
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    images = look_at([str(tmp_path / "images")])
    choices = TokenizerChoice("v.ckpt", 16), TeacherChoice("vit_small_patch14_reg4_dinov2.lvd142m", None)
    tree = overlay("mine", images, *choices, None, {"title": "t", "licence": "other", "source": "s"})
    write_preset(presets / "mine.yaml", text_of(tree, "a comment"))
    params = validate(resolve("mine"), "mine")
    trained = images.counts["train"]
    assert sum(images.counts.values()) == count
    assert params.pretrain.batch <= max(2, trained // 8)
    assert params.kmeans.k * 39 <= trained * 64 or params.kmeans.k == 2
    assert params.evaluate.probe.batch <= trained
    shots = params.evaluate.few_shot
    assert max(shots.shots) <= images.fewest
    assert shots.batch <= min(shots.shots) * classes
    assert params.pretrain.epochs * (trained // params.pretrain.batch) >= 1500, "steps enough to learn"
    assert params.pixels.size == 128


def test_powers_of_two():
    assert [power_of_two(n) for n in (0, 1, 2, 3, 4, 255, 256)] == [2, 2, 2, 2, 4, 128, 256]


def test_a_preset_that_is_not_valid_is_not_left_behind(presets):
    with pytest.raises(UsageError, match=r"kmeans\.kk"):
        write_preset(presets / "mine.yaml", "preset: mine\nkmeans: {kk: 3}\n")
    assert not (presets / "mine.yaml").exists()
    (presets / "mine.yaml").write_text("preset: mine\n")
    with pytest.raises(UsageError):
        write_preset(presets / "mine.yaml", "preset: other\n")
    assert (presets / "mine.yaml").read_text() == "preset: mine\n"


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["demo", "--images", "."], "presets/demo.yaml exists"),
        (["small", "--images", "."], "presets/small.yaml exists"),
        (["Mine", "--images", "."], "cannot name a preset"),
        (["mine", "--images", "nowhere"], "nowhere does not exist"),
        (["mine", "--images", "empty"], "no images in"),
        (["mine", "--images", "empty", "--images", "train=empty"], "SPLIT=PATH"),
    ],
)
def test_what_cannot_be_started_is_refused_in_one_line(presets, tmp_path, capsys, words, problem):
    (tmp_path / "dvc.yaml").touch()
    (tmp_path / "empty").mkdir()
    assert main(["init", *words]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert problem in message
    assert not (presets / "mine.yaml").exists()


@pytest.mark.slow
def test_from_a_folder_to_verified_tokens_in_two_commands(tmp_path):
    """No key is edited; the commands that follow are those that DVC knows."""
    folder = project(tmp_path / "project")
    tiny.make_images(tmp_path, classes=3, each=20)
    tiny.make_vqgan(folder / "weights" / "vqgan" / "mine.ckpt")
    tiny.make_teacher(tmp_path / "teacher.pth")
    output = call(
        folder, "semdict", "init", "photos", "--images", str(tmp_path / "train"), "--licence", "cc-by-4.0",
        "--teacher", tiny.TEACHER["model"], "--teacher-weights", str(tmp_path / "teacher.pth"),
        "--set", f"features.kwargs={json.dumps(tiny.VIT)}", "--set", "vqgan.psnr_floor=0.0",
    )  # fmt: skip
    assert "3 classes, class folders" in output
    assert "missing" not in output
    commands = [line.strip().split("  ")[0] for line in output.split("\nnext\n")[1].splitlines()]
    commands = [command for command in commands if command.startswith("dvc repro ")]
    assert commands == ["dvc repro encode", "dvc repro pretrain@lease", "dvc repro evaluate@lease"]
    call(folder, *commands[0].split())
    planned = call(folder, *commands[2].split(), "--dry")
    assert all(f"Running stage '{stage}@lease'" in planned for stage in ("pretrain", "evaluate"))
    assert verify_shards(folder / "shards" / "photos").ok
    shards = open_shards(folder / "shards" / "photos")
    manifest = load_manifest(folder / "data" / "photos" / "manifest" / "manifest.parquet")
    assert len(shards) == len(manifest) == 60
    assert shards.meta["licence"] == "cc-by-4.0"

"""`semdict check` names what a stage would stumble over, before any stage runs."""

import shutil
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from semdict.pipeline.common.errors import WeightsError
from semdict.pipeline.manifest.duplicates import shared_images
from semdict.pipeline.manifest.table import load_manifest
from semdict.pipeline.tokenizers import inspect_features, inspect_tokenizer, load_features, load_tokenizer
from tests import tiny

ROOT = Path(__file__).resolve().parent.parent
SMALL = {  # batches and shots that twelve images allow, and the one split there is
    "pretrain": {"batch": 4},
    "condition": {"batch": 4, "held_out": []},
    "vcq": {"batch": 4, "held_out": []},
    "vqgan_train": {"batch": 4, "held_out": []},
    "ar": {"batch": 4, "held_out": []},
    "generate": {"split": "train"},
    "scores": {"split": "train"},
    "vcq_evaluate": {"test_splits": ["train"]},
    "evaluate": {
        "test_splits": ["train"], "knn": {"k": 3}, "probe": {"batch": 4}, "few_shot": {"shots": [1, 2], "batch": 2}
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Twelve images of three classes, a tokenizer, a teacher, and parameters that fit them."""
    root = tmp_path_factory.mktemp("check")
    tiny.make_world(root, **SMALL)
    return root


def check(world: Path, capsys, *options: str) -> tuple[int, list[str]]:
    """Exit status and lines."""
    capsys.readouterr()
    status = tiny.semdict(world, "check", *options)
    return status, capsys.readouterr().out.splitlines()


def test_a_sound_project_is_described(world, capsys):
    status, lines = check(world, capsys)
    text = "\n".join(lines)
    assert status == 0, text
    assert "preset tiny is valid" in text
    assert "images: 12 train, 3 classes" in text
    assert f"{tiny.CODES} codes, 16 x 16 cells" in text
    assert "24 features, 16 x 16 cells" in text
    assert "wrong" not in text and "not there yet" not in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("features.model=vit_base_patch14_dinov9", "no model that timm"),
        ("features.layer=-5", "layer -5 is not in -2 .. -1"),
        ("features.image_size=112", "has 8 x 8 cells (features.image_size, features.pool), the tokenizer 16 x 16"),
        ("features.kwargs={patch_size: 14, embed_dim: 48, depth: 2, num_heads: 2}", "does not fit"),
        ("features.kwargs={patch_size: 14, embed_dim: 24, depth: 2, num_heads: 5}", "cannot be built"),
        ("pixels.size=250", "250 is not a multiple of the tokenizer's stride 16"),
        ("vqgan.layout=magee", "did you mean mage?"),
        ("pretrain.batch=13", "pretrain.batch is 13, its splits ['train'] have 12 images"),
        ("evaluate.probe.batch=64", "evaluate.probe.batch is 64, evaluate.train_splits have 12 images"),
        ("evaluate.few_shot.shots=[1, 8]", "asks for 8 images of every class, one has 4"),
        ("evaluate.few_shot.batch=8", "1 shots of 3 classes are 3 images"),
        ("evaluate.knn.k=20", "evaluate.knn.k is 20"),
        ("evaluate.test_splits=[val]", "evaluate.test_splits names the split val, manifest.images has train"),
        ("manifest.layout=parquet", "no .parquet file"),
    ],
)
def test_what_a_stage_would_refuse_is_named(world, capsys, change, message):
    status, lines = check(world, capsys, "--set", change)
    assert status == 1
    assert any(line.startswith("  wrong: ") and message in line for line in lines), lines


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("manifest.images={train: nowhere}", "nowhere (manifest.images.train)"),
        ("manifest.images={train: 'nowhere-*.tar'}", "nowhere-*.tar does not exist"),
    ],
)
def test_what_is_missing_yet_is_not_wrong(world, capsys, change, message):
    status, lines = check(world, capsys, "--set", change)
    assert status == 0
    assert any(line.startswith("  not there yet: ") and message in line for line in lines), lines
    assert not any("images:" in line for line in check(world, capsys, "--no-images")[1])


def test_a_key_that_dvc_watches_and_a_preset_without_a_file_are_named(world, capsys, tmp_path):
    for name in ("images", "vqgan.ckpt", "teacher.pth"):
        (tmp_path / name).symlink_to(world / name)
    shutil.copytree(ROOT / "presets", tmp_path / "presets")
    shutil.copy2(world / "params.yaml", tmp_path / "params.yaml")
    text = (ROOT / "dvc.yaml").read_text()
    (tmp_path / "dvc.yaml").write_text(text.replace("params: [preset, kmeans]", "params: [preset, kmeans, kmeanz.k]"))
    status, lines = check(tmp_path, capsys)
    assert status == 1
    wrong = [line for line in lines if line.startswith("  wrong: ")]
    assert any("stage kmeans watches kmeanz.k" in line for line in wrong)
    assert any("preset: tiny is not the name of a file" in line for line in wrong)
    assert len(wrong) == 2, "every other key of dvc.yaml is there"


def test_images_in_two_splits_are_named_by_manifest_and_check(world, capsys, tmp_path):
    """The same bytes under another name, once in both splits and once twice in one."""
    tiny.make_images(tmp_path, classes=2, each=6)
    tiny.make_images(tmp_path / "other", classes=2, each=3, start=100)
    (tmp_path / "other" / "train").rename(tmp_path / "val")
    shutil.copy2(tmp_path / "train" / "c0" / "i000.png", tmp_path / "val" / "c0" / "copy.png")
    shutil.copy2(tmp_path / "train" / "c0" / "i002.png", tmp_path / "train" / "c0" / "twice.png")
    bad = tmp_path / "val" / "c0" / "bad.png"
    bad.write_bytes(b"no image")
    shutil.copy2(bad, tmp_path / "train" / "c0" / "bad.png")
    options = {"manifest": {"images": {"train": "train", "val": "val"}, "max_bad_fraction": 0.5}}
    sections = {**SMALL, **options}
    sections["evaluate"] = {**SMALL["evaluate"], "test_splits": ["val"]}
    tree = {name: str(world / file) for name, file in (("vqgan", "vqgan.ckpt"), ("features", "teacher.pth"))}
    tiny.write_params(
        tmp_path, **sections, inputs=tree, vqgan={"weights": tree["vqgan"]}, features={"weights": tree["features"]}
    )
    capsys.readouterr()
    assert tiny.semdict(tmp_path, "manifest") == 0
    named = "1 image is in split train and in split val (equal SHA-256), such as train/c0/i000 and val/c0/copy"
    assert named in capsys.readouterr().err
    (shared,) = shared_images(load_manifest(tmp_path / "data" / "tiny" / "manifest" / "manifest.parquet"))
    assert (shared.splits, shared.count) == (("train", "val"), 1)
    status, lines = check(tmp_path, capsys)
    assert status == 1
    assert any(line.startswith("  wrong: ") and named in line for line in lines)
    assert any("images: 13 train + 7 val, 2 classes, 2 that cannot be decoded" in line for line in lines)


def test_of_weights_names_and_shapes_alone_are_read(world, tmp_path):
    """A flipped bit inside a tensor is found when the weights are used, not here."""
    for name, inspect, load in (
        ("vqgan.ckpt", inspect_tokenizer, load_tokenizer),
        ("teacher.pth", lambda path: inspect_features(**tiny.TEACHER, weights=path),
         lambda path: load_features(**tiny.TEACHER, weights=path)),
    ):  # fmt: skip
        data = bytearray((world / name).read_bytes())
        data[len(data) // 2] ^= 1
        (tmp_path / name).write_bytes(data)
        inspect(tmp_path / name)
        with pytest.raises(WeightsError):
            load(tmp_path / name)


def test_what_is_inspected_is_what_loads(world, tmp_path):
    inspected, loaded = inspect_tokenizer(world / "vqgan.ckpt"), load_tokenizer(world / "vqgan.ckpt")
    assert (inspected.codebook_size, inspected.stride) == (loaded.codebook_size, loaded.stride)
    assert {p.device.type for p in inspected.parameters()} == {"meta"}
    for model, layer, pool in (
        ("mobilenetv1_100", -2, 1),
        ("mobilenetv1_100", -1, 2),
        ("deit_tiny_patch16_224", -1, 1),
    ):
        network = timm.create_model(model, num_classes=0)
        torch.save(network.state_dict(), tmp_path / "weights.pth")
        options = {"model": model, "weights": tmp_path / "weights.pth", "layer": layer, "grid": 4, "pool": pool}
        teacher = load_features(**options)
        assert inspect_features(**options) == (teacher.grid[0], teacher.dim), model
        assert teacher(torch.zeros(1, 3, 64, 64)).shape == (1, 16, teacher.dim)


def test_images_of_equal_bytes_within_a_split_are_not_shared(tmp_path):
    tiny.make_images(tmp_path, classes=1, each=3)
    shutil.copy2(tmp_path / "train" / "c0" / "i000.png", tmp_path / "train" / "c0" / "again.png")
    Image.new("RGB", (9, 9)).save(tmp_path / "train" / "c0" / "other.png")
    tiny.write_params(tmp_path, manifest={"images": {"train": "train"}})
    assert tiny.semdict(tmp_path, "manifest") == 0
    assert shared_images(load_manifest(tmp_path / "data" / "tiny" / "manifest" / "manifest.parquet")) == []

"""Sets of images to score: damaged images, order, files of other programs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from semdict.pipeline.common.errors import ManifestError
from semdict.pipeline.config.params import load_params
from semdict.train.eval.image_sets import ArrayImages, PngFolder, open_images
from tests import tiny
from tests.test_scores import COUNT, fid, textures, write_pngs


def damage(path: Path) -> None:
    """Cut off the second half of an image file; its header, which is all that the manifest reads, stays."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


@pytest.fixture
def damaged(tmp_path) -> Path:
    """Twelve JPEGs with a manifest, one of them damaged, and a folder of samples."""
    root = tiny.make_world(tmp_path).parent
    for path in (root / "images" / "train").rglob("*.png"):
        Image.open(path).save(path.with_suffix(".jpg"), quality=95)
        path.unlink()
    write_pngs(root / "one", textures(0))
    damage(root / "images" / "train" / "c1" / "i004.jpg")
    assert tiny.semdict(root, "manifest") == 0
    return root


def test_a_damaged_image_is_left_out_counted_and_named(damaged, capsys):
    assert fid(damaged, "--samples", "one", "--protocol", "teacher", "--out", "a.json") == 0
    about = json.loads((damaged / "a.json").read_text())["protocol"][0]["reference"]
    assert about["images"] == 11 and about["left_out"] == 1
    ((name, reason),) = about["left_out_first"].items()
    assert name.endswith("c1/i004") and "damaged JPEG" in reason
    error = capsys.readouterr().err
    assert "left out 1 of 12 images" in error and name in error and reason in error
    (damaged / "images" / "train" / "c1" / "i004.jpg").unlink()
    assert tiny.semdict(damaged, "manifest") == 0
    assert fid(damaged, "--samples", "one", "--protocol", "teacher", "--out", "b.json") == 0
    one, other = (json.loads((damaged / name).read_text()) for name in ("a.json", "b.json"))
    assert one["teacher_frechet_distance"] == pytest.approx(other["teacher_frechet_distance"], rel=1e-9)


def test_a_damaged_image_is_left_out_of_the_reference_and_of_the_neighbours(damaged):
    assert tiny.semdict(damaged, "evaluate", "reference", "--split", "train", "--out", "reference") == 0
    card = json.loads((damaged / "reference" / "reference.json").read_text())
    assert (card["images"], card["left_out"]) == (11, 1) and len(list((damaged / "reference/images").iterdir())) == 11
    options = ["--samples", "reference", "--split", "train", "--set", "runtime.device=cpu", "--set", "scores.shown=11"]
    assert tiny.semdict(damaged, "evaluate", "nearest", *options, "--out", "near") == 0
    result = json.loads((damaged / "near" / "nearest.json").read_text())
    rows = [int(path.stem) for path in sorted((damaged / "reference" / "images").iterdir())]
    assert len(set(rows)) == 11 and [pair["training"][0] for pair in result["pairs"]] == rows
    assert result["protocol"][0]["training"]["left_out"] == 1


def test_no_decodable_image_is_an_error(damaged):
    for path in (damaged / "images" / "train").rglob("*.jpg"):
        if path.stem != "i004":
            damage(path)
    assert tiny.semdict(damaged, "manifest") == 0
    reference = open_images(
        damaged / "data/tiny/manifest/manifest.parquet", load_params(damaged / "params.yaml", []), "train"
    )
    with pytest.raises(ManifestError, match=r"none of 12 images can be decoded; the first is .*c0/i000: damaged JPEG"):
        list(reference.batches(4))


def test_a_damaged_sample_is_an_error_that_names_it(damaged, capsys):
    damage(damaged / "one" / "images" / "000003.png")
    assert fid(damaged, "--samples", "one", "--protocol", "teacher", "--out", "a.json") == 1
    assert "000003.png cannot be decoded" in capsys.readouterr().err and not (damaged / "a.json").exists()


def test_files_of_other_programs_are_no_samples(tmp_path):
    folder = write_pngs(tmp_path / "copied", textures(0))
    for name in ("._000000.png", ".DS_Store", "Thumbs.db"):
        (folder / "images" / name).write_bytes(b"no image")
    assert len(PngFolder(folder, 10**8)) == COUNT


def test_batches_are_the_set_in_order():
    images = ArrayImages(textures(3, count=7), {"from": "textures"})
    parts = list(images.batches(3))
    assert [numbers for numbers, _ in parts] == [[0, 1, 2], [3, 4, 5], [6]]
    whole = torch.cat([part for _, part in parts])
    assert whole.dtype == torch.uint8 and np.array_equal(whole.permute(0, 2, 3, 1).numpy(), textures(3, count=7))
    assert [numbers for numbers, _ in images.batches(3, count=4)] == [[0, 1, 2], [3]]

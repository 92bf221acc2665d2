"""Importers of plain arrays, LlamaGen's folders and RAR's JSONL, against files written as those projects write them."""

import json
from pathlib import Path

import numpy as np
import pytest

from semdict.cli import main
from semdict.pipeline.common.errors import SemdictError, ShardError, UsageError
from semdict.pipeline.shards import open_shards, verify_shards
from semdict.pipeline.shards.convert import import_tokens


def ids(*shape: int, size: int = 1024, dtype=np.int64, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, size, shape).astype(dtype)


def write_llamagen(folder: Path, codes: np.ndarray, labels: np.ndarray, dataset: str = "imagenet256") -> Path:
    """One file per image as `extract_codes_c2i.py` saves them: codes (1, V, L) and labels (1,), int64."""
    for name in ("codes", "labels"):
        (folder / f"{dataset}_{name}").mkdir(parents=True)
    for number, (code, label) in enumerate(zip(codes, labels, strict=True)):
        np.save(folder / f"{dataset}_codes" / f"{number}.npy", code[None])
        np.save(folder / f"{dataset}_labels" / f"{number}.npy", np.array([label]))
    return folder


@pytest.mark.parametrize(("views", "names"), [(10, "ten-crop-0 ten-crop-9"), (2, "centre flip"), (1, "centre centre")])
def test_llamagen_folders(tmp_path, views, names):
    codes, labels = ids(23, views, 256, size=16384), ids(23, size=1000)
    folder = write_llamagen(tmp_path / "codes", codes, labels)
    (folder / "imagenet256_codes" / ".DS_Store").write_bytes(b"x")
    for path, out in ((folder, "s"), (folder / "imagenet256_codes", "t")):
        result = import_tokens(path, tmp_path / out, None if out == "s" else "llamagen")
        shards = open_shards(tmp_path / out)
        assert (result.rows, result.gen_size, shards.grid) == (23, 16384, (16, 16))
        assert np.array_equal(shards.gen[:], codes) and np.array_equal(shards.label[:], labels)
        assert [shards.views[0]["name"], shards.views[-1]["name"]] == names.split()
        assert verify_shards(tmp_path / out).ok


def test_llamagen_folders_with_repeated_images(tmp_path):
    """Several processes pad their shares by the first images; --rows leaves those out."""
    codes, labels = ids(11, 2, 64, size=16384), ids(11, size=1000)
    folder = write_llamagen(tmp_path / "codes", np.concatenate([codes, codes[:1]]), np.append(labels, labels[0]))
    assert main(["shards", "import", str(folder), str(tmp_path / "s"), "--from", "llamagen", "--rows", "11"]) == 0
    shards = open_shards(tmp_path / "s")
    assert np.array_equal(shards.gen[:], codes) and shards.grid == (8, 8)


def test_llamagen_mistakes_are_named(tmp_path):
    folder = write_llamagen(tmp_path / "codes", ids(5, 2, 16), ids(5, size=9))
    codes, labels = folder / "imagenet256_codes", folder / "imagenet256_labels"

    def refused(error: type[SemdictError], text: str) -> None:
        with pytest.raises(error, match=text):
            import_tokens(folder, tmp_path / "s")

    np.save(codes / "3.npy", ids(1, 2, 15))
    refused(ShardError, r"codes/3.npy is \(1, 2, 15\), expected \(1, 2, 16\)")
    np.save(codes / "3.npy", ids(1, 2, 16).astype(np.float32))
    refused(ShardError, r"codes/3.npy is float32")
    np.save(codes / "3.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    refused(ShardError, r"codes/3.npy is not a .npy array of numbers")
    np.save(codes / "3.npy", ids(1, 2, 16) + 16384)
    refused(UsageError, r"codes row 3, position 0 holds \d+, beyond the usual codebook of 16384: give --gen-size")
    (codes / "3.npy").rename(codes / "5.npy")
    refused(ShardError, "codes/3.npy is missing")
    (codes / "5.npy").rename(codes / "notes.npy")
    refused(ShardError, "codes/notes.npy is not named by a number")
    (codes / "notes.npy").unlink()
    (codes / "4.npy").unlink()
    refused(ShardError, r"imagenet256_codes has 3 files, .*labels has 5")
    labels.rename(folder / "other")
    refused(UsageError, "has no folder of labels beside it")
    (folder / "second_codes").mkdir()
    refused(UsageError, "it holds imagenet256_codes, second_codes")
    assert not (tmp_path / "s").exists()


def write_rar(path: Path, tokens: np.ndarray, labels: np.ndarray) -> Path:
    """A line per view as `pretokenization.py` writes them: json.dump of class_id and tokens."""
    with path.open("w") as file:
        for image, label in zip(tokens, labels, strict=True):
            for view in image:
                json.dump({"class_id": int(label), "tokens": view.tolist()}, file)
                file.write("\n")
    return path


def test_rar_jsonl(tmp_path):
    """Lines as images of their own, and ten lines of ten crops as the views of one image."""
    tokens, labels = ids(30, 10, 256), ids(30, size=1000)
    path = write_rar(tmp_path / "pretokenized.jsonl", tokens, labels)
    result = import_tokens(path, tmp_path / "s")
    assert (result.rows, result.gen_size) == (300, 1024)
    shards = open_shards(tmp_path / "s")
    assert np.array_equal(shards.gen[:, 0], tokens.reshape(300, 256))
    assert np.array_equal(shards.label[:], labels.repeat(10)) and shards.grid == (16, 16)
    assert main(["shards", "import", str(path), str(tmp_path / "t"), "--views", "10"]) == 0
    shards = open_shards(tmp_path / "t")
    assert np.array_equal(shards.gen[:], tokens) and np.array_equal(shards.label[:], labels)
    assert shards.views[3]["name"] == "ten-crop-3" and verify_shards(tmp_path / "t").ok


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("{", "line 3 is no record"),
        ("[1, 2]", "line 3 is no record"),
        ('{"class_id": 1}', "line 3 is no record of class_id and tokens"),
        ("[" * 100_000, "line 3 is no record"),
        ('{"class_id": "x", "tokens": [1, 2, 3, 4]}', "line 3 holds a class_id or tokens that are no whole numbers"),
        ('{"class_id": 1, "tokens": [1, 2, 3.5, 4]}', "no whole numbers"),
        ('{"class_id": 1, "tokens": [1, [2], 3, 4]}', "line 3 is no record"),
        ('{"class_id": 1, "tokens": []}', "no whole numbers"),
        ('{"class_id": 1, "tokens": [1, 2, 3]}', "line 3 has 3 tokens, the first line 4"),
        ('{"class_id": 1, "tokens": [1, 2, -3, 4]}', "tokens row 2, position 2 holds -3"),
        ('{"class_id": 1, "tokens": [1, 2, 1024, 4]}', "position 2 holds 1024, beyond the usual codebook of 1024"),
        ('{"class_id": 1, "tokens": [1, 2, 99999999999999999999, 4]}', "whole numbers"),
        ('{"class_id": 99999999999, "tokens": [1, 2, 3, 4]}', "class_id row 2 holds 99999999999"),
    ],
)
def test_rar_mistakes_are_named(tmp_path, line, text):
    path = write_rar(tmp_path / "a.jsonl", ids(2, 1, 4), ids(2, size=9))
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(SemdictError, match=text):
        import_tokens(path, tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_rar_views_are_of_one_image(tmp_path):
    path = write_rar(tmp_path / "a.jsonl", ids(3, 2, 4), np.array([1, 2, 3]))
    with pytest.raises(ShardError, match="6 lines, expected a positive multiple of 4"):
        import_tokens(path, tmp_path / "s", views=4)
    with pytest.raises(ShardError, match="line 3 has class_id 2, its image 1: check --views"):
        import_tokens(path, tmp_path / "s", views=3)
    (tmp_path / "b.jsonl").write_text("")
    with pytest.raises(ShardError, match="0 lines"):
        import_tokens(tmp_path / "b.jsonl", tmp_path / "s")


@pytest.mark.parametrize(
    ("shape", "axes", "want"),
    [
        ((9, 16), None, ((9, 1, 16), (4, 4))),
        ((9, 15), None, ((9, 1, 15), (15,))),
        ((9, 3, 5), None, ((9, 1, 15), (3, 5))),
        ((9, 2, 16), "NVL", ((9, 2, 16), (4, 4))),
        ((9, 2, 4, 4), None, ((9, 2, 16), (4, 4))),
    ],
)
def test_arrays_of_every_shape(tmp_path, shape, axes, want):
    gen, disc = ids(*shape, dtype=np.int32), ids(*shape, size=16384, dtype=np.uint16, seed=1)
    np.save(tmp_path / "gen.npy", gen)
    np.save(tmp_path / "disc.npy", disc)
    np.save(tmp_path / "labels.npy", np.arange(9)[:, None])
    options = ["--disc", str(tmp_path / "disc.npy"), "--labels", str(tmp_path / "labels.npy")]
    options += ["--axes", axes] if axes else []
    assert main(["shards", "import", str(tmp_path / "gen.npy"), str(tmp_path / "s"), *options]) == 0
    shards = open_shards(tmp_path / "s")
    assert (shards.gen.shape, shards.grid) == want and np.array_equal(shards.gen[:].ravel(), gen.ravel())
    assert np.array_equal(shards.disc[:].ravel(), disc.ravel()) and np.array_equal(shards.label[:], np.arange(9))
    assert verify_shards(tmp_path / "s").ok


def test_npz_of_262144_codes_without_labels(tmp_path):
    """One file with all columns; ids beyond 16 bits become uint32."""
    tokens, disc = ids(20, 64, size=1 << 18), ids(20, 64, size=500, seed=2)
    np.savez_compressed(tmp_path / "a.npz", tokens=tokens, tokens_dino=disc, note=np.zeros(3))
    result = import_tokens(tmp_path / "a.npz", tmp_path / "s", gen_size=1 << 18, disc_size=500)
    shards = open_shards(tmp_path / "s")
    assert result.ignored == ("note",) and shards.gen.dtype == np.uint32 and shards.disc.dtype == np.uint16
    assert np.array_equal(shards.gen[:, 0], tokens) and np.array_equal(shards.disc[:, 0], disc)
    assert (shards.label[:] == -1).all()


def test_array_mistakes_are_named(tmp_path):
    np.save(tmp_path / "a.npy", ids(9, 16))
    np.save(tmp_path / "floats.npy", np.zeros((9, 16)))
    np.save(tmp_path / "other.npy", ids(8, 16))
    np.save(tmp_path / "flat.npy", ids(9))
    np.savez(tmp_path / "b.npz", x=ids(9, 16))
    np.savez(tmp_path / "c.npz", gen=np.array([{"a": 1}], dtype=object))
    np.savez_compressed(tmp_path / "d.npz", gen=np.zeros((1 << 12, 1 << 12), np.int64))
    (tmp_path / "e.npz").write_bytes(b"PK\x03\x04 no archive")
    for name, options, text in (
        ("floats.npy", {}, "float64, expected whole numbers"),
        ("flat.npy", {}, r"is \(9,\), expected axes NL"),
        ("a.npy", {"axes": "NHW"}, r"is \(9, 16\), expected axes NHW"),
        ("a.npy", {"disc": tmp_path / "other.npy"}, r"other.npy is \(8, 16\), a.npy \(9, 16\)"),
        ("a.npy", {"labels": tmp_path / "other.npy"}, r"9 rows of tokens, the labels are \(8, 16\)"),
        ("b.npz", {}, r"has the arrays \['x'\]; expected one of"),
        ("c.npz", {}, "is not a .npz of numbers"),
        ("d.npz", {}, "would inflate to"),
        ("e.npz", {}, "is not a .npz of numbers"),
    ):
        with pytest.raises(SemdictError, match=text):
            import_tokens(tmp_path / name, tmp_path / "s", **options)
    assert not (tmp_path / "s").exists()

"""Digests of published files: one command writes them, the next one compares them; files of others have none."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from semdict.pipeline.analysis.curves import read_nll
from semdict.pipeline.common.digests import (
    check_digest,
    check_published,
    check_sums,
    record_digest,
    seal_holds,
    sealed,
    sidecar,
    write_sums,
)
from semdict.pipeline.common.errors import SemdictError, WeightsError
from semdict.pipeline.common.files import sha256_file
from semdict.pipeline.common.safeload import load_array
from tests import tiny


def flip(path: Path, at: int = -1) -> None:
    """Flip the lowest bit of one byte."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_an_array_is_compared_with_the_digest_beside_it(tmp_path):
    path = tmp_path / "c.npy"
    np.save(path, np.ones((3, 2), np.float32))
    assert load_array(path).shape == (3, 2), "without a digest it is read as it is"
    record_digest(path)
    check_digest(path)
    assert sidecar(path).read_text() == f"{sha256_file(path)}  c.npy\n"
    flip(path)
    with pytest.raises(WeightsError, match=r"c\.npy is damaged or was replaced.*remove c\.npy\.sha256"):
        load_array(path)


def test_a_folder_is_compared_with_its_list(tmp_path):
    folder = tmp_path / "f"
    (folder / "deep").mkdir(parents=True)
    for name in ("a", "deep/b"):
        (folder / name).write_text(name)
    with pytest.raises(SemdictError, match="has no SHA256SUMS; again"):
        check_sums(folder, "again")
    write_sums(folder)
    (folder / ".DS_Store").touch()
    check_sums(folder, "again")
    for damage in (lambda f: flip(f / "deep" / "b"), lambda f: (f / "a").unlink(), lambda f: (f / "c").touch(),
                   lambda f: flip(f / "SHA256SUMS", 3)):  # fmt: skip
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy)
        damage(copy)
        with pytest.raises(SemdictError, match="is not the file that SHA256SUMS lists; again"):
            check_sums(copy, "again")
        shutil.rmtree(copy)


def test_a_sealed_file_shows_any_change():
    content = sealed({"a": 1, "b": [1, 2]})
    assert seal_holds(content) and seal_holds({"a": 1})
    assert not seal_holds({**content, "a": 2}) and not seal_holds({**content, "c": 0})


def test_curves_of_a_run_are_compared_with_its_card(tmp_path):
    path = tmp_path / "nll.json"
    path.write_text(json.dumps({"sizes": [2, 4], "bits": {"train": [1.0, 2.0]}}))
    (tmp_path / "run.json").write_text(json.dumps({"files": {"nll.json": sha256_file(path)}}))
    assert read_nll(tmp_path)[0] == (2, 4) and check_published(path) == sha256_file(path)
    path.write_text(path.read_text().replace("2.0", "3.0"))
    with pytest.raises(WeightsError, match="damaged or was replaced"):
        read_nll(tmp_path)


def test_features_and_centroids_with_one_flipped_bit_are_refused(tmp_path, capsys):
    tiny.make_world(tmp_path)
    tiny.run_until_centroids(tmp_path)
    features, centroids = tmp_path / "data/tiny/features.zarr", tmp_path / "data/tiny/kmeans/centroids.npy"
    for path, command, words in (
        (features / "features" / "zarr.json", "kmeans", "dvc repro -f sample_features"),
        (features / "features" / "c" / "0" / "0", "kmeans", "dvc repro -f sample_features"),
        (centroids, "encode", "is damaged or was replaced"),
    ):
        flip(path)
        assert tiny.semdict(tmp_path, command) == 1
        assert words in capsys.readouterr().err
        flip(path)
    assert tiny.semdict(tmp_path, "kmeans") == 0, "the same bytes again"

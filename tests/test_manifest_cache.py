"""The manifest's cache: no image is read twice, no change is missed, damage never reaches the manifest."""

import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from semdict.cli import main
from semdict.pipeline.common.errors import ManifestError, SemdictError
from semdict.pipeline.images.decode import Status
from semdict.pipeline.manifest import folders, scan
from semdict.pipeline.manifest.cache import open_cache
from semdict.pipeline.manifest.table import load_manifest
from tests.image_files import encoded, picture
from tests.image_sources import (
    build,
    make_tree,
    params,
    rows,
    write,
)


def test_a_file_is_read_again_only_when_it_changed(tmp_path, monkeypatch):
    """Also where its size and modification time are as they were: the change time moves on every write."""
    tree = make_tree(tmp_path / "train")
    images = {"train": str(tree)}
    before = build(tmp_path, images)
    secret, touched = tree / "a" / "2.png", tree / "b" / "3.png"
    stat = secret.stat()
    data = bytearray(secret.read_bytes())
    data[-20] ^= 1
    for path in (secret, touched):
        path.write_bytes(data)
    os.utime(secret, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    write(tree / "a" / "new.png", encoded(picture()))
    (tree / "b" / "0.png").unlink()
    after = build(tmp_path, images)
    old, new = dict(rows(before, "key", "sha256")), dict(rows(after, "key", "sha256"))
    assert new["train/a/2"] == hashlib.sha256(data).hexdigest() != old["train/a/2"]
    assert new["train/b/3"] == hashlib.sha256(data).hexdigest() != old["train/b/3"]
    assert new.keys() == old.keys() - {"train/b/0"} | {"train/a/new"}
    assert len(list((tmp_path / "cache").iterdir())) == 1

    def never(*_):
        raise AssertionError("read again")

    with monkeypatch.context() as patch:
        patch.setattr(scan, "_examine", never)
        assert build(tmp_path, images).table.equals(after.table)
        with pytest.raises(AssertionError, match="read again"):
            build(tmp_path, images, max_pixels=10**6)  # another limit: nothing remembered counts
    assert len(list((tmp_path / "cache").iterdir())) == 1, "results of other settings are deleted"


def test_the_cache_does_not_grow_with_every_change(tmp_path):
    tree = make_tree(tmp_path / "train")
    for i in range(6):
        shutil.rmtree(tree)
        make_tree(tree, each=3 + i % 2)
        build(tmp_path, {"train": str(tree)})
        write(tree / "a" / f"more{i}.png")
    (path,) = (tmp_path / "cache").glob("*.sqlite")
    with open_cache(path) as (cache, _):
        assert len(cache) <= 2 * 8


def hide_change_times(monkeypatch) -> None:
    """A file system whose change times do not move (some network drives): size and modification time remain."""
    real = folders.make_stamp
    monkeypatch.setattr(folders, "make_stamp", lambda status: (*real(status)[:2], 0))


def change_secretly(path: Path) -> str:
    """Change one byte and set the time back; the new SHA-256."""
    before, data = path.stat(), bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    return hashlib.sha256(data).hexdigest()


def test_a_fresh_manifest_reads_everything_again(tmp_path, monkeypatch, capsys):
    """The advice of the message that a reader gives helps, and does not lead back to itself."""
    hide_change_times(monkeypatch)
    params(tmp_path)
    tree = make_tree(tmp_path / "train")
    monkeypatch.chdir(tmp_path)
    assert main(["manifest"]) == 0
    sha256, images = change_secretly(tree / "a" / "2.png"), {"train": "train"}
    assert main(["manifest"]) == 0
    path = tmp_path / "data/t/manifest/manifest.parquet"
    with pytest.raises(ManifestError, match=r"SHA-256\); run `semdict manifest --fresh`, then `dvc repro -f manifest`"):
        load_manifest(path).reader(images).read(2)
    assert main(["manifest", "--fresh"]) == 0
    assert main(["manifest"]) == 0, "as dvc repro -f manifest runs it"
    manifest = load_manifest(path)
    assert manifest.table["sha256"][2].as_py() == sha256
    assert manifest.reader(images).read(2) == (tree / "a" / "2.png").read_bytes()


def test_no_flipped_bit_of_the_cache_reaches_the_manifest(tmp_path, capsys):
    images = {"train": str(make_tree(tmp_path / "train"))}
    build(tmp_path, images)
    want = (tmp_path / "manifest.parquet").read_bytes()
    (path,) = (tmp_path / "cache").glob("*.sqlite")
    sound = path.read_bytes()
    sha256 = rows(load_manifest(tmp_path / "manifest.parquet"), "sha256")[5][0].encode()
    rng = np.random.default_rng(0)
    places = [8 * sound.index(sha256) + 8 * 7 + 1, *rng.integers(0, 8 * len(sound), 60).tolist()]
    for place in places:
        data = bytearray(sound)
        data[place // 8] ^= 1 << place % 8
        path.write_bytes(data)
        build(tmp_path, images)
        assert (tmp_path / "manifest.parquet").read_bytes() == want, place
        if place == places[0]:
            assert "is damaged and deleted, all images are read again" in capsys.readouterr().err


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    path = tmp_path / "cache.sqlite"
    with open_cache(path) as (cache, empty):
        cache._database.execute("PRAGMA max_page_count = 3")
        columns = {field.name: ["x" * 200] * 500 if field.type == pa.string() else [1] * 500 for field in empty.schema}
        table = pa.table(columns | {"offset": range(500)}, empty.schema)
        with pytest.raises(SemdictError, match=r"cache\.sqlite cannot be written \(database or disk is full\)"):
            cache.add(table)


def test_an_unreadable_file_is_tried_again(tmp_path):
    tree = make_tree(tmp_path / "train")
    target = tree / "a" / "late.png"
    target.symlink_to("nowhere")
    first = build(tmp_path, {"train": str(tree)}, max_bad_fraction=0.5)
    assert first.status.tolist().count(Status.UNREADABLE) == 1
    target.unlink()
    write(target)
    assert not build(tmp_path, {"train": str(tree)}).status.any()


def test_a_damaged_cache_is_made_again(tmp_path):
    images = {"train": str(make_tree(tmp_path / "train"))}
    build(tmp_path, images)
    want = (tmp_path / "manifest.parquet").read_bytes()
    (part,) = (tmp_path / "cache").glob("*.sqlite")
    part.write_bytes(part.read_bytes()[:100])
    build(tmp_path, images)
    assert (tmp_path / "manifest.parquet").read_bytes() == want

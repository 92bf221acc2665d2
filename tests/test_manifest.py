"""The manifest stage: right rows, no progress lost by a kill, changed images found by the readers."""

import csv
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from semdict.cli import main
from semdict.pipeline.common.errors import ManifestError
from semdict.pipeline.images.decode import BadImage, Status
from semdict.pipeline.manifest.cache import open_cache
from semdict.pipeline.manifest.table import COLUMNS, Manifest, load_manifest
from tests.image_files import bad_files, encoded, good_files, picture
from tests.image_sources import (
    build,
    make_tree,
    params,
    rows,
    write,
    write_parquet,
    write_tar,
)

ROOT = Path(__file__).resolve().parent.parent


def test_rows_describe_the_files(tmp_path):
    tree = make_tree(tmp_path / "train")
    manifest = build(tmp_path, {"train": str(tree)})
    assert len(manifest) == 12 and manifest.table.schema.equals(COLUMNS)
    for row, (key, source, size, width, height, sha256, status) in enumerate(
        rows(manifest, "key", "source", "bytes", "width", "height", "sha256", "status")
    ):
        data = (tree / source).read_bytes()
        assert key == f"train/{source.removesuffix('.png')}" == manifest.key(row)
        assert (size, sha256, status) == (len(data), hashlib.sha256(data).hexdigest(), 0)
        assert (width, height) == (9, 8 + int(Path(source).stem))
    assert manifest.label.tolist() == [0] * 6 + [1] * 6 and manifest.label.dtype == np.int32
    assert manifest.classes == ["a", "b"]
    assert manifest.rows_of(["train"]).tolist() == list(range(12)) and not len(manifest.rows_of(["val"]))


def test_the_saved_manifest_equals_the_built_one(tmp_path):
    built = build(tmp_path, {"train": str(make_tree(tmp_path / "train"))})
    loaded = load_manifest(tmp_path / "manifest.parquet")
    assert loaded.table.equals(built.table) and loaded.classes == built.classes and loaded.sha256 == built.sha256
    names = pq.read_schema(tmp_path / "manifest.parquet").names
    assert not any("time" in name or "stamp" in name for name in names)


def test_the_fingerprint_depends_on_the_content_only(tmp_path):
    tree = make_tree(tmp_path / "train")
    base = build(tmp_path, {"train": str(tree)}).sha256
    pq.write_table(load_manifest(tmp_path / "manifest.parquet").table, tmp_path / "other.parquet", row_group_size=3,
                   compression="gzip")  # fmt: skip
    assert load_manifest(tmp_path / "other.parquet").sha256 == base
    table = load_manifest(tmp_path / "manifest.parquet").table
    for name in COLUMNS.names:
        values = table[name].to_pylist()
        values[3] = f"{values[3]}x" if isinstance(values[3], str) else values[3] + 1
        at = COLUMNS.names.index(name)
        changed = table.set_column(at, COLUMNS.field(name), pa.array(values, COLUMNS.field(name).type))
        assert Manifest(changed).sha256 != base, name
        pq.write_table(changed, tmp_path / "changed.parquet")
        with pytest.raises(ManifestError, match="its content is not what was written"):
            load_manifest(tmp_path / "changed.parquet")
    assert Manifest(table.take([1, 0, *range(2, 12)])).sha256 != base


def test_every_bad_file_keeps_its_row_with_its_reason(tmp_path):
    for folder, files in (("good", good_files()), ("bad", bad_files())):
        for name, (data, *_) in files.items():
            write(tmp_path / "in" / folder / f"{name.replace('.', '-')}{Path(name).suffix}", data)
    (tmp_path / "in" / "bad" / "gone.png").symlink_to("nowhere")
    manifest = build(tmp_path, {"train": str(tmp_path / "in")}, max_bad_fraction=1.0)
    found = {Path(key).name: rest for key, *rest in rows(manifest, "key", "status", "reason", "width", "height")}
    for name, (_, status, in_header) in bad_files().items():
        code, reason, width, _ = found.pop(name.replace(".", "-"))
        assert code == (Status[status] if in_header else Status.OK), name
        assert bool(reason) == bool(code) and (width == 0) == bool(code), name
    assert found["gone"][0] == Status.UNREADABLE and "No such file" in found.pop("gone")[1]
    for name, (_, rgb) in good_files().items():
        assert found.pop(name.replace(".", "-")) == [Status.OK, "", rgb.shape[1], rgb.shape[0]], name
    assert not found
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    bad = sum(in_header for *_, in_header in bad_files().values()) + 1
    assert metrics["images"] == len(good_files()) + len(bad_files()) + 1
    assert metrics["bad"] == bad == sum(n for name, n in metrics["status"].items() if name != "OK")
    with (tmp_path / "cache" / "bad.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == bad and {row["status"] for row in table} == set(metrics["status"]) - {"OK"}


def test_too_many_bad_images_stop_the_stage(tmp_path):
    tree = make_tree(tmp_path / "train", each=10)
    write(tree / "a" / "3.png", b"")
    build(tmp_path, {"train": str(tree)}, max_bad_fraction=0.05)  # 1 of 20 is not more than 5 %
    (tmp_path / "manifest.parquet").unlink()
    write(tree / "b" / "4.png", b"nonsense")
    with pytest.raises(ManifestError, match=r"2 of 20 .*1 EMPTY, 1 NOT_AN_IMAGE.*train/a/3.*bad\.csv"):
        build(tmp_path, {"train": str(tree)}, max_bad_fraction=0.05)
    assert not (tmp_path / "manifest.parquet").exists() and (tmp_path / "cache" / "bad.csv").exists()


@pytest.mark.parametrize("layout", ["classes", "webdataset", "parquet"])
def test_readers_notice_every_change(tmp_path, layout):
    data = [encoded(picture(seed=i)) for i in range(3)]
    if layout == "classes":
        paths = [write(tmp_path / "in" / "c" / f"{i}.png", data[i]) for i in range(3)]
    elif layout == "webdataset":
        paths = [write_tar(tmp_path / "in" / "t.tar", [(f"{i}.png", data[i]) for i in range(3)])]
    else:
        paths = [write_parquet(tmp_path / "in" / "p.parquet", [(data[i], f"{i}.png", 0) for i in range(3)])]
    images = {"train": str(tmp_path / "in")}
    manifest = build(tmp_path, images)
    reader = load_manifest(tmp_path / "manifest.parquet").reader(images)
    assert [reader.read(i) for i in range(3)] == data
    assert [size for (size,) in rows(manifest, "bytes")] == [len(item) for item in data]
    other = data[1][:-1] + b"!"
    if layout == "parquet":
        write_parquet(paths[0], [(item, f"{i}.png", 0) for i, item in enumerate([data[0], other, data[2]])])
    else:
        path = paths[1] if layout == "classes" else paths[0]
        path.write_bytes(path.read_bytes().replace(data[1], other))
    reader = manifest.reader(images)
    with pytest.raises(ManifestError, match=r"(1\.png|t\.tar at|p\.parquet at 1).*dvc repro -f manifest"):
        reader.read(1)
    if layout == "classes":
        write(paths[0], data[0] + b"more")
        paths[2].unlink()
        for row, message in ((0, "bytes, the manifest says"), (2, "cannot be read")):
            with pytest.raises(ManifestError, match=rf"{row}\.png.*{message}.*dvc repro -f manifest"):
                reader.read(row)
    with pytest.raises(ManifestError, match=r"'train'.*val"):
        manifest.reader({"val": images["train"]}).read(0)


def test_bad_rows_are_not_read(tmp_path):
    tree = make_tree(tmp_path / "train")
    write(tree / "a" / "0.png", b"")
    reader = build(tmp_path, {"t": str(tree)}, max_bad_fraction=1.0).reader({"t": str(tree)})
    with pytest.raises(BadImage) as caught:
        reader.read(0)
    assert caught.value.status == Status.EMPTY and "empty" in caught.value.reason


def test_null_images_in_parquet_are_empty(tmp_path):
    write_parquet(tmp_path / "in" / "p.parquet", [(encoded(picture()), "a.png", 0), (None, "b.png", 1)])
    manifest = build(tmp_path, {"t": str(tmp_path / "in")}, max_bad_fraction=1.0)
    assert manifest.status.tolist() == [Status.OK, Status.EMPTY]


def test_a_file_that_changes_meanwhile_is_named(tmp_path, monkeypatch):
    tree = make_tree(tmp_path / "train")
    from semdict.pipeline.manifest import stage

    listed = stage.list_images

    def grow(*args):
        listing = listed(*args)
        with (tree / "b" / "1.png").open("ab") as file:
            file.write(b"more")
        return listing

    monkeypatch.setattr(stage, "list_images", grow)
    with pytest.raises(ManifestError, match=r"b/1\.png: changed while"):
        build(tmp_path, {"train": str(tree)})


def test_duplicates_are_counted(tmp_path):
    tree = make_tree(tmp_path / "train")
    write(tree / "a" / "copy.png", (tree / "b" / "1.png").read_bytes())
    build(tmp_path, {"train": str(tree)})
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["duplicates"] == 1 and metrics["classes"] == 2 and metrics["splits"]["train"]["images"] == 13


@pytest.mark.parametrize("content", [None, b"text", b"other columns"])
def test_a_file_that_is_no_manifest_is_named(tmp_path, content):
    path = tmp_path / "m.parquet"
    if content == b"other columns":
        pq.write_table(pa.table({"a": [1]}), path)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(ManifestError, match=r"m\.parquet"):
        load_manifest(path)


SLOW = """
import sys, time
from semdict.pipeline.manifest import scan
scan.BATCH_ROWS, scan.SAVE_ROWS = 2, 4
examine = scan._examine
def slow(*args):
    time.sleep(0.02)
    with open("reads", "a") as file:
        file.write(f"{args[3]}\\n")
    return examine(*args)
scan._examine = slow
from semdict.cli import main
sys.exit(main(["manifest", "--set", "runtime.workers=2"]))
"""


def start(root: Path) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", SLOW], cwd=root, env=environment, stderr=subprocess.PIPE, text=True)


def wait_for_reads(root: Path, process: subprocess.Popen, count: int) -> None:
    """Until the processes so far have read `count` images."""
    deadline, reads = time.monotonic() + 60, root / "reads"
    while not reads.exists() or len(reads.read_text().split()) < count:
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.005)


def test_a_killed_run_continues_and_ends_in_the_same_bytes(tmp_path, monkeypatch):
    for name in ("killed", "calm"):
        (tmp_path / name).mkdir()
        params(tmp_path / name)
        make_tree(tmp_path / name / "train", each=30)
    killed = tmp_path / "killed"
    for count in (12, 36):
        process = start(killed)
        wait_for_reads(killed, process, count)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        process.stderr.close()
    assert not (killed / "data").exists()
    process = start(killed)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    reads = (killed / "reads").read_text().split()
    assert set(reads) == {f"{label}/{i}.png" for label in "ab" for i in range(30)}
    assert len(reads) < 60 + 2 * 30  # what was saved before a kill was not read again
    monkeypatch.chdir(tmp_path / "calm")
    assert main(["manifest"]) == 0
    for name in ("data/t/manifest/manifest.parquet", "reports/t/manifest.json"):
        assert (killed / name).read_bytes() == (tmp_path / "calm" / name).read_bytes(), name


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_ends_cleanly_and_keeps_its_progress(tmp_path, sent):
    params(tmp_path)
    make_tree(tmp_path / "train", each=30)
    process = start(tmp_path)
    wait_for_reads(tmp_path, process, 12)
    process.send_signal(sent)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors
    assert not (tmp_path / "data").exists() and not list(tmp_path.rglob("*.part"))
    (path,) = (tmp_path / "work").glob("manifest-cache/t/*.sqlite")
    with open_cache(path) as (_, remembered):
        assert len(remembered) >= 8
    assert not list(tmp_path.rglob("*-journal"))


def test_user_mistakes_are_one_line(tmp_path, monkeypatch, capsys):
    params(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["manifest"]) == 1
    assert "manifest.images.train" in capsys.readouterr().err
    (tmp_path / "train").mkdir()
    assert main(["manifest"]) == 1
    errors = capsys.readouterr().err
    assert "no images in train" in errors and "Traceback" not in errors


def test_photographs(photographs, tmp_path):
    manifest = build(tmp_path, {"val": str(photographs)})
    assert len(manifest) == len(manifest.classes) == 160 and not manifest.status.any()
    assert manifest.label.tolist() == list(range(160))
    reader = manifest.reader({"val": str(photographs)})
    assert hashlib.sha256(reader.read(77)).hexdigest() == rows(manifest, "sha256")[77][0]

"""The manifest stage: right rows, no image read twice, no progress lost by a kill, changed images found."""

import csv
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from semdict.cli import main
from semdict.pipeline.common.errors import ManifestError, SemdictError
from semdict.pipeline.config import schema
from semdict.pipeline.images.decode import MAX_PIXELS, BadImage, DecodeSpec, Status
from semdict.pipeline.manifest import folders, scan
from semdict.pipeline.manifest.cache import open_cache
from semdict.pipeline.manifest.stage import build_manifest
from semdict.pipeline.manifest.table import COLUMNS, Manifest, load_manifest
from tests import tiny
from tests.image_files import bad_files, encoded, good_files, picture
from tests.test_sources import write, write_parquet, write_tar

ROOT = Path(__file__).resolve().parent.parent


def make_tree(root: Path, each: int = 6) -> Path:
    for i in range(each):
        for label in "ab":
            write(root / label / f"{i}.png", encoded(picture(8 + i, 9, seed=ord(label) * 100 + i)))
    return root


def build(root: Path, images: dict[str, str], max_pixels: int = MAX_PIXELS, workers: int = 0, **settings):
    return build_manifest(
        schema.Manifest(**{**tiny.base()["manifest"], "images": images, **settings}),
        root / "manifest.parquet",
        metrics=root / "metrics.json",
        cache=root / "cache",
        limits=DecodeSpec(max_pixels=max_pixels),
        workers=workers,
    )


def rows(manifest, *names):
    return list(zip(*(manifest.table[name].to_pylist() for name in names), strict=True))


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


def params(root: Path) -> None:
    tree = tiny.preset("demo")
    tree = tiny.replaced(tree, manifest={"images": {"train": "train"}}) | {"preset": "t"}
    (root / "params.yaml").write_text(yaml.safe_dump(tree))


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

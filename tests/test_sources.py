"""Listing images: one deterministic order in every layout, labels that agree, errors that name the file."""

import io
import json
import os
import random
import tarfile
import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semdict.pipeline.common.errors import ManifestError
from semdict.pipeline.images.decode import SUFFIXES
from semdict.pipeline.manifest import folders
from semdict.pipeline.manifest.reader import ByteReader
from semdict.pipeline.manifest.sources import list_images
from tests.image_files import encoded, picture

PNG = encoded(picture(4, 5))


def image(seed: int) -> bytes:
    return encoded(picture(4, 5, seed))


def write(path, data: bytes = PNG):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def write_tar(path, members, kind=None):
    """`members`: (name, bytes), or a TarInfo."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, f"w:{kind}" if kind else "w") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return path


def write_parquet(path, rows, names=None, column="image", group=2):
    """`rows`: (bytes or None, path or None, label)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    struct = pa.array([{"bytes": data, "path": name} for data, name, _ in rows],
                      pa.struct([("bytes", pa.binary()), ("path", pa.string())]))  # fmt: skip
    table = pa.table({column: struct, "label": [label for *_, label in rows]})
    if names:
        features = {"label": {"names": names, "_type": "ClassLabel"}, "image": {"_type": "Image"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=group)
    return path


def columns(listing, *names):
    return list(zip(*(listing.table[name].to_pylist() for name in names), strict=True))


def read_all(images, listing):
    reader = ByteReader(images)
    return [reader.read(*row) for row in columns(listing, "split", "source", "offset", "bytes")]


def test_class_folders(tmp_path):
    names = ["b/2.JPEG", "b/10.png", "a/z/deep.webp", "a/x.jpg", "B/1.bmp"]
    for i, name in enumerate(names):
        write(tmp_path / "train" / name, image(i))
    write(tmp_path / "train" / "a" / "notes.txt", b"messages")
    write(tmp_path / "train" / "a" / ".draft.jpg", b"hidden")
    write(tmp_path / "val" / "c" / "v.jpg", image(9))
    images = {"val": str(tmp_path / "val"), "train": str(tmp_path / "train")}
    listing = list_images(images)
    assert columns(listing, "key", "label", "label_name", "split") == [
        ("val/c/v", 3, "c", "val"),
        ("train/B/1", 0, "B", "train"),
        ("train/a/x", 1, "a", "train"),
        ("train/a/z/deep", 1, "a", "train"),
        ("train/b/10", 2, "b", "train"),
        ("train/b/2", 2, "b", "train"),
    ]
    assert listing.classes == ["B", "a", "b", "c"]
    assert listing.layouts == {"val": "classes", "train": "classes"}
    assert listing.ignored.counts == {".txt": 1, "hidden": 1}
    assert listing.notes == ["split train: not taken for images: 1 .txt (a/notes.txt), 1 hidden (a/.draft.jpg)"]
    assert read_all(images, listing) == [image(i) for i in (9, 4, 3, 2, 1, 0)]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_order_never_depends_on_the_file_system(seed, tmp_path_factory):
    root = tmp_path_factory.mktemp("order")
    for name in ("b.1/y", "b/x-1", "b/x", "b/x.2", "a/É", "a/e", "a/Z", "b-/q"):
        write(root / f"{name}.png")
    real = os.scandir

    class Shuffled:
        def __init__(self, path):
            with real(path) as entries:
                self.entries = list(entries)
            random.Random(f"{seed}{path}").shuffle(self.entries)

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *_):
            pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folders.os, "scandir", Shuffled)
        keys = [key for (key,) in columns(list_images({"t": str(root)}), "key")]
    assert keys == sorted(keys, key=str.encode) and len(keys) == 8


def test_every_suffix_that_the_decoder_reads_is_an_image(tmp_path):
    """One list, from the formats that Pillow can open here; nothing that `decode` accepts is ignored."""
    names = [f"x{suffix}" for suffix in (".jfif", ".avif", ".jp2", ".JPE", ".pgm", ".mpo")]
    for name in names:
        write(tmp_path / "c" / name.replace("x", name.strip("x.")), PNG)
    listing = list_images({"t": str(tmp_path)})
    assert len(listing.table) == len(names) and not listing.ignored.counts and not listing.notes
    assert {f".{suffix}" for suffix in ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")} <= SUFFIXES
    assert not SUFFIXES & {".txt", ".json", ".cls", ".npy", ".eps", ".pdf", ".svg"}


@pytest.mark.parametrize("layout", ["classes", "flat", "tar"])
def test_files_of_other_programs_are_ignored(tmp_path, layout):
    foreign = ["._x.jpg", ".DS_Store", "Thumbs.db", "__MACOSX/x.jpg", "@eaDir/y.png"]
    folder = "" if layout == "flat" else "a/"
    names = [f"{folder}x.jpg", *(f"{folder}{name}" for name in foreign), "._a", "__MACOSX/a/._x.jpg", ".DS_Store"]
    if layout == "tar":
        path = write_tar(tmp_path / "in" / "t.tar", [(name, PNG) for name in names])
        write(tmp_path / "in" / "._t.tar", b"resource fork")
        root = path.parent
    else:
        root = tmp_path / "in"
        for name in names:
            write(root / name)
    listing = list_images({"t": str(root)})
    assert columns(listing, "key") == [(f"t/{folder}x",)]
    assert not listing.notes


def test_flat_folder(tmp_path):
    for name in ("b.png", "sub/a.png", "sub/deep/c.jpeg"):
        write(tmp_path / name)
    listing = list_images({"all": str(tmp_path)})
    assert columns(listing, "key", "label", "label_name") == [
        ("all/b", -1, ""),
        ("all/sub/a", -1, ""),
        ("all/sub/deep/c", -1, ""),
    ]
    assert listing.classes == [] and listing.layouts == {"all": "flat"}
    with pytest.raises(ManifestError, match=r"b\.png"):
        list_images({"all": str(tmp_path)}, "classes")


def test_layout_flat_ignores_folder_names(tmp_path):
    write(tmp_path / "dog" / "a.png")
    assert columns(list_images({"t": str(tmp_path)}, "flat"), "key", "label") == [("t/dog/a", -1)]


@pytest.mark.parametrize(
    ("files", "messages"),
    [
        (["a/x.jpg", "a/x.png"], [r"a/x\.jpg", r"a/x\.png"]),
        (["a/readme.txt"], ["class folder without images"]),
        (["readme.txt"], ["no images", r"1 \.txt \(readme\.txt\)"]),
        ([], ["no images"]),
        (["a/x.jpg", "empty/.keep"], ["empty", "without images"]),
    ],
)
def test_folders_without_a_clear_reading_are_refused(tmp_path, files, messages):
    for name in files:
        write(tmp_path / name)
    with pytest.raises(ManifestError) as caught:
        list_images({"train": str(tmp_path)})
    for message in messages:
        assert caught.match(message)


def test_symlinks_are_followed_and_loops_named(tmp_path):
    write(tmp_path / "real" / "x.png")
    (tmp_path / "root" / "a").mkdir(parents=True)
    (tmp_path / "root" / "a" / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "root" / "b").symlink_to(tmp_path / "real")  # the same folder twice is no loop
    keys = columns(list_images({"t": str(tmp_path / "root")}), "key")
    assert keys == [("t/a/linked/x",), ("t/b/x",)]
    (tmp_path / "real" / "back").symlink_to(tmp_path / "root" / "a")
    with pytest.raises(ManifestError, match=r"back.*loop"):
        list_images({"t": str(tmp_path / "root")})


@pytest.mark.parametrize("target", [".", "..", "self"])
def test_every_short_loop_is_named(tmp_path, target):
    write(tmp_path / "root" / "a" / "x.png")
    (tmp_path / "root" / "a" / "self").symlink_to(target)
    with pytest.raises(ManifestError, match=r"self.*loop"):
        list_images({"t": str(tmp_path / "root")})


def test_unreadable_folder_is_named(tmp_path, monkeypatch):
    write(tmp_path / "a" / "x.png")
    real = os.scandir

    def scandir(path):
        if str(path).endswith("/a"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(folders.os, "scandir", scandir)
    with pytest.raises(ManifestError, match=r"/a: folder cannot be read: Permission denied"):
        list_images({"t": str(tmp_path)})


def test_names_that_are_not_utf8_are_named(tmp_path):
    (tmp_path / "a").mkdir()
    with open(os.fsencode(tmp_path) + b"/a/\xff.png", "wb") as file:
        file.write(PNG)
    with pytest.raises(ManifestError, match=r"xff\.png.*UTF-8"):
        list_images({"t": str(tmp_path)})


def test_missing_path_names_the_parameter(tmp_path):
    with pytest.raises(ManifestError, match=r"manifest\.images\.train"):
        list_images({"train": str(tmp_path / "nowhere")})


def test_webdataset_tars(tmp_path):
    write_tar(
        tmp_path / "s-001.tar",
        [("b.jpg", image(1)), ("b.cls", b"7"), ("a.seg.png", b"mask"), ("a.png", image(2)), ("a.cls", b" 0\n")],
    )
    write_tar(
        tmp_path / "s-000.tar",
        [
            ("sub/n1.v2.txt", b"caption"),
            ("sub/n1.json", b'{"label": 3}'),
            ("sub/n1.WebP", image(3)),
            ("bare.jpg", image(4)),
            ("__meta__", b"{}"),
            (".hidden.png", PNG),
        ],
    )
    images = {"train": str(tmp_path / "s-{000..001}.tar")}
    for pattern in (images["train"], str(tmp_path / "s-*.tar"), str(tmp_path)):
        listing = list_images({"train": pattern})
        assert columns(listing, "key", "label", "label_name", "source") == [
            ("train/sub/n1", 3, "3", "s-000.tar"),
            ("train/bare", -1, "", "s-000.tar"),
            ("train/b", 7, "7", "s-001.tar"),
            ("train/a", 0, "0", "s-001.tar"),
        ]
        assert read_all({"train": pattern}, listing) == [image(i) for i in (3, 4, 1, 2)]
    assert listing.classes == ["0", "", "", "3", "", "", "", "7"]
    with pytest.raises(ManifestError, match=r"s-002\.tar"):
        list_images({"train": str(tmp_path / "s-{000..002}.tar")})


def test_long_and_pax_names_have_the_right_offsets(tmp_path):
    for number, kind in enumerate((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)):
        with tarfile.open(tmp_path / f"{number}.tar", "w", format=kind) as tar:
            for i in range(5):
                info = tarfile.TarInfo(f"{number}/{'long' * 40}ü{i}.png")
                info.size = len(image(i))
                tar.addfile(info, io.BytesIO(image(i)))
    images = {"t": str(tmp_path)}
    assert read_all(images, list_images(images)) == [image(i) for i in range(5)] * 2


def linked(kind: bytes, name: str = "x.jpg") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd"
    return info


@pytest.mark.parametrize(
    ("member", "word"),
    [
        (("../x.jpg", PNG), "outside"),
        (("a/../../x.jpg", PNG), "outside"),
        (("/etc/x.jpg", PNG), "outside"),
        (("..\\x.jpg", PNG), "outside"),
        (("../notes.txt", b""), "outside"),
        (linked(tarfile.SYMTYPE), "link"),
        (linked(tarfile.LNKTYPE), "link"),
        (linked(tarfile.CHRTYPE), "device"),
        (linked(tarfile.FIFOTYPE), "device"),
    ],
)
def test_unsafe_tar_members_are_refused(tmp_path, member, word):
    write_tar(tmp_path / "in" / "t.tar", [("good.jpg", PNG), member])
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ManifestError, match=rf"t\.tar.*{word}"):
        list_images({"train": str(tmp_path / "in")})
    assert sorted(tmp_path.rglob("*")) == before  # nothing written anywhere


def test_damaged_tars_are_refused_and_named(tmp_path):
    whole = write_tar(tmp_path / "whole.tar", [(f"{i}.png", image(i)) for i in range(4)]).read_bytes()
    end = whole.rindex(b"3.png") + 512 + len(image(3))
    cases = {
        "cut inside an image": whole[: end - 20],
        "cut after an image": whole[: -(-end // 512) * 512],
        "cut inside a header": whole[: whole.index(b"2.png") + 100],
        "damaged header": whole.replace(b"2.png", b"2.p\xffg"),
        "text": b"hello " * 500,
        "empty": b"",
    }
    for name, data in cases.items():
        path = write(tmp_path / "in" / f"{name.replace(' ', '-')}.tar", data)
        with pytest.raises(ManifestError, match=r"\.tar"):
            list_images({"t": str(path)})
    for kind in ("gz", "xz"):
        path = write_tar(tmp_path / "z" / f"{kind}.tar", [("a.png", PNG)], kind)
        with pytest.raises(ManifestError, match=r"decompress"):
            list_images({"t": str(path)})


@pytest.mark.parametrize(
    ("tars", "messages"),
    [
        ([[("a.jpg", PNG)], [("a.png", PNG)]], ["'a'", r"0\.tar", r"1\.tar"]),
        ([[("a.jpg", PNG), ("a.jpg", PNG)]], [r"a\.jpg", "twice"]),
        ([[("a.jpg", PNG), ("a.png", PNG)]], ["2 images"]),
        ([[("a.jpg", PNG), ("a.cls", b"\xff\xfe")]], [r"a\.cls"]),
        ([[("a.jpg", PNG), ("a.json", b"{")]], [r"a\.json"]),
        ([[("a.jpg", PNG), ("a.json", b'{"label": 1.5}')]], [r"a\.json", "1.5"]),
        ([[("a.jpg", PNG), ("a.json", b"[" * 100_000)]], [r"a\.json"]),
        ([[("a.jpg", PNG), ("a.json", b'{"label": "\\ud800"}')]], [r"a\.json", "Unicode"]),
        ([[("a.jpg", PNG), ("a.cls", b"2147483648")]], [r"a\.cls", "2147483648 is too large"]),
        ([[("a.txt", b"no image")]], ["no images", r"1 \.txt"]),
    ],
)
def test_tars_without_a_clear_reading_are_refused(tmp_path, tars, messages):
    for i, members in enumerate(tars):
        write_tar(tmp_path / f"{i}.tar", members)
    with pytest.raises(ManifestError) as caught:
        list_images({"train": str(tmp_path)})
    for message in messages:
        assert caught.match(message)


@pytest.mark.parametrize(
    "headers",
    [
        {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "x.jpg", "GNU.sparse.realsize": "9"},
        {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.map": "a,b,c"},
        {"GNU.sparse.size": "many"},
        {"size": "-1"},
    ],
)
def test_damaged_extended_headers_are_named(tmp_path, headers):
    with tarfile.open(tmp_path / "t.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("x.jpg")
        info.size, info.pax_headers = len(PNG), headers
        tar.addfile(info, io.BytesIO(PNG))
    with pytest.raises(ManifestError, match=r"t\.tar"):
        list_images({"t": str(tmp_path / "t.tar")})


def test_ignored_names_with_several_dots_are_reported(tmp_path):
    """A webdataset key ends at the first dot, so `b.v2.jpg` has the suffix v2.jpg, which is no image's."""
    write_tar(tmp_path / "t.tar", [("a.jpg", PNG), ("b.v2.jpg", PNG), ("c.v2.jpg", PNG)])
    listing = list_images({"t": str(tmp_path / "t.tar")})
    assert columns(listing, "key") == [("t/a",)]
    (note,) = listing.notes
    assert "2 .v2.jpg (" in note and note.endswith("t.tar: b.v2.jpg)")


@pytest.mark.parametrize("label_key", [None, "fine_label", "species"])
def test_labels_of_another_key_in_tars(tmp_path, label_key):
    sample = {"fine_label": 4, "coarse_label": 1, "caption": "a fox"}
    write_tar(tmp_path / "t.tar", [("a.jpg", PNG), ("a.cls", b"9"), ("a.json", json.dumps(sample).encode())])
    write_tar(tmp_path / "u.tar", [("b.jpg", PNG), ("b.json", json.dumps(sample).encode())])
    images = {"t": str(tmp_path / "u.tar")}
    if label_key is None:
        listing = list_images(images)
        assert columns(listing, "label") == [(-1,)]
        candidates = "candidates for manifest.label_key: coarse_label, fine_label"
        assert listing.notes == [f"split t: no labels read; {candidates}"]
        assert columns(list_images({"t": str(tmp_path / "t.tar")}), "label") == [(9,)]
    elif label_key == "fine_label":
        listing = list_images({"t": str(tmp_path / "*.tar")}, label_key=label_key)
        assert columns(listing, "label") == [(4,), (4,)] and not listing.notes
    else:
        with pytest.raises(ManifestError, match=r"'species'.*coarse_label, fine_label"):
            list_images(images, label_key=label_key)


def test_labels_of_another_column_in_parquet(tmp_path):
    """CIFAR-100's columns: without `label` the candidates are named, with manifest.label_key one of them is read."""
    path = write_parquet(tmp_path / "p.parquet", [(image(i), None, i) for i in range(3)])
    table = pq.read_table(path).rename_columns(["img", "fine_label"])
    table = table.append_column("coarse_label", pa.array([1, 0, 1])).append_column("split_name", pa.array(["a"] * 3))
    names = {"fine_label": {"_type": "ClassLabel", "names": ["ant", "bee", "cow"]}, "img": {"_type": "Image"}}
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": names}})})
    pq.write_table(table, path)
    images = {"t": str(path)}
    listing = list_images(images)
    assert columns(listing, "label") == [(-1,)] * 3
    assert listing.notes == ["split t: no labels read; candidates for manifest.label_key: coarse_label, fine_label"]
    listing = list_images(images, label_key="fine_label")
    assert columns(listing, "label_name") == [("ant",), ("bee",), ("cow",)] and listing.classes == ["ant", "bee", "cow"]
    assert columns(list_images(images, label_key="coarse_label"), "label") == [(1,), (0,), (1,)]
    with pytest.raises(ManifestError, match=r"no column 'species'.*fine_label"):
        list_images(images, label_key="species")


def test_parquet_of_paths_alone_is_explained(tmp_path):
    path = write_parquet(tmp_path / "p.parquet", [(None, f"images/{i}.jpg", 0) for i in range(5)])
    with pytest.raises(ManifestError, match=r"p\.parquet: column `image` holds paths without image bytes.*embed"):
        list_images({"t": str(path)})
    pq.write_table(pa.table({"image": ["images/0.jpg"], "label": [0]}), path)
    with pytest.raises(ManifestError, match=r"column `image` holds text: paths are not followed"):
        list_images({"t": str(path)})
    write_parquet(path, [(None, "a.jpg", 0), (PNG, "b.jpg", 0)])
    assert len(list_images({"t": str(path)}).table) == 2, "one missing image is a bad row, not a wrong file"


def hub_names(path, names) -> None:
    """Give column `label` these class names in the file's metadata."""
    metadata = {"huggingface": json.dumps({"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}})}
    pq.write_table(pq.read_table(path).replace_schema_metadata(metadata), path)


def test_parquet_with_odd_labels_and_columns_is_refused(tmp_path):
    path = write_parquet(tmp_path / "p.parquet", [(PNG, "a.png", 0)])
    bad_names = {
        "not a list of texts": [1, 2],
        "not a list": {"a": 1},
        "repeat themselves": ["a", "a"],
        "not valid Unicode": ["\ud800", "b"],
    }
    for messages, names in bad_names.items():
        hub_names(path, names)
        with pytest.raises(ManifestError, match=messages):
            list_images({"t": str(path)})
    for labels, messages in (([2**31], "2147483648 is too large"), ([True], "neither"), ([{"a": 1}], "neither")):
        table = pq.read_table(path).replace_schema_metadata(None)
        pq.write_table(table.set_column(1, "label", pa.array(labels)), path)
        with pytest.raises(ManifestError, match=messages):
            list_images({"t": str(path)})
    image_column = pq.read_table(path)["image"]
    pq.write_table(
        pa.Table.from_arrays([image_column, pa.array([1]), pa.array([1])], ["image", "label", "label"]), path
    )
    with pytest.raises(ManifestError, match=r"column 'label' occurs twice"):
        list_images({"t": str(path)})
    data = path.read_bytes().replace(b"label", b"la\xffel")
    path.write_bytes(data)
    with pytest.raises(ManifestError, match=r"p\.parquet"):
        list_images({"t": str(path)})


def test_parquet_as_on_the_hub(tmp_path):
    names = ["tench", "goldfish", "shark"]
    rows = [(image(i), f"n{i % 2}/p_{9 - i}.JPEG", i % 3) for i in range(5)]
    write_parquet(tmp_path / "data" / "train-00000-of-00002.parquet", rows[:3], names)
    write_parquet(tmp_path / "data" / "train-00001-of-00002.parquet", rows[3:], names)
    images = {"train": str(tmp_path / "data" / "train-*.parquet")}
    listing = list_images(images)
    assert columns(listing, "key", "label", "label_name", "offset") == [
        ("train/n0/p_9", 0, "tench", 0),
        ("train/n1/p_8", 1, "goldfish", 1),
        ("train/n0/p_7", 2, "shark", 2),
        ("train/n1/p_6", 0, "tench", 0),
        ("train/n0/p_5", 1, "goldfish", 1),
    ]
    assert listing.classes == names  # the order of the Hub, not the alphabet's
    assert read_all(images, listing) == [image(i) for i in range(5)]


def test_parquet_keys_fall_back_to_row_numbers(tmp_path):
    for paths in ((None, "x.jpg"), ("same.jpg", "same.jpg")):
        write_parquet(tmp_path / "t.parquet", [(PNG, paths[0], None), (PNG, paths[1], -1)])
        listing = list_images({"test": str(tmp_path / "t.parquet")})
        assert columns(listing, "key", "label") == [("test/t/00000000", -1), ("test/t/00000001", -1)]


def test_parquet_without_images_or_sound_labels_is_refused(tmp_path):
    path = write(tmp_path / "bad.parquet", b"PAR1 not really")
    with pytest.raises(ManifestError, match=r"bad\.parquet.*sound"):
        list_images({"t": str(path)})
    pq.write_table(pa.table({"text": ["a"]}), path)
    with pytest.raises(ManifestError, match=r"no column `image`.*text"):
        list_images({"t": str(path)})
    write_parquet(path, [(PNG, "a", 5)], ["only", "two"])
    with pytest.raises(ManifestError, match=r"label 5.*2 classes"):
        list_images({"t": str(path)})


def test_labels_agree_between_layouts(tmp_path):
    write_parquet(tmp_path / "p.parquet", [(PNG, "a.png", 0)], ["tench", "goldfish"])
    write(tmp_path / "val" / "goldfish" / "x.png")
    images = {"train": str(tmp_path / "p.parquet"), "val": str(tmp_path / "val")}
    assert columns(list_images(images), "label", "label_name") == [(0, "tench"), (1, "goldfish")]
    write(tmp_path / "val" / "whale" / "x.png")
    with pytest.raises(ManifestError, match=r"split val: class 'whale'"):
        list_images(images)
    write_parquet(tmp_path / "q.parquet", [(PNG, "b.png", 0)], ["goldfish", "tench"])
    with pytest.raises(ManifestError, match=r"split test.*agree"):
        list_images({"train": images["train"], "test": str(tmp_path / "q.parquet")})


def test_many_threads_read_the_right_bytes(tmp_path):
    data = {i: image(i) for i in range(24)}
    for tar in range(12):  # more tars than a thread keeps open
        write_tar(tmp_path / "tars" / f"{tar:02d}.tar", [(f"{i}.png", data[i]) for i in range(2 * tar, 2 * tar + 2)])
    write_parquet(tmp_path / "p.parquet", [(data[i], f"{i}.png", 0) for i in range(24)])
    images = {"a": str(tmp_path / "tars"), "b": str(tmp_path / "p.parquet")}
    rows = columns(list_images(images), "split", "source", "offset", "bytes")
    reader, wrong = ByteReader(images), []

    def work(seed):
        order = list(enumerate(rows))
        random.Random(seed).shuffle(order)
        wrong.extend(i for i, row in order if reader.read(*row) != data[i % 24])

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong

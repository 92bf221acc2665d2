"""Listing folders: one order on any file system, labels from folder names, errors that name the file."""

import os
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semdict.pipeline.common.errors import ManifestError
from semdict.pipeline.manifest import folders
from semdict.pipeline.manifest.sources import list_images
from tests.image_sources import PNG, columns, image, read_all, write


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

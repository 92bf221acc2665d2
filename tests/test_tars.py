"""Listing webdataset tars: members, offsets, labels; unsafe and damaged tars are refused."""

import io
import json
import tarfile

import pytest

from semdict.pipeline.common.errors import ManifestError
from semdict.pipeline.manifest.sources import list_images
from tests.image_sources import PNG, columns, image, read_all, write, write_tar


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

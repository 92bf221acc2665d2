"""Listing Parquet files as on the Hugging Face hub: images, keys and labels; wrong columns are refused."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from semdict.pipeline.common.errors import ManifestError
from semdict.pipeline.manifest.sources import list_images
from tests.image_sources import PNG, columns, image, read_all, write, write_parquet


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

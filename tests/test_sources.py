"""Listing images in any layout: the same keys and labels, files of other programs, readers in threads."""

import random
import threading

import pytest

from semdict.pipeline.common.errors import ManifestError
from semdict.pipeline.images.decode import SUFFIXES
from semdict.pipeline.manifest.reader import ByteReader
from semdict.pipeline.manifest.sources import list_images
from tests.image_sources import PNG, columns, image, write, write_parquet, write_tar


def test_missing_path_names_the_parameter(tmp_path):
    with pytest.raises(ManifestError, match=r"manifest\.images\.train"):
        list_images({"train": str(tmp_path / "nowhere")})


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


def test_every_suffix_that_the_decoder_reads_is_an_image(tmp_path):
    """One list, from the formats that Pillow can open here; nothing that `decode` accepts is ignored."""
    names = [f"x{suffix}" for suffix in (".jfif", ".avif", ".jp2", ".JPE", ".pgm", ".mpo")]
    for name in names:
        write(tmp_path / "c" / name.replace("x", name.strip("x.")), PNG)
    listing = list_images({"t": str(tmp_path)})
    assert len(listing.table) == len(names) and not listing.ignored.counts and not listing.notes
    assert {f".{suffix}" for suffix in ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")} <= SUFFIXES
    assert not SUFFIXES & {".txt", ".json", ".cls", ".npy", ".eps", ".pdf", ".svg"}


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

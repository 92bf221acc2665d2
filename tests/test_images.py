"""Decoding: every kind of file means what the field's loaders take it for, or is refused with its reason.

Loading ahead: results in the order of the requests, whatever the workers.
"""

import io
import itertools
import json
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

from semdict.pipeline.common.errors import ManifestError, UsageError
from semdict.pipeline.images import decode as images
from semdict.pipeline.images.batches import AHEAD, first_good, good_or_bad, load_ahead
from semdict.pipeline.images.decode import (
    BadImage,
    DecodeSpec,
    Status,
    decode,
    decoder_identity,
    probe,
    resolve_decoder,
)
from tests.image_files import bad_files, encoded, good_files, huge_jpeg, huge_png, picture
from tests.large_images import KINDS

DECODERS = ["simplejpeg", "pillow"]


def reference(data: bytes) -> np.ndarray:
    """What torchvision's ImageFolder loader makes of a file."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize("name", good_files())
def test_well_defined_files_decode_to_what_they_mean(name):
    data, want = good_files()[name]
    got = decode(data)
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, want)
    if not name.startswith("sixteen"):  # there the loader clips at 255: nearly everything turns white
        np.testing.assert_array_equal(got, reference(data))
    assert probe(data) == (want.shape[1], want.shape[0])


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("name", bad_files())
def test_bad_files_are_refused_with_their_reason(name, decoder):
    data, status, in_header = bad_files()[name]
    with pytest.raises(BadImage) as caught:
        decode(data, DecodeSpec(decoder))
    assert caught.value.status == Status[status]
    assert "\n" not in caught.value.reason and "object at" not in caught.value.reason
    if in_header:
        with pytest.raises(BadImage) as caught:
            probe(data)
        assert caught.value.status == Status[status]
    else:
        assert probe(data) == (60, 40)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 2, "quality": 40}])
def test_jpegs_are_what_pillow_reads(mode, options, decoder):
    data = encoded(Image.fromarray(picture(41, 63)).convert(mode), "JPEG", **options)
    got = decode(data, DecodeSpec(decoder))
    assert got.shape == (41, 63, 3)
    assert np.abs(got.astype(int) - reference(data)).max() <= 2
    assert np.abs(got.astype(int) - picture(41, 63)).mean() < (60 if mode == "L" else 12)  # the right colours at all


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_rotation_is_not_applied(turn, decoder):
    exif = Image.Exif()
    exif[0x0112] = turn
    plain, turned = encoded(picture(), "JPEG"), encoded(picture(), "JPEG", exif=exif)
    np.testing.assert_array_equal(decode(turned, DecodeSpec(decoder)), decode(plain, DecodeSpec(decoder)))


def test_colours_stored_as_rgb_inside_a_jpeg():
    data = encoded(picture(), "JPEG", keep_rgb=True, quality=95)
    for decoder in DECODERS:
        assert np.abs(decode(data, DecodeSpec(decoder)).astype(int) - picture()).mean() < 3


def test_a_photograph_with_previews_is_its_first_picture():
    frames = [Image.fromarray(picture(seed=i)) for i in range(2)]
    data = encoded(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    for decoder in DECODERS:
        assert np.abs(decode(data, DecodeSpec(decoder)).astype(int) - picture()).mean() < 12
    assert probe(data) == (60, 40)


def test_the_pixel_limit_is_checked_before_a_pixel_is_decoded(monkeypatch):
    monkeypatch.setattr(images, "_to_rgb", lambda image: pytest.fail("decoded"))
    monkeypatch.setattr(images._simplejpeg(), "decode_jpeg", lambda *a, **k: pytest.fail("decoded"))
    for data in (encoded(picture()), encoded(picture(), "JPEG"), huge_jpeg(), huge_png()):
        with pytest.raises(BadImage, match="pixels") as caught:
            decode(data, DecodeSpec(max_pixels=40 * 60 - 1))
        assert caught.value.status == Status.TOO_MANY_PIXELS


@pytest.mark.parametrize("make", [encoded, lambda rgb: encoded(rgb, "JPEG")])
def test_the_pixel_limit_is_inclusive(make):
    data = make(picture())
    assert decode(data, DecodeSpec(max_pixels=40 * 60)).shape == (40, 60, 3)
    assert probe(data, DecodeSpec(max_pixels=40 * 60)) == (60, 40)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems count memory in another unit")
def test_decoding_and_cropping_take_no_more_memory_than_estimated(tmp_path):
    for kind, make in KINDS.items():
        (tmp_path / f"2000-{kind}").write_bytes(make(2000))
    command = [sys.executable, "-m", "tests.large_images", str(tmp_path)]
    exact = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }  # freed buffers go back at once
    rows = json.loads(subprocess.run(command, env=exact, check=True, capture_output=True, text=True).stdout)
    assert len(rows) == 2 * len(KINDS)
    shown = {(kind, decoder): (used / 4e6, estimate / 4e6) for kind, decoder, estimate, used in rows}  # bytes a pixel
    assert not {name: pair for name, pair in shown.items() if not 0.4 * pair[1] < pair[0] < pair[1]}, shown


@pytest.mark.parametrize("kind", KINDS)
def test_what_takes_too_much_memory_is_refused_by_its_header(kind, monkeypatch):
    data = KINDS[kind](500)
    monkeypatch.setattr(images, "_to_rgb", lambda image: pytest.fail("decoded"))
    monkeypatch.setattr(images._simplejpeg(), "decode_jpeg", lambda *a, **k: pytest.fail("decoded"))
    for call in (decode, probe):
        with pytest.raises(BadImage, match=r"500 x 500 \w+ takes about \d MB to decode") as caught:
            call(data, DecodeSpec(decode_memory=500**2 * 7))
        assert caught.value.status == Status.TOO_MUCH_MEMORY


def test_small_files_of_large_images_are_refused_by_default():
    """Both have fewer than max_pixels."""
    for data in (huge_png(13_300, 13_300), encoded(Image.new("1", (13_300, 13_300)))):
        assert len(data) < 50_000
        with pytest.raises(BadImage, match="13300 x 13300 PNG takes about 1592 MB to decode, more than decode_memory"):
            probe(data)


def test_threads_decode_together_only_what_fits_into_memory():
    data = encoded(picture(200, 200))
    needed = images._prepare(data, DecodeSpec()).needed
    spec, lock, now, most = DecodeSpec(decode_memory=3 * needed), threading.Lock(), [0], [0]

    def hold(number: int) -> int:
        with images.decoded(data, spec) as rgb:
            with lock:
                now[0] += 1
                most[0] = max(most[0], now[0])
            time.sleep(0.01)
            with lock:
                now[0] -= 1
        return int(rgb[0, 0, 0])

    assert len(list(load_ahead([range(8)] * 3, hold, 8))) == 3
    assert most[0] == 2 and now[0] == 0 and images._memory._used == 0


def test_a_strip_waits_until_it_is_alone():
    """Its pixels are few, but resized to 256 x 128,000 they fill the memory."""
    strip, small = encoded(np.zeros((2, 1000, 3), np.uint8)), encoded(picture(200, 200))
    spec = DecodeSpec(decode_memory=100_000_000)
    with images.decoded(strip, spec, 256):
        waiting = threading.Thread(target=lambda: images.decoded(small, spec, 256).__enter__())
        waiting.start()
        waiting.join(0.05)
        assert waiting.is_alive()
    waiting.join(5)
    assert not waiting.is_alive()


def test_memory_is_free_again_after_a_damaged_image():
    data = bad_files()["short.png"][0]
    for _ in range(3):
        with pytest.raises(BadImage), images.decoded(data):
            pass
    assert images._memory._used == 0


def test_what_simplejpeg_finds_fault_with_goes_to_pillow():
    good = encoded(picture(), "JPEG")
    scan = good.index(b"\xff\xda") + 14
    data = good[:scan] + good[scan:-2] + b"\x00\x12\x34" * 4 + good[-2:]  # stray bytes before the end mark
    want = reference(data)
    np.testing.assert_array_equal(decode(data, DecodeSpec("simplejpeg")), want)
    np.testing.assert_array_equal(decode(data, DecodeSpec("pillow")), want)


def test_random_damage_never_raises_anything_else():
    rng = np.random.default_rng(0)
    kinds = [encoded(picture(), "JPEG"), encoded(picture()), encoded(picture(), "WEBP"), encoded(picture(), "TIFF")]
    bad = 0
    for round_ in range(150):
        data = bytearray(kinds[round_ % len(kinds)])
        for at in rng.integers(0, len(data), rng.integers(1, 20)):
            data[at] = rng.integers(256)
        try:
            got = decode(bytes(data), DecodeSpec(max_pixels=1_000_000))
            assert got.ndim == 3 and got.dtype == np.uint8
        except BadImage as error:
            assert error.status != Status.OK and error.reason
            bad += 1
    assert 0 < bad < 150


def test_the_recipe_names_the_decoder(monkeypatch):
    auto, pillow = decoder_identity("auto"), decoder_identity("pillow")
    assert auto["library"] == "simplejpeg" and auto["simplejpeg"]
    assert pillow["library"] == "pillow" and pillow["pillow"] == Image.__version__ and "simplejpeg" not in pillow
    assert auto["exif_rotation"] is False
    monkeypatch.setattr(images, "_simplejpeg", lambda: None)
    assert decoder_identity("auto") == pillow
    np.testing.assert_array_equal(decode(encoded(picture(), "JPEG")), reference(encoded(picture(), "JPEG")))
    with pytest.raises(UsageError, match="not installed"):
        resolve_decoder("simplejpeg")
    with pytest.raises(UsageError, match="known: auto"):
        resolve_decoder("turbo")


def test_photographs_decode_alike(photographs):
    files = sorted(photographs.glob("*/*"))[::4]
    assert files
    for file in files:
        data = file.read_bytes()
        fast, slow = decode(data, DecodeSpec("simplejpeg")).astype(int), decode(data, DecodeSpec("pillow"))
        np.testing.assert_array_equal(slow, reference(data))
        assert np.abs(fast - slow).max() <= 3, file.name
        assert probe(data) == (slow.shape[1], slow.shape[0])


def test_status_codes_stay():
    names = (
        "OK EMPTY NOT_AN_IMAGE DAMAGED ANIMATED TOO_MANY_PIXELS TOO_NARROW UNSUPPORTED_DEPTH UNREADABLE TOO_MUCH_MEMORY"
    )
    assert [status.name for status in sorted(Status)] == names.split()
    assert [int(status) for status in sorted(Status)] == list(range(10))


def slow_square(number: int) -> int:
    """The first requests take longest, so that results are ready in another order than they are asked for."""
    time.sleep(0.02 / (number + 1))
    return number * number


BATCHES = [[0, 1, 2], [3], [], [4, 5, 6, 7], [8, 9]]


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("processes", [False, True])
def test_results_come_in_the_order_of_the_requests(workers, processes):
    batches = [batch for batch in BATCHES if batch or not processes]
    loaded = list(load_ahead(batches, slow_square, workers, collate=tuple, processes=processes))
    assert loaded == [tuple(n * n for n in batch) for batch in batches]


def test_endless_batches_are_loaded_a_few_ahead():
    asked = []
    loaded = load_ahead(([n] for n in itertools.count()), lambda n: asked.append(n) or n, 2)
    assert [next(loaded) for _ in range(3)] == [[0], [1], [2]]
    assert len(asked) <= 2 + AHEAD
    loaded.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decode")]


def refuse_three(number: int) -> int:
    if number == 3:
        raise BadImage(Status.DAMAGED, "three")
    return number


def test_an_exception_belongs_to_its_batch():
    loaded = load_ahead([[1, 2], [3, 4]], refuse_three, 2)
    assert next(loaded) == [1, 2]
    with pytest.raises(BadImage, match="three"):
        next(loaded)


def test_a_bad_image_is_returned_or_replaced_by_the_next_one():
    error = good_or_bad(refuse_three, 3)
    assert isinstance(error, BadImage) and error.status == Status.DAMAGED and good_or_bad(refuse_three, 4) == 4
    rows = np.array([7, 3, 3, 5, 3])
    assert first_good(rows, 0, refuse_three) == (7, [0])
    assert first_good(rows, 1, refuse_three) == (5, [1, 2, 3])
    assert first_good(rows, 4, refuse_three) == (7, [4, 0])  # after the last comes the first
    with pytest.raises(ManifestError, match="none of the listed images can be decoded"):
        first_good(np.array([3, 3]), 1, refuse_three)

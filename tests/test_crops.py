"""Crops: equal to torchvision and to the published ADM code path, and every box points at the pixels it names."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms as T
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from semdict.pipeline.common.errors import UsageError
from semdict.pipeline.config.schema.base import check_crop
from semdict.pipeline.images.crops import (
    RANDOM_RATIO,
    RANDOM_SCALE,
    Box,
    Crop,
    ViewSpec,
    _random_window,
    crop_identity,
    crop_views,
    expand_views,
)
from tests.image_files import picture

SIDES = [256, 64, 512]  # of a view, pixels
SIZES = [  # of an image, (height, width)
    (375, 500),
    (500, 375),
    (256, 256),
    (300, 257),
    (1, 1),
    (7, 500),
    (1200, 900),
    (2049, 1031),
    (257, 511),
    (281, 281),
]


def adm(image: Image.Image, side: int) -> Image.Image:
    """ADM's centre crop, step by step in its own words: halve, bicubic, integer centre."""
    while min(image.size) >= 2 * side:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.Resampling.BOX)
    scale = side / min(image.size)
    image = image.resize(tuple(round(x * scale) for x in image.size), resample=Image.Resampling.BICUBIC)
    pixels = np.array(image)
    y, x = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    return Image.fromarray(pixels[y : y + side, x : x + side])


def torchvision_resize(short: int, side: int) -> T.Compose:
    return T.Compose([T.Resize(short, InterpolationMode.BICUBIC), T.CenterCrop(side)])


def protocols(side: int) -> list[Crop]:
    return [Crop("resize", side), Crop("adm", side), Crop("resize-larger", side, 1.14)]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("size", SIZES)
def test_centre_crops_equal_torchvision_and_adm(size, side):
    rgb = picture(*size)
    image = Image.fromarray(rgb)
    larger = {256: 292, 64: 73, 512: 584}[side]
    references = [torchvision_resize(side, side)(image), adm(image, side), torchvision_resize(larger, side)(image)]
    for crop, want in zip(protocols(side), references, strict=True):
        views, boxes = crop_views(rgb, crop, expand_views(["centre", "flip"]))
        np.testing.assert_array_equal(views[0], np.asarray(want), err_msg=crop.name)
        np.testing.assert_array_equal(views[1], np.asarray(want)[:, ::-1], err_msg=crop.name)
        assert [box.flip for box in boxes] == [False, True]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("size", SIZES)
def test_ten_crops_equal_torchvision_over_adm(size, side):
    rgb = picture(*size)
    want = T.TenCrop(side)(adm(Image.fromarray(rgb), {256: 281, 64: 70, 512: 563}[side]))
    views, boxes = crop_views(rgb, Crop("resize", side), expand_views(["ten-crop"]))
    np.testing.assert_array_equal(views, np.stack([np.asarray(crop) for crop in want]))
    assert [box.flip for box in boxes] == [False] * 5 + [True] * 5


def test_resizing_follows_the_antialiased_bicubic_of_the_textbook():
    """One axis in float64: Keys' kernel (a = -0.5), widened by the scale, normalised weights."""
    rgb = picture(256, 700, seed=3)
    scale = 700 / 512
    row = np.zeros((512, 3))
    for x in range(512):
        centre = (x + 0.5) * scale
        taps = np.arange(max(0, int(centre - 2 * scale + 0.5)), min(700, int(centre + 2 * scale + 0.5)))
        t = np.abs((taps + 0.5 - centre) / scale)
        near, far = 1.5 * t**3 - 2.5 * t**2 + 1, -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
        weights = np.where(t < 1, near, np.where(t < 2, far, 0))
        row[x] = weights @ rgb[100, taps] / weights.sum()
    image = Image.fromarray(rgb).resize((512, 256), Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(image)[100] - np.clip(row, 0, 255)).max() <= 0.51


def ramp(height: int, width: int) -> np.ndarray:
    """Red grows with x, green with y, from 0 to 255 over the image: a pixel tells where it came from."""
    x = (np.arange(width) + 0.5) / width * 255
    y = (np.arange(height) + 0.5) / height * 255
    red, green = np.broadcast_to(x, (height, width)), np.broadcast_to(y[:, None], (height, width))
    return np.stack([red, green, np.zeros_like(red)], axis=-1).round().astype(np.uint8)


@pytest.mark.parametrize("size", [(375, 500), (640, 310), (300, 300), (1100, 1500)])
@pytest.mark.parametrize("crop", [*protocols(256), *protocols(64)], ids=lambda crop: f"{crop.name}-{crop.size}")
def test_boxes_point_at_the_pixels_shown(size, crop):
    (height, width), side = size, crop.size
    views, boxes = crop_views(ramp(*size), crop, expand_views(["centre", "flip", "ten-crop", "random-6"]), "k", 7)
    for pixels, box in zip(views, boxes, strict=True):
        assert -1e-6 <= box.left < box.right <= width + 1e-6 and -1e-6 <= box.top < box.bottom <= height + 1e-6
        across = (np.arange(side) + 0.5) / side
        xs = box.left + (across[::-1] if box.flip else across) * (box.right - box.left)
        ys = box.top + across * (box.bottom - box.top)
        inner, middle = slice(8, -8), side // 2  # the filter bends the ramp at the image's border
        atol = 1 + 0.6 * 256 / side  # a rounding error, and 0.6 pixels of the view: ADM's halvings drop odd rows
        np.testing.assert_allclose(pixels[middle, inner, 0], (xs / width * 255)[inner], atol=atol)
        np.testing.assert_allclose(pixels[inner, middle, 1], (ys / height * 255)[inner], atol=atol)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("size", [(375, 500), (50, 49), (1000, 333)])
def test_random_crops_equal_torchvision_at_their_box(size, side):
    rgb = picture(*size)
    views, boxes = crop_views(rgb, Crop("resize", side), expand_views(["random-8"]), "a/b", 1)
    for pixels, box in zip(views, boxes, strict=True):
        top, left, h, w = int(box.top), int(box.left), int(box.bottom - box.top), int(box.right - box.left)
        want = F.resized_crop(Image.fromarray(rgb), top, left, h, w, [side, side], InterpolationMode.BICUBIC)
        np.testing.assert_array_equal(pixels, np.asarray(F.hflip(want) if box.flip else want))


def test_random_crops_depend_on_seed_key_and_index_alone():
    rgb = picture(200, 300)

    def boxes(names: list[str], key: str = "x", seed: int = 0) -> list[Box]:
        return crop_views(rgb, Crop("adm", 256), expand_views(names), key, seed)[1]

    base = boxes(["random-4"])
    assert boxes(["random-4"]) == base and boxes(["random-2"]) == base[:2] and boxes(["flip", "random-4"])[1:] == base
    assert len(set(base)) == 4
    assert not set(base) & set(boxes(["random-4"], key="y")) and not set(base) & set(boxes(["random-4"], seed=1))
    assert crop_views(rgb, Crop("resize", 64), expand_views(["random-4"]), "x", 0)[1] == base
    assert base[0] == Box(left=45, top=4, right=272, bottom=184, flip=False)  # stored tokens rest on these numbers


def test_random_crops_cover_what_they_promise():
    rgb = picture(400, 400)
    found = [crop_views(rgb, Crop("resize", 256), [ViewSpec("random", i)], "key", 0)[1][0] for i in range(250)]
    width, height = (np.array([getattr(b, far) - getattr(b, near) for b in found]) for near, far in
                     (("left", "right"), ("top", "bottom")))  # fmt: skip
    share, ratio = width * height / 400**2, np.log(width / height)
    assert RANDOM_SCALE[0] - 0.01 < share.min() < 0.25 and 0.9 < share.max() <= 1
    assert abs(share.mean() - 0.58) < 0.05 and abs(ratio.mean()) < 0.04
    assert math.log(RANDOM_RATIO[0]) - 0.02 < ratio.min() and ratio.max() < math.log(RANDOM_RATIO[1]) + 0.02
    assert 0.4 < np.mean([box.flip for box in found]) < 0.6
    slack = 400 - width > 40
    assert 0.4 < np.mean(np.array([box.left for box in found])[slack] / (400 - width[slack])) < 0.6


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 60),
    height=st.integers(1, 60),
    draws=st.lists(st.floats(0, 1, exclude_max=True), min_size=40, max_size=40),
)
def test_random_windows_lie_inside(width, height, draws):
    left, top, w, h = _random_window(width, height, iter(draws))
    assert left >= 0 and top >= 0 and w >= 1 and h >= 1 and left + w <= width and top + h <= height


@pytest.mark.parametrize("size", [(10, 300), (300, 10)])
def test_narrow_images_fall_back_to_the_largest_centre_cut(size):
    always_whole = iter([0.999, 0.5] * 10)  # ten tries of nearly the whole area at a square ratio: none fits
    left, top, w, h = _random_window(size[1], size[0], always_whole)
    want = T.RandomResizedCrop.get_params(Image.new("RGB", size[::-1]), [0.999, 0.999], list(RANDOM_RATIO))
    assert (top, left, h, w) == tuple(want)


def test_view_names():
    names = [view.name for view in expand_views(["centre", "ten-crop", "random-2"])]
    assert names == ["centre", *(f"ten-crop-{i}" for i in range(10)), "random-0", "random-1"]
    for wrong in (["center"], ["random-0"], ["random-"], [], ["flip", "flip"], ["random-2", "random-3"]):
        with pytest.raises(UsageError):
            expand_views(wrong)


def test_the_recipe_tells_what_a_view_shows():
    centre = expand_views(["centre"])
    adm, resize = Crop("adm", 256), Crop("resize", 256)
    assert crop_identity(adm, centre, 0) == crop_identity(adm, centre, 1)  # the seed moves nothing here
    random = expand_views(["random-1"])
    assert crop_identity(adm, random, 0) != crop_identity(adm, random, 1)
    crops = [adm, resize, Crop("resize-larger", 256, 1.14), Crop("adm", 64), Crop("resize", 64), Crop("resize", 292)]
    identities = [json.dumps(crop_identity(crop, centre, 0)) for crop in crops]
    assert len(set(identities)) == len(crops)


def test_the_recipe_of_256_pixels_is_that_of_existing_token_sets():
    names = ["resize-256", "adm-256", "resize-292"]
    for name, crop in zip(names, protocols(256), strict=True):
        assert crop_identity(crop, expand_views(["centre", "ten-crop"]), 0) == {
            "crop": name,
            "views": ["centre", *(f"ten-crop-{i}" for i in range(10))],
            "size": 256,
            "filter": "Pillow bicubic, antialias",
            "ten_crop": {"base": "ADM centre crop to 281", "order": "tl tr bl br centre, flipped"},
        }


def test_crops_as_params_yaml_has_them():
    assert Crop.of("resize", 64) == Crop("resize", 64) and Crop.of("adm", 512).short == 512
    assert Crop.of({"resize-larger": 1.14}, 256).short == 292
    for protocol in ("resize-256", {"adm": 1.1, "resize": 1}, {}, {"resized": 1.1}):
        with pytest.raises(UsageError, match=r"is unknown; known: resize, adm, \{resize-larger: factor\}"):
            Crop.of(protocol, 256)
    for wrong in ("resize-256", {"adm": 1.1}, {"resize-larger": True}, {"resize-larger": 0.9}, {}, None, 1.14):
        with pytest.raises(ValueError, match=r"must be resize, adm or \{resize-larger: F\}"):
            check_crop(wrong)
    assert check_crop("adm") == "adm" and check_crop({"resize-larger": 1}) == {"resize-larger": 1.0}
    for factor in (0.9, float("nan")):
        with pytest.raises(UsageError, match="factor must be at least 1"):
            Crop.of({"resize-larger": factor}, 256)


def test_photographs(photographs):
    files = sorted(photographs.glob("*/*"))[::16]
    for file in files:
        image = Image.open(file).convert("RGB")
        views, _ = crop_views(np.asarray(image), Crop("adm", 256), expand_views(["centre", "ten-crop"]))
        np.testing.assert_array_equal(views[0], np.asarray(adm(image, 256)))
        np.testing.assert_array_equal(views[1:], np.stack([np.asarray(c) for c in T.TenCrop(256)(adm(image, 281))]))
        plain, _ = crop_views(np.asarray(image), Crop("resize", 256), expand_views(["centre"]))
        np.testing.assert_array_equal(plain[0], np.asarray(torchvision_resize(256, 256)(image)))

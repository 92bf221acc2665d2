"""RGB pixels -> 256 x 256 views by the field's crop protocols, each with its box, so that any view can be found again.

All resizing is Pillow's antialiased filter on 8-bit pixels. Legend: H, W height and width in pixels, V views.
"""

import hashlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from semdict.pipeline.common.errors import UsageError

SIZE = 256  # side of every view, pixels
TEN_CROP_SIDE = math.floor(1.1 * SIZE)  # 281, LlamaGen's crop range 1.1
CROPS = ("resize-256", "adm-256", "resize-292")
RANDOM_SCALE = (0.2, 1.0)  # share of the image's area, MAGE's training crop
RANDOM_RATIO = (3 / 4, 4 / 3)  # width / height
RANDOM_TRIES = 10


@dataclass(frozen=True)
class ViewSpec:
    """One view: `kind` centre, flip, ten-crop or random; `index` counts within the kind; `name` is unique."""

    kind: str
    index: int = 0

    @property
    def name(self) -> str:
        """ "centre", "flip", "ten-crop-3", "random-0"."""
        return self.kind if self.kind in ("centre", "flip") else f"{self.kind}-{self.index}"


@dataclass(frozen=True)
class Box:
    """Where a view lies in the decoded image, in its pixels (fractions allowed), then mirrored if `flip`."""

    left: float
    top: float
    right: float
    bottom: float
    flip: bool = False


def expand_views(names: list[str]) -> list[ViewSpec]:
    """["centre", "ten-crop"] -> 11 ViewSpecs in order; UsageError for an unknown name, a repeated view, or none."""
    views: list[ViewSpec] = []
    for name in names:
        random = re.fullmatch(r"random-([1-9]\d*)", name)
        if name in ("centre", "flip"):
            views.append(ViewSpec(name))
        elif name == "ten-crop":
            views.extend(ViewSpec("ten-crop", i) for i in range(10))
        elif random:
            views.extend(ViewSpec("random", i) for i in range(int(random[1])))
        else:
            raise UsageError(f"view {name!r} is unknown; known: centre, flip, ten-crop, random-K (K >= 1)")
    if not views or len(set(views)) < len(views):
        raise UsageError(f"views {names} must name at least one view and none twice")
    return views


def crop_identity(crop: str, views: list[ViewSpec], seed: int) -> dict:
    """Part of the recipe: everything besides the pixels that decides what a view shows."""
    _check_crop(crop)
    identity = {
        "crop": crop,
        "views": [view.name for view in views],
        "size": SIZE,
        "filter": "Pillow bicubic, antialias",
    }
    if any(view.kind == "ten-crop" for view in views):
        identity["ten_crop"] = {"base": f"ADM centre crop to {TEN_CROP_SIDE}", "order": "tl tr bl br centre, flipped"}
    if any(view.kind == "random" for view in views):
        identity["random"] = {"scale": list(RANDOM_SCALE), "ratio": list(RANDOM_RATIO), "flip": 0.5, "seed": seed}
    return identity


def crop_views(
    rgb_HW3: np.ndarray, crop: str, views: list[ViewSpec], key: str = "", seed: int = 0
) -> tuple[np.ndarray, list[Box]]:
    """Views of one (H, W, 3) uint8 image: (V, 256, 256, 3) uint8, and the box of each.

    `crop` decides centre and flip: "resize-256" and "resize-292" bring the shorter side to 256 (292) and take the
    centre; "adm-256" is ADM's centre crop (guided-diffusion): halve with a box filter while both sides are >= 512,
    then bicubic, then the integer centre. Ten-crop cuts ADM's 281 centre crop, whatever `crop` is (LlamaGen). Random
    resized crops are cut from the image itself, and depend on (seed, key, index) alone.
    """
    _check_crop(crop)
    image = Image.fromarray(rgb_HW3)
    views_V = np.empty((len(views), SIZE, SIZE, 3), np.uint8)
    boxes: list[Box] = []
    kinds = {view.kind for view in views}
    centre = _centre(image, crop) if kinds & {"centre", "flip"} else None
    ten = _ten_crop(image) if "ten-crop" in kinds else []
    for pixels_HW3, view in zip(views_V, views, strict=True):
        if view.kind == "random":
            cut, box = _random(image, _uniforms(f"{seed}/{view.index}/{key}"))
        else:
            cut, box = ten[view.index] if view.kind == "ten-crop" else centre
            if view.kind == "flip":
                box = Box(box.left, box.top, box.right, box.bottom, flip=True)
        cut_HW3 = np.asarray(cut)
        pixels_HW3[:] = cut_HW3[:, ::-1] if box.flip else cut_HW3
        boxes.append(box)
    return views_V, boxes


def _check_crop(crop: str) -> None:
    if crop not in CROPS:
        raise UsageError(f"crop {crop!r} is unknown; known: {', '.join(CROPS)}")


def _centre(image: Image.Image, crop: str) -> tuple[Image.Image, Box]:
    """The 256 centre crop of the protocol, and its box."""
    if crop == "adm-256":
        small = _resize_adm(image, SIZE)
        left, top = (small.width - SIZE) // 2, (small.height - SIZE) // 2
    else:
        small = _resize_short(image, int(crop.removeprefix("resize-")))
        left, top = round((small.width - SIZE) / 2), round((small.height - SIZE) / 2)  # torchvision's CenterCrop
    return _window(image, small, left, top)


def _ten_crop(image: Image.Image) -> list[tuple[Image.Image, Box]]:
    """Corners and centre of the 281 centre crop, then the same five of its mirror image (torchvision's TenCrop)."""
    small = _resize_adm(image, TEN_CROP_SIDE)
    left0, top0 = (small.width - TEN_CROP_SIDE) // 2, (small.height - TEN_CROP_SIDE) // 2
    far = TEN_CROP_SIDE - SIZE
    middle = round(far / 2)
    corners = [(0, 0), (far, 0), (0, far), (far, far), (middle, middle)]
    crops = []
    for flip in (False, True):
        for x, y in corners:
            # a window of the mirror image is the mirrored window that lies as far from the other edge
            left = left0 + (far - x if flip else x)
            crops.append(_window(image, small, left, top0 + y, flip))
    return crops


def _resize_short(image: Image.Image, short: int) -> Image.Image:
    """Shorter side to `short`, the longer one rounded down (torchvision's Resize), bicubic."""
    width, height = image.size
    size = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


def _resize_adm(image: Image.Image, short: int) -> Image.Image:
    """Shorter side to `short` as ADM does it: box-filter halvings, then bicubic, both sides rounded to the nearest."""
    while min(image.size) >= 2 * short:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = short / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)


def _window(image: Image.Image, small: Image.Image, left: int, top: int, flip: bool = False) -> tuple[Image.Image, Box]:
    """Cut 256 x 256 at (left, top) of the resized image; the box is in the pixels of the image it was made from."""
    x, y = image.width / small.width, image.height / small.height
    box = Box(left * x, top * y, (left + SIZE) * x, (top + SIZE) * y, flip)
    return small.crop((left, top, left + SIZE, top + SIZE)), box


def _random(image: Image.Image, draw: Iterator[float]) -> tuple[Image.Image, Box]:
    """A random resized crop (torchvision's RandomResizedCrop, bicubic) and a coin for the flip."""
    left, top, width, height = _random_window(image.width, image.height, draw)
    box = Box(left, top, left + width, top + height, flip=next(draw) < 0.5)
    cut = image.crop((left, top, left + width, top + height))
    return cut.resize((SIZE, SIZE), Image.Resampling.BICUBIC), box


def _random_window(width: int, height: int, draw: Iterator[float]) -> tuple[int, int, int, int]:
    """(left, top, w, h): area share, log ratio and position uniform; after ten misses the largest centre cut."""
    low, high = (math.log(ratio) for ratio in RANDOM_RATIO)
    for _ in range(RANDOM_TRIES):
        area = width * height * (RANDOM_SCALE[0] + (RANDOM_SCALE[1] - RANDOM_SCALE[0]) * next(draw))
        ratio = math.exp(low + (high - low) * next(draw))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(next(draw) * (width - w + 1)), int(next(draw) * (height - h + 1)), w, h
    ratio = min(max(width / height, RANDOM_RATIO[0]), RANDOM_RATIO[1])
    w, h = min(width, max(1, round(height * ratio))), min(height, max(1, round(width / ratio)))
    return (width - w) // 2, (height - h) // 2, w, h


def _uniforms(name: str) -> Iterator[float]:
    """Numbers in [0, 1) that depend on `name` alone: no generator state, no library version."""
    for counter in range(1 << 30):
        digest = hashlib.sha256(f"{counter}/{name}".encode()).digest()
        yield (int.from_bytes(digest[:8], "big") >> 11) / (1 << 53)

"""RGB pixels -> square views by the field's crop protocols, each with its box, so that any view can be found again.

All resizing is Pillow's antialiased filter on 8-bit pixels. Legend: H, W height and width in pixels, S side of a view,
V views.
"""

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image

from semdict.pipeline.common.errors import UsageError

PROTOCOLS = ("resize", "adm", "resize-larger")
TEN_CROP_RATIO = 1.1  # side of the ADM crop that ten-crop cuts from, in views: LlamaGen's crop range 1.1
RANDOM_SCALE = (0.2, 1.0)  # share of the image's area, MAGE's training crop
RANDOM_RATIO = (3 / 4, 4 / 3)  # width / height
RANDOM_TRIES = 10


@dataclass(frozen=True)
class Crop:
    """How centre and flip views are cut, and the side of every view in pixels.

    "resize": shorter side to `size`, then the centre. "resize-larger": shorter side to round(factor * size), then the
    centre; MAGE's and LEASE's test crop has factor 1.14, 292 pixels for 256. "adm": ADM's centre crop
    (guided-diffusion): halve with a box filter while both sides are at least 2 * size, bicubic, the integer centre.
    """

    protocol: str
    size: int
    factor: float = 1.0

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise UsageError(f"crop {self.protocol!r} is unknown; known: resize, adm, {{resize-larger: factor}}")
        if not 1 <= self.factor < math.inf:
            raise UsageError(f"crop {self.protocol}: factor must be at least 1, found {self.factor}")

    @classmethod
    def of(cls, protocol: str | Mapping[str, float], size: int) -> "Crop":
        """From params.yaml: "resize", "adm" or {"resize-larger": factor}, and the side of a view in pixels."""
        if isinstance(protocol, Mapping) and list(protocol) == ["resize-larger"]:
            return cls("resize-larger", size, protocol["resize-larger"])
        return cls(protocol, size)

    @property
    def short(self) -> int:
        """Shorter side of the resized image, pixels."""
        return round(self.factor * self.size) if self.protocol == "resize-larger" else self.size

    @property
    def name(self) -> str:
        """Name in recipes and score files: "resize-256", "adm-256"; "resize-292" for 256 pixels out of 292."""
        return f"{'adm' if self.protocol == 'adm' else 'resize'}-{self.short}"

    @property
    def ten_crop_side(self) -> int:
        """Side of the ADM crop that ten-crop cuts from, pixels: 281 for 256."""
        return math.floor(TEN_CROP_RATIO * self.size)


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
    """Position of a view in the decoded image, in its pixels (fractions allowed), then mirrored if `flip`."""

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


def crop_identity(crop: Crop, views: list[ViewSpec], seed: int) -> dict:
    """Part of the recipe: everything besides the decoded pixels that decides the pixels of a view."""
    identity = {
        "crop": crop.name,
        "views": [view.name for view in views],
        "size": crop.size,
        "filter": "Pillow bicubic, antialias",
    }
    if any(view.kind == "ten-crop" for view in views):
        identity["ten_crop"] = {
            "base": f"ADM centre crop to {crop.ten_crop_side}",
            "order": "tl tr bl br centre, flipped",
        }
    if any(view.kind == "random" for view in views):
        identity["random"] = {"scale": list(RANDOM_SCALE), "ratio": list(RANDOM_RATIO), "flip": 0.5, "seed": seed}
    return identity


def crop_views(
    rgb_HW3: np.ndarray, crop: Crop, views: list[ViewSpec], key: str = "", seed: int = 0
) -> tuple[np.ndarray, list[Box]]:
    """Views of one (H, W, 3) uint8 image: (V, S, S, 3) uint8, and the box of each.

    Centre and flip follow `crop`. Ten-crop cuts ADM's centre crop of 1.1 * S, whatever the protocol is (LlamaGen).
    Random resized crops are cut from the image itself, and depend on (seed, key, index) alone.
    """
    views_VSS3 = np.empty((len(views), crop.size, crop.size, 3), np.uint8)
    boxes: list[Box] = []
    kinds = {view.kind for view in views}
    if kinds - {"random"}:
        image = Image.fromarray(rgb_HW3)
        centre = _centre(image, crop) if kinds & {"centre", "flip"} else None
        ten = _ten_crop(image, crop) if "ten-crop" in kinds else []
        del image  # random crops need the pixels alone: memory for one copy of them is enough
    for pixels_SS3, view in zip(views_VSS3, views, strict=True):
        if view.kind == "random":
            cut, box = _random(rgb_HW3, crop.size, _uniforms(f"{seed}/{view.index}/{key}"))
        else:
            cut, box = ten[view.index] if view.kind == "ten-crop" else centre
            if view.kind == "flip":
                box = Box(box.left, box.top, box.right, box.bottom, flip=True)
        cut_SS3 = np.asarray(cut)
        pixels_SS3[:] = cut_SS3[:, ::-1] if box.flip else cut_SS3
        boxes.append(box)
    return views_VSS3, boxes


def _centre(image: Image.Image, crop: Crop) -> tuple[Image.Image, Box]:
    """The centre crop of the protocol, and its box."""
    size = crop.size
    if crop.protocol == "adm":
        small = _resize_adm(image, size)
        left, top = (small.width - size) // 2, (small.height - size) // 2
    else:
        small = _resize_short(image, crop.short)
        left, top = round((small.width - size) / 2), round((small.height - size) / 2)  # torchvision's CenterCrop
    return _window(image, small, left, top, size)


def _ten_crop(image: Image.Image, crop: Crop) -> list[tuple[Image.Image, Box]]:
    """Corners and centre of the larger ADM crop, then the same five of its mirror image (torchvision's TenCrop)."""
    side = crop.ten_crop_side
    small = _resize_adm(image, side)
    left0, top0 = (small.width - side) // 2, (small.height - side) // 2
    far = side - crop.size
    middle = round(far / 2)
    corners = [(0, 0), (far, 0), (0, far), (far, far), (middle, middle)]
    crops = []
    for flip in (False, True):
        for x, y in corners:
            # a window of the mirror image is the mirrored window that lies as far from the other edge
            left = left0 + (far - x if flip else x)
            crops.append(_window(image, small, left, top0 + y, crop.size, flip))
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


def _window(
    image: Image.Image, small: Image.Image, left: int, top: int, size: int, flip: bool = False
) -> tuple[Image.Image, Box]:
    """size x size pixels at (left, top) of the resized image; the box is in the pixels of the original."""
    x, y = image.width / small.width, image.height / small.height
    box = Box(left * x, top * y, (left + size) * x, (top + size) * y, flip)
    return small.crop((left, top, left + size, top + size)), box


def _random(rgb_HW3: np.ndarray, size: int, uniforms: Iterator[float]) -> tuple[Image.Image, Box]:
    """A random resized crop (torchvision's RandomResizedCrop, bicubic) and a flip with probability 1/2."""
    left, top, width, height = _random_window(rgb_HW3.shape[1], rgb_HW3.shape[0], uniforms)
    box = Box(left, top, left + width, top + height, flip=next(uniforms) < 0.5)
    row = 3 * rgb_HW3.shape[1]  # bytes; read where they are, without a copy of the window in between
    pixels = np.ascontiguousarray(rgb_HW3).reshape(-1)[row * top + 3 * left :]
    cut = Image.frombuffer("RGB", (width, height), pixels, "raw", "RGB", row, 1)
    return cut.resize((size, size), Image.Resampling.BICUBIC), box


def _random_window(width: int, height: int, uniforms: Iterator[float]) -> tuple[int, int, int, int]:
    """(left, top, w, h): area share, log ratio and position uniform; after ten misses the largest centre cut."""
    low, high = (math.log(ratio) for ratio in RANDOM_RATIO)
    for _ in range(RANDOM_TRIES):
        area = width * height * (RANDOM_SCALE[0] + (RANDOM_SCALE[1] - RANDOM_SCALE[0]) * next(uniforms))
        ratio = math.exp(low + (high - low) * next(uniforms))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(next(uniforms) * (width - w + 1)), int(next(uniforms) * (height - h + 1)), w, h
    ratio = min(max(width / height, RANDOM_RATIO[0]), RANDOM_RATIO[1])
    w, h = min(width, max(1, round(height * ratio))), min(height, max(1, round(width / ratio)))
    return (width - w) // 2, (height - h) // 2, w, h


def _uniforms(name: str) -> Iterator[float]:
    """Numbers in [0, 1) that depend on `name` alone: no generator state, no library version."""
    for counter in range(1 << 30):
        digest = hashlib.sha256(f"{counter}/{name}".encode()).digest()
        yield (int.from_bytes(digest[:8], "big") >> 11) / (1 << 53)

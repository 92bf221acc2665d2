"""Image bytes -> RGB pixels: the only decoder of the project.

The pixels are those of `PIL.Image.open(file).convert("RGB")`, as ImageFolder loaders read them: EXIF rotation is NOT
applied, embedded colour profiles are ignored, an alpha channel is dropped (not composited). CMYK, palette, grey and
16-bit (the high byte counts) images become 8-bit RGB. Animations, images with several pages, and 32-bit or
floating-point samples have no one RGB meaning: they are refused with a reason.

Memory: a small file can describe an image of gigabytes. What decoding and cropping take is estimated from the header;
an image above the limit is refused, and `decoded` lets threads decode together only what fits into it. JPEGs are not
decoded at reduced scale to fit: the scaled inverse transform gives other pixels than the crop protocols do.

Legend of suffixes: H, W height and width in pixels.
"""

import io
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from semdict.pipeline.common.errors import UsageError

if TYPE_CHECKING:
    from semdict.pipeline.config.schema import Pixels

MAX_PIXELS = 178_956_970  # Pillow's own warning threshold; it refuses more than twice that in any case
DECODE_MEMORY = 1_000_000_000  # bytes
MAX_ASPECT = 1000  # a longer strip would be resized to hundreds of megabytes before it is cropped
BAND_PIXELS = 1 << 18  # converted to RGB at a time
DECODERS = ("auto", "simplejpeg", "pillow")

# Bytes per pixel at the peak of decoding, measured as resident memory (Pillow 12) and rounded up; most are buffers of
# the format's library. Cropping takes CROP_BYTES, the pixels and Pillow's own copy, and HALVING_BYTES more where ADM's
# crop halves the image; these count while threads share the memory, but no image is refused because of them.
PEAK_BYTES = {"WEBP": 19, "TIFF": 16, "JPEG2000": 28, "AVIF": 20}
PEAK_BYTES_OTHERS, JPEG_BYTES = 9, 11  # a JPEG of three components takes at most that
CROP_BYTES, HALVING_BYTES = 8, 3

# Only formats whose reader is a plain parser: EPS would start Ghostscript, WMF and others depend on the platform.
# Their plugins are imported here because Pillow's own lazy registration is not safe between threads.
for _plugin in ("Jpeg", "Mpo", "Png", "WebP", "Gif", "Bmp", "Tiff", "Ppm", "Jpeg2K", "Avif"):
    import_module(f"PIL.{_plugin}ImagePlugin")
FORMATS = tuple(
    name
    for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
    if name in Image.OPEN  # Pillow can be built without some; MPO comes with JPEG
)
# Endings of the files that these formats use, with those that Pillow's readers register: .jfif, .avif, ...
SUFFIXES = frozenset(suffix for suffix, name in Image.EXTENSION.items() if name in (*FORMATS, "MPO"))
_MAGIC = (b"\xff\xd8", b"\x89PNG", b"GIF8", b"BM", b"RIFF", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP", b"\xff\x4f\xff\x51")
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")

# About the size limit, palette transparency and damage, which this module decides; they would come on every run.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
PngImagePlugin.MAX_TEXT_CHUNK = 1 << 25  # metadata of some programs exceeds Pillow's limit of 1 MB


@dataclass(frozen=True)
class DecodeSpec:
    """How images are decoded: decoder auto, simplejpeg or pillow; limits in pixels and in bytes while decoding.

    decode_memory limits one image, and all images together that the threads of a process decode at a time.
    """

    decoder: str = "auto"
    max_pixels: int = MAX_PIXELS
    decode_memory: int = DECODE_MEMORY

    @classmethod
    def of(cls, pixels: "Pixels") -> "DecodeSpec":
        """From section pixels of params.yaml."""
        return cls(pixels.decoder, pixels.max_pixels, pixels.decode_memory)


DEFAULT_DECODING = DecodeSpec()


class Status(IntEnum):
    """Result of reading an image: 0 is good, others are reason codes stored in manifest and shards (never renumber)."""

    OK = 0
    EMPTY = 1
    NOT_AN_IMAGE = 2
    DAMAGED = 3
    ANIMATED = 4
    TOO_MANY_PIXELS = 5
    TOO_NARROW = 6
    UNSUPPORTED_DEPTH = 7
    UNREADABLE = 8
    TOO_MUCH_MEMORY = 9


class BadImage(Exception):  # noqa: N818
    """One image that cannot be used: `.status` is its Status code, `.reason` one line of text."""

    def __init__(self, status: Status, reason: str):
        super().__init__(reason)
        self.status, self.reason = status, reason


@lru_cache
def _simplejpeg():
    """The module, or None where it is not installed."""
    try:
        import simplejpeg
    except ImportError:
        return None
    return simplejpeg


def resolve_decoder(decoder: str = "auto") -> str:
    """ "simplejpeg" or "pillow"; UsageError for an unknown name, or for simplejpeg where it is not installed."""
    if decoder not in DECODERS:
        raise UsageError(f"decoder {decoder!r} is unknown; known: {', '.join(DECODERS)}")
    if decoder == "auto":
        return "simplejpeg" if _simplejpeg() else "pillow"
    if decoder == "simplejpeg" and not _simplejpeg():
        raise UsageError("decoder simplejpeg is not installed; `pip install simplejpeg`, or set encode.decoder: pillow")
    return decoder


def decoder_identity(decoder: str = "auto") -> dict:
    """Part of the recipe: which libraries turn bytes into pixels, their versions, and the colour rules."""
    from PIL import features

    name = resolve_decoder(decoder)
    identity = {
        "library": name,
        "pillow": Image.__version__,
        "pillow_jpeg": features.version("libjpeg_turbo") or features.version("jpg") or "none",
        "exif_rotation": False,
        "colour_profiles": False,
        "alpha": "dropped",
        "sixteen_bit": "high byte",
    }
    if name == "simplejpeg":
        identity["simplejpeg"] = version("simplejpeg")
    return identity


def decode(data: bytes, spec: DecodeSpec = DEFAULT_DECODING) -> np.ndarray:
    """Whole image as (H, W, 3) uint8 RGB, not rotated; BadImage with the reason if it cannot be used.

    JPEGs in YCbCr, RGB or grey go through simplejpeg (libjpeg-turbo, exact DCT and upsampling) when it is the decoder;
    everything else, and any JPEG that simplejpeg refuses, through Pillow, whose verdict is final.
    """
    return _prepare(data, spec).read()


@contextmanager
def decoded(data: bytes, spec: DecodeSpec = DEFAULT_DECODING, side: int = 0) -> Iterator[np.ndarray]:
    """`decode` for threads: waits until the image fits into the memory that others leave of `spec.decode_memory`.

    The estimate counts as used until the block ends, so crop inside it; side: pixels that the shorter side is resized
    to, which takes much memory for long strips.
    """
    image = _prepare(data, spec)
    with _memory.reserved(image.needed + _crop_bytes(*image.size, side), spec.decode_memory):
        yield image.read()


def probe(data: bytes, spec: DecodeSpec = DEFAULT_DECODING) -> tuple[int, int]:
    """(width, height) from the header alone, no pixel decoded; BadImage where `decode` would refuse for the same."""
    with _opened(data) as image:
        _check(image, spec)
        return image.size


class _Memory:
    """Bytes in use by the decode threads of this process; requests are served in the order of their arrival."""

    def __init__(self) -> None:
        self._used, self._changed, self._turn = 0, threading.Condition(), threading.Lock()

    @contextmanager
    def reserved(self, size: int, limit: int) -> Iterator[None]:
        """Waits until `size` bytes are free; an image larger than the limit waits until it is alone."""
        size = min(size, limit)
        with self._turn, self._changed:
            self._changed.wait_for(lambda: self._used + size <= limit)
            self._used += size
        try:
            yield
        finally:
            with self._changed:
                self._used -= size
                self._changed.notify_all()


_memory = _Memory()
os.register_at_fork(after_in_child=_memory.__init__)  # a thread of the parent may have held the lock


@dataclass(frozen=True)
class _Undecoded:
    """An image whose header is read: (width, height), estimated bytes to decode and crop it, the function to decode."""

    size: tuple[int, int]
    needed: int
    read: Callable[[], np.ndarray]


def _prepare(data: bytes, spec: DecodeSpec) -> _Undecoded:
    """Read the header; BadImage if the image is out of bounds or has no one RGB meaning."""
    if resolve_decoder(spec.decoder) == "simplejpeg" and data[:2] == b"\xff\xd8":
        size = _jpeg_size(data)
        if size is not None:
            needed = JPEG_BYTES * size[0] * size[1] + len(data)
            _check_size(*size, spec)
            if needed > spec.decode_memory // 2:  # large enough for a closer look
                with _opened(data) as image:
                    needed = _check_memory(image, len(data), spec)
            return _Undecoded(size, needed, lambda: _decode_jpeg(data, spec))
    image = _opened(data)
    needed = _check(image, spec, len(data))
    return _Undecoded(image.size, needed, lambda: _decode_by_pillow(image))


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) of a JPEG that simplejpeg can decode; None for CMYK or a damaged header, which Pillow judges."""
    try:
        height, width, colours, _ = _simplejpeg().decode_jpeg_header(data)
    except ValueError:
        return None
    return (width, height) if colours in ("YCbCr", "RGB", "Gray") else None


def _decode_jpeg(data: bytes, spec: DecodeSpec) -> np.ndarray:
    try:
        return _simplejpeg().decode_jpeg(data, colorspace="RGB")
    except ValueError:
        image = _opened(data)
        _check(image, spec)
        return _decode_by_pillow(image)


def _decode_by_pillow(image: Image.Image) -> np.ndarray:
    with closing(image):  # frees Pillow's pixels
        try:
            return _to_rgb(image)
        except MemoryError:
            raise
        except Exception as error:  # Pillow's readers raise a dozen types on damaged data
            raise BadImage(Status.DAMAGED, f"damaged {image.format}: {_one_line(error)}") from None


def _opened(data: bytes) -> Image.Image:
    """A Pillow image whose header is read, whose pixels are not."""
    if not data:
        raise BadImage(Status.EMPTY, "empty file (0 bytes)")
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except MemoryError:
        raise
    except Image.DecompressionBombError as error:
        raise BadImage(Status.TOO_MANY_PIXELS, _one_line(error)) from None
    except Exception as error:
        if data.startswith(_MAGIC):
            raise BadImage(Status.DAMAGED, f"header cannot be read: {_one_line(error)}") from None
        if isinstance(error, UnidentifiedImageError):
            raise BadImage(Status.NOT_AN_IMAGE, f"not an image (starts with {data[:12]!r})") from None
        raise BadImage(Status.NOT_AN_IMAGE, f"not an image: {_one_line(error)}") from None


def _check(image: Image.Image, spec: DecodeSpec, file_size: int = 0) -> int:
    """Refuse an image that has no one RGB meaning or is out of bounds; the estimated bytes otherwise."""
    _check_size(*image.size, spec)
    # an MPO is one photograph with previews or a second eye: its first picture is the photograph
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise BadImage(Status.ANIMATED, f"{image.format} with several frames")
    if image.mode in ("I", "F"):
        raise BadImage(
            Status.UNSUPPORTED_DEPTH, f"{image.format} of 32-bit samples (mode {image.mode}) has no 8-bit range"
        )
    return _check_memory(image, file_size, spec)


def _check_size(width: int, height: int, spec: DecodeSpec) -> None:
    if width * height > spec.max_pixels:
        raise BadImage(Status.TOO_MANY_PIXELS, f"{width} x {height} pixels, more than max_pixels {spec.max_pixels}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadImage(Status.TOO_NARROW, f"{width} x {height} pixels: one side more than {MAX_ASPECT} times the other")


def _check_memory(image: Image.Image, file_size: int, spec: DecodeSpec) -> int:
    """Estimated bytes that decoding and cropping take at their peak; BadImage if they exceed the limit."""
    needed = image.width * image.height * max(_peak_bytes(image), CROP_BYTES) + file_size
    if needed > spec.decode_memory:
        raise BadImage(
            Status.TOO_MUCH_MEMORY,
            f"{image.width} x {image.height} {image.format} takes about {needed / 1e6:.0f} MB to decode, "
            f"more than decode_memory {spec.decode_memory / 1e6:.0f} MB",
        )
    return needed


def _crop_bytes(width: int, height: int, side: int) -> int:
    """Estimated bytes that cropping takes besides the pixels and Pillow's copy, if the shorter side becomes `side`."""
    resized = 2 * 4 * side**2 * max(width, height) // min(width, height)  # 4 bytes a pixel, after each of two passes
    return HALVING_BYTES * width * height + resized


def _peak_bytes(image: Image.Image) -> float:
    """Estimated bytes per pixel at the peak of decoding."""
    layers = getattr(image, "layer", None)
    if image.format in ("JPEG", "MPO") and layers:  # 2 bytes for each coefficient, and Pillow's for each pixel
        samples = [horizontal * vertical for _, horizontal, vertical, *_ in layers]
        return 2 * sum(samples) / max(1, *samples) + 5
    return PEAK_BYTES.get(image.format, PEAK_BYTES_OTHERS)


def _to_rgb(image: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8; 16-bit grey keeps its high byte, as Pillow does for 16-bit colour (its own grey path clips).

    Converts a band of rows at a time, since Pillow's conversion and export of a whole image need 10 bytes a pixel more.
    """
    image.load()
    rows = max(1, BAND_PIXELS // image.width)
    if rows >= image.height:
        return _band_to_rgb(image)
    rgb_HW3 = np.empty((image.height, image.width, 3), np.uint8)
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        rgb_HW3[top:bottom] = _band_to_rgb(image.crop((0, top, image.width, bottom)))
    return rgb_HW3


def _band_to_rgb(band: Image.Image) -> np.ndarray:
    if band.mode in _SIXTEEN_BIT:
        grey_HW = (np.asarray(band) >> 8).astype(np.uint8)
        return np.repeat(grey_HW[:, :, None], 3, axis=2)
    return np.array(band.convert("RGB"))


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()).split(" <_io")[0]  # Pillow prints the address of the buffer
    return text[:200] or type(error).__name__

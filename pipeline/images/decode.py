"""Image bytes -> RGB pixels: the only decoder of the project.

What counts as the picture is what `PIL.Image.open(file).convert("RGB")` gives, as the field's ImageFolder loaders read
it: EXIF rotation is NOT applied, embedded colour profiles are ignored, an alpha channel is dropped (not composited).
CMYK, palette, grey and 16-bit (the high byte counts) pictures become 8-bit RGB. Animations, pictures with several
pages, and 32-bit or floating-point samples have no one RGB meaning: they are refused with a reason.

Legend of suffixes: H, W height and width in pixels.
"""

import io
import warnings
from enum import IntEnum
from functools import lru_cache
from importlib import import_module
from importlib.metadata import version

import numpy as np
from PIL import Image, UnidentifiedImageError

from semdict.pipeline.common.errors import UsageError

MAX_PIXELS = 178_956_970  # Pillow's own warning threshold; it refuses more than twice that, whatever is asked for
MAX_ASPECT = 1000  # a longer strip would be resized to hundreds of megabytes before it is cropped
DECODERS = ("auto", "simplejpeg", "pillow")

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

# They speak of what is decided here (size limit, palette transparency, damage), on every run.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


class Status(IntEnum):
    """What became of an image; 0 is good, the rest are reason codes kept in manifest and shards (never renumber)."""

    OK = 0
    EMPTY = 1
    NOT_AN_IMAGE = 2
    DAMAGED = 3
    ANIMATED = 4
    TOO_MANY_PIXELS = 5
    TOO_NARROW = 6
    UNSUPPORTED_DEPTH = 7
    UNREADABLE = 8


class BadImage(Exception):  # noqa: N818
    """One image that cannot be used: `.status` is its Status code, `.reason` one line for people."""

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


def decode(data: bytes, decoder: str = "auto", max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Whole picture as (H, W, 3) uint8 RGB, not rotated; BadImage says why not.

    JPEGs in YCbCr, RGB or grey go through simplejpeg (libjpeg-turbo, exact DCT and upsampling) when it is the decoder;
    everything else, and any JPEG that simplejpeg finds fault with, through Pillow, whose verdict is final.
    """
    if resolve_decoder(decoder) == "simplejpeg" and data[:2] == b"\xff\xd8":
        rgb_HW3 = _decode_jpeg(data, max_pixels)
        if rgb_HW3 is not None:
            return rgb_HW3
    with _opened(data) as image:
        _check(image, max_pixels)
        try:
            return _to_rgb(image)
        except MemoryError:
            raise
        except Exception as error:  # Pillow's readers raise a dozen types on damaged data
            raise BadImage(Status.DAMAGED, f"damaged {image.format}: {_one_line(error)}") from None


def probe(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(width, height) from the header alone, no pixel decoded; BadImage where `decode` would refuse for the same."""
    with _opened(data) as image:
        _check(image, max_pixels)
        return image.size


def _decode_jpeg(data: bytes, max_pixels: int) -> np.ndarray | None:
    """(H, W, 3) uint8, or None for what Pillow has to look at (CMYK, damage); BadImage for a size out of bounds."""
    simplejpeg = _simplejpeg()
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours not in ("YCbCr", "RGB", "Gray"):
            return None
        _check_size(width, height, max_pixels)
        return simplejpeg.decode_jpeg(data, colorspace="RGB")
    except ValueError:
        return None


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


def _check(image: Image.Image, max_pixels: int) -> None:
    """Refuse what has no one RGB meaning, or is out of bounds."""
    _check_size(*image.size, max_pixels)
    # an MPO is one photograph with previews or a second eye: its first picture is the photograph
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise BadImage(Status.ANIMATED, f"{image.format} with several frames")
    if image.mode in ("I", "F"):
        raise BadImage(
            Status.UNSUPPORTED_DEPTH, f"{image.format} of 32-bit samples (mode {image.mode}) has no 8-bit range"
        )


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise BadImage(Status.TOO_MANY_PIXELS, f"{width} x {height} pixels, more than max_pixels {max_pixels}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadImage(Status.TOO_NARROW, f"{width} x {height} pixels: one side more than {MAX_ASPECT} times the other")


def _to_rgb(image: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8; 16-bit grey keeps its high byte, as Pillow does for 16-bit colour (its own grey path clips)."""
    if image.mode in _SIXTEEN_BIT:
        grey_HW = (np.asarray(image) >> 8).astype(np.uint8)
        return np.repeat(grey_HW[:, :, None], 3, axis=2)
    return np.array(image.convert("RGB"))


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()).split(" <_io")[0]  # Pillow prints the address of the buffer
    return text[:200] or type(error).__name__

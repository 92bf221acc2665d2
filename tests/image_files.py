"""Image files of every kind that a dataset has been seen to contain, as bytes."""

import io
import struct
import zlib

import numpy as np
from PIL import Image


def picture(height: int = 40, width: int = 60, seed: int = 0) -> np.ndarray:
    """(H, W, 3) uint8, smooth enough for JPEG, different in every corner."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def encoded(image: Image.Image | np.ndarray, kind: str = "PNG", **options) -> bytes:
    """The image as a file of format `kind`."""
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def huge_png(width: int = 30_000, height: int = 30_000) -> bytes:
    """A valid header that claims many pixels, and none of them."""

    return raw_png(width, height, 8, b"\0" * 64)


def raw_png(width: int, height: int, bits: int, rows: bytes) -> bytes:
    """An RGB PNG of `bits` per sample around unfiltered rows."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def huge_jpeg(side: int = 30_000) -> bytes:
    """A JPEG whose frame header claims side x side pixels."""
    data = bytearray(encoded(picture(), "JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", side, side)
    return bytes(data)


def animation(kind: str) -> bytes:
    """Two different frames, as GIF, WEBP or PNG."""
    frames = [Image.fromarray(picture(seed=i)) for i in range(2)]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=50)


def bad_files() -> dict[str, tuple[bytes, str, bool]]:
    """name -> (bytes, Status name, True when the header alone tells)."""
    jpeg = encoded(picture(), "JPEG", quality=90)
    png = encoded(picture())
    return {
        "empty.jpg": (b"", "EMPTY", True),
        "text.jpg": (b"<html>404 not found</html>", "NOT_AN_IMAGE", True),
        "script.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "NOT_AN_IMAGE", True),
        "short.jpg": (jpeg[: len(jpeg) // 2], "DAMAGED", False),
        "short.png": (png[: len(png) // 2], "DAMAGED", False),
        "header.jpg": (jpeg[:100], "DAMAGED", True),
        "stub.jpg": (jpeg[:3], "DAMAGED", True),
        "stub.png": (png[:12], "DAMAGED", True),
        "moving.gif": (animation("GIF"), "ANIMATED", True),
        "moving.webp": (animation("WEBP"), "ANIMATED", True),
        "moving.png": (animation("PNG"), "ANIMATED", True),
        "huge.png": (huge_png(), "TOO_MANY_PIXELS", True),
        "huge.jpg": (huge_jpeg(), "TOO_MANY_PIXELS", True),
        "strip.png": (encoded(np.zeros((1, 1001, 3), np.uint8)), "TOO_NARROW", True),
        "float.tiff": (encoded(Image.new("F", (4, 4)), "TIFF"), "UNSUPPORTED_DEPTH", True),
        "wide.tiff": (encoded(Image.new("I", (4, 4)), "TIFF"), "UNSUPPORTED_DEPTH", True),
    }


def good_files() -> dict[str, tuple[bytes, np.ndarray]]:
    """name -> (bytes, the (H, W, 3) uint8 pixels that it means), computed without any decoder."""
    rgb = picture()
    grey = rgb[..., 0]
    sixteen = (grey.astype(np.uint16) << 8) + np.arange(60, dtype=np.uint16)
    deep = b"".join(b"\0" + row.tobytes() for row in ((rgb.astype(">u2") << 8) + 77).astype(">u2"))
    palette = np.arange(768).reshape(256, 3).astype(np.uint8)[::-1].copy()
    indexed = Image.fromarray(grey)
    indexed.putpalette(palette.tobytes())
    alpha = np.dstack([rgb, grey])
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    triple = np.repeat(grey[..., None], 3, axis=2)
    return {
        "rgb.png": (encoded(rgb), rgb),
        "rgb.bmp": (encoded(rgb, "BMP"), rgb),
        "rgb.tiff": (encoded(rgb, "TIFF"), rgb),
        "rgb.ppm": (encoded(rgb, "PPM"), rgb),
        "rgb.webp": (encoded(rgb, "WEBP", lossless=True), rgb),
        "grey.png": (encoded(grey), triple),
        "sixteen.png": (encoded(sixteen), triple),
        "sixteen.tiff": (encoded(sixteen, "TIFF"), triple),
        "sixteen-colour.png": (raw_png(60, 40, 16, deep), rgb),
        "palette.png": (encoded(indexed), palette[grey]),
        "palette-clear.png": (encoded(indexed, transparency=bytes(range(256))), palette[grey]),
        "still.gif": (encoded(indexed, "GIF"), palette[grey]),
        "alpha.png": (encoded(alpha), rgb),
        "bilevel.png": (encoded(Image.fromarray(grey > 99)), np.where(triple > 99, 255, 0).astype(np.uint8)),
        "rotated.png": (encoded(rgb, exif=exif), rgb),
        "one.png": (encoded(rgb[:1, :1]), rgb[:1, :1]),
        "cmyk.tiff": (encoded(Image.fromarray(np.dstack([255 - rgb, 0 * grey]), "CMYK"), "TIFF"), rgb),
    }

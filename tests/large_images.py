"""Images of all formats that are large enough to measure the memory of decoding and cropping.

`python -m tests.large_images FOLDER` measures every file in FOLDER, named <side>-<kind>, and prints
[[kind, decoder, estimated bytes, bytes used], ...] as JSON.
"""

import json
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image

from semdict.pipeline.images.batches import CropRecipe, load_crop
from semdict.pipeline.images.crops import Crop, expand_views
from semdict.pipeline.images.decode import DecodeSpec, _crop_bytes, _prepare
from tests.image_files import encoded, raw_png

KINDS: dict[str, Callable[[int], bytes]] = {
    "png": lambda side: encoded(np.zeros((side, side, 3), np.uint8)),
    "bilevel.png": lambda side: encoded(Image.new("1", (side, side))),
    "alpha.png": lambda side: encoded(Image.new("RGBA", (side, side))),
    "deep.png": lambda side: raw_png(side, side, 16, bytes(side * (6 * side + 1))),
    "gif": lambda side: encoded(Image.new("P", (side, side)), "GIF"),
    "bmp": lambda side: encoded(Image.new("RGB", (side, side)), "BMP"),
    "tiff": lambda side: encoded(Image.new("RGB", (side, side)), "TIFF", compression="tiff_lzw"),
    "webp": lambda side: encoded(Image.new("RGB", (side, side)), "WEBP"),
    "lossless.webp": lambda side: encoded(Image.new("RGBA", (side, side)), "WEBP", lossless=True),
    "avif": lambda side: encoded(Image.new("RGBA", (side, side)), "AVIF", speed=10, subsampling="4:4:4"),
    "jp2": lambda side: encoded(Image.new("RGBA", (side, side)), "JPEG2000"),
    "jpeg": lambda side: encoded(Image.new("RGB", (side, side)), "JPEG"),
    "progressive.jpeg": lambda side: encoded(Image.new("RGB", (side, side)), "JPEG", progressive=True, subsampling=0),
    "cmyk.jpeg": lambda side: encoded(Image.new("CMYK", (side, side)), "JPEG", progressive=True),
}


def main(folder: Path) -> None:
    decoders, recipe = ("simplejpeg", "pillow"), [Crop("resize", 64), tuple(expand_views(["ten-crop", "random-2"]))]
    for make in KINDS.values():  # what libraries allocate once
        for decoder in decoders:
            cropped(make(100), CropRecipe(*recipe, DecodeSpec(decoder)))
    rows = []
    for path in sorted(folder.iterdir()):
        for decoder in decoders:
            spec = DecodeSpec(decoder)
            used = in_child(lambda path=path, spec=spec: bytes_used(path, CropRecipe(*recipe, spec)))
            image = _prepare(path.read_bytes(), spec)
            estimate = image.needed + _crop_bytes(*image.size, recipe[0].ten_crop_side)
            rows.append((path.name.partition("-")[2], decoder, estimate, used))
    json.dump(rows, sys.stdout)


def cropped(data: bytes, recipe: CropRecipe) -> None:
    load_crop(SimpleNamespace(read=lambda row: data), SimpleNamespace(key=str), 0, recipe)


def bytes_used(path: Path, recipe: CropRecipe) -> int:
    """Rise of the largest resident memory while all kinds of views are made of an image."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cropped(path.read_bytes(), recipe)
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def in_child(work: Callable[[], int]) -> int:
    """work() in a fork of this process, whose small heap has no freed memory to use again unseen."""
    end, start = os.pipe()
    if not os.fork():
        os.write(start, str(work()).encode())
        os._exit(0)
    os.close(start)
    with os.fdopen(end) as result:
        number = int(result.read())
    os.wait()
    return number


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Pictures inside the page, as data URIs of JPEG, within a limit on their bytes together."""

import base64
import io
from pathlib import Path
from typing import TYPE_CHECKING

from semdict.report.parts import Picture

if TYPE_CHECKING:
    from PIL import Image

WIDTH, HEIGHT = 1280, 1600  # pixels; larger pictures are shrunk
LIMIT = 4_000_000  # bytes of all pictures; with the library that draws the charts the page stays below 10 MB


class Pictures:
    """Turns picture files into data URIs until the limit is reached; `left_out` lists the files beyond it."""

    def __init__(self, limit: int = LIMIT):
        self.left, self.left_out = limit, list[Path]()

    def file(self, path: Path, caption: str, kind: str = "picture") -> Picture | None:
        """A picture file; None if there is none, or no room for it."""
        from PIL import Image

        if not path.exists():
            return None
        with Image.open(path) as opened:
            picture = self.image(opened.convert("RGB"), caption, kind)
        if picture is None:
            self.left_out.append(path)
        return picture

    def image(self, image: "Image.Image", caption: str, kind: str = "picture") -> Picture | None:
        """An RGB image, at most WIDTH x HEIGHT pixels; None if there is no room for it."""
        from PIL import Image

        image.thumbnail((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, format="JPEG", quality=88, optimize=True)
        uri = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
        if len(uri) > self.left:
            return None
        self.left -= len(uri)
        return Picture(uri, caption, kind)

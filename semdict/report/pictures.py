"""Pictures inside a page, no larger than a screen shows them."""

import base64
import io
from pathlib import Path

WIDTH, HEIGHT = 1280, 1600


def inline(path: Path) -> str:
    """A data URI of the picture as JPEG, at most WIDTH x HEIGHT pixels."""
    from PIL import Image

    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    picture.thumbnail((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
    written = io.BytesIO()
    picture.save(written, format="JPEG", quality=88, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(written.getvalue()).decode()

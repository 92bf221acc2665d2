"""Bytes of a token set beside the bytes of the images it was made from: Sorcen's table E.8."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from semdict.pipeline.common.errors import ManifestError

if TYPE_CHECKING:
    from semdict.pipeline.shards import TokenShards


@dataclass(frozen=True)
class DiskRow:
    """One line: images, bytes, per cent of the original images' bytes, linear probe top-1 (per cent) and FID."""

    method: str
    images: int
    bytes: int
    per_cent: float | None
    top1: float | None = None
    fid: float | None = None


IMAGENET = 140_000_000_000
# Sorcen, table E.8 (Uniform, C-score and JPEG 5 as reported by SeiT); bytes and per cent as printed
PUBLISHED = (
    DiskRow("MAGE", 1_281_000, IMAGENET, 100.0, 74.7, 11.1),
    DiskRow("Uniform", 512_000, 54_600_000_000, 39.0, 74.0),
    DiskRow("C-score", 512_000, 53_300_000_000, 38.0, 73.3),
    DiskRow("JPEG 5", 1_281_000, 11_000_000_000, 8.0, 74.6),
    DiskRow("SeiT", 1_281_000, 1_400_000_000, 1.0, 74.0),
    DiskRow("SeiT++", 1_281_000, 1_400_000_000, 1.0, 77.8),
    DiskRow("Sorcen", 1_281_000, 390_000_000, 0.29, 75.1, 9.61),
)


def disk_rows(shards: "TokenShards", original_bytes: int | None) -> list[DiskRow]:
    """The files of each codebook's tokens, and of the whole directory (codebooks, index and labels included)."""
    from semdict.pipeline.shards.format import files_under, token_file

    images = int((shards.status[:] == 0).sum())
    sizes = {
        f"{name} tokens": [token_file(name, shard) for shard in range(shards.layout.shards)]
        for name in shards.spec.sizes
    }
    sizes["whole directory"] = list(files_under(shards.path))
    rows = []
    for title, files in sizes.items():
        total = sum((shards.path / file).stat().st_size for file in files)
        rows.append(DiskRow(title, images, total, 100 * total / original_bytes if original_bytes else None))
    return rows


def bytes_of_images(shards: "TokenShards", manifest: Path) -> int:
    """Bytes of the encoded images behind the good rows; ManifestError if the manifest is of other images."""
    import pyarrow.parquet as pq

    from semdict.pipeline.manifest.table import load_manifest

    table = load_manifest(manifest).table
    same = len(table) == len(shards) and table["key"].equals(pq.read_table(shards.path / "index.parquet")["key"])
    if not same:
        raise ManifestError(f"{manifest} lists other images than {shards.path}; name its manifest or --original-bytes")
    good = np.asarray(shards.status[:] == 0)
    return int(table["bytes"].to_numpy()[good].sum())


def disk_table(rows: list[DiskRow]) -> str:
    """Plain text: the published rows, then `rows`."""
    lines = [["method", "images", "size", "of originals", "top-1 %", "FID"]]
    for row in (*PUBLISHED, *rows):
        share = "-" if row.per_cent is None else f"{row.per_cent:.2f} %"
        scores = ["-" if score is None else f"{score:g}" for score in (row.top1, row.fid)]
        lines.append([row.method, f"{row.images:,}", size_text(row.bytes), share, *scores])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )


def size_text(count: int) -> str:
    """Bytes with a decimal unit."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"


def as_dicts(rows: list[DiskRow]) -> list[dict[str, object]]:
    """For JSON."""
    return [asdict(row) for row in rows]

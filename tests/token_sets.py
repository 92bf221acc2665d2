"""Random token sets and writing them, for the tests of the shard format."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from semdict.pipeline.shards import FILL, Block, ShardSpec, filler, write_shards

KEYS = ("a.b/c.d.JPEG", "../up", "/abs", "ünïcode key", "100%", "plain", "照片/" * 60)


def make_index(rows: int, split=lambda row: "train") -> pa.Table:
    return pa.table(
        {
            "key": [f"image-{row}" for row in range(rows)],
            "split": [split(row) for row in range(rows)],
            "label_name": [""] * rows,
            "reason": [""] * rows,
        }
    )


def make_set(rows=50, views=1, grid=(4, 4), gen_sizes=40, disc_size=300, bad=0.1, seed=0):
    """A spec and its rows in one block; rows without tokens hold the filler. Nothing is written."""
    rng = np.random.default_rng(seed)
    spec = ShardSpec(
        rows, [{"name": f"v{v}"} for v in range(views)], grid, gen_sizes, disc_size, recipe={"z": 1, "a": 2}
    )
    shape = (rows, views, spec.length)
    status = (rng.random(rows) < bad).astype(np.uint8) * 3
    gen = (rng.random(shape) ** 2 * spec.sizes["gen"]).astype(spec.dtypes["gen"])
    disc = None if disc_size is None else rng.integers(0, disc_size, shape).astype(spec.dtypes["disc"])
    for ids in (gen, disc):
        if ids is not None:
            ids[status != 0] = filler(ids.dtype)
    return spec, Block(gen, disc, rng.integers(-1, 5, rows).astype(np.int32), status)


def cut(block: Block, *sizes: int) -> list[Block]:
    """The block in parts of the passed sizes, in a cycle."""
    parts, start, at = [], 0, 0
    while start < len(block.label):
        part = slice(start, start + sizes[at % len(sizes)])
        disc = None if block.disc is None else block.disc[part]
        parts.append(Block(block.gen[part], disc, block.label[part], block.status[part]))
        start, at = part.stop, at + 1
    return parts


def write(path: Path, spec: ShardSpec, block: Block, **options) -> Path:
    """Write in small chunks and shards, so that a few rows fill several files."""
    options = {"chunk_rows": 8, "shard_rows": 16} | options
    write_shards(path, spec, cut(block, 7, 13), make_index(spec.rows), **options)
    return path


def tree(path: Path) -> dict[str, bytes]:
    """File -> bytes of a folder."""
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def write_awkward_set(
    path: Path, rows: int = 60, views: int = 1, title: str = "synthetic", licence: str = "mit"
) -> tuple[Path, Block, list[str]]:
    """Writes a set with two interleaved splits, rows without tokens and keys that no file system would take."""
    rng = np.random.default_rng(1)
    spec = ShardSpec(rows, [{"name": f"v{v}"} for v in range(views)], (4, 4), 40, 300, title=title, licence=licence)
    status = (np.arange(rows) % 7 == 3).astype(np.uint8)
    gen, disc = (rng.integers(0, size, (rows, views, 16)).astype(np.uint16) for size in (40, 300))
    gen[status != 0] = disc[status != 0] = FILL
    block = Block(gen, disc, rng.integers(-1, 5, rows).astype(np.int32), status)
    keys = [f"{KEYS[row % len(KEYS)]}{row}" for row in range(rows)]
    splits = ["val" if row % 3 == 0 else "train" for row in range(rows)]
    index = pa.table({"key": keys, "split": splits, "label_name": ["x"] * rows, "reason": [""] * rows})
    centroids = rng.standard_normal((300, 4)).astype(np.float32)
    write_shards(path, spec, [block], index, centroids, chunk_rows=8, shard_rows=16)
    return path, block, keys


def good_rows(block: Block, split: str | None) -> np.ndarray:
    rows = np.arange(len(block.label))
    in_split = {"val": rows % 3 == 0, "train": rows % 3 != 0, None: rows >= 0}[split]
    return rows[in_split & (block.status == 0)]

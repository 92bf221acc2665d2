"""Random token sets and writing them, for the tests of the shard format."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from semdict.pipeline.shards import Block, ShardSpec, filler, write_shards


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

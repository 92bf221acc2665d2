"""Imports the JSONL of bytedance/1d-tokenizer (RAR), as its `pretokenization.py` writes it.

One line per view of an image: `{"class_id": 7, "tokens": [1, 2, ...]}`. If it ran with `--ten_crop`, the ten lines of
an image follow each other (four corners and centre, then their mirror images): give `--views 10`. Otherwise the images
of a batch are followed by their mirror images, and every line becomes an image of its own.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from semdict.pipeline.common.errors import ShardError, UsageError
from semdict.pipeline.common.files import sha256_file
from semdict.pipeline.shards.rows import RawRows, Source, square_grid

SUFFIXES = (".jsonl",)
IMPORT_OPTIONS = {"views": {"type": int, "metavar": "V", "help": "consecutive lines of one image (10 for ten crops)"}}
SIZES = {"gen": 1024}  # MaskGIT-VQGAN
BATCH = 1 << 12  # images read at a time


def read(path: str | Path, views: int = 1) -> Source:
    """Describe the file; ShardError if the lines are no multiple of `views`, or if the first is no such record."""
    path = Path(path)
    if views < 1:
        raise UsageError(f"--views {views}: an image has one view or more")
    with path.open("rb") as file:
        first = file.readline()
        lines = bool(first.strip()) + sum(1 for line in file if line.strip())
    if not lines or lines % views:
        raise ShardError(f"{path} has {lines} lines, expected a positive multiple of {views}")
    length = len(_record(path, 1, first)[1])
    names = ["imported"] if views == 1 else [f"{'ten-crop' if views == 10 else 'imported'}-{v}" for v in range(views)]
    return Source(
        path=str(path),
        rows=lines // views,
        views=[{"name": name} for name in names],
        grid=square_grid(length),
        names={"gen": "tokens", "label": "class_id"},
        default_sizes=SIZES,
        read=lambda: _rows(path, views, length),
        origin={"layout": "rar", "file": path.name, "sha256": sha256_file(path)},
    )


def _record(path: Path, number: int, line: bytes) -> tuple[int, np.ndarray]:
    """class_id and tokens (L,) of one line; ShardError names it if it is anything else."""
    try:
        record = json.loads(line)
        label, tokens = record["class_id"], np.array(record["tokens"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ShardError(f"{path}: line {number} is no record of class_id and tokens ({reason})") from None
    if not isinstance(label, int) or tokens.dtype.kind not in "iu" or not tokens.size:
        raise ShardError(f"{path}: line {number} holds a class_id or tokens that are no whole numbers")
    return label, tokens.reshape(-1)


def _rows(path: Path, views: int, length: int) -> Iterator[RawRows]:
    """Images in order; the lines of one image have one class."""
    gen, labels = [], []
    with path.open("rb") as file:
        for number, line in enumerate((line for line in file if line.strip()), 1):
            label, tokens = _record(path, number, line)
            if len(tokens) != length:
                raise ShardError(f"{path}: line {number} has {len(tokens)} tokens, the first line {length}")
            if len(gen) % views and label != labels[-1]:
                raise ShardError(f"{path}: line {number} has class_id {label}, its image {labels[-1]}: check --views")
            gen.append(tokens)
            labels.append(label)
            if len(gen) == BATCH * views:
                yield _batch(gen, labels, views)
                gen, labels = [], []
    if gen:
        yield _batch(gen, labels, views)


def _batch(gen: list[np.ndarray], labels: list[int], views: int) -> RawRows:
    return RawRows(np.stack(gen).reshape(-1, views, len(gen[0])), None, np.array(labels[::views]))

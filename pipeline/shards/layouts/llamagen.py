"""Imports the code folders of FoundationVision/LlamaGen: one .npy per image, as `extract_codes_c2i.py` writes them.

`{dataset}{size}_codes/{i}.npy` holds (1, V, L) integers of image i in the order of ImageFolder, and
`{dataset}{size}_labels/{i}.npy` its class (1,). V is 10 for ten crops (four corners and centre, then their mirror
images), 2 for an image and its mirror image. A run of several processes adds up to one file per process that repeats
the first images, which `--rows` leaves out.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from semdict.pipeline.common.errors import ShardError, UsageError, WeightsError
from semdict.pipeline.common.files import is_foreign
from semdict.pipeline.shards.rows import RawRows, Source, square_grid

SUFFIXES = ("/",)
IMPORT_OPTIONS = {"rows": {"type": int, "metavar": "N", "help": "images of the dataset; further files are left out"}}
SIZES = {"gen": 16384}
BATCH = 1 << 10  # images read at a time
VIEWS = {
    1: [{"name": "centre"}],
    2: [{"name": "centre"}, {"name": "flip"}],
    10: [{"name": f"ten-crop-{i}"} for i in range(10)],
}


def read(path: str | Path, rows: int | None = None) -> Source:
    """Describe the folders; `path` is the folder of codes, or the one that holds it.

    Raises ShardError naming the image whose file is missing, and UsageError if there is no folder of codes, or several.
    """
    codes = _codes_folder(Path(path))
    labels = codes.with_name(codes.name.removesuffix("_codes") + "_labels")
    if not labels.is_dir():
        raise UsageError(f"{codes} has no folder of labels beside it, expected {labels}")
    count = _count(codes, rows)
    if _count(labels, rows) != count:
        raise ShardError(f"{codes} has {count} files, {labels} has {_count(labels, rows)}")
    first = _load(codes / "0.npy")
    if first.ndim != 3 or len(first) != 1 or not first.size:
        raise ShardError(f"{codes}/0.npy is {first.shape}, expected (1, views, cells)")
    _, views, length = first.shape
    return Source(
        path=str(codes),
        rows=count,
        views=VIEWS.get(views) or [{"name": f"imported-{view}"} for view in range(views)],
        grid=square_grid(length),
        names={"gen": "codes", "label": "labels"},
        default_sizes=SIZES,
        read=lambda: _rows(codes, labels, count, (views, length)),
        origin={"layout": "llamagen", "codes": codes.name, "labels": labels.name, "files": count},
    )


def _codes_folder(path: Path) -> Path:
    if path.name.endswith("_codes"):
        return path
    folders = sorted(folder for folder in path.glob("*_codes") if folder.is_dir())
    if len(folders) != 1:
        names = ", ".join(folder.name for folder in folders) or "none"
        raise UsageError(f"{path} must hold one folder that ends in _codes, it holds {names}; name the folder of codes")
    return folders[0]


def _count(folder: Path, rows: int | None) -> int:
    """The number of files `0.npy`, `1.npy` and so on; ShardError for a gap and for a file of another name."""
    numbers = []
    for name in (entry.name for entry in folder.iterdir()):
        if re.fullmatch(r"\d+\.npy", name):
            numbers.append(int(name[:-4]))
        elif not is_foreign(name):
            raise ShardError(f"{folder}/{name} is not named by a number, as 0.npy; move it away")
    expected = len(numbers) if rows is None else rows
    missing = sorted(set(range(expected)) - set(numbers))[:1] or ([0] if not expected else [])
    if missing:
        raise ShardError(f"{folder}/{missing[0]}.npy is missing, the folder has {len(numbers)} files")
    return expected


def _load(path: Path, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """One small array of integers, of the shape if one is passed."""
    from semdict.pipeline.common.safeload import load_array

    try:
        values = load_array(path)
    except WeightsError as error:
        raise ShardError(str(error)) from None
    if values.dtype.kind not in "iu":
        raise ShardError(f"{path} is {values.dtype}, expected whole numbers")
    if shape is not None and values.shape != shape:
        raise ShardError(f"{path} is {values.shape}, expected {shape}")
    return values


def _rows(codes: Path, labels: Path, count: int, shape: tuple[int, int]) -> Iterator[RawRows]:
    for start in range(0, count, BATCH):
        stop = min(start + BATCH, count)
        gen, label = np.empty((stop - start, *shape), np.int64), np.empty(stop - start, np.int64)
        for row, number in enumerate(range(start, stop)):
            gen[row] = _load(codes / f"{number}.npy", (1, *shape))[0]
            label[row] = _load(labels / f"{number}.npy", (1,))[0]
        yield RawRows(gen, None, label)

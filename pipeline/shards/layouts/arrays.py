"""Imports plain arrays: a .npy of generative tokens with other columns in files of their own, or a .npz with all.

Tokens are (N, L), (N, H, W), (N, V, L) or (N, V, H, W) integers: N images, V views, a grid of H x W cells or L cells.
Labels are (N,) or (N, 1), and optional.
"""

import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from semdict.pipeline.common.errors import ShardError, UsageError
from semdict.pipeline.common.files import sha256_file
from semdict.pipeline.shards.rows import STEP, RawRows, Source, square_grid

SUFFIXES = (".npy", ".npz")
AXES = {2: "NL", 3: "NHW", 4: "NVHW"}  # meaning of the axes, by their number
IMPORT_OPTIONS = {
    "labels": {"type": Path, "metavar": "FILE.npy", "help": "(N,) class numbers (default: none)"},
    "disc": {"type": Path, "metavar": "FILE.npy", "help": "discriminative tokens, of the shape of FILE's"},
    "axes": {
        "choices": ("NL", "NHW", "NVL", "NVHW"),
        "help": "axes of the token arrays: images, views, cells L or H x W (default: NL, NHW or NVHW by their number)",
    },
}
# Names of the columns in a .npz, the first that is there.
COLUMNS = {
    "gen": ("gen", "tokens", "tokens_vqgan", "codes"),
    "disc": ("disc", "tokens_dino"),
    "label": ("label", "labels"),
}
SIZES = {"gen": 1024, "disc": 16384}


def read(
    path: str | Path, labels: str | Path | None = None, disc: str | Path | None = None, axes: str | None = None
) -> Source:
    """Describe the arrays; ShardError names the one that has another shape or type than expected."""
    path = Path(path)
    files = {"gen": path, "disc": disc, "label": labels}
    names, arrays, ignored = _npz(path) if path.suffix == ".npz" else ({}, {}, ())
    for name, file in files.items():
        if file is not None and not (name == "gen" and arrays):
            names[name], arrays[name] = Path(file).name, _npy(file)
    grid, views = _shape_tokens(path, arrays, names, axes)
    rows = len(arrays["gen"])
    arrays["label"] = _shape_labels(path, arrays.get("label"), rows)
    names.setdefault("label", "labels")
    return Source(
        path=str(path),
        rows=rows,
        views=[{"name": "imported" if views == 1 else f"imported-{view}"} for view in range(views)],
        grid=grid,
        names=names,
        default_sizes=SIZES,
        read=lambda: _rows(arrays),
        origin={
            name: {"file": Path(file).name, "sha256": sha256_file(file)}
            for name, file in files.items()
            if file is not None
        },
        ignored=ignored,
    )


def _npy(path: str | Path) -> np.ndarray:
    from semdict.pipeline.common.safeload import load_array

    return _require_integers(path, "it", load_array(path, mmap=True))


def _npz(path: Path) -> tuple[dict[str, str], dict[str, np.ndarray], tuple[str, ...]]:
    """Column -> its name in the file, column -> array, and the names that were not used."""
    from semdict.pipeline.common.safeload import check_npz_size

    try:
        check_npz_size(path)
        with np.load(path, allow_pickle=False) as content:
            names = {column: name for column, known in COLUMNS.items() for name in known[::-1] if name in content.files}
            if "gen" not in names:
                raise ShardError(f"{path} has the arrays {content.files}; expected one of {COLUMNS['gen']}")
            arrays = {column: _require_integers(path, name, content[name]) for column, name in names.items()}
            return names, arrays, tuple(sorted(set(content.files) - set(names.values())))
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, NotImplementedError) as error:
        raise ShardError(f"{path} is not a .npz of numbers and was not loaded: {str(error).splitlines()[0]}") from None


def _require_integers(path: str | Path, name: str, values: np.ndarray) -> np.ndarray:
    if values.dtype.kind not in "iu":
        raise ShardError(f"{path}: {name} is {values.dtype}, expected whole numbers")
    return values


def _shape_tokens(
    path: Path, arrays: dict[str, np.ndarray], names: dict[str, str], axes: str | None
) -> tuple[tuple[int, ...], int]:
    """Bring gen and disc to (N, V, L) in place; returns the grid and V."""
    shape = arrays["gen"].shape
    axes = axes or AXES.get(len(shape), "NL")
    if len(shape) != len(axes) or 0 in shape:
        raise ShardError(f"{path}: {names['gen']} is {shape}, expected axes {axes} with at least one token")
    if "disc" in arrays and arrays["disc"].shape != shape:
        raise ShardError(f"{path}: {names['disc']} is {arrays['disc'].shape}, {names['gen']} {shape}")
    views = shape[1] if "V" in axes else 1
    grid = shape[-2:] if axes.endswith("HW") else square_grid(shape[-1])
    for name in arrays.keys() & {"gen", "disc"}:
        arrays[name] = arrays[name].reshape(shape[0], views, -1)
    return grid, views


def _shape_labels(path: Path, label: np.ndarray | None, rows: int) -> np.ndarray:
    """(N,) labels, -1 if there are none."""
    if label is None:
        return np.full(rows, -1, np.int32)
    if label.shape not in ((rows,), (rows, 1)):
        raise UsageError(f"{path} has {rows} rows of tokens, the labels are {label.shape}")
    return label.reshape(rows)


def _rows(arrays: dict[str, np.ndarray]) -> Iterator[RawRows]:
    for start in range(0, len(arrays["gen"]), STEP):
        part = {name: np.asarray(values[start : start + STEP]) for name, values in arrays.items()}
        yield RawRows(part["gen"], part.get("disc"), part["label"])

"""The LEASE authors' .pt: integer tokens_vqgan (N, L), labels (N,) and optionally tokens_dino (N, L), read and written.

Keys and shapes are those that the README of ImaGonEs/LEASE lists.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from semdict.pipeline.common.errors import ShardError, UsageError
from semdict.pipeline.common.files import atomic_write, sha256_file
from semdict.pipeline.common.publish import check_output
from semdict.pipeline.shards.reader import TokenShards
from semdict.pipeline.shards.rows import STEP, RawRows, Source, square_grid

SUFFIXES = (".pt", ".pth")
KEYS = {"gen": "tokens_vqgan", "disc": "tokens_dino", "label": "labels"}
SIZES = {"gen": 1024, "disc": 16384}  # MAGE's VQGAN and DiGIT's k-means
EXPORT_OPTIONS = {
    "view": {"type": int, "help": "number of the view, for a set with several"},
    "dtype": {"choices": ("int16", "int32", "int64"), "help": "integer type (default: as imported, else int64)"},
}


def read(path: str | Path) -> Source:
    """Describe the file; ShardError names the key that is missing, of another shape, or not of whole numbers."""
    from semdict.pipeline.common.safeload import load_checkpoint

    content = load_checkpoint(path)
    arrays = {name: _array(path, content, key) for name, key in KEYS.items() if name != "disc" or key in content}
    _check_shapes(path, arrays)
    rows, length = arrays["gen"].shape
    return Source(
        path=str(path),
        rows=rows,
        views=[{"name": "imported"}],
        grid=square_grid(length),
        names={name: KEYS[name] for name in arrays},
        default_sizes=SIZES,
        read=lambda: _rows(arrays),
        origin={
            "file": Path(path).name,
            "sha256": sha256_file(path),
            "dtypes": {KEYS[name]: str(values.dtype) for name, values in arrays.items()},
        },
        ignored=tuple(sorted(map(str, content.keys() - KEYS.values()))),
    )


def _array(path: str | Path, content: dict[Any, Any], key: str) -> np.ndarray:
    """One entry of the file as an array of integers."""
    import torch

    value = content.get(key)
    if not isinstance(value, (torch.Tensor, np.ndarray)):
        raise ShardError(f"{path} has no tensor {key}; it has {sorted(map(str, content))}")
    value = value.numpy() if isinstance(value, torch.Tensor) else value
    if value.dtype.kind not in "iu":
        raise ShardError(f"{path}: {key} is {value.dtype}, expected whole numbers")
    return value


def _check_shapes(path: str | Path, arrays: dict[str, np.ndarray]) -> None:
    gen, label = arrays["gen"], arrays["label"]
    if gen.ndim != 2 or not len(gen):
        raise ShardError(f"{path}: tokens_vqgan is {gen.shape}, expected (N, L)")
    if label.shape != (len(gen),):
        raise ShardError(f"{path}: labels is {label.shape}, tokens_vqgan has {len(gen)} rows")
    if "disc" in arrays and arrays["disc"].shape != gen.shape:
        raise ShardError(f"{path}: tokens_dino is {arrays['disc'].shape}, tokens_vqgan {gen.shape}")


def _rows(arrays: dict[str, np.ndarray]) -> Iterator[RawRows]:
    for start in range(0, len(arrays["gen"]), STEP):
        part = {name: values[start : start + STEP] for name, values in arrays.items()}
        disc = part["disc"][:, None] if "disc" in part else None
        yield RawRows(part["gen"][:, None], disc, part["label"])


def export(
    shards: TokenShards, out: str | Path, split: str | None = None, view: int | None = None, dtype: str | None = None
) -> int:
    """Write the good rows of a split, or of all; returns the number of rows left out because of their status.

    A set that came from a .pt gets its integer types back and equals it tensor by tensor. The whole set is in memory.
    Raises UsageError if the integer type does not hold the ids, and if the set has several views and none is named.
    """
    import torch

    view = one_view(shards, view)
    imported = shards.recipe.get("imported", {}).get("dtypes", {})
    loaded = shards.load(split)
    tensors = {}
    for name, key in KEYS.items():
        values = getattr(loaded, name)
        if values is not None:
            target = getattr(torch, dtype or imported.get(key, "int64"))
            values = values if name == "label" else values[:, view]
            limits = torch.iinfo(target)
            if values.size and (values.max() > limits.max or values.min() < limits.min):
                raise UsageError(f"{key} reaches {values.max()}, more than {target} holds: choose a larger --dtype")
            tensors[key] = torch.from_numpy(np.ascontiguousarray(values)).to(target)
    with atomic_write(check_output(out, "tensors")) as staged, staged.open("wb") as file:
        torch.save(tensors, file)  # to a file object: a path would put its name into the bytes
    return loaded.left_out


def one_view(shards: TokenShards, view: int | None) -> int:
    """The only view, or the one asked for; UsageError if there are several and none is named."""
    names = [str(entry.get("name", number)) for number, entry in enumerate(shards.views)]
    if view is None and len(names) > 1:
        raise UsageError(f"{shards.path} has {len(names)} views, a .pt holds one: give --view 0..{len(names) - 1}")
    if view is not None and not 0 <= view < len(names):
        raise UsageError(f"--view {view}: {shards.path} has the views 0..{len(names) - 1} ({', '.join(names)})")
    return view or 0

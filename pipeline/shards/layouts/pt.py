"""The LEASE authors' .pt: integer tokens_vqgan (N, L), labels (N,) and optionally tokens_dino (N, L), read and written.

Keys and shapes are those that the README of ImaGonEs/LEASE lists. Read too are the older key `tokens`, labels (N, 1),
tokens (N, H, W), numpy arrays in place of tensors, and `class_embeddings` (C, E), which the shards keep.
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
OLD_GEN_KEY = "tokens"
EMBEDDINGS = "class_embeddings"
SIZES = {"gen": 1024, "disc": 16384}  # MAGE's VQGAN and DiGIT's k-means
EXPORT_OPTIONS = {
    "view": {"type": int, "help": "number of the view, for a set with several"},
    "dtype": {"choices": ("int16", "int32", "int64"), "help": "integer type (default: as imported, else int64)"},
}


def read(path: str | Path) -> Source:
    """Describe the file; ShardError names the key that is missing, of another shape, or not of whole numbers."""
    from semdict.pipeline.common.safeload import existing_file, load_checkpoint

    path = existing_file(path)
    content = load_checkpoint(path)
    names = dict(KEYS)
    if KEYS["gen"] not in content and OLD_GEN_KEY in content:
        names["gen"] = OLD_GEN_KEY
    names = {name: key for name, key in names.items() if name != "disc" or key in content}
    arrays = {name: _integers(path, content, key) for name, key in names.items()}
    dtypes = {KEYS[name]: str(values.dtype) for name, values in arrays.items()}
    grid = _check_shapes(path, arrays, names)
    return Source(
        path=str(path),
        rows=len(arrays["gen"]),
        views=[{"name": "imported"}],
        grid=grid,
        names=names,
        default_sizes=SIZES,
        read=lambda: _rows(arrays),
        origin={"file": path.name, "sha256": sha256_file(path), "dtypes": dtypes},
        ignored=tuple(sorted(map(str, content.keys() - {*names.values(), EMBEDDINGS}))),
        class_embeddings=_embeddings(path, content),
    )


def _integers(path: Path, content: dict[Any, Any], key: str) -> np.ndarray:
    """One entry of the file as an array of integers; labels (N, 1) as (N,)."""
    from semdict.pipeline.common.safeload import plain_array

    values = plain_array(content.get(key))
    if values is None:
        state = "is no plain tensor" if key in content else "is missing"
        raise ShardError(f"{path}: {key} {state}; the file has {sorted(map(str, content))}")
    if values.dtype.kind not in "iu":
        raise ShardError(f"{path}: {key} is {values.dtype}, expected whole numbers")
    return values[:, 0] if key == KEYS["label"] and values.ndim == 2 and values.shape[1] == 1 else values


def _check_shapes(path: Path, arrays: dict[str, np.ndarray], names: dict[str, str]) -> tuple[int, ...]:
    """The grid, after a check that all shapes agree."""
    gen, label = arrays["gen"], arrays["label"]
    if gen.ndim not in (2, 3) or not gen.size:
        raise ShardError(f"{path}: {names['gen']} is {gen.shape}, expected (N, L) or (N, H, W) with at least one token")
    if label.shape != (len(gen),):
        raise ShardError(f"{path}: {names['label']} is {label.shape}, {names['gen']} has {len(gen)} rows")
    if "disc" in arrays and arrays["disc"].shape != gen.shape:
        raise ShardError(f"{path}: {names['disc']} is {arrays['disc'].shape}, {names['gen']} {gen.shape}")
    return gen.shape[1:] if gen.ndim == 3 else square_grid(gen.shape[1])


def _embeddings(path: Path, content: dict[Any, Any]) -> np.ndarray | None:
    from semdict.pipeline.common.safeload import plain_array

    if EMBEDDINGS not in content:
        return None
    values = plain_array(content[EMBEDDINGS])
    if values is None or values.dtype.kind != "f" or values.ndim != 2:
        actual = type(content[EMBEDDINGS]).__name__ if values is None else f"{values.dtype} {values.shape}"
        raise ShardError(f"{path}: {EMBEDDINGS} is {actual}, expected floats (classes, width)")
    return values


def _rows(arrays: dict[str, np.ndarray]) -> Iterator[RawRows]:
    for start in range(0, len(arrays["gen"]), STEP):
        part = {name: values[start : start + STEP] for name, values in arrays.items()}
        ids = {name: part[name].reshape(len(part[name]), 1, -1) for name in part.keys() - {"label"}}
        yield RawRows(ids["gen"], ids.get("disc"), part["label"])


def export(
    shards: TokenShards, out: str | Path, split: str | None = None, view: int | None = None, dtype: str | None = None
) -> int:
    """Write the good rows of a split, or of all; returns the number of rows left out because they have no tokens.

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
    if shards.class_embeddings is not None:
        tensors[EMBEDDINGS] = torch.from_numpy(np.array(shards.class_embeddings))
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

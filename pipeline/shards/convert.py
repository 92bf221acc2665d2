"""Token shards from and to what others use: the authors' .pt, webdataset tars, a folder for the Hugging Face Hub."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from semdict.pipeline.common.errors import ShardError, UsageError
from semdict.pipeline.common.files import occupied, sha256_file, write_aside
from semdict.pipeline.shards import Block, ShardSpec, TokenShards, open_shards, write_shards

PT_KEYS = {"gen": "tokens_vqgan", "disc": "tokens_dino", "label": "labels"}
MAGE_CODES, DIGIT_WORDS = 1024, 16384  # codebook sizes of the published files, taken where a file's ids fit
STEP = 1 << 16  # rows converted at a time


@dataclass(frozen=True)
class Imported:
    """What `import_pt` took, for the command line to print."""

    rows: int
    gen_size: int
    disc_size: int | None
    ignored: tuple[str, ...]  # keys of the file that are no tokens


def import_pt(
    file: str | Path,
    out: str | Path,
    centroids: str | Path | None = None,
    *,
    gen_size: int | None = None,
    disc_size: int | None = None,
    split: str = "train",
    codec: str = "pcodec",
    overwrite: bool = False,
) -> Imported:
    """Shards from the published layout: integer tokens_vqgan (N, L), labels (N,), optional tokens_dino (N, L).

    Loaded as data only. The file has no image keys, so rows are named by number; its SHA-256 and integer types go into
    the recipe, and `export_pt` restores them. Codebook sizes: from `centroids` (K, D) .npy, else as given, else 1024
    and 16384 where the ids fit. ShardError names the key, row and position that is wrong.
    """
    from semdict.pipeline.common.safeload import load_array, load_checkpoint

    refuse_to_replace(out, overwrite)
    found = load_checkpoint(file)
    table = None if centroids is None else load_array(centroids)
    tensors = {name: _tensor(file, found, name) for name in PT_KEYS if name != "disc" or PT_KEYS["disc"] in found}
    _check_pt(file, tensors)
    if table is not None and "disc" not in tensors:
        raise ShardError(f"{file} has no {PT_KEYS['disc']}: the centroids {centroids} would belong to nothing")
    sizes = {"gen": gen_size or _guess(file, "gen", tensors["gen"], MAGE_CODES)}
    if "disc" in tensors:
        known = disc_size if table is None else len(table)
        sizes["disc"] = known or _guess(file, "disc", tensors["disc"], DIGIT_WORDS)
    rows, length = tensors["gen"].shape
    spec = ShardSpec(
        rows=rows,
        views=[{"name": "imported"}],
        grid=_grid(length),
        gen_sizes=sizes["gen"],
        disc_size=sizes.get("disc"),
        recipe={"imported": _origin(file, tensors, centroids)},
        title=Path(file).name,
        source=Path(file).name,
    )
    _refuse_outside(file, tensors, sizes)
    write_shards(out, spec, lambda: _pt_blocks(tensors), _numbered_index(rows, split), table, codec=codec)
    return Imported(rows, sizes["gen"], sizes.get("disc"), tuple(sorted(map(str, found.keys() - PT_KEYS.values()))))


def refuse_to_replace(out: str | Path, overwrite: bool) -> None:
    """UsageError where something stands at `out` that the user did not ask to replace."""
    if not overwrite and occupied(out):
        raise UsageError(f"{out} exists; choose another name, or give --overwrite to replace the whole of it")


def _tensor(file: str | Path, found: dict, name: str) -> np.ndarray:
    """One array of the file, an integer one."""
    import torch

    key = PT_KEYS[name]
    value = found.get(key)
    if not isinstance(value, (torch.Tensor, np.ndarray)):
        raise ShardError(f"{file} has no tensor {key}; it has {sorted(map(str, found))}")
    value = value.numpy() if isinstance(value, torch.Tensor) else value
    if value.dtype.kind not in "iu":
        raise ShardError(f"{file}: {key} is {value.dtype}, expected whole numbers")
    return value


def _check_pt(file: str | Path, tensors: dict) -> None:
    """Shapes agree with each other."""
    gen, label = tensors["gen"], tensors["label"]
    if gen.ndim != 2 or not len(gen):
        raise ShardError(f"{file}: tokens_vqgan is {tuple(gen.shape)}, expected (N, L)")
    if label.shape != (len(gen),):
        raise ShardError(f"{file}: labels is {tuple(label.shape)}, tokens_vqgan has {len(gen)} rows")
    if "disc" in tensors and tensors["disc"].shape != gen.shape:
        raise ShardError(f"{file}: tokens_dino is {tuple(tensors['disc'].shape)}, tokens_vqgan {tuple(gen.shape)}")
    if int(label.min()) < -1 or int(label.max()) >= 1 << 31:
        raise ShardError(f"{file}: labels reach from {int(label.min())} to {int(label.max())}, expected -1 or more")


def _guess(file: str | Path, name: str, ids: Any, size: int) -> int:
    top = int(ids.max())
    if top >= size:
        option = f"--{name}-size" + (" or --centroids" if name == "disc" else "")
        raise UsageError(f"{file}: {PT_KEYS[name]} reaches id {top}, more than the usual {size} codes: give {option}")
    return size


def _refuse_outside(file: str | Path, tensors: dict, sizes: dict[str, int]) -> None:
    """Before uint16 could wrap: every id within its codebook."""
    for name, size in sizes.items():
        ids = tensors[name]
        if int(ids.min()) < 0 or int(ids.max()) >= size:
            row, position = np.argwhere((ids < 0) | (ids >= size))[0]
            raise ShardError(
                f"{file}: {PT_KEYS[name]} row {row}, position {position} holds {ids[row, position]}, "
                f"the codebook has {size} entries"
            )


def _grid(length: int) -> tuple[int, ...]:
    side = math.isqrt(length)
    return (side, side) if side * side == length else (length,)


def _origin(file: str | Path, tensors: dict, centroids: str | Path | None) -> dict:
    origin: dict[str, Any] = {
        "file": Path(file).name,
        "sha256": sha256_file(file),
        "dtypes": {PT_KEYS[name]: str(value.dtype) for name, value in tensors.items()},
    }
    if centroids is not None:
        origin["centroids"] = {"file": Path(centroids).name, "sha256": sha256_file(centroids)}
    return origin


def _pt_blocks(tensors: dict):
    for start in range(0, len(tensors["gen"]), STEP):
        part = {name: value[start : start + STEP] for name, value in tensors.items()}
        n = len(part["label"])
        disc = part["disc"].astype(np.uint16)[:, None] if "disc" in part else None
        yield Block(part["gen"].astype(np.uint16)[:, None], disc, part["label"].astype(np.int32), np.zeros(n, np.uint8))


def _numbered_index(rows: int, split: str):
    """An index for rows that came without names, as a stream."""
    import pyarrow as pa

    text = pa.string()
    schema = pa.schema([("key", text), ("split", text), ("label_name", text), ("reason", text)])

    def batches():
        for start in range(0, rows, STEP):
            n = min(STEP, rows - start)
            keys = [f"{row:08d}" for row in range(start, start + n)]
            yield pa.record_batch([keys, [split] * n, [""] * n, [""] * n], schema=schema)

    return pa.RecordBatchReader.from_batches(schema, batches())


def export_pt(
    shards: TokenShards, out: str | Path, split: str | None = None, view: int | None = None, dtype: str | None = None
) -> int:
    """Write the authors' layout as one torch file; returns the number of rows left out because of their status.

    tokens_vqgan (n, L), labels (n,), tokens_dino (n, L) where there is one; a set that came from a .pt gets its integer
    types back and equals it tensor by tensor, else int64. The whole set is in memory.
    """
    import torch

    view = one_view(shards, view)
    origin = shards.recipe.get("imported", {}).get("dtypes", {})
    loaded = shards.load(split)
    tensors = {}
    for name, key in PT_KEYS.items():
        values = getattr(loaded, name)
        if values is not None:
            target = getattr(torch, dtype or origin.get(key, "int64"))
            values = values if name == "label" else values[:, view]
            limits = torch.iinfo(target)
            if values.size and (values.max() > limits.max or values.min() < limits.min):
                raise UsageError(f"{key} reaches {values.max()}, more than {target} holds: choose a larger --dtype")
            tensors[key] = torch.from_numpy(np.ascontiguousarray(values)).to(target)
    with write_aside(out) as aside, aside.open("wb") as file:
        torch.save(tensors, file)  # to a file object: a path would put its name into the bytes
    return loaded.left_out


def one_view(shards: TokenShards, view: int | None) -> int:
    """The only view, or the one asked for; UsageError where the choice is open."""
    names = [str(entry.get("name", number)) for number, entry in enumerate(shards.views)]
    if view is None and len(names) > 1:
        raise UsageError(f"{shards.path} has {len(names)} views, a .pt holds one: give --view 0..{len(names) - 1}")
    if view is not None and not 0 <= view < len(names):
        raise UsageError(f"--view {view}: {shards.path} has the views 0..{len(names) - 1} ({', '.join(names)})")
    return view or 0


def export(
    source: str | Path,
    out: str | Path,
    to: str,
    *,
    split: str | None = None,
    view: int | None = None,
    dtype: str | None = None,
    per_sample: bool = False,
    overwrite: bool = False,
) -> int:
    """Convert a shard directory to "pt" (a file), "webdataset" or "hf" (folders); returns the rows left out."""
    refuse_to_replace(out, overwrite)
    shards = open_shards(source)
    if to == "pt":
        return export_pt(shards, out, split, view, dtype)
    if view is not None or dtype is not None:
        raise UsageError(f"--view and --dtype belong to --to pt; {to} holds every view as uint16")
    if to == "webdataset":
        from semdict.pipeline.shards.export_webdataset import export_webdataset

        return export_webdataset(shards, out, split=split, per_sample=per_sample)
    if to == "hf":
        from semdict.pipeline.shards.export_hub import export_hub

        return export_hub(shards, out, split=split)
    raise UsageError(f"--to {to} is unknown: pt, webdataset or hf")


@dataclass
class Piece:
    """Good rows of one split: gen, disc (n, V, L) uint16, label (n,) int32, rows (n,) int64 manifest rows."""

    gen: np.ndarray
    disc: np.ndarray | None
    label: np.ndarray
    rows: np.ndarray


def pieces(shards: TokenShards, split: str, step: int) -> Iterator[Piece]:
    """The good rows of a split in order, `step` at a time (fewer in the last); memory: one shard."""
    chosen = shards.split_rows(split) & (shards.status[:] == 0)
    names = [name for name in ("gen", "disc") if getattr(shards, name) is not None]
    held: dict[str, np.ndarray] = {}
    for number in range(shards.layout.shards):
        where = shards.layout.shard(number)
        keep = np.flatnonzero(chosen[where])
        if not keep.size:
            continue
        new = {name: getattr(shards, name)[where][keep] for name in [*names, "label"]} | {"rows": keep + where.start}
        held = {name: np.concatenate([held[name], new[name]]) if held else new[name] for name in new}
        whole = len(held["rows"]) // step * step
        for start in range(0, whole, step):
            yield Piece(**{"disc": None} | {name: values[start : start + step] for name, values in held.items()})
        held = {name: values[whole:] for name, values in held.items()}
    if held and held["rows"].size:
        yield Piece(**{"disc": None} | held)


def splits_of(shards: TokenShards, split: str | None) -> list[str]:
    """The splits to export, in order of first appearance."""
    if split is not None:
        shards.split_rows(split)
        return [split]
    return [str(name) for name in shards.index["split"].unique().to_pylist()]

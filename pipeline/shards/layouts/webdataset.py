"""Webdataset tars of tokens. By default a sample is a block of rows: a member per image costs nine times its tokens.

Block sample `train-000007`: `gen.npy`, `disc.npy` (n, V, L) ids, `cls.npy` (n,) int32, `keys.json` n keys. With
per_sample one image: `gen.npy`, `disc.npy` (V, L) ids, `cls` as text, `json` with key, row and label name. Bytes
depend on the tokens only: members carry no time, owner or host name.
"""

import io
import json
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from semdict.pipeline.common.digests import seal_holds, sealed
from semdict.pipeline.common.errors import ShardError
from semdict.pipeline.common.files import write_json
from semdict.pipeline.common.publish import publish_folder
from semdict.pipeline.shards.reader import TokenShards
from semdict.pipeline.shards.rows import RawRows, RowBatch, Source, class_names, export_splits, row_batches, rows_of

if TYPE_CHECKING:
    import pyarrow as pa

SUFFIXES = ()
MARK = "dataset.json"  # file that shows a folder to be of this layout
BLOCK_ROWS = 1024  # rows of a block sample: the unit that a streaming loader shuffles
TAR_ROWS = 16384  # rows of a tar: the unit that workers and ranks share out
SAFE = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-/")
EXPORT_OPTIONS = {"per_sample": {"action": "store_true", "help": "one image per sample, not a block of rows"}}


def export(shards: TokenShards, out: str | Path, split: str | None = None, per_sample: bool = False) -> int:
    """Write `{split}-{number:06d}.tar` and `dataset.json` into folder `out`.

    Returns the number of rows left out because they have no tokens.
    """
    written = 0
    with publish_folder(out, "webdataset") as folder:
        tars: dict[str, list[str]] = {}
        blocks: dict[str, list[list[Any]]] = {}
        for name in export_splits(shards, split):
            tars[name] = []
            for number, batch in enumerate(row_batches(shards, name, TAR_ROWS)):
                tars[name].append(f"{percent(name, slash=False)}-{number:06d}.tar")
                with tarfile.open(folder / tars[name][-1], "w", format=tarfile.PAX_FORMAT) as tar:
                    if per_sample:
                        _write_images(tar, shards, batch)
                    else:
                        prefix, first = f"{percent(name, slash=False)}-", number * (TAR_ROWS // BLOCK_ROWS)
                        blocks[tars[name][-1]] = _write_blocks(tar, shards, batch, prefix, first)
                written += len(batch.rows)
        about = describe(shards, tars, per_sample)
        write_json(folder / MARK, sealed(about if per_sample else {**about, "blocks": blocks}))
    return rows_of(shards, split) - written


def describe(shards: TokenShards, tars: dict[str, list[str]], per_sample: bool) -> dict[str, Any]:
    """What a reader of the tars needs: shapes, codebooks, recipe, and the tars of each split."""
    kept = ("rows", "views", "grid", "codebooks", "recipe", "fingerprint", "title", "licence", "source")
    rows = 1 if per_sample else BLOCK_ROWS
    about = {key: shards.meta[key] for key in kept} | {"content_sha256": shards.content_sha256}
    about["classes"] = class_names(shards)
    return about | {"tars": tars, "rows_per_sample": rows, "rows_per_tar": TAR_ROWS}


def percent(key: str, slash: bool = True) -> str:
    """`key` as a sample name: webdataset cuts names at the first dot, so all but letters, digits, _ - / become %XX."""
    text = "".join(c if c in SAFE and (slash or c != "/") else "".join(f"%{b:02X}" for b in c.encode()) for c in key)
    return "%2F" + text[1:] if text.startswith("/") else text


def _write_blocks(
    tar: tarfile.TarFile, shards: TokenShards, batch: RowBatch, prefix: str, first: int
) -> list[list[Any]]:
    """Samples of up to BLOCK_ROWS rows, numbered from `first`; returns [name, rows, CRC-32 of its arrays] of each."""
    written = []
    keys = [str(key) for key in shards.index["key"].take(batch.rows).to_pylist()]
    for number, start in enumerate(range(0, len(keys), BLOCK_ROWS), first):
        part = slice(start, start + BLOCK_ROWS)
        checksum, base = 0, f"{prefix}{number:06d}"
        for suffix, ids in (("gen", batch.gen), ("disc", batch.disc), ("cls", batch.label)):
            if ids is not None:
                data = _npy(ids[part])
                checksum = zlib.crc32(data, checksum)
                _add(tar, f"{base}.{suffix}.npy", data)
        _add(tar, f"{base}.keys.json", json.dumps(keys[part], ensure_ascii=False).encode())
        written.append([base, len(keys[part]), checksum])
    return written


def _write_images(tar: tarfile.TarFile, shards: TokenShards, batch: RowBatch) -> None:
    """One sample per image, named by its key."""
    index = shards.index.select(["key", "label_name"]).take(batch.rows).to_pylist()
    for at, entry in enumerate(index):
        base = percent(str(entry["key"]))
        about = {"key": str(entry["key"]), "row": int(batch.rows[at]), "label_name": entry["label_name"]}
        _add(tar, f"{base}.gen.npy", _npy(batch.gen[at]))
        if batch.disc is not None:
            _add(tar, f"{base}.disc.npy", _npy(batch.disc[at]))
        _add(tar, f"{base}.cls", str(int(batch.label[at])).encode())
        _add(tar, f"{base}.json", json.dumps(about, ensure_ascii=False, sort_keys=True).encode())


def _npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(values), allow_pickle=False)
    return buffer.getvalue()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Append a member with no time, owner or host name in its header."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), 0o644
    tar.addfile(info, io.BytesIO(data))


def read(path: str | Path) -> Source:
    """Describe a folder of tars that was exported here; ShardError for a damaged one.

    Rows are those of the tars in the order of splits and files: rows without tokens were not exported.
    """
    folder = Path(path)
    try:
        meta = json.loads((folder / MARK).read_text())
        tars = {split: [folder / Path(name).name for name in names] for split, names in meta["tars"].items()}
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ShardError(f"{folder} is no folder of token tars: {error}") from None
    if not seal_holds(meta):
        raise ShardError(f"{folder / MARK} is damaged: its SHA-256 is not the one in it; export the set again")
    index = _read_index(tars, meta)
    return Source(
        path=str(path),
        rows=index.num_rows,
        views=meta["views"],
        grid=tuple(meta["grid"]),
        names={name: name for name in (*meta["codebooks"], "label")},
        default_sizes={},
        read=lambda: (rows for files in tars.values() for file in files for rows in _read_tar(file, meta)),
        origin={},
        meta=meta,
        index=lambda: index,
    )


def _members(file: Path) -> Iterator[dict[str, bytes]]:
    """Ending -> content of each sample of a tar; tarfile extracts nothing."""
    sample: dict[str, bytes] = {}
    base = None
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                name, _, ending = member.name.partition(".")
                if name != base and sample:
                    yield sample
                    sample = {}
                base = name
                content = tar.extractfile(member)
                if content is not None:
                    sample[ending] = content.read()
    except (OSError, tarfile.TarError) as error:
        raise ShardError(f"{file} is damaged: {error}") from None
    if sample:
        yield sample


def _read_tar(file: Path, meta: dict[str, Any]) -> Iterator[RawRows]:
    """The rows of a tar, a sample at a time."""
    shape = (-1, len(meta["views"]), int(np.prod(meta["grid"])))
    names = [name for name in ("gen", "disc") if name in meta["codebooks"]]
    for sample in _members(file):
        try:
            ids = {name: _load_npy(sample[f"{name}.npy"]).reshape(shape) for name in names}
            label = _load_npy(sample["cls.npy"]) if "cls.npy" in sample else np.array([int(sample["cls"])], np.int64)
        except (KeyError, ValueError, EOFError) as error:
            raise ShardError(f"{file}: a sample is damaged or lacks a member: {error}") from None
        yield RawRows(ids["gen"], ids.get("disc"), label)


def _load_npy(data: bytes) -> np.ndarray:
    return np.load(io.BytesIO(data), allow_pickle=False)


def _read_index(tars: dict[str, list[Path]], meta: dict[str, Any]) -> "pa.Table":
    """key, split, label_name and reason of every row, in the order of the tars."""
    import pyarrow as pa

    classes = meta.get("classes", [])
    columns: dict[str, list[str]] = {"key": [], "split": [], "label_name": [], "reason": []}
    for split, files in tars.items():
        for sample in (sample for file in files for sample in _members(file)):
            try:
                keys = json.loads(sample["keys.json"]) if "keys.json" in sample else [json.loads(sample["json"])["key"]]
                labels = _load_npy(sample["cls.npy"]).tolist() if "cls.npy" in sample else [int(sample["cls"])]
            except (KeyError, ValueError, TypeError, EOFError) as error:
                raise ShardError(f"a tar of split {split}: a sample is damaged or lacks a member: {error}") from None
            columns["key"] += keys
            columns["split"] += [split] * len(keys)
            columns["label_name"] += [classes[label] if 0 <= label < len(classes) else "" for label in labels]
            columns["reason"] += [""] * len(keys)
    return pa.table({name: pa.array(texts, pa.string()) for name, texts in columns.items()})

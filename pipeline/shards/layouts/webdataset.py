"""Webdataset tars of tokens. By default a sample is a block of rows: a member per image costs nine times its tokens.

Block sample `train-000007`: `gen.npy`, `disc.npy` (n, V, L) ids, `cls.npy` (n,) int32, `keys.json` n keys. With
per_sample one image: `gen.npy`, `disc.npy` (V, L) ids, `cls` as text, `json` with key, row and label name. Bytes
depend on the tokens only: members carry no time, owner or host name.
"""

import io
import json
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from semdict.pipeline.common.digests import sealed
from semdict.pipeline.common.files import write_json
from semdict.pipeline.common.publish import publish_folder
from semdict.pipeline.shards.reader import TokenShards
from semdict.pipeline.shards.rows import RowBatch, export_splits, row_batches, rows_of

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
        write_json(folder / "dataset.json", sealed(about if per_sample else {**about, "blocks": blocks}))
    return rows_of(shards, split) - written


def describe(shards: TokenShards, tars: dict[str, list[str]], per_sample: bool) -> dict[str, Any]:
    """What a reader of the tars needs: shapes, codebooks, recipe, and the tars of each split."""
    kept = ("rows", "views", "grid", "codebooks", "recipe", "fingerprint", "title", "licence", "source")
    rows = 1 if per_sample else BLOCK_ROWS
    about = {key: shards.meta[key] for key in kept} | {"content_sha256": shards.content_sha256}
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

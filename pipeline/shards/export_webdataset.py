"""Webdataset tars of tokens. By default a sample is a block of rows: a member per image costs nine times its tokens.

Block sample `train-000007`: `gen.npy`, `disc.npy` (n, V, L) uint16, `cls.npy` (n,) int32, `keys.json` n keys. With
per_sample one image: `gen.npy`, `disc.npy` (V, L) uint16, `cls` as text, `json` with key, row and label name. Bytes
depend on the tokens only: members carry no time, owner or host.
"""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from semdict.pipeline.common.files import publish_dir, write_json
from semdict.pipeline.shards import TokenShards
from semdict.pipeline.shards.convert import Piece, pieces, splits_of

BLOCK_ROWS = 1024  # rows of a block sample: the unit that a streaming loader shuffles
TAR_ROWS = 16384  # rows of a tar: the unit that workers and ranks share out
SAFE = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-/")


def export_webdataset(shards: TokenShards, out: str | Path, split: str | None = None, per_sample: bool = False) -> int:
    """Write `{split}-{number:06d}.tar` and `dataset.json` into folder `out`; returns the rows left out (bad status)."""
    written = 0
    with publish_dir(out) as folder:
        tars: dict[str, list[str]] = {}
        for name in splits_of(shards, split):
            tars[name] = []
            for number, piece in enumerate(pieces(shards, name, TAR_ROWS)):
                tars[name].append(f"{percent(name, slash=False)}-{number:06d}.tar")
                with tarfile.open(folder / tars[name][-1], "w", format=tarfile.USTAR_FORMAT) as tar:
                    _write_tar(tar, shards, name, number, piece, per_sample)
                written += len(piece.rows)
        write_json(folder / "dataset.json", describe(shards, tars, per_sample))
    chosen = len(shards) if split is None else int(shards.split_rows(split).sum())
    return chosen - written


def describe(shards: TokenShards, tars: dict[str, list[str]], per_sample: bool) -> dict[str, Any]:
    """What a reader of the tars needs: shapes, codebooks, recipe, and the tars of each split."""
    kept = ("rows", "views", "grid", "codebooks", "recipe", "fingerprint", "title", "licence", "source")
    rows = 1 if per_sample else BLOCK_ROWS
    return {key: shards.meta[key] for key in kept} | {"tars": tars, "rows_per_sample": rows, "rows_per_tar": TAR_ROWS}


def percent(key: str, slash: bool = True) -> str:
    """`key` as a sample name: webdataset cuts names at the first dot, so all but letters, digits, _ - / become %XX."""
    text = "".join(c if c in SAFE and (slash or c != "/") else "".join(f"%{b:02X}" for b in c.encode()) for c in key)
    return "%2F" + text[1:] if text.startswith("/") else text


def _write_tar(tar: tarfile.TarFile, shards: TokenShards, split: str, number: int, piece: Piece, single: bool) -> None:
    index = shards.index.select(["key", "label_name"]).take(piece.rows)
    keys = [str(key) for key in index["key"].to_pylist()]
    if single:
        names = index["label_name"].to_pylist()
        for at, key in enumerate(keys):
            _write_image(tar, piece, at, key, names[at])
        return
    for start in range(0, len(keys), BLOCK_ROWS):
        part = slice(start, start + BLOCK_ROWS)
        base = f"{percent(split, slash=False)}-{number * (TAR_ROWS // BLOCK_ROWS) + start // BLOCK_ROWS:06d}"
        _add(tar, f"{base}.gen.npy", _npy(piece.gen[part]))
        if piece.disc is not None:
            _add(tar, f"{base}.disc.npy", _npy(piece.disc[part]))
        _add(tar, f"{base}.cls.npy", _npy(piece.label[part]))
        _add(tar, f"{base}.keys.json", json.dumps(keys[part], ensure_ascii=False).encode())


def _write_image(tar: tarfile.TarFile, piece: Piece, at: int, key: str, label_name: str) -> None:
    base = percent(key)
    about = {"key": key, "row": int(piece.rows[at]), "label_name": label_name}
    _add(tar, f"{base}.gen.npy", _npy(piece.gen[at]))
    if piece.disc is not None:
        _add(tar, f"{base}.disc.npy", _npy(piece.disc[at]))
    _add(tar, f"{base}.cls", str(int(piece.label[at])).encode())
    _add(tar, f"{base}.json", json.dumps(about, ensure_ascii=False, sort_keys=True).encode())


def _npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(values), allow_pickle=False)
    return buffer.getvalue()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """A member whose header says nothing of when and by whom it was made."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), 0o644
    tar.addfile(info, io.BytesIO(data))

"""Find the images of a dataset, whatever its layout, in one deterministic order."""
# Paths are plain strings here: millions of them, no object for each.
# ruff: noqa: PTH112, PTH118, PTH122, PTH207, PTH208

import glob
import os
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa

from semdict.pipeline.common.errors import ManifestError
from semdict.pipeline.manifest.folders import LIST_THREADS, list_folder
from semdict.pipeline.manifest.listing import IMAGE_SUFFIXES, Found, merge_label_ids, refuse_duplicates, split_root
from semdict.pipeline.manifest.parquets import list_parquet
from semdict.pipeline.manifest.reader import Reader
from semdict.pipeline.manifest.tars import list_tar

__all__ = ["LAYOUTS", "Listing", "Reader", "list_images"]

LAYOUTS = ("auto", "classes", "flat", "webdataset", "parquet")


@dataclass(frozen=True)
class Listing:
    """All images of all splits in manifest order.

    `table`: key, split, source, label_name (string), label int32 (-1 none), offset, bytes (-1 = unknown until read),
    stamp_size, stamp_mtime (int64, of the file that holds the image). `classes[i]` names label i ("" = unused).
    """

    table: pa.Table
    layouts: dict[str, str]
    classes: list[str]
    ignored: Counter


def list_images(images: Mapping[str, str], layout: str = "auto") -> Listing:
    """List every split of `images` (name -> folder, file, or glob with * ? [] or {000..127}) and agree on labels.

    Rows: splits in the order given; within folders by key, within tars and parquet by file name and position, so that
    reading in row order is sequential. Keys are "split/path without suffix". ManifestError names what is in the way.
    """
    found = {split: _list_split(split, pattern, layout) for split, pattern in images.items()}
    ids = _agree_on_labels({split: part for split, (part, _) in found.items()}, images)
    columns: dict[str, list] = {name: [] for name in _SCHEMA.names}
    ignored: Counter = Counter()
    for split, (part, _) in found.items():
        columns["key"] += [f"{split}/{key}" for key in part.keys]
        columns["split"] += [split] * len(part.keys)
        columns["label"] += [-1 if name is None else ids[name] for name in part.labels]
        columns["label_name"] += [name or "" for name in part.labels]
        for name, values in zip(("source", "offset", "bytes"), (part.sources, part.offsets, part.sizes), strict=True):
            columns[name] += values
        columns["stamp_size"] += part.stamp_sizes
        columns["stamp_mtime"] += part.stamp_mtimes
        ignored.update(part.ignored)
    refuse_duplicates(columns["key"], columns["source"], "rename one of the splits or folders")
    table = pa.table({name: pa.array(columns.pop(name), _SCHEMA.field(name).type) for name in _SCHEMA.names})
    return Listing(table, {split: kind for split, (_, kind) in found.items()}, _class_list(ids), ignored)


_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("label", pa.int32()),
        ("label_name", pa.string()),
        ("split", pa.string()),
        ("source", pa.string()),
        ("offset", pa.int64()),
        ("bytes", pa.int64()),
        ("stamp_size", pa.int64()),
        ("stamp_mtime", pa.int64()),
    ]
)


def _list_split(split: str, pattern: str, layout: str) -> tuple[Found, str]:
    """Rows and layout of one split; ManifestError when there is nothing."""
    files, kind = _resolve(split, pattern, layout)
    root = split_root(pattern)
    if kind in ("classes", "flat"):
        found = list_folder(root, classes=kind == "classes")
    elif kind == "webdataset":
        found = _list_tars(root, files)
    else:
        found = _list_parquets(root, files)
    if not found.keys:
        seen = ", ".join(f"{count} {suffix}" for suffix, count in sorted(found.ignored.items())) or "nothing"
        raise ManifestError(f"split {split}: no images in {pattern} (found {seen})")
    return found, kind


def _resolve(split: str, pattern: str, layout: str) -> tuple[list[str], str]:
    """(files relative to the root, layout); files only for tars and parquet."""
    if layout not in LAYOUTS:
        raise ManifestError(f"layout {layout!r} is unknown; known: {', '.join(LAYOUTS)}")
    if os.path.isdir(pattern):
        names = _names(pattern)
        kind = _guess(pattern, names) if layout == "auto" else layout
        suffix = {"webdataset": ".tar", "parquet": ".parquet"}.get(kind)
        files = [name for name in names if suffix and name.endswith(suffix)]
        if suffix and not files:
            raise ManifestError(f"split {split}: no {suffix} file in {pattern}")
        return files, kind
    paths = _expand(pattern)
    if not paths:
        raise ManifestError(
            f"split {split}: {pattern} does not exist; set manifest.images.{split} to a folder or files"
        )
    suffixes = {os.path.splitext(path)[1] for path in paths}
    kind = {".tar": "webdataset", ".parquet": "parquet"}.get(min(suffixes)) if len(suffixes) == 1 else None
    if kind is None or layout not in ("auto", kind):
        raise ManifestError(f"split {split}: {pattern} gives files {sorted(suffixes)}, not what layout {layout} reads")
    return sorted(os.path.relpath(path, split_root(pattern)) for path in paths), kind


def _expand(pattern: str) -> list[str]:
    """Files of a glob or brace pattern; ManifestError for a braced name that is missing (a glob cannot miss one)."""
    if "{" not in pattern:
        return glob.glob(pattern, recursive=True)
    from braceexpand import braceexpand

    paths: list[str] = []
    for name in braceexpand(pattern):
        hits = glob.glob(name)
        if not hits:
            raise ManifestError(f"{name} does not exist, but {pattern} asks for it")
        paths += hits
    return sorted(set(paths))


def _guess(folder: str, names: list[str]) -> str:
    """Layout of a folder by what lies at its top: tars, parquet, images (flat), else class folders."""
    visible = [name for name in names if not name.startswith(".")]
    suffixes = {os.path.splitext(name)[1].lower() for name in visible}
    if suffixes & IMAGE_SUFFIXES:
        return "flat"
    for suffix, kind in ((".tar", "webdataset"), (".parquet", "parquet")):
        if suffix in suffixes:
            return kind
    has_folders = any(os.path.isdir(os.path.join(folder, name)) for name in visible)
    return "classes" if has_folders else "flat"


def _names(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise ManifestError(f"{folder}: folder cannot be read: {error.strerror}") from None


def _list_tars(root: str, files: list[str]) -> Found:
    found = Found()
    with ThreadPoolExecutor(LIST_THREADS) as pool:
        for source, part in zip(files, pool.map(lambda source: list_tar(root, source), files), strict=True):
            found.extend(part, os.path.join(root, source))
    refuse_duplicates(found.keys, found.sources, "samples of different tars must not share a name")
    return found


def _list_parquets(root: str, files: list[str]) -> Found:
    """Keys are the rows' own paths where every row has one and all differ; otherwise file name and row number."""
    found, paths = Found(), []
    with ThreadPoolExecutor(LIST_THREADS) as pool:
        results = pool.map(lambda source: list_parquet(root, source), files)
        for source, (part, names) in zip(files, results, strict=True):
            found.extend(part, os.path.join(root, source))
            paths += names
    if all(paths):
        keys = [os.path.splitext(path)[0] for path in paths]
        if len(set(keys)) == len(keys):
            found.keys = keys
    return found


def _agree_on_labels(parts: dict[str, Found], images: Mapping[str, str]) -> dict[str, int]:
    """Class name -> id: the numbers that the data brings, else the rank of the name among all splits' names."""
    ids: dict[str, int] = {}
    for split, part in parts.items():
        merge_label_ids(ids, part.label_ids, f"split {split} ({images[split]})")
    names = {split: {name for name in part.labels if name is not None} for split, part in parts.items()}
    if not ids:
        return {name: i for i, name in enumerate(sorted(set().union(*names.values())))}
    for split, used in names.items():
        if unknown := sorted(used - ids.keys()):
            raise ManifestError(f"split {split}: class {unknown[0]!r} has no number, others have; labels must agree")
    return ids


def _class_list(ids: dict[str, int]) -> list[str]:
    """Name of every label id; numbers nobody uses stay empty."""
    if ids and max(ids.values()) > 10_000_000:
        raise ManifestError(f"label {max(ids.values())} is too large for a class number")
    classes = [""] * (max(ids.values(), default=-1) + 1)
    for name, number in ids.items():
        classes[number] = name
    return classes

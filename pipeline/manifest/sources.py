"""Find the images of a dataset, whatever its layout, in one deterministic order."""
# Paths are plain strings here: millions of them, no object for each.
# ruff: noqa: PTH112, PTH118, PTH122, PTH207, PTH208

import glob
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa

from semdict.pipeline.common.errors import ManifestError
from semdict.pipeline.common.files import is_foreign
from semdict.pipeline.images.decode import SUFFIXES
from semdict.pipeline.manifest.folders import LIST_THREADS, list_folder
from semdict.pipeline.manifest.listing import Ignored, ImageList, merge_label_ids, refuse_duplicates, split_root
from semdict.pipeline.manifest.parquets import list_parquet
from semdict.pipeline.manifest.shares import assign, shared_splits
from semdict.pipeline.manifest.tars import list_tar

LAYOUTS = ("auto", "classes", "flat", "webdataset", "parquet")


@dataclass(frozen=True)
class Listing:
    """All images of all splits in manifest order.

    `table`: key, split, source, label_name (string), label int32 (-1 none), offset, bytes (-1 = unknown until read),
    stamp_size, stamp_mtime, stamp_ctime (int64, of the file that holds the image). `classes[i]` names label i ("" =
    unused). `notes`: what was left out, one line per split and kind of thing.
    """

    table: pa.Table
    layouts: dict[str, str]
    classes: list[str]
    ignored: Ignored
    notes: list[str]


SCHEMA = pa.schema(
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
        ("stamp_ctime", pa.int64()),
    ]
)


def list_images(
    images: Mapping[str, str],
    layout: str = "auto",
    label_key: str | None = None,
    shares: Mapping[str, float] | None = None,
) -> Listing:
    """List every split of `images` (name -> folder, file, or glob with * ? [] or {000..127}) and agree on labels.

    Rows: splits in the order of `images`; within folders by key, within tars and parquet by file name and position, so
    that reading in row order is sequential. Keys are "split/path without suffix". `label_key`: the parquet column or
    the key of tar members' .json that holds labels. `shares`: for splits of one folder, the share of its images that
    each takes (`shares.assign`). ManifestError names what is in the way.
    """
    splits = {split: _list_split(split, pattern, layout, label_key) for split, pattern in images.items()}
    for group in shared_splits(images, shares or {}):
        images_of_folder = splits[next(iter(group))][0]
        assigned = assign(images_of_folder.keys, images_of_folder.labels, group)
        for number, split in enumerate(group):
            splits[split][0].keep([row for row, owner in enumerate(assigned) if owner == number])
            if not splits[split][0].keys:
                raise ManifestError(f"split {split}: its share of {images[split]} (manifest.shares) is no image")
    ids = _agree_on_labels({split: part for split, (part, _) in splits.items()}, images)
    columns: dict[str, list] = {name: [] for name in SCHEMA.names}
    ignored, notes = Ignored(), []
    for split, (part, _) in splits.items():
        columns["key"] += [f"{split}/{key}" for key in part.keys]
        columns["split"] += [split] * len(part.keys)
        columns["label"] += [-1 if name is None else ids[name] for name in part.labels]
        columns["label_name"] += [name or "" for name in part.labels]
        for name, values in zip(("source", "offset", "bytes"), (part.sources, part.offsets, part.sizes), strict=True):
            columns[name] += values
        for name, values in zip(SCHEMA.names[-3:], zip(*part.stamps, strict=True), strict=True):
            columns[name] += values
        ignored.update(part.ignored)
        notes += _notes(split, part)
    refuse_duplicates(columns["key"], columns["source"], "rename one of the splits or folders")
    table = pa.table({name: pa.array(columns.pop(name), SCHEMA.field(name).type) for name in SCHEMA.names})
    return Listing(table, {split: kind for split, (_, kind) in splits.items()}, _class_list(ids), ignored, notes)


def _notes(split: str, images: ImageList) -> list[str]:
    """What a user should know of a split: files that are not taken for images, labels that are not read."""
    notes = []
    if images.ignored.counts:
        notes.append(f"split {split}: not taken for images: {images.ignored}")
    if images.label_candidates and not any(label is not None for label in images.labels):
        candidates = ", ".join(sorted(images.label_candidates)[:8])
        notes.append(f"split {split}: no labels read; candidates for manifest.label_key: {candidates}")
    return notes


def _list_split(split: str, pattern: str, layout: str, label_key: str | None) -> tuple[ImageList, str]:
    """Rows and layout of one split; ManifestError when there is nothing."""
    files, kind = _resolve(split, pattern, layout)
    root = split_root(pattern)
    if kind in ("classes", "flat"):
        images = list_folder(root, classes=kind == "classes")
    elif kind == "webdataset":
        images = _list_tars(root, files, label_key)
    else:
        images = _list_parquets(root, files, label_key)
    if not images.keys:
        raise ManifestError(f"split {split}: no images in {pattern} (but {images.ignored or 'nothing'})")
    if kind == "webdataset" and label_key is not None and not any(label is not None for label in images.labels):
        others = ", ".join(sorted(images.label_candidates)) or "none"
        raise ManifestError(
            f"split {split}: no sample's .json in {pattern} has a key {label_key!r} (manifest.label_key); "
            f"keys that look like labels: {others}"
        )
    return images, kind


def _resolve(split: str, pattern: str, layout: str) -> tuple[list[str], str]:
    """(files relative to the root, layout); files only for tars and parquet."""
    if layout not in LAYOUTS:
        raise ManifestError(f"layout {layout!r} is unknown; known: {', '.join(LAYOUTS)}")
    if os.path.isdir(pattern):
        names = _names(pattern)
        kind = _guess(pattern, names) if layout == "auto" else layout
        suffix = {"webdataset": ".tar", "parquet": ".parquet"}.get(kind)
        files = [name for name in names if suffix and name.endswith(suffix) and not is_foreign(name)]
        if suffix and not files:
            raise ManifestError(f"split {split}: no {suffix} file in {pattern}")
        return files, kind
    paths = [path for path in _expand(pattern) if not is_foreign(os.path.split(path)[1])]
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
    visible = [name for name in names if not name.startswith(".") and not is_foreign(name)]
    suffixes = {os.path.splitext(name)[1].lower() for name in visible}
    if suffixes & SUFFIXES:
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


def _list_tars(root: str, files: list[str], label_key: str | None) -> ImageList:
    images = ImageList()
    with ThreadPoolExecutor(LIST_THREADS) as pool:
        parts = pool.map(lambda source: list_tar(root, source, label_key), files)
        for source, part in zip(files, parts, strict=True):
            images.extend(part, os.path.join(root, source))
    refuse_duplicates(images.keys, images.sources, "samples of different tars must not share a name")
    return images


def _list_parquets(root: str, files: list[str], label_key: str | None) -> ImageList:
    """Keys are the rows' own paths where every row has one and all differ; otherwise file name and row number."""
    images, paths = ImageList(), []
    with ThreadPoolExecutor(LIST_THREADS) as pool:
        results = pool.map(lambda source: list_parquet(root, source, label_key), files)
        for source, (part, names) in zip(files, results, strict=True):
            images.extend(part, os.path.join(root, source))
            paths += names
    if all(paths):
        keys = [os.path.splitext(path)[0] for path in paths]
        if len(set(keys)) == len(keys):
            images.keys = keys
    return images


def _agree_on_labels(parts: dict[str, ImageList], images: Mapping[str, str]) -> dict[str, int]:
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
    classes = [""] * (max(ids.values(), default=-1) + 1)
    for name, number in ids.items():
        classes[number] = name
    return classes

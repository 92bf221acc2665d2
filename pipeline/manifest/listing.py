"""What listing an image store yields, whatever its layout, and the rules that all layouts share."""
# Paths are plain strings here: millions of them, no object for each.
# ruff: noqa: PTH112, PTH116, PTH120

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from semdict.pipeline.common.errors import ManifestError

# torchvision's ImageFolder list, and GIF: a still GIF decodes, an animated one is named rather than overlooked
IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif"))


@dataclass
class Found:
    """Images of one split as columns of equal length, in their final order.

    `stamp_sizes` (bytes) and `stamp_mtimes` (ns) are those of the file that holds the image, which tell whether it has
    changed; `sizes` is the image's own byte count, -1 where only reading it would tell (parquet).
    """

    keys: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)  # relative to the split's root folder
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    stamp_sizes: list[int] = field(default_factory=list)
    stamp_mtimes: list[int] = field(default_factory=list)
    labels: list[str | None] = field(default_factory=list)  # class names, None = no label
    label_ids: dict[str, int] = field(default_factory=dict)  # class numbers that the data brings along
    ignored: Counter = field(default_factory=Counter)  # suffix -> files that are not taken for images

    def add(self, key: str, source: str, offset: int, size: int, stamp: tuple[int, int], label: str | None) -> None:
        """Append one image; `stamp` is (bytes, mtime in ns) of the file that holds it."""
        self.keys.append(key)
        self.sources.append(source)
        self.offsets.append(offset)
        self.sizes.append(size)
        self.stamp_sizes.append(stamp[0])
        self.stamp_mtimes.append(stamp[1])
        self.labels.append(label)

    def extend(self, other: "Found", where: str) -> None:
        """Append another listing of the same split; ManifestError where the two number their classes differently."""
        for name in ("keys", "sources", "offsets", "sizes", "stamp_sizes", "stamp_mtimes", "labels"):
            getattr(self, name).extend(getattr(other, name))
        merge_label_ids(self.label_ids, other.label_ids, where)
        self.ignored.update(other.ignored)

    def sort(self) -> None:
        """Rows by key; code point order is the byte order of UTF-8, no locale is involved."""
        order = np.array(sorted(range(len(self.keys)), key=self.keys.__getitem__), np.int64)
        for name in ("keys", "sources", "offsets", "sizes", "stamp_sizes", "stamp_mtimes", "labels"):
            column = getattr(self, name)
            setattr(self, name, [column[i] for i in order])


def merge_label_ids(known: dict[str, int], new: dict[str, int], where: str) -> None:
    """Add class numbers to `known`; ManifestError when a name has two numbers or a number two names."""
    names = {number: name for name, number in known.items()}
    for name, number in new.items():
        if known.get(name, number) != number or names.get(number, name) != name:
            other = f"{name!r} = {known[name]}" if name in known else f"{names[number]!r} = {number}"
            raise ManifestError(
                f"{where}: class {name!r} = {number}, but {other} in what was read before; labels must agree"
            )
        known[name] = number
        names[number] = name


def label_name(value: object, where: str, label_ids: dict[str, int]) -> str | None:
    """A label value as a class name; whole numbers name themselves and keep their number, below zero is no label."""
    if value is None or value == "":
        return None
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int):
        raise ManifestError(f"{where}: label {value!r} is neither a whole number nor a name")
    if value < 0:
        return None
    label_ids[str(value)] = value
    return str(value)


def refuse_duplicates(keys: Sequence[str], sources: Sequence[str], hint: str) -> None:
    """ManifestError naming the first key that occurs twice and both places."""
    if len(set(keys)) == len(keys):
        return
    first: dict[str, str] = {}
    for key, source in zip(keys, sources, strict=True):
        if key in first:
            raise ManifestError(f"key {key!r} occurs twice: {first[key]} and {source}; {hint}")
        first[key] = source


def stamp_of(path: str) -> tuple[int, int]:
    """(bytes, mtime in ns) of a file; ManifestError when it cannot be looked at."""
    try:
        found = os.stat(path)
    except OSError as error:
        raise ManifestError(f"{path}: {error.strerror}") from None
    return found.st_size, found.st_mtime_ns


def split_root(pattern: str) -> str:
    """The folder that a split's sources are relative to: the pattern's longest part without wildcards."""
    if os.path.isdir(pattern):
        return pattern
    head = os.path.dirname(pattern)
    while any(mark in head for mark in "*?[{"):
        head = os.path.dirname(head)
    return head or "."

"""What listing an image store yields, whatever its layout, and the rules that all layouts share."""
# Paths are plain strings here: millions of them, no object for each.
# ruff: noqa: PTH112, PTH116, PTH120

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from semdict.pipeline.common.errors import ManifestError

# DVC restores an older manifest from its run cache unless the stage is forced; --fresh forgets what was read before.
REFRESH = "run `semdict manifest --fresh`, then `dvc repro -f manifest`"
MAX_CLASS = 10_000_000  # larger class numbers are no classes: the list of class names would not fit into memory
LABEL_WORDS = ("label", "class", "cls", "categ", "target")  # in the names of columns that probably hold labels

Stamp = tuple[int, int, int]  # bytes, mtime and ctime (ns) of a file: equal stamps mean an unchanged file


@dataclass
class Ignored:
    """Files that are not taken for images: how many of each kind (mostly a suffix), and one example of it."""

    counts: Counter = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, kind: str, example: str) -> None:
        """Count one file."""
        self.counts[kind] += 1
        self.examples.setdefault(kind, example)

    def update(self, other: "Ignored") -> None:
        """Add the counts of another listing."""
        self.counts.update(other.counts)
        self.examples = {**other.examples, **self.examples}

    def __str__(self) -> str:
        return ", ".join(f"{count} {kind} ({self.examples[kind]})" for kind, count in sorted(self.counts.items()))


COLUMNS = ("keys", "sources", "offsets", "sizes", "stamps", "labels")


@dataclass
class ImageList:
    """Images of one split as columns of equal length, in their final order.

    `stamps` are those of the files that hold the images, which tell whether a file has changed; `sizes` are the images'
    own byte counts, -1 where only reading the image would tell (parquet).
    """

    keys: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)  # relative to the split's root folder
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    stamps: list[Stamp] = field(default_factory=list)
    labels: list[str | None] = field(default_factory=list)  # class names, None = no label
    label_ids: dict[str, int] = field(default_factory=dict)  # class numbers that the data brings along
    label_candidates: set[str] = field(default_factory=set)  # columns or keys that look like labels and are not read
    ignored: Ignored = field(default_factory=Ignored)

    def add(self, key: str, source: str, offset: int, size: int, stamp: Stamp, label: str | None) -> None:
        """Append one image; `stamp` is that of the file that holds it."""
        self.keys.append(key)
        self.sources.append(source)
        self.offsets.append(offset)
        self.sizes.append(size)
        self.stamps.append(stamp)
        self.labels.append(label)

    def extend(self, other: "ImageList", where: str) -> None:
        """Append another listing of the same split; ManifestError where the two number their classes differently."""
        for name in COLUMNS:
            getattr(self, name).extend(getattr(other, name))
        merge_label_ids(self.label_ids, other.label_ids, where)
        self.label_candidates |= other.label_candidates
        self.ignored.update(other.ignored)

    def sort(self) -> None:
        """Rows by key; code point order is the byte order of UTF-8, no locale is involved."""
        self.keep(np.array(sorted(range(len(self.keys)), key=self.keys.__getitem__), np.int64))

    def keep(self, rows: Sequence[int] | np.ndarray) -> None:
        """These rows alone, in this order."""
        for name in COLUMNS:
            column = getattr(self, name)
            setattr(self, name, [column[i] for i in rows])


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
        return valid_text(value, where)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ManifestError(f"{where}: label {str(value)[:80]!r} is neither a whole number nor a name")
    if value < 0:
        return None
    if value > MAX_CLASS:
        raise ManifestError(f"{where}: label {value} is too large for a class number (at most {MAX_CLASS:,})")
    label_ids[str(value)] = value
    return str(value)


def looks_like_label(name: str) -> bool:
    """Whether a column or key of this name probably holds labels."""
    return any(word in name.lower() for word in LABEL_WORDS)


def valid_text(text: str, where: str) -> str:
    """The text; ManifestError where it holds half a surrogate pair, which UTF-8 cannot store."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ManifestError(f"{where}: {text!r} is not valid Unicode text") from None
    return text


def refuse_duplicates(keys: Sequence[str], sources: Sequence[str], hint: str) -> None:
    """ManifestError naming the first key that occurs twice and both places."""
    if len(set(keys)) == len(keys):
        return
    first: dict[str, str] = {}
    for key, source in zip(keys, sources, strict=True):
        if key in first:
            raise ManifestError(f"key {key!r} occurs twice: {first[key]} and {source}; {hint}")
        first[key] = source


def stamp_of(path: str) -> Stamp:
    """Stamp of a file; ManifestError when it cannot be looked at."""
    try:
        return make_stamp(os.stat(path))
    except OSError as error:
        raise ManifestError(f"{path}: {error.strerror}") from None


def make_stamp(status: os.stat_result) -> Stamp:
    """The change time is part of a stamp: it moves on every write, also where a tool sets the time of the old file."""
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def split_root(pattern: str) -> str:
    """The folder that a split's sources are relative to: the pattern's longest part without wildcards."""
    if os.path.isdir(pattern):
        return pattern
    head = os.path.dirname(pattern)
    while any(mark in head for mark in "*?[{"):
        head = os.path.dirname(head)
    return head or "."

"""Looks at a folder of images: which splits, layout, counts and classes it holds."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from semdict.pipeline.common.errors import ManifestError, UsageError
from semdict.pipeline.common.files import is_foreign
from semdict.pipeline.manifest.sources import Listing, list_images

# Beginnings of names that published sets give their splits -> our name of the split.
SPLIT_WORDS = {
    "training": "train",
    "train": "train",
    "validation": "val",
    "valid": "val",
    "val": "val",
    "testing": "test",
    "test": "test",
}
PACKED = (".tar", ".parquet")
HELD_OUT = {"train": 0.9, "val": 0.1}  # shares of a folder without splits


@dataclass(frozen=True)
class Images:
    """What `manifest` will read: section `manifest` of a preset, and what a listing of it holds."""

    images: dict[str, str]  # split -> folder or pattern
    shares: dict[str, float]
    label_key: str | None
    listing: Listing

    @property
    def counts(self) -> dict[str, int]:
        """Images per split."""
        counts = Counter(self.listing.table["split"].to_pylist())
        return {split: counts[split] for split in self.images}

    @property
    def classes(self) -> int:
        """Classes that have images; 0 = no labels."""
        return sum(1 for name in self.listing.classes if name)

    @property
    def fewest(self) -> int:
        """Training images of the smallest class that has any."""
        columns = (self.listing.table[name].to_pylist() for name in ("split", "label"))
        counts = Counter(label for split, label in zip(*columns, strict=True) if split == "train" and label >= 0)
        return min(counts.values(), default=0)

    def describe(self) -> str:
        """One line: `9,469 train + 3,925 val images, 10 classes, webdataset tars`."""
        counts = " + ".join(f"{count:,} {split}" for split, count in self.counts.items())
        classes = f"{self.classes} classes" if self.classes else "no labels"
        layouts = {"webdataset": "tars", "classes": "class folders", "flat": "image files", "parquet": "parquet"}
        kinds = sorted({layouts[kind] for kind in self.listing.layouts.values()})
        return f"{counts} images, {classes}, {' and '.join(kinds)}"


def look_at(where: list[str], label_key: str | None = None, layout: str = "auto") -> Images:
    """Find the splits of `where` and list their images.

    `where`: one folder or pattern, in which splits are recognised by name, or several SPLIT=PATH. A folder without
    splits is divided by HELD_OUT. UsageError for a path that is not there, ManifestError for images that cannot be
    listed.
    """
    images, shares = named_splits(where), {}
    if images is None:
        images = find_splits(where[0])
        if set(images) == {"all"}:
            images, shares = dict.fromkeys(HELD_OUT, images["all"]), HELD_OUT
    try:
        listing = list_images(images, layout, label_key, shares)
    except ManifestError as error:
        raise UsageError(f"{error}. docs/start.md describes the layouts that can be read") from None
    return Images(images, shares, label_key, listing)


def named_splits(where: list[str]) -> dict[str, str] | None:
    """{split: path} from SPLIT=PATH arguments; None for one plain path."""
    if len(where) == 1 and ("=" not in where[0] or Path(where[0]).exists()):
        return None
    pairs = [text.partition("=") for text in where]
    if any(not (name and equals and path) for name, equals, path in pairs):
        raise UsageError("several --images must read SPLIT=PATH: --images train=DIR --images val=DIR")
    return {name: _readable(path) for name, _, path in pairs}


def find_splits(where: str) -> dict[str, str]:
    """{split: folder or pattern} of one folder or pattern; {"all": where} when its names tell no splits apart.

    Splits are sub-folders or files whose names begin with train, val, valid, validation or test. A test set without a
    validation set serves as one.
    """
    where = _readable(where)
    root = Path(where)
    if not root.is_dir():
        return {"all": where}
    names = [path for path in sorted(root.iterdir()) if not path.name.startswith(".") and not is_foreign(path.name)]
    folders = [path for path in names if path.is_dir()]
    packed = [path for path in names if path.suffix in PACKED and path.is_file()]
    if not packed and [path.name for path in folders] == ["data"]:  # a data set as the Hub stores it
        return find_splits(str(folders[0]))
    splits = _folders_of_splits(folders) or _patterns_of_splits(root, packed)
    if "train" not in splits:
        return {"all": where}
    if "val" not in splits and "test" in splits:
        splits["val"] = splits.pop("test")
    if "val" not in splits:
        return {"all": splits["train"]}
    return {split: splits[split] for split in ("train", "val", "test") if split in splits}


def _folders_of_splits(folders: list[Path]) -> dict[str, str]:
    names = {path.name.lower(): path for path in folders}
    return {SPLIT_WORDS[name]: str(path) for name, path in names.items() if name in SPLIT_WORDS}


def _patterns_of_splits(root: Path, packed: list[Path]) -> dict[str, str]:
    """{split: glob} of tars or parquet files whose names begin with the name of a split."""
    splits: dict[str, str] = {}
    for path in packed:
        word = next((word for word in SPLIT_WORDS if path.name.lower().startswith(word)), None)
        if word is not None:
            splits.setdefault(SPLIT_WORDS[word], str(root / f"{path.name[: len(word)]}*{path.suffix}"))
    return splits


def _readable(where: str) -> str:
    """The path, `~` expanded; UsageError where nothing is there. Patterns are checked when they are listed."""
    where = str(Path(where).expanduser())
    if not any(mark in where for mark in "*?[{") and not Path(where).exists():
        raise UsageError(f"{where} does not exist; name the folder, the tars or the parquet files that hold the images")
    return where

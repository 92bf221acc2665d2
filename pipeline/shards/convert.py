"""Layouts that token sets are imported from and exported to: one table for each direction, and its use.

A layout is one module and one line per direction here.

- Import: `read(path, **options) -> Source`, and SUFFIXES, the endings of such files ("/" for a folder); MARK, the name
  of a file that only folders of this layout have.
- Export: `export(shards, out, split, **options) -> int`, the number of rows left out because they have no tokens.

IMPORT_OPTIONS and EXPORT_OPTIONS, if a module has them, are the options of `semdict shards` for that layout, passed to
the function: name -> keyword arguments of argparse's `add_argument`.
"""

import argparse
import importlib
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from semdict.pipeline.common.errors import ShardError, UsageError, suggestion
from semdict.pipeline.common.files import sha256_file
from semdict.pipeline.common.publish import occupied
from semdict.pipeline.shards.format import ShardSpec, spec_of
from semdict.pipeline.shards.reader import open_shards
from semdict.pipeline.shards.rows import Source, checked_blocks, numbered_index
from semdict.pipeline.shards.writer import write_shards


@dataclass(frozen=True)
class LayoutTable:
    """Layout name -> module, imported when needed; `option` is the command's option that names one."""

    option: str
    options_name: str  # the modules' attribute that holds their options
    modules: dict[str, str]

    def load(self, name: str) -> ModuleType:
        """The module of a layout; UsageError suggests the nearest known name."""
        if name not in self.modules:
            raise UsageError(f"{self.option} {name}: no such layout; {suggestion(name, self.modules)}")
        return importlib.import_module(self.modules[name])

    def options(self, name: str) -> dict[str, dict[str, Any]]:
        """Option name -> arguments of `add_argument`."""
        return getattr(self.load(name), self.options_name, {})

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """One group of options per layout; an option that several layouts share is listed with the first."""
        known: set[str] = set()
        for name in self.modules:
            group = parser.add_argument_group(f"with {self.option} {name}")
            for key, settings in self.options(name).items():
                if key not in known:
                    group.add_argument(f"--{key.replace('_', '-')}", **settings)
                    known.add(key)

    def selected(self, args: argparse.Namespace, name: str) -> dict[str, Any]:
        """The options on the command line; UsageError for one that the layout `name` does not take."""
        selected = {}
        for other in self.modules:
            for key in self.options(other):
                if getattr(args, key) is None or getattr(args, key) is False:  # 0 is a number that was asked for
                    continue
                if key not in self.options(name):
                    flag = f"--{key.replace('_', '-')}"
                    raise UsageError(f"{flag} belongs to {self.option} {other}; {self.option} {name} does not take it")
                selected[key] = getattr(args, key)
        return selected


IMPORTERS = LayoutTable(
    "--from",
    "IMPORT_OPTIONS",
    {
        "pt": "semdict.pipeline.shards.layouts.pt",
        "arrays": "semdict.pipeline.shards.layouts.arrays",
        "llamagen": "semdict.pipeline.shards.layouts.llamagen",
        "rar": "semdict.pipeline.shards.layouts.rar",
        "hf": "semdict.pipeline.shards.layouts.hub",
        "webdataset": "semdict.pipeline.shards.layouts.webdataset",
    },
)
EXPORTERS = LayoutTable(
    "--to",
    "EXPORT_OPTIONS",
    {
        "pt": "semdict.pipeline.shards.layouts.pt",
        "webdataset": "semdict.pipeline.shards.layouts.webdataset",
        "hf": "semdict.pipeline.shards.layouts.hub",
    },
)


@dataclass(frozen=True)
class Imported:
    """Result of `import_tokens`. ignored: entries of the file that were not imported."""

    rows: int
    gen_size: int
    disc_size: int | None
    ignored: tuple[str, ...]


def import_tokens(
    path: str | Path,
    out: str | Path,
    layout: str | None = None,
    *,
    centroids: str | Path | None = None,
    gen_size: int | None = None,
    disc_size: int | None = None,
    split: str = "train",
    codec: str = "pcodec",
    overwrite: bool = False,
    **options: Any,
) -> Imported:
    """Write the tokens of a file or folder as a shard directory; `layout` None = by the path's ending.

    The source is read as data only. Codebook sizes: the rows of `centroids` (K, D) .npy, else the sizes passed, else
    those of the layout's published sets. The SHA-256 and integer types of the source go into the recipe. Rows are named
    by number. Raises UsageError for an unknown layout, for ids beyond an assumed codebook size and if `out` exists,
    ShardError naming the entry, row and position that is wrong.
    """
    refuse_to_replace(out, overwrite)
    source: Source = IMPORTERS.load(layout or guess_layout(path)).read(path, **options)
    centroids = centroids or source.centroids
    book = None if centroids is None else _load_centroids(centroids, source)
    passed = {"gen": gen_size, "disc": disc_size if book is None else len(book)}
    assumed = {name for name in source.default_sizes if passed[name] is None}
    spec = _spec_of(source, Path(path).name, passed, None if centroids is None else Path(centroids))
    index = numbered_index(source.rows, split) if source.index is None else source.index()
    write_shards(
        out, spec, lambda: checked_blocks(source, spec, assumed), index, book,
        class_embeddings=source.class_embeddings, codec=codec,
    )  # fmt: skip
    return Imported(source.rows, spec.gen_size, spec.disc_size, source.ignored)


def _spec_of(source: Source, name: str, passed: dict[str, int | None], centroids: Path | None) -> ShardSpec:
    """The shard directory that a source becomes: that of its attributes, else of the sizes passed or the layout's."""
    if source.meta is not None:
        try:
            return replace(spec_of(source.meta), rows=source.rows)
        except (KeyError, TypeError, ValueError) as error:
            raise ShardError(f"{source.path}: its attributes are damaged ({type(error).__name__}: {error})") from None
    sizes = {
        array: size if passed[array] is None else passed[array]
        for array, size in source.default_sizes.items()
        if array in source.names
    }
    origin = source.origin
    if centroids is not None:
        origin = origin | {"centroids": {"file": centroids.name, "sha256": sha256_file(centroids)}}
    return ShardSpec(
        rows=source.rows,
        views=source.views,
        grid=source.grid,
        gen_sizes=sizes["gen"],
        disc_size=sizes.get("disc"),
        recipe={"imported": origin},
        title=name,
        source=name,
    )


def export_tokens(
    path: str | Path, out: str | Path, to: str, *, split: str | None = None, overwrite: bool = False, **options: Any
) -> int:
    """Write a shard directory in the layout `to`; returns the number of rows left out because they have no tokens.

    Raises UsageError for an unknown layout, and if `out` exists.
    """
    module = EXPORTERS.load(to)
    refuse_to_replace(out, overwrite)
    return module.export(open_shards(path), out, split, **options)


def guess_layout(path: str | Path) -> str:
    """The layout whose files end as `path` does; UsageError lists the endings."""
    path = Path(path)
    for name in IMPORTERS.modules:
        mark = getattr(IMPORTERS.load(name), "MARK", None)
        if mark and (path / mark).is_file():
            return name
    endings = {ending: name for name in IMPORTERS.modules for ending in IMPORTERS.load(name).SUFFIXES}
    ending = "/" if path.is_dir() else path.suffix
    if ending not in endings:
        known = ", ".join(f"{ending} ({name})" for ending, name in endings.items())
        raise UsageError(f"{path}: its ending names no layout, known are {known}; give --from NAME")
    return endings[ending]


def refuse_to_replace(out: str | Path, overwrite: bool) -> None:
    """UsageError if `out` exists and the user did not ask to replace it."""
    if not overwrite and occupied(out):
        raise UsageError(f"{out} exists; choose another name, or give --overwrite to replace an earlier output")


def _load_centroids(path: str | Path, source: Source) -> np.ndarray:
    """(K, D) centroids of the source's discriminative codebook."""
    from semdict.pipeline.common.safeload import load_array

    if "disc" not in source.names:
        raise ShardError(f"{source.path} has no discriminative tokens: the centroids {path} would belong to nothing")
    centroids = load_array(path)
    if centroids.ndim != 2 or centroids.dtype.kind != "f" or not centroids.size:
        raise ShardError(f"{path} is {centroids.dtype} {centroids.shape}, expected centroids: floats (K, D)")
    return centroids

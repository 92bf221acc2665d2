"""Images in parquet files as the Hugging Face Hub lays them out: `image` {bytes, path}, `label` with class names."""
# Paths are plain strings here: millions of them, no object for each.
# ruff: noqa: PTH118, PTH122

import json
import os
from collections import OrderedDict
from dataclasses import dataclass
from threading import Lock

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from semdict.pipeline.common.errors import ManifestError
from semdict.pipeline.manifest.listing import REFRESH, ImageList, label_name, looks_like_label, stamp_of, valid_text

KEPT_ROW_GROUPS = 4  # decoded, per reader: what threads that walk side by side need
LABEL_COLUMN = "label"


def list_parquet(root: str, source: str, label_key: str | None = None) -> tuple[ImageList, list[str | None]]:
    """Rows of one file in their order with provisional keys, and each row's `image.path` (None where there is none).

    Only labels (column `label_key`, by default `label`) and paths are read, no image. ManifestError when there is no
    image column, when it holds paths alone, or the file is damaged.
    """
    path = os.path.join(root, source)
    stamp = stamp_of(path)
    images = ImageList()
    try:
        with pq.ParquetFile(path) as file:
            columns = Columns.find(file.schema_arrow, path, label_key)
            _refuse_paths_alone(file.metadata, columns, path)
            wanted = [f"{columns.image}.path"] if columns.has_path else []
            wanted += [columns.label] if columns.label else []
            table = file.read(columns=wanted)
            rows = file.metadata.num_rows
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"{path}: not a sound parquet file ({str(error).splitlines()[0]})") from None
    images.label_candidates |= columns.candidates
    labels = _labels(table, columns, path, images.label_ids) if columns.label else [None] * rows
    paths = table[columns.image].combine_chunks().field("path").to_pylist() if columns.has_path else [None] * rows
    stem = os.path.splitext(source)[0]
    for row, label in enumerate(labels):
        images.add(f"{stem}/{row:08d}", source, row, -1, stamp, label)
    return images, [None if name is None else valid_text(name, f"{path} row {row}") for row, name in enumerate(paths)]


@dataclass(frozen=True)
class Columns:
    """The columns of a file that are read."""

    image: str
    has_path: bool  # the image column is a struct with a field `path`
    label: str | None
    class_names: list[str] | None  # the Hub's ClassLabel names of the label column
    candidates: set[str]  # other columns that look like labels, where none is read

    @classmethod
    def find(cls, schema: pa.Schema, path: str, label_key: str | None) -> "Columns":
        """The columns of a schema; ManifestError where a column occurs twice or the one asked for is missing."""
        names = schema.names
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ManifestError(f"{path}: column {twice!r} occurs twice; rename one")
        image = image_column(schema, path)
        features = _hub_features(schema)
        candidates = {n for n in names if n != image and (looks_like_label(n) or _is_class_label(features.get(n)))}
        label = label_key or LABEL_COLUMN
        if label_key is not None and label_key not in names:
            raise ManifestError(f"{path}: no column {label_key!r} (manifest.label_key); columns: {', '.join(names)}")
        field = schema.field(image)
        has_path = _is_struct(field) and field.type.get_field_index("path") >= 0
        if label not in names:
            return cls(image, has_path, None, None, candidates)
        return cls(image, has_path, label, _class_names(features.get(label), path, label), set())


def image_column(schema: pa.Schema, path: str) -> str:
    """Name of the column that holds encoded images: `image` or `img`, else the only {bytes, path} struct."""
    structs = [field.name for field in schema if _is_struct(field)]
    for name in ("image", "img"):
        if name in structs or (name in schema.names and _is_binary(schema.field(name).type)):
            return name
    if len(structs) != 1:
        text = [name for name in ("image", "img") if name in schema.names and _is_text(schema.field(name).type)]
        hint = f"; column `{text[0]}` holds text: {PATHS_ALONE}" if text else ""
        raise ManifestError(f"{path}: no column `image` with image bytes; columns: {', '.join(schema.names)}{hint}")
    return structs[0]


PATHS_ALONE = (
    "paths are not followed; name the folder that holds the files in manifest.images, or embed the images (datasets: "
    "`ds.with_format('arrow').map(datasets.table.embed_table_storage, batched=True)`)"
)


def _refuse_paths_alone(metadata: pq.FileMetaData, columns: Columns, path: str) -> None:
    """ManifestError where every image of the file is a path without bytes, as its statistics say."""
    if not columns.has_path or not metadata.num_rows:
        return
    nulls = 0
    for group in (metadata.row_group(i) for i in range(metadata.num_row_groups)):
        for column in (group.column(i) for i in range(group.num_columns)):
            if column.path_in_schema == f"{columns.image}.bytes":
                statistics = column.statistics
                nulls += statistics.null_count if statistics is not None and statistics.has_null_count else 0
    if nulls == metadata.num_rows:
        raise ManifestError(f"{path}: column `{columns.image}` holds paths without image bytes: {PATHS_ALONE}")


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_struct(field: pa.Field) -> bool:
    kind = field.type
    return pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 and _is_binary(kind.field("bytes").type)


def _labels(table: pa.Table, columns: Columns, path: str, label_ids: dict[str, int]) -> list[str | None]:
    """Class names per row: from the ClassLabel names in the file's metadata, else the value itself."""
    values = table[columns.label].to_pylist()
    names = columns.class_names
    if names is None:
        return [label_name(value, f"{path} row {row}", label_ids) for row, value in enumerate(values)]
    label_ids.update({name: number for number, name in enumerate(names)})
    for row, value in enumerate(values):
        if value is not None and (not isinstance(value, int) or value >= len(names)):
            raise ManifestError(f"{path} row {row}: label {value!r}, but the file names {len(names)} classes")
    return [None if value is None or value < 0 else names[value] for value in values]


def _hub_features(schema: pa.Schema) -> dict:
    """The Hub's description of the columns, empty where there is none."""
    text = (schema.metadata or {}).get(b"huggingface")
    try:
        features = json.loads(text)["info"]["features"] if text is not None else {}
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return features if isinstance(features, dict) else {}


def _is_class_label(feature: object) -> bool:
    return isinstance(feature, dict) and feature.get("_type") == "ClassLabel"


def _class_names(feature: object, path: str, label: str) -> list[str] | None:
    """The Hub's ClassLabel names of the label column, or None."""
    names = feature.get("names") if isinstance(feature, dict) else None
    if names is None:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ManifestError(f"{path}: the class names of column {label!r} in its metadata are not a list of texts")
    if len(set(names)) < len(names):
        raise ManifestError(f"{path}: the class names of column {label!r} in its metadata repeat themselves")
    return [valid_text(name, f"{path}: class names") for name in names]


class ParquetBytes:
    """Image bytes of any row of any file, by row group; the last few decoded groups are kept. Safe between threads."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._starts: dict[str, tuple[str, np.ndarray]] = {}
        self._groups: OrderedDict[tuple[str, int], tuple[Lock, list[pa.Array]]] = OrderedDict()

    def read(self, path: str, row: int) -> bytes:
        """Encoded image at `row` (b"" for null); ManifestError when the file cannot be read or has no such row."""
        try:
            column, starts = self._index(path)
            group = int(np.searchsorted(starts, row, side="right")) - 1
            if row >= starts[-1]:
                raise ManifestError(f"{path}: has {starts[-1]} rows, row {row} is gone; {REFRESH}")
            value = self._group(path, group, column)[row - int(starts[group])]
        except (pa.ArrowException, OSError) as error:
            raise ManifestError(f"{path} row {row}: cannot be read ({str(error).splitlines()[0]})") from None
        return value.as_py() or b""

    def _index(self, path: str) -> tuple[str, np.ndarray]:
        """Image column and first row of each row group, with the row count at the end."""
        if path not in self._starts:
            with pq.ParquetFile(path) as file:
                counts = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
                self._starts[path] = image_column(file.schema_arrow, path), np.cumsum([0, *counts])
        return self._starts[path]

    def _group(self, path: str, group: int, column: str) -> pa.Array:
        """The bytes of one row group; threads that want the same group wait for the one that reads it."""
        with self._lock:
            lock, slot = self._groups.setdefault((path, group), (Lock(), []))
            self._groups.move_to_end((path, group))
            while len(self._groups) > KEPT_ROW_GROUPS:
                self._groups.popitem(last=False)
        with lock:
            if not slot:
                with pq.ParquetFile(path) as file:
                    struct = _is_struct(file.schema_arrow.field(column))
                    table = file.read_row_group(group, columns=[f"{column}.bytes" if struct else column])
                values = table[column].combine_chunks()
                slot.append(pc.struct_field(values, "bytes") if struct else values)
        return slot[0]

"""Images in parquet files as the Hugging Face Hub lays them out: `image` {bytes, path}, `label` with class names."""
# Paths are plain strings here: millions of them, no object for each.
# ruff: noqa: PTH118, PTH122

import json
import os
from collections import OrderedDict
from threading import Lock

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from semdict.pipeline.common.errors import ManifestError
from semdict.pipeline.manifest.listing import Found, label_name, stamp_of

KEPT_ROW_GROUPS = 4  # decoded, per reader: what threads that walk side by side need


def list_parquet(root: str, source: str) -> tuple[Found, list[str | None]]:
    """Rows of one file in their order with provisional keys, and each row's `image.path` (None where there is none).

    Only labels and paths are read, no image. ManifestError when there is no image column or the file is damaged.
    """
    path = os.path.join(root, source)
    stamp = stamp_of(path)
    found = Found()
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            column = image_column(schema, path)
            inner = {field.name for field in schema.field(column).type} if _is_struct(schema, column) else set()
            wanted = [f"{column}.path"] if "path" in inner else []
            wanted += ["label"] if "label" in schema.names else []
            table = file.read(columns=wanted)
            rows = file.metadata.num_rows
    except (pa.ArrowException, OSError) as error:
        raise ManifestError(f"{path}: not a sound parquet file ({str(error).splitlines()[0]})") from None
    labels = _labels(table, schema, path, found.label_ids) if "label" in schema.names else [None] * rows
    paths = table[column].combine_chunks().field("path").to_pylist() if "path" in inner else [None] * rows
    stem = os.path.splitext(source)[0]
    for row, label in enumerate(labels):
        found.add(f"{stem}/{row:08d}", source, row, -1, stamp, label)
    return found, paths


def image_column(schema: pa.Schema, path: str) -> str:
    """Name of the column that holds encoded images: `image` or `img`, else the only {bytes, path} struct."""
    structs = [name for name in schema.names if _is_struct(schema, name)]
    for name in ("image", "img"):
        if name in structs or (name in schema.names and _is_binary(schema.field(name).type)):
            return name
    if len(structs) != 1:
        raise ManifestError(f"{path}: no column `image` with image bytes; columns: {', '.join(schema.names)}")
    return structs[0]


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_struct(schema: pa.Schema, name: str) -> bool:
    kind = schema.field(name).type
    return pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 and _is_binary(kind.field("bytes").type)


def _labels(table: pa.Table, schema: pa.Schema, path: str, label_ids: dict[str, int]) -> list[str | None]:
    """Class names per row: from the ClassLabel names in the file's metadata, else the value itself."""
    values = table["label"].to_pylist()
    names = _class_names(schema, path)
    if names is None:
        return [label_name(value, f"{path} row {row}", label_ids) for row, value in enumerate(values)]
    label_ids.update({name: number for number, name in enumerate(names)})
    for row, value in enumerate(values):
        if value is not None and value >= len(names):
            raise ManifestError(f"{path} row {row}: label {value}, but the file names {len(names)} classes")
    return [None if value is None or value < 0 else names[value] for value in values]


def _class_names(schema: pa.Schema, path: str) -> list[str] | None:
    """The Hub's ClassLabel names of column `label`, or None."""
    text = (schema.metadata or {}).get(b"huggingface")
    if text is None:
        return None
    try:
        feature = json.loads(text)["info"]["features"]["label"]
    except (ValueError, KeyError, TypeError):
        return None
    names = feature.get("names") if isinstance(feature, dict) else None
    if names is not None and len(set(names)) < len(names):
        raise ManifestError(f"{path}: the class names in the file's metadata repeat themselves")
    return names


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
                raise ManifestError(f"{path}: has {starts[-1]} rows, row {row} is gone; run `dvc repro -f manifest`")
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
                    struct = _is_struct(file.schema_arrow, column)
                    table = file.read_row_group(group, columns=[f"{column}.bytes" if struct else column])
                values = table[column].combine_chunks()
                slot.append(pc.struct_field(values, "bytes") if struct else values)
        return slot[0]

"""The manifest: a parquet table with one row per image. Row number = identity of an image in every later stage."""

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from semdict.pipeline.common.errors import ManifestError
from semdict.pipeline.manifest.reader import Reader

COLUMNS = pa.schema(
    [
        ("key", pa.string()),
        ("label", pa.int32()),  # -1 = none
        ("label_name", pa.string()),  # "" = none
        ("split", pa.string()),
        ("source", pa.string()),  # relative to the split's root folder
        ("offset", pa.int64()),  # byte offset in a tar, row number in a parquet file, else 0
        ("bytes", pa.int64()),
        ("width", pa.int32()),  # pixels; 0 where the status is not OK
        ("height", pa.int32()),
        ("sha256", pa.string()),  # of the encoded image; "" where it could not be read
        ("status", pa.uint8()),  # images.Status
        ("reason", pa.string()),
    ]
)
META = b"semdict.manifest"


class Manifest:
    """The rows of a manifest.parquet. Row number = identity of an image in every later stage.

    `table` has COLUMNS; `label` (N,) int32 and `status` (N,) uint8 are NumPy; `classes[i]` names label i.
    """

    def __init__(self, table: pa.Table):
        self.table = table.combine_chunks()
        self.meta = _metadata(table)
        self.classes: list[str] = self.meta.get("classes", [])
        self.label: np.ndarray = self.table["label"].to_numpy()
        self.status: np.ndarray = self.table["status"].to_numpy()

    def __len__(self) -> int:
        return self.table.num_rows

    def key(self, row: int) -> str:
        """The image's name: split/path without suffix."""
        return self.table["key"][row].as_py()

    def reason(self, row: int) -> str:
        """Why the row's status is not OK; "" where it is."""
        return self.table["reason"][row].as_py()

    def rows_of(self, splits: list[str]) -> np.ndarray:
        """(n,) int64 ascending row numbers of the splits named."""
        return np.flatnonzero(pc.is_in(self.table["split"], pa.array(splits, pa.string())).to_numpy())

    def reader(self, images: Mapping[str, str]) -> Reader:
        """Bytes of any row, checked against it; `images` as in params.yaml."""
        return Reader(images, self.table)

    @cached_property
    def sha256(self) -> str:
        """Hex fingerprint of the content (all columns and class names), whatever library version wrote the file."""
        digest = hashlib.sha256(json.dumps(self.classes).encode())
        for field in COLUMNS:
            digest.update(f"\n{field.name}:{field.type}\n".encode())
            column = self.table[field.name]
            if pa.types.is_string(field.type):
                digest.update(pc.binary_length(column).to_numpy().tobytes())
                for chunk in column.chunks:
                    digest.update(_text_bytes(chunk))
            else:
                digest.update(column.to_numpy().tobytes())
        return digest.hexdigest()


def _metadata(table: pa.Table) -> dict[str, Any]:
    """Class names, layouts and the content's SHA-256, as the stage wrote them."""
    meta = json.loads((table.schema.metadata or {}).get(META, b"{}"))
    if not isinstance(meta, dict) or not isinstance(meta.get("classes", []), list):
        raise ValueError("no metadata of a manifest")
    return meta


def _text_bytes(strings: pa.StringArray) -> memoryview:
    """The characters of an Arrow string array, end to end, as UTF-8."""
    _, offsets, data = strings.buffers()
    ends = np.frombuffer(offsets, np.int32)[[strings.offset, strings.offset + len(strings)]]
    return memoryview(data)[ends[0] : ends[1]] if data is not None else memoryview(b"")


def load_manifest(path: str | Path) -> Manifest:
    """Read a manifest.parquet; ManifestError when it is missing, damaged or has other columns."""
    try:
        table = pq.read_table(path)
    except FileNotFoundError:
        raise ManifestError(f"{path} does not exist; run `dvc repro manifest`") from None
    except (pa.ArrowException, OSError) as error:
        raise ManifestError(
            f"{path} cannot be read ({str(error).splitlines()[0]}); run `dvc repro -f manifest`"
        ) from None
    if not table.schema.equals(COLUMNS):
        raise ManifestError(f"{path} has columns {table.schema.names}, expected {COLUMNS.names} of fixed types")
    try:
        manifest = Manifest(table)
        sound = manifest.meta.get("sha256", manifest.sha256) == manifest.sha256
    except (ValueError, TypeError, AttributeError, pa.ArrowException):
        sound = False
    if not sound:
        raise ManifestError(f"{path} is damaged: its content is not what was written; run `dvc repro -f manifest`")
    return manifest

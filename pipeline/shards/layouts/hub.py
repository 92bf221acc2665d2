"""A folder ready for the Hugging Face Hub: parquet tables per split, codebooks, the shard directory, and a card.

Parquet is what the Hub recommends for data that are no media: its viewer, SQL and `datasets` read it without semdict,
tokens as sequences and labels as a ClassLabel. The shard directory in shards/ is the set itself, byte for byte:
`semdict.open_shards("hf://datasets/owner/name")` opens it.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from semdict.pipeline.common.errors import ShardError
from semdict.pipeline.common.files import write_json
from semdict.pipeline.common.publish import publish_folder
from semdict.pipeline.shards.format import CODEBOOKS, files_under
from semdict.pipeline.shards.layouts.card import PICTURE, CardFacts, licence_fields, make_card, safe_split
from semdict.pipeline.shards.reader import TokenShards
from semdict.pipeline.shards.rows import RawRows, RowBatch, Source, class_names, export_splits, row_batches, rows_of

if TYPE_CHECKING:
    import pyarrow as pa

EXPORT_OPTIONS = {
    "licence": {"metavar": "ID", "help": "licence of the card, an id of the Hub (default: the set's)"},
    "reports": {
        "type": Path,
        "metavar": "DIR",
        "help": "results of `semdict encode`, for PSNR and picture on the card (default: reports/NAME of shards/NAME)",
    },
    "parquet_only": {"action": "store_true", "help": "leave the shard directory out"},
}
SUFFIXES = ()
MARK = "semdict.json"  # file that shows a folder to be of this layout
FILE_ROWS = 1 << 17  # rows of one parquet file: ten for ImageNet-1k
GROUP_ROWS = 4096  # of one row group, about 2 MB, read at once by the viewer


def export(
    shards: TokenShards,
    out: str | Path,
    split: str | None = None,
    licence: str | None = None,
    reports: Path | None = None,
    parquet_only: bool = False,
) -> int:
    """Write data/*.parquet, codebooks/*.npy, shards/, semdict.json and README.md into folder `out`.

    Returns the number of rows left out of the tables because they have no tokens. With one `split` or `parquet_only`
    there is no shards/. Raises UsageError for a licence that the Hub does not know; `licence` replaces the one that the
    set states.
    """
    header = licence_fields(shards.meta, licence)
    names = class_names(shards)
    counts: dict[str, int] = {}
    with publish_folder(out, "hub") as folder:
        (folder / "data").mkdir()
        for name in export_splits(shards, split):
            counts[name] = _write_split(shards, name, names, folder / "data")
        (folder / CODEBOOKS).mkdir()
        files = files_under(shards.path)
        for name in (name for name in files if name.startswith(f"{CODEBOOKS}/")):
            shutil.copyfile(shards.path / name, folder / name)
        whole = split is None and not parquet_only
        for name in files if whole else ():
            (folder / "shards" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(shards.path / name, folder / "shards" / name)
        write_json(folder / MARK, shards.meta)
        facts = CardFacts.of(shards, counts, reports or Path("reports") / shards.path.name, whole)
        if facts.picture is not None:
            shutil.copyfile(facts.picture, folder / PICTURE)
        make_card(shards.meta, facts, header).save(folder / "README.md")
    return rows_of(shards, split) - sum(counts.values())


def _write_split(shards: TokenShards, split: str, names: list[str], folder: Path) -> int:
    """`{split}-00000-of-00010.parquet` and so on; returns the number of rows written."""
    import pyarrow.parquet as pq

    rows = int((shards.split_rows(split) & (shards.status[:] == 0)).sum())
    files = -(-rows // FILE_ROWS)
    for number, batch in enumerate(row_batches(shards, split, FILE_ROWS)):
        path = folder / f"{safe_split(split)}-{number:05d}-of-{files:05d}.parquet"
        pq.write_table(_table(shards, batch, names), path, compression="zstd", row_group_size=GROUP_ROWS)
    return rows


def _table(shards: TokenShards, batch: RowBatch, names: list[str]) -> "pa.Table":
    """key, label, label_name, row, gen and disc; tokens as fixed-size lists (L), or (V, L) for a set with views."""
    import pyarrow as pa

    index = shards.index.select(["key", "label_name"]).take(batch.rows)
    columns = {"key": index["key"], "label": pa.array(batch.label, pa.int64()), "label_name": index["label_name"]}
    columns["row"] = pa.array(batch.rows)
    for name in ("gen", "disc"):
        if getattr(batch, name) is not None:
            columns[name] = _lists(getattr(batch, name))
    table = pa.table(columns)
    features = {"info": {"features": _features(table.schema, names)}}
    return table.replace_schema_metadata({"huggingface": json.dumps(features)})


def _features(schema: "pa.Schema", names: list[str]) -> dict[str, Any]:
    """What `datasets` makes of the columns: labels are a ClassLabel (-1 = none), tokens sequences of fixed length."""
    features = {field.name: _feature(field.type) for field in schema}
    if names:
        features["label"] = {"names": names, "_type": "ClassLabel"}
    return features


def _feature(kind: "pa.DataType") -> dict[str, Any]:
    import pyarrow as pa

    if pa.types.is_fixed_size_list(kind):
        return {"feature": _feature(kind.value_type), "length": kind.list_size, "_type": "Sequence"}
    return {"dtype": str(kind), "_type": "Value"}


def _lists(ids: np.ndarray) -> "pa.Array":
    """(n, V, L) ids as n fixed-size lists."""
    import pyarrow as pa

    _, views, length = ids.shape
    values = pa.FixedSizeListArray.from_arrays(pa.array(ids.reshape(-1)), length)
    return values if views == 1 else pa.FixedSizeListArray.from_arrays(values, views)


def read(path: str | Path) -> Source:
    """Describe a folder of this layout, exported here or fetched from the Hub; ShardError for a damaged one.

    Rows are those of the tables in the order of splits and files: rows without tokens were not exported.
    """
    folder = Path(path)
    try:
        meta = json.loads((folder / MARK).read_text())
        tables = {split: sorted((folder / "data").glob(f"{split}-*-of-*.parquet")) for split in _splits(folder)}
        counts = {split: sum(map(_rows_of_file, files)) for split, files in tables.items()}
    except (OSError, ValueError) as error:
        raise ShardError(f"{folder} is no folder of tokens for the Hub: {error}") from None
    if not sum(counts.values()):
        raise ShardError(f"{folder}/data has no rows")
    books = folder / CODEBOOKS / "centroids.npy"
    return Source(
        path=str(path),
        rows=sum(counts.values()),
        views=meta["views"],
        grid=tuple(meta["grid"]),
        names={name: name for name in (*meta["codebooks"], "label")},
        default_sizes={},
        read=lambda: _read_rows(folder, tables, meta),
        origin={},
        meta=meta,
        index=lambda: _read_index(tables),
        centroids=books if books.is_file() else None,
    )


def _splits(folder: Path) -> list[str]:
    """Names of the splits in the order of the card, those of the files where the card names none."""
    from huggingface_hub import DatasetCard

    present = dict.fromkeys(path.name.rsplit("-", 3)[0] for path in sorted((folder / "data").glob("*-of-*.parquet")))
    card = folder / "README.md"
    configs = DatasetCard.load(card).data.to_dict().get("configs") or [] if card.exists() else []
    named = [
        entry["split"] for config in configs for entry in config.get("data_files", []) if entry["split"] in present
    ]
    return list(dict.fromkeys([*named, *present]))


def _rows_of_file(path: Path) -> int:
    import pyarrow.parquet as pq

    return pq.read_metadata(path).num_rows


def _read_rows(folder: Path, tables: dict[str, list[Path]], meta: dict[str, Any]) -> Iterator[RawRows]:
    import pyarrow.parquet as pq

    shape = (-1, len(meta["views"]), int(np.prod(meta["grid"])))
    names = [name for name in ("gen", "disc") if name in meta["codebooks"]]
    for file in (file for files in tables.values() for file in files):
        for batch in pq.ParquetFile(file).iter_batches(1 << 14, columns=[*names, "label"]):
            try:
                ids = {name: _flat(batch.column(name)).reshape(shape) for name in names}
            except (ValueError, KeyError) as error:
                raise ShardError(f"{file}: tokens do not fit views and grid of {folder / MARK}: {error}") from None
            yield RawRows(ids["gen"], ids.get("disc"), batch.column("label").to_numpy())


def _flat(column: "pa.Array") -> np.ndarray:
    """All numbers of a column of lists, of lists of lists."""
    while hasattr(column, "flatten") and hasattr(column.type, "value_type"):
        column = column.flatten()
    return column.to_numpy()


def _read_index(tables: dict[str, list[Path]]) -> "pa.Table":
    import pyarrow as pa
    import pyarrow.parquet as pq

    parts = []
    for split, files in tables.items():
        for file in files:
            table = pq.read_table(file, columns=["key", "label_name"]).replace_schema_metadata(None)
            texts = {"split": split, "reason": ""}
            columns = {name: pa.array([text] * table.num_rows, pa.string()) for name, text in texts.items()}
            parts.append(pa.table({"key": table["key"], "label_name": table["label_name"], **columns}))
    return pa.concat_tables(parts).select(["key", "split", "label_name", "reason"])

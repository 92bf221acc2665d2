"""Exports a folder ready for the Hugging Face Hub: parquet tables per split, codebooks, and a dataset card.

Parquet is what the Hub recommends for data that are no media: its viewer, SQL and `datasets` read it without semdict.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from semdict.pipeline.common.errors import UsageError, suggestion
from semdict.pipeline.common.files import write_json
from semdict.pipeline.common.publish import publish_folder
from semdict.pipeline.shards.format import CODEBOOKS, files_under
from semdict.pipeline.shards.reader import TokenShards
from semdict.pipeline.shards.rows import RowBatch, export_splits, row_batches, rows_of

if TYPE_CHECKING:
    import pyarrow as pa
    from huggingface_hub import DatasetCard

EXPORT_OPTIONS = {"licence": {"metavar": "ID", "help": "licence of the card, an id of the Hub (default: the set's)"}}
FILE_ROWS = 1 << 17  # rows of one parquet file: ten for ImageNet-1k
GROUP_ROWS = 4096  # of one row group, about 2 MB, read at once by the viewer
# The Hub's categories, as listed by huggingface_hub.DatasetCardData: (rows below, id).
SIZE_CATEGORIES = (
    (10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"),
    (10**8, "10M<n<100M"), (10**9, "100M<n<1B"), (10**10, "1B<n<10B"), (10**11, "10B<n<100B"), (10**12, "100B<n<1T"),
)  # fmt: skip
# Licence ids of the Hub (hub-docs, repositories-licenses.md); huggingface_hub itself checks a card only online.
LICENCE_IDS = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
lgpl lgpl-2.1 lgpl-3.0 isc lppl-1.3c ms-pl mpl-2.0 odc-by odbl openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense
zlib pddl lgpl-lr deepfloyd-if-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 gemma apple-ascl apple-amlr
intel-research h-research unknown other
"""
LICENCES = frozenset(LICENCE_IDS.split())
IMAGENET_TERMS = (
    "These tokens are derived from ImageNet and decode to recognisable images. By asking for access you accept the "
    "ImageNet terms: non-commercial research and education only, and passing the data on only to colleagues who "
    "accepted the same terms."
)


def export(shards: TokenShards, out: str | Path, split: str | None = None, licence: str | None = None) -> int:
    """Write data/*.parquet, codebooks/*.npy, semdict.json and README.md into folder `out`.

    Returns the number of rows left out because they have no tokens. Raises UsageError for a licence that the Hub does
    not know; `licence` replaces the one that the set states.
    """
    header = licence_fields(shards.meta, licence)
    counts: dict[str, int] = {}
    with publish_folder(out, "hub") as folder:
        (folder / "data").mkdir()
        for name in export_splits(shards, split):
            counts[name] = _write_split(shards, name, folder / "data")
        (folder / CODEBOOKS).mkdir()
        for name in (name for name in files_under(shards.path) if name.startswith(f"{CODEBOOKS}/")):
            (folder / name).write_bytes((shards.path / name).read_bytes())
        write_json(folder / "semdict.json", shards.meta)
        make_card(shards.meta, counts, header).save(folder / "README.md")
    return rows_of(shards, split) - sum(counts.values())


def _write_split(shards: TokenShards, split: str, folder: Path) -> int:
    """`{split}-00000-of-00010.parquet` and so on; returns the number of rows written."""
    import pyarrow.parquet as pq

    rows = int((shards.split_rows(split) & (shards.status[:] == 0)).sum())
    files = -(-rows // FILE_ROWS)
    for number, batch in enumerate(row_batches(shards, split, FILE_ROWS)):
        path = folder / f"{safe_split(split)}-{number:05d}-of-{files:05d}.parquet"
        pq.write_table(_table(shards, batch), path, compression="zstd", row_group_size=GROUP_ROWS)
    return rows


def safe_split(split: str) -> str:
    """A split as `datasets` accepts it: letters, digits, dots and underscores."""
    return "".join(c if c.isalnum() or c in "._" else "_" for c in split)


def _table(shards: TokenShards, batch: RowBatch) -> "pa.Table":
    """key, label, label_name, row, gen and disc; tokens as fixed-size lists (L), or (V, L) for a set with views."""
    import pyarrow as pa

    index = shards.index.select(["key", "label_name"]).take(batch.rows)
    columns = {"key": index["key"], "label": pa.array(batch.label), "label_name": index["label_name"]}
    columns["row"] = pa.array(batch.rows)
    for name in ("gen", "disc"):
        if getattr(batch, name) is not None:
            columns[name] = _lists(getattr(batch, name))
    return pa.table(columns)


def _lists(ids: np.ndarray) -> "pa.Array":
    """(n, V, L) ids as n fixed-size lists."""
    import pyarrow as pa

    _, views, length = ids.shape
    values = pa.FixedSizeListArray.from_arrays(pa.array(ids.reshape(-1)), length)
    return values if views == 1 else pa.FixedSizeListArray.from_arrays(values, views)


def licence_fields(meta: dict[str, Any], licence: str | None = None) -> dict[str, Any]:
    """The card's licence: `licence`, else the set's, as an id of the Hub; ImageNet's terms for tokens of ImageNet.

    Raises UsageError that suggests the nearest id.
    """
    if is_imagenet(meta):
        fields = {"license": "other", "license_name": "imagenet"}
        fields |= {"license_link": "https://www.image-net.org/download.php", "extra_gated_prompt": IMAGENET_TERMS}
        return fields | {"extra_gated_fields": {"I accept these terms": "checkbox"}}
    name = (licence or meta["licence"]).strip().lower().replace(" ", "-")
    if name not in LICENCES:
        raise UsageError(
            f"licence {licence or meta['licence']!r} is not among the licence ids of the Hugging Face Hub; "
            f"{suggestion(name, sorted(LICENCES))} Give --licence ID, or --licence other and put the text into LICENSE"
        )
    if name != "other" or meta["licence"].strip().lower() == "other":
        return {"license": name}
    return {"license": "other", "license_name": "".join(c if c.isalnum() else "-" for c in meta["licence"].lower())}


def is_imagenet(meta: dict[str, Any]) -> bool:
    """Whether title, source or licence name ImageNet, whose terms hold for its tokens under any stated licence."""
    text = " ".join(str(meta[key]) for key in ("title", "source", "licence")).lower()
    return "imagenet" in text or "ilsvrc" in text


def size_category(rows: int) -> str:
    """The Hub's id for a number of rows."""
    return next((name for limit, name in SIZE_CATEGORIES if rows < limit), "n>1T")


def make_card(meta: dict[str, Any], counts: dict[str, int], licence: dict[str, Any]) -> "DatasetCard":
    """The dataset card: a YAML header for the Hub, then text for people. counts: rows of each split."""
    from huggingface_hub import DatasetCard, DatasetCardData

    files = [
        {"split": safe_split(name), "path": f"data/{safe_split(name)}-*.parquet"}
        for name, rows in counts.items()
        if rows
    ]
    data = DatasetCardData(
        pretty_name=meta["title"] or "token shards",
        task_categories=["image-classification", "unconditional-image-generation"],
        size_categories=[size_category(sum(counts.values()))],
        tags=["image-tokens", "semdict"],
        configs=[{"config_name": "default", "data_files": files}],
        **licence,
    )
    return DatasetCard(f"---\n{data.to_yaml()}\n---\n" + "\n".join([*_body(meta, counts), ""]))


def _body(meta: dict[str, Any], counts: dict[str, int]) -> Iterator[str]:
    books = meta["codebooks"]
    grid = " x ".join(map(str, meta["grid"]))
    yield f"\n# {meta['title'] or 'Token shards'}\n"
    yield f"Every image as tokens on a grid of {grid} cells, {len(meta['views'])} view(s) per image.\n"
    yield "| column | content |\n|---|---|"
    yield "| `key`, `row` | the image's key and its row in the manifest |"
    yield "| `label`, `label_name` | class number (-1 = none) and name |"
    for name, text in (("gen", "what a cell looks like"), ("disc", "what a cell means")):
        if name in books:
            yield f"| `{name}` | {text}: ids below {books[name]['size']}, row-major over the grid |"
    if books["gen"]["sizes"]:
        yield "\nPosition t of `gen` uses ids below `codebooks.gen.sizes[t]` of `semdict.json`."
    yield "\n| split | rows |\n|---|---|"
    yield from (f"| {name} | {rows} |" for name, rows in counts.items())
    yield "\n## Use\n"
    yield '```python\nfrom datasets import load_dataset\nrows = load_dataset("OWNER/NAME").with_format("numpy")\n```'
    yield "\n## How the tokens were made\n"
    yield f"Source: {meta['source'] or 'not stated'}. Licence: {meta['licence']}. Fingerprint: `{meta['fingerprint']}`."
    yield "Images that could not be read are left out; `row` shows the gaps. Crop, transform, decoder and models:\n"
    recipe = json.dumps({"views": meta["views"], "recipe": meta["recipe"]}, indent=1, sort_keys=True)
    yield f"```json\n{recipe}\n```"

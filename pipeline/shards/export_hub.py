"""A folder ready for the Hugging Face Hub: parquet tables per split, codebooks, and a dataset card.

Parquet is what the Hub asks for where the data are no media: its viewer, SQL and `datasets` read it without our code.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from semdict.pipeline.common.files import publish_dir, write_json
from semdict.pipeline.shards import TokenShards
from semdict.pipeline.shards.convert import Piece, pieces, splits_of
from semdict.pipeline.shards.format import CODEBOOKS

if TYPE_CHECKING:
    import pyarrow as pa

FILE_ROWS = 1 << 17  # rows of one parquet file: ten for ImageNet-1k
GROUP_ROWS = 4096  # of one row group, about 2 MB, what the viewer reads at once
SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))
IMAGENET_TERMS = (
    "These tokens are derived from ImageNet and decode to recognisable images. By asking for access you accept the "
    "ImageNet terms: non-commercial research and education only, and passing the data on only to colleagues who "
    "accepted the same terms."
)


def export_hub(shards: TokenShards, out: str | Path, split: str | None = None) -> int:
    """Write data/*.parquet, codebooks/*.npy, semdict.json and README.md; returns the rows left out (bad status)."""
    counts: dict[str, int] = {}
    with publish_dir(out) as folder:
        (folder / "data").mkdir()
        for name in splits_of(shards, split):
            counts[name] = _write_split(shards, name, folder / "data")
        books = folder / CODEBOOKS
        books.mkdir()
        for file in sorted((shards.path / CODEBOOKS).glob("*.npy")):
            (books / file.name).write_bytes(file.read_bytes())
        write_json(folder / "semdict.json", shards.meta)
        (folder / "README.md").write_text(card(shards, counts))
    chosen = len(shards) if split is None else int(shards.split_rows(split).sum())
    return chosen - sum(counts.values())


def _write_split(shards: TokenShards, split: str, folder: Path) -> int:
    """`{split}-00000-of-00010.parquet` and so on; returns the rows written."""
    import pyarrow.parquet as pq

    rows = int((shards.split_rows(split) & (shards.status[:] == 0)).sum())
    files = -(-rows // FILE_ROWS)
    for number, piece in enumerate(pieces(shards, split, FILE_ROWS)):
        path = folder / f"{safe_split(split)}-{number:05d}-of-{files:05d}.parquet"
        table = _table(shards, piece)
        pq.write_table(table, path, compression="zstd", row_group_size=GROUP_ROWS)
    return rows


def safe_split(split: str) -> str:
    """A split as `datasets` accepts it: letters, digits, dots and underscores."""
    return "".join(c if c.isalnum() or c in "._" else "_" for c in split)


def _table(shards: TokenShards, piece: Piece) -> "pa.Table":
    """key, label, label_name, row, gen and disc; tokens as fixed-size lists (L), or (V, L) where there are views."""
    import pyarrow as pa

    index = shards.index.select(["key", "label_name"]).take(piece.rows)
    columns = {"key": index["key"], "label": pa.array(piece.label), "label_name": index["label_name"]}
    columns["row"] = pa.array(piece.rows)
    for name in ("gen", "disc"):
        if getattr(piece, name) is not None:
            columns[name] = _lists(getattr(piece, name))
    return pa.table(columns)


def _lists(ids: np.ndarray) -> "pa.Array":
    """(n, V, L) uint16 as n fixed-size lists."""
    import pyarrow as pa

    _, views, length = ids.shape
    values = pa.FixedSizeListArray.from_arrays(pa.array(ids.reshape(-1)), length)
    return values if views == 1 else pa.FixedSizeListArray.from_arrays(values, views)


def card(shards: TokenShards, counts: dict[str, int]) -> str:
    """The dataset card: YAML header as the Hub reads it, then what a person must know before using the tokens."""
    meta = shards.meta
    return "\n".join([*_header(shards, counts), *_body(meta, counts), ""])


def _header(shards: TokenShards, counts: dict[str, int]) -> Iterator[str]:
    import yaml

    meta = shards.meta
    total = sum(counts.values())
    imagenet = is_imagenet(meta)
    header = {
        "pretty_name": meta["title"] or "token shards",
        "license": "other" if imagenet else meta["licence"],
        "task_categories": ["image-classification", "unconditional-image-generation"],
        "size_categories": [next((text for limit, text in SIZES if total < limit), "n>10M")],
        "tags": ["image-tokens", "semdict"],
        "configs": [
            {
                "config_name": "default",
                "data_files": [
                    {"split": safe_split(name), "path": f"data/{safe_split(name)}-*.parquet"}
                    for name, rows in counts.items()
                    if rows
                ],
            }
        ],
    }
    if imagenet:
        header |= {"license_name": "imagenet", "license_link": "https://www.image-net.org/download.php"}
        header |= {"extra_gated_prompt": IMAGENET_TERMS, "extra_gated_fields": {"I accept these terms": "checkbox"}}
    yield "---"
    yield yaml.safe_dump(header, sort_keys=False, allow_unicode=True).rstrip()
    yield "---"


def is_imagenet(meta: dict) -> bool:
    """Tokens of ImageNet stay under its terms, whatever licence the tokens' maker had in mind."""
    told = " ".join(str(meta[key]) for key in ("title", "source", "licence")).lower()
    return "imagenet" in told or "ilsvrc" in told


def _body(meta: dict, counts: dict[str, int]) -> Iterator[str]:
    books = meta["codebooks"]
    grid = " x ".join(map(str, meta["grid"]))
    yield f"\n# {meta['title'] or 'Token shards'}\n"
    yield f"Every image as words on a grid of {grid} cells, {len(meta['views'])} view(s) per image.\n"
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

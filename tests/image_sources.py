"""Small sets of images in every layout, their listings and their manifests."""

import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from semdict.pipeline.config import schema
from semdict.pipeline.images.decode import MAX_PIXELS, DecodeSpec
from semdict.pipeline.manifest.reader import ByteReader
from semdict.pipeline.manifest.stage import build_manifest
from tests import tiny
from tests.image_files import encoded, picture

PNG = encoded(picture(4, 5))


def image(seed: int) -> bytes:
    return encoded(picture(4, 5, seed))


def write(path, data: bytes = PNG):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def write_tar(path, members, kind=None):
    """`members`: (name, bytes), or a TarInfo."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, f"w:{kind}" if kind else "w") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return path


def write_parquet(path, rows, names=None, column="image", group=2):
    """`rows`: (bytes or None, path or None, label)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    struct = pa.array([{"bytes": data, "path": name} for data, name, _ in rows],
                      pa.struct([("bytes", pa.binary()), ("path", pa.string())]))  # fmt: skip
    table = pa.table({column: struct, "label": [label for *_, label in rows]})
    if names:
        features = {"label": {"names": names, "_type": "ClassLabel"}, "image": {"_type": "Image"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=group)
    return path


def columns(listing, *names):
    return list(zip(*(listing.table[name].to_pylist() for name in names), strict=True))


def read_all(images, listing):
    reader = ByteReader(images)
    return [reader.read(*row) for row in columns(listing, "split", "source", "offset", "bytes")]


def make_tree(root: Path, each: int = 6) -> Path:
    for i in range(each):
        for label in "ab":
            write(root / label / f"{i}.png", encoded(picture(8 + i, 9, seed=ord(label) * 100 + i)))
    return root


def build(root: Path, images: dict[str, str], max_pixels: int = MAX_PIXELS, workers: int = 0, **settings):
    return build_manifest(
        schema.Manifest(**{**tiny.base()["manifest"], "images": images, **settings}),
        root / "manifest.parquet",
        metrics=root / "metrics.json",
        cache=root / "cache",
        limits=DecodeSpec(max_pixels=max_pixels),
        workers=workers,
    )


def rows(manifest, *names):
    return list(zip(*(manifest.table[name].to_pylist() for name in names), strict=True))


def params(root: Path) -> None:
    tree = tiny.preset("demo")
    tree = tiny.replaced(tree, manifest={"images": {"train": "train"}}) | {"preset": "t"}
    (root / "params.yaml").write_text(yaml.safe_dump(tree))

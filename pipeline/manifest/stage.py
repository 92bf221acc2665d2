"""Stage `manifest`: a table with one row per image; the only stage that looks at the image store itself."""

import argparse
import csv
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from semdict.pipeline.common.errors import ManifestError
from semdict.pipeline.common.files import atomic_write, remove, sha256_json, write_json
from semdict.pipeline.common.publish import check_output
from semdict.pipeline.config import paths, schema
from semdict.pipeline.config.params import add_params_arguments, params_of
from semdict.pipeline.execute.locks import interrupt_on_signals, lock
from semdict.pipeline.execute.store import WORK
from semdict.pipeline.images.decode import DecodeSpec, Status
from semdict.pipeline.manifest.duplicates import shared_images
from semdict.pipeline.manifest.scan import scan
from semdict.pipeline.manifest.sources import Listing, list_images
from semdict.pipeline.manifest.table import COLUMNS, META, Manifest

EXAMPLE = """examples:
  semdict manifest                                  what `dvc repro manifest` runs
  semdict manifest --set runtime.workers=32        more threads for a slow network drive
  semdict manifest --set manifest.images.train=/data/train --out /tmp/train.parquet --metrics /tmp/train.json

  semdict manifest --fresh                          read every image again

Images seen before are not read again unless their file changed (size, modification or change time); a killed run
continues where it stopped."""

SHOWN = 5  # bad images named in an error message


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Paths default to the preset's own; every other choice is in params.yaml."""
    add_params_arguments(parser)
    parser.add_argument("--out", type=Path, help="default: data/<preset>/manifest/manifest.parquet")
    parser.add_argument("--metrics", type=Path, help="default: reports/<preset>/manifest.json")
    parser.add_argument("--work", type=Path, default=WORK, help="where earlier results are remembered (default: work)")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results and read every image again")


def run(args: argparse.Namespace) -> int:
    """Write the manifest and its metrics."""
    params = params_of(args)
    preset = params.preset
    out = args.out or paths.manifest(preset)
    check_output(out, "manifest")
    with lock(f"manifest-{preset}", args.work), interrupt_on_signals():
        build_manifest(
            params.manifest,
            out,
            metrics=args.metrics or Path("reports") / preset / "manifest.json",
            cache=args.work / "manifest-cache" / preset,
            limits=DecodeSpec.of(params.pixels),
            workers=params.runtime.workers,
            fresh=args.fresh,
        )
    return 0


def build_manifest(
    cfg: schema.Manifest,
    out: Path,
    metrics: Path,
    cache: Path,
    limits: DecodeSpec,
    workers: int = 0,
    fresh: bool = False,
) -> Manifest:
    """List the images, read each and write the manifest; nothing appears at `out` before all of it is known.

    Folder `cache` keeps results between runs, which `fresh` deletes, and receives `bad.csv` (key, source, status,
    reason) when images are bad. ManifestError when there are no images, or more than `max_bad_fraction` are bad.
    """
    listing = list_images(cfg.images, cfg.layout, cfg.label_key, cfg.shares)
    for note in listing.notes:
        print(f"manifest: {note}", file=sys.stderr)
    results = scan(listing.table, cfg.images, _cache_file(cache, limits), limits, workers, fresh)
    manifest = Manifest(_assemble(listing, results))
    _report_bad(manifest, cache / "bad.csv", cfg.max_bad_fraction)
    shared = shared_images(manifest)
    for pair in shared:
        print(f"manifest: {pair}; scores on one are no scores if the other is trained on", file=sys.stderr)
    with atomic_write(out) as tmp_path:
        pq.write_table(manifest.table, tmp_path, compression="zstd")
    write_json(metrics, _metrics(manifest, listing) | {"shared_between_splits": sum(pair.count for pair in shared)})
    return manifest


def _cache_file(cache: Path, limits: DecodeSpec) -> Path:
    """Results depend on the limit and on Pillow's readers; those of other settings are deleted."""
    from PIL import Image

    parts = {"version": 3, "limits": [limits.max_pixels, limits.decode_memory], "pillow": Image.__version__}
    identity = sha256_json(parts)
    path = cache / f"images-{identity[:16]}.sqlite"
    for other in cache.iterdir() if cache.is_dir() else []:
        if not other.name.startswith(path.name) and (other.is_dir() or ".sqlite" in other.name):
            remove(other)
    return path


def _assemble(listing: Listing, results: pa.Table) -> pa.Table:
    """The manifest's columns, from the listing and the results of the scan."""
    arrays = [(results if name in results.column_names else listing.table)[name] for name in COLUMNS.names]
    meta = {"format": 1, "classes": listing.classes, "layouts": listing.layouts}
    table = pa.table(arrays, schema=COLUMNS.with_metadata({META: json.dumps(meta).encode()}))
    meta["sha256"] = Manifest(table).sha256  # of the content; `load_manifest` compares it
    return table.replace_schema_metadata({META: json.dumps(meta).encode()})


def _report_bad(manifest: Manifest, path: Path, max_bad_fraction: float) -> None:
    """Write the bad rows as a table for people; ManifestError when they are too many."""
    remove(path)
    bad = np.flatnonzero(manifest.status)
    if not len(bad):
        return
    rows = manifest.table.take(pa.array(bad)).select(["key", "source", "status", "reason"]).to_pylist()
    with atomic_write(path) as tmp_path, tmp_path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["key", "source", "status", "reason"])
        writer.writerows([row["key"], row["source"], Status(row["status"]).name, row["reason"]] for row in rows)
    counts = Counter(Status(row["status"]).name for row in rows)
    summary = (
        f"{len(bad)} of {len(manifest)} images are bad ({', '.join(f'{n} {s}' for s, n in sorted(counts.items()))})"
    )
    print(f"{summary}: see {path}", file=sys.stderr)
    if len(bad) > max_bad_fraction * len(manifest):
        first = "; ".join(f"{row['key']}: {row['reason']}" for row in rows[:SHOWN])
        raise ManifestError(
            f"{summary}, more than manifest.max_bad_fraction {max_bad_fraction:g}. First: {first}. All are in {path}; "
            "repair or remove them, or raise the limit"
        )


def _metrics(manifest: Manifest, listing: Listing) -> dict:
    """Counts that DVC tracks; nothing that changes from run to run."""
    splits = manifest.table["split"].to_numpy(zero_copy_only=False)
    names = [Status(code).name for code in np.unique(manifest.status)]
    by_split = {}
    for split in listing.layouts:
        status = manifest.status[splits == split]
        by_split[split] = {"images": len(status), "bad": int(np.count_nonzero(status))}
    good = pc.filter(manifest.table["sha256"], pa.array(manifest.status == 0))
    return {
        "images": len(manifest),
        "bad": int(np.count_nonzero(manifest.status)),
        "status": {name: int(np.count_nonzero(manifest.status == Status[name])) for name in names},
        "splits": by_split,
        "classes": len(manifest.classes),
        "bytes": int(pc.sum(manifest.table["bytes"]).as_py()),
        "duplicates": len(good) - pc.count_distinct(good).as_py(),
        "ignored_files": dict(sorted(listing.ignored.counts.items())),
        "fingerprint": manifest.sha256,
    }

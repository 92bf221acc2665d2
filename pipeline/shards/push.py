"""`semdict shards push`: a token set as a dataset of the Hugging Face Hub, with its card."""

import argparse
from pathlib import Path

EXAMPLE = """examples:
  semdict shards push shards/demo my-name/demo-tokens --private
  semdict shards push shards/in1k my-name/in1k-tokens --licence other --keep export/in1k-hf

Uploads Parquet tables per split (`datasets.load_dataset("my-name/demo-tokens")`), the shard directory itself
(`semdict.open_shards("hf://datasets/my-name/demo-tokens")`) and a card with counts, codebook use, sizes, PSNR and
picture. Log in first: hf auth login. The folder is made in work/ and removed after the upload, unless --keep names
another."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The set, the repository, and the options of layout hf."""
    from semdict.pipeline.shards.layouts.hub import EXPORT_OPTIONS

    parser.add_argument("dir", type=Path)
    parser.add_argument("repository", metavar="OWNER/NAME")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--split", help="one split only")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where the uploaded folder is left")
    for name, settings in EXPORT_OPTIONS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **settings)


def run(args: argparse.Namespace) -> int:
    """Export, then upload."""
    from semdict.pipeline.common.files import remove
    from semdict.pipeline.common.hub import push_folder
    from semdict.pipeline.shards.convert import export_tokens

    folder = args.keep or Path("work") / f"push-{args.repository.replace('/', '-')}"
    options = {"licence": args.licence, "reports": args.reports, "parquet_only": args.parquet_only}
    skipped = export_tokens(args.dir, folder, "hf", split=args.split, overwrite=args.keep is None, **options)
    address = push_folder(folder, args.repository, "dataset", args.private)
    if args.keep is None:
        remove(folder)
    print(f"{address}: pushed" + (f"; {skipped:,} rows without tokens left out of the tables" if skipped else ""))
    return 0

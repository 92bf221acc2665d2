"""`semdict shards`: the actions info, verify, import and export, each with EXAMPLE, add_arguments and run."""

import argparse
import json
from pathlib import Path
from typing import Any


class Info:
    """Prints counts, codebooks, sizes and provenance of a shard directory."""

    EXAMPLE = """examples:
  semdict shards info shards/demo
  semdict shards info shards/demo --json"""

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """The directory, and whether to print JSON."""
        parser.add_argument("dir", type=Path)
        parser.add_argument("--json", action="store_true", help="machine-readable")

    @staticmethod
    def run(args: argparse.Namespace) -> int:
        """Print the summary."""
        numbers = summary(args.dir)
        print(json.dumps(numbers, indent=1, ensure_ascii=False) if args.json else _as_text(numbers))
        return 0


class Verify:
    """Reads every byte and names the damaged arrays and chunks."""

    EXAMPLE = """example:
  semdict shards verify shards/demo

Exit status: 0 sound, 1 damaged (names array and chunk), 2 not a shard directory."""

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """The directory."""
        parser.add_argument("dir", type=Path)

    @staticmethod
    def run(args: argparse.Namespace) -> int:
        """Print each problem, or that there is none."""
        from semdict.pipeline.shards import verify_shards

        report = verify_shards(args.dir)
        for problem in report.problems:
            print(f"{args.dir}: {problem}")
        if report.ok:
            print(
                f"{args.dir}: sound; {report.rows:,} rows ({report.bad_rows:,} without tokens), "
                f"{report.files} files, {report.bytes:,} bytes read"
            )
        return 0 if report.ok else 1


class Import:
    """Writes the tokens of another layout as a shard directory; layouts come from the table of `convert.py`."""

    EXAMPLE = """example:
  semdict shards import tokens.pt shards/lease --centroids km_16k.npy"""

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Source, target and codebooks, and the options of every layout."""
        from semdict.pipeline.shards.convert import IMPORTERS

        parser.add_argument("file", type=Path)
        parser.add_argument("dir", type=Path)
        layouts = "|".join(IMPORTERS.modules)
        parser.add_argument("--from", dest="layout", metavar=layouts, help="layout of FILE (default: by its ending)")
        parser.add_argument("--centroids", type=Path, help="(K, D) .npy of the discriminative codebook")
        parser.add_argument("--gen-size", type=int, metavar="K", help="entries of the generative codebook")
        parser.add_argument("--disc-size", type=int, metavar="K", help="entries of the discriminative codebook")
        parser.add_argument("--split", default="train", help="split of all rows (default: train)")
        parser.add_argument("--overwrite", action="store_true", help="replace DIR if it exists")
        IMPORTERS.add_arguments(parser)

    @staticmethod
    def run(args: argparse.Namespace) -> int:
        """Import, and print the counts."""
        from semdict.pipeline.shards.convert import IMPORTERS, guess_layout, import_tokens

        layout = args.layout or guess_layout(args.file)
        result = import_tokens(
            args.file,
            args.dir,
            layout,
            centroids=args.centroids,
            gen_size=args.gen_size,
            disc_size=args.disc_size,
            split=args.split,
            overwrite=args.overwrite,
            **IMPORTERS.selected(args, layout),
        )
        if result.ignored:
            print(f"{args.file}: not imported, no tokens: {', '.join(result.ignored)}")
        print(f"{args.dir}: {result.rows:,} rows, codebooks {result.gen_size} and {result.disc_size or 'none'}")
        return 0


class Export:
    """Writes a shard directory in another layout; layouts come from the table of `convert.py`."""

    EXAMPLE = """examples:
  semdict shards export shards/demo tokens.pt --to pt
  semdict shards export shards/demo tars/ --to webdataset
  semdict shards export shards/demo hub/ --to hf"""

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Source and target, and the options of every layout."""
        from semdict.pipeline.shards.convert import EXPORTERS

        parser.add_argument("dir", type=Path)
        parser.add_argument("out", type=Path)
        parser.add_argument("--to", required=True, metavar="|".join(EXPORTERS.modules), help="layout of OUT")
        parser.add_argument("--split", help="one split only")
        parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
        EXPORTERS.add_arguments(parser)

    @staticmethod
    def run(args: argparse.Namespace) -> int:
        """Export, and print the number of rows left out."""
        from semdict.pipeline.shards.convert import EXPORTERS, export_tokens

        options = EXPORTERS.selected(args, args.to)
        skipped = export_tokens(args.dir, args.out, args.to, split=args.split, overwrite=args.overwrite, **options)
        print(f"{args.out}: written as {args.to}" + (f"; {skipped:,} rows without tokens left out" if skipped else ""))
        return 0


def summary(path: Path) -> dict[str, Any]:
    """What `info --json` prints. Bits per token count the file bytes of an array, against its order-0 entropy."""
    import pyarrow.parquet as pq

    from semdict.pipeline.shards import open_shards
    from semdict.pipeline.shards.format import INDEX, files_under, token_file
    from semdict.pipeline.shards.ids import order0_entropy

    shards = open_shards(path)
    path = shards.path
    status = shards.status[:]
    good = int((status == 0).sum())
    codebooks = {}
    for name, sizes in shards.spec.sizes.items():
        files = [path / token_file(name, shard) for shard in range(shards.layout.shards)]
        stored = sum(file.stat().st_size for file in files)
        tokens = good * len(shards.views) * shards.spec.length
        count = shards.counts[name]
        codebooks[name] = {
            "size": int(sizes.max()),
            "sizes_vary": bool(sizes.min() != sizes.max()),
            "used": int((count > 0).sum()),
            "tokens": tokens,
            "bytes": stored,
            "bits_per_token": round(8 * stored / tokens, 4) if tokens else None,
            "order0_entropy_bits": round(order0_entropy(count), 4),
        }
    column = pq.read_table(path / INDEX, columns=["split"])["split"]
    splits = {str(item["values"]): item["counts"] for item in column.value_counts().to_pylist()}
    kept = ("format", "version", "title", "licence", "source", "fingerprint", "recipe", "libraries", "codec")
    sizes = [(path / file).stat().st_size for file in files_under(path)]
    return {
        "path": str(path),
        "rows": len(shards),
        "bad_rows": len(shards) - good,
        "labelled_rows": int((shards.label[:] >= 0).sum()),
        "splits": splits,
        "views": list(shards.views),
        "grid": list(shards.grid),
        "codebooks": codebooks,
        "centroids": None if shards.centroids is None else list(shards.centroids.shape),
        "bytes": sum(sizes),
        "files": len(sizes),
        "content_sha256": shards.content_sha256,
        **{key: shards.meta[key] for key in kept},
    }


def _as_text(numbers: dict[str, Any]) -> str:
    views = ", ".join(str(view.get("name", "?")) for view in numbers["views"])
    splits = ", ".join(f"{name} {rows:,}" for name, rows in numbers["splits"].items())
    lines = [
        f"{numbers['path']}: {numbers['title'] or 'untitled'} (format {numbers['version']}, {numbers['codec']})",
        f"rows       {numbers['rows']:,} ({splits}), {numbers['bad_rows']:,} without tokens",
        f"grid       {' x '.join(map(str, numbers['grid']))}, views: {views}",
    ]
    for name, book in numbers["codebooks"].items():
        ratio = f"{book['bits_per_token'] / book['order0_entropy_bits']:.4f} x" if book["order0_entropy_bits"] else "-"
        lines.append(
            f"{name:<10} {book['used']:,} of {book['size']:,} codes used, {book['bytes']:,} bytes = "
            f"{book['bits_per_token']} bits per token, order-0 entropy {book['order0_entropy_bits']} ({ratio})"
        )
    lines += [
        f"size       {numbers['bytes']:,} bytes in {numbers['files']} files",
        f"licence    {numbers['licence']}; source: {numbers['source'] or 'not stated'}",
        f"made with  fingerprint {numbers['fingerprint'] or '-'}",
        *("           " + line for line in json.dumps(numbers["recipe"], indent=1, ensure_ascii=False).splitlines()),
    ]
    return "\n".join(lines)

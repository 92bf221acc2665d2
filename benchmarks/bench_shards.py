"""Token shards at ImageNet size: bytes against entropy; write, verify, load, peak memory; beside .pt and zstd -19.

Example: python -m benchmarks.bench_shards --out benchmarks/results/shards.json      (--small for a quick look)
Each timed part runs in a process of its own, so that its peak memory is its own.
"""

import argparse
import json
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np

LENGTH = 256
SIZES = {"gen": 1024, "disc": 16384}
LARGE = {"gen": 1 << 18}  # the codebook of Open-MAGVIT2 and of the largest IBQ, as 32-bit ids
ROWS = 1 << 14  # rows read or written at a time


def zipf_counts(size: int) -> np.ndarray:
    """Probabilities of a Zipf-Mandelbrot law, flat at the head as codebook usage is: 1 / (rank + size / 8)."""
    weight = 1 / (np.arange(size) + size / 8)
    return weight / weight.sum()


def make_raw(folder: Path, rows: int, sizes: dict[str, int]) -> None:
    """sizes.json, and NAME.raw of each array: ids (rows, L), numbered at random so that an id tells no frequency."""
    from semdict.pipeline.shards import id_dtype

    rng = np.random.default_rng(0)
    (folder / "sizes.json").write_text(json.dumps(sizes))
    for name, size in sizes.items():
        # a table of 2^22 (2^25) equally likely ids stands for the law: one sample is one look-up
        cells = max(1 << 22, size << 7)
        ids = rng.permutation(size).astype(id_dtype(size))
        table = np.repeat(ids, np.round(zipf_counts(size) * cells).astype(int))
        with (folder / f"{name}.raw").open("wb") as file:
            for start in range(0, rows, ROWS):
                n = min(ROWS, rows - start)
                table[rng.integers(0, len(table), n * LENGTH, dtype=np.uint32)].tofile(file)


def read_sizes(folder: Path) -> dict[str, int]:
    return json.loads((folder / "sizes.json").read_text())


def raw_blocks(folder: Path, rows: int) -> Iterator:
    """Blocks read from the raw files, which are not mapped: maps would count towards peak memory."""
    from semdict.pipeline.shards import Block, id_dtype

    with ExitStack() as stack:
        sizes = read_sizes(folder)
        files = {name: stack.enter_context((folder / f"{name}.raw").open("rb")) for name in sizes}
        for start in range(0, rows, ROWS):
            n = min(ROWS, rows - start)
            ids = {
                name: np.fromfile(file, id_dtype(sizes[name]), n * LENGTH).reshape(n, 1, LENGTH)
                for name, file in files.items()
            }
            label = (np.arange(start, start + n) % 1000).astype(np.int32)
            yield Block(ids["gen"], ids.get("disc"), label, np.zeros(n, np.uint8))


def index_stream(rows: int):
    """index.parquet as a stream of ImageNet-like keys."""
    import pyarrow as pa

    schema = pa.schema([(name, pa.string()) for name in ("key", "split", "label_name", "reason")])

    def batches():
        for start in range(0, rows, 1 << 16):
            n = min(1 << 16, rows - start)
            keys = [f"n{i % 1000:08d}/n{i % 1000:08d}_{i}" for i in range(start, start + n)]
            yield pa.record_batch([keys, ["train"] * n, [""] * n, [""] * n], schema=schema)

    return pa.RecordBatchReader.from_batches(schema, batches())


def part_write(folder: Path, rows: int) -> dict:
    """Count and write; the time contains both walks over the blocks."""
    from semdict.pipeline.shards import ShardSpec, write_shards

    sizes = read_sizes(folder)
    spec = ShardSpec(rows, [{"name": "centre"}], (16, 16), sizes["gen"], sizes.get("disc"), title="synthetic")
    write_shards(folder / "shards", spec, lambda: raw_blocks(folder, rows), index_stream(rows))
    return {}


def part_verify(folder: Path, rows: int) -> dict:
    from semdict.pipeline.shards import verify_shards

    report = verify_shards(folder / "shards")
    assert report.ok and report.rows == rows, report.problems
    return {"files": report.files, "bytes": report.bytes}


def part_load(folder: Path, rows: int) -> dict:
    """The set in memory, as a trainer loads it at its start."""
    from semdict.pipeline.shards import open_shards

    loaded = open_shards(folder / "shards").load()
    assert loaded.gen.shape == (rows, 1, LENGTH)
    return {"token_bytes": loaded.gen.nbytes + (0 if loaded.disc is None else loaded.disc.nbytes)}


def part_read_one_core(folder: Path, rows: int) -> dict:
    """Original ids through the lazy arrays, one thread on one core, with the commands' setting of the allocator."""
    from semdict.pipeline.common.device import keep_freed_memory
    from semdict.pipeline.shards import open_shards

    keep_freed_memory()

    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    shards, done = open_shards(folder / "shards"), 0
    shards.gen[:1], shards.disc[:1]  # codecs are imported by the first read
    started, cpu = time.perf_counter(), time.process_time()
    for array in (shards.gen, shards.disc):
        for number in range(min(4, shards.layout.shards)):
            done += array[shards.layout.shard(number)].nbytes
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    return {"mb_per_s": done / 1e6 / seconds, "mb_per_cpu_s": done / 1e6 / cpu}


def part_read_raw(folder: Path, rows: int) -> dict:
    """The baseline of loading: the uncompressed ids, read into memory."""
    kept = [np.fromfile(folder / f"{name}.raw", np.uint16) for name in SIZES]
    return {"token_bytes": sum(part.nbytes for part in kept)}


def part_pt(folder: Path, rows: int) -> dict:
    """The authors' layout with int16 ids, the smallest type that torch indexes quickly: write, then load."""
    import torch

    names = {"gen": "tokens_vqgan", "disc": "tokens_dino"}
    tokens = {
        names[name]: torch.from_numpy(np.fromfile(folder / f"{name}.raw", np.int16).reshape(rows, LENGTH))
        for name in SIZES
    }
    started = time.perf_counter()
    torch.save(tokens | {"labels": torch.zeros(rows, dtype=torch.int64)}, folder / "tokens.pt")
    written = time.perf_counter()
    del tokens
    torch.load(folder / "tokens.pt", weights_only=True)
    loaded = time.perf_counter()
    size = (folder / "tokens.pt").stat().st_size
    return {"write_s": written - started, "load_s": loaded - written, "bytes_int16": size, "bytes_int64": 4 * size}


def part_zstd(folder: Path, rows: int) -> dict:
    """zstd -19 of raw uint16, on the first rows only: it makes about 2 MB/s."""
    from numcodecs import Zstd

    packed = {}
    for name in SIZES:
        raw = np.fromfile(folder / f"{name}.raw", np.uint8, 2 * LENGTH * min(rows, ROWS))
        packed[name] = 8 * len(Zstd(level=19).encode(raw)) / (raw.size / 2)
    return {"bits_per_token": packed, "rows": min(rows, ROWS)}


def child(part: str, folder: Path, rows: int) -> dict:
    """Run one part in a fresh process; adds wall seconds, CPU seconds and peak MB of that process."""
    from benchmarks.report import in_child

    return json.loads(in_child("benchmarks.bench_shards", "--part", part, "--folder", str(folder), "--rows", str(rows)))


def run_part(part: str, folder: Path, rows: int) -> dict:
    """One part, in the child process."""
    import pyarrow.parquet  # noqa: F401  imports are not measured
    import zarr  # noqa: F401

    started, cpu = time.perf_counter(), time.process_time()
    figures = globals()[f"part_{part}"](folder, rows)
    figures["seconds"], figures["cpu_seconds"] = time.perf_counter() - started, time.process_time() - cpu
    figures["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return figures


def measure(folder: Path, rows: int) -> dict:
    """Every part, and the ratios that the design asks for."""
    from benchmarks.report import machine
    from semdict.pipeline.shards.command import summary

    make_raw(folder, rows, SIZES)
    parts = ["write", "verify", "load", "read_one_core", "read_raw", "pt", "zstd"]
    result = {"rows": rows, "machine": machine(), "load_average": os.getloadavg()} | {
        part: child(part, folder, rows) for part in parts
    }
    small = max(1, rows // 10)
    tenth = folder / "tenth"
    tenth.mkdir()
    for name in SIZES:
        np.fromfile(folder / f"{name}.raw", np.uint16, small * LENGTH).tofile(tenth / f"{name}.raw")
    shutil.copy(folder / "sizes.json", tenth)
    result["write_tenth"] = child("write", tenth, small)
    books = summary(folder / "shards")["codebooks"]
    result["codebooks"] = books
    result["ratios"] = {
        f"{name}_bytes_over_entropy": book["bits_per_token"] / book["order0_entropy_bits"]
        for name, book in books.items()
    } | {
        f"{name}_zstd19_over_ours": result["zstd"]["bits_per_token"][name] / book["bits_per_token"]
        for name, book in books.items()
    }
    result["ratios"] |= {
        "pt_int64_bytes_over_ours": result["pt"]["bytes_int64"] / result["verify"]["bytes"],
        "write_peak_over_tenth": result["write"]["peak_mb"] / result["write_tenth"]["peak_mb"],
    }
    result |= measure_large(folder, rows)
    load = result["load"]
    result["load_mb_per_s"] = load["token_bytes"] / 1e6 / load["seconds"]
    result["load_mb_per_s_per_core"] = load["token_bytes"] / 1e6 / load["cpu_seconds"]
    return result


def measure_large(folder: Path, rows: int) -> dict:
    """One array of 2^18 codes with 32-bit ids: size over entropy, write, verify, load."""
    from semdict.pipeline.shards.command import summary

    large = folder / "large"
    large.mkdir()
    make_raw(large, rows, LARGE)
    parts = {part: child(part, large, rows) for part in ("write", "verify", "load")}
    book = summary(large / "shards")["codebooks"]["gen"]
    ratio = book["bits_per_token"] / book["order0_entropy_bits"]
    return {"large": {**parts, "codebook": book, "bytes_over_entropy": ratio}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="20,000 rows")
    parser.add_argument("--out", type=Path, default=Path("reports/bench/shards.json"))
    parser.add_argument("--rows", type=int, default=1_281_167)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, default=None, help="parent of a temporary folder of about 8 GB")
    args = parser.parse_args()
    if args.part:
        print(json.dumps(run_part(args.part, args.folder, args.rows)))
        return
    rows = 20_000 if args.small else args.rows
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        result = measure(folder, rows)
    finally:
        shutil.rmtree(folder)
    from benchmarks.report import publish

    publish(args.out, result)


if __name__ == "__main__":
    main()

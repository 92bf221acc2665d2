"""Token loader against DataLoader(TensorDataset), on a synthetic set of ImageNet-1k's size, in one process.

    python -m benchmarks.bench_loader [--small] [--out benchmarks/results/loader.json]

Both give shuffled batches of int64 ids from the same small-integer arrays. Prints images per second, seconds until the
first batch, and memory beyond the tokens themselves.
"""

import itertools
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.memory import status
from benchmarks.report import arguments, machine, publish
from semdict.pipeline.shards import Block, ShardSpec, write_shards
from semdict.train.data.resident import ResidentLoader, TokenTable, table_from_shards

LENGTH, CODES, WORDS = 256, 1024, 16384
TURNS = 4


def synthetic(rows: int) -> dict[str, np.ndarray]:
    """Zipf-like ids: gen below 1,024 and disc below 16,384, (rows, 1, 256) uint16; labels."""
    rng = np.random.default_rng(0)
    found = {}
    for name, size in (("gen", CODES), ("disc", WORDS)):
        weights = 1 / (np.arange(size) + 10)
        ids = rng.permutation(size)
        pool = ids[np.searchsorted(np.cumsum(weights / weights.sum()), rng.random(1 << 22)).clip(max=size - 1)]
        starts = rng.integers(
            0, len(pool) - LENGTH, rows
        )  # rows are windows into the pool: fast to make, hard to cache
        tokens = np.empty((rows, 1, LENGTH), np.uint16)
        for begin in range(0, rows, 1 << 16):
            part = starts[begin : begin + (1 << 16)]
            tokens[begin : begin + len(part), 0] = pool[part[:, None] + np.arange(LENGTH)]
        found[name] = tokens
    return {**found, "label": rng.integers(0, 1000, rows).astype(np.int32)}


def measure(makes: dict[str, Callable[[], Iterator[Any]]], batch: int, seconds: float) -> dict[str, dict[str, float]]:
    """Seconds to the first batch, then the best of several turns, so that a busy machine slows all of them alike.

    images_per_cpu_s counts this process's own processor time, all threads together.
    """
    found, open_ones = {}, {}
    for name, make in makes.items():
        before, began = status("VmRSS"), perf_counter()
        open_ones[name] = make()
        next(open_ones[name])
        added = round((status("VmRSS") - before) / 2**20)
        found[name] = {"ready_s": round(perf_counter() - began, 3), "added_mb": added, "images_per_s": 0}
    for _ in range(TURNS):
        for name, batches in open_ones.items():
            began, cpu, count = perf_counter(), process_time(), 0
            while perf_counter() - began < seconds / TURNS:
                next(batches)
                count += batch
            wall, cpu = perf_counter() - began, process_time() - cpu
            if count / wall > found[name]["images_per_s"]:
                found[name] |= {"images_per_s": round(count / wall), "images_per_cpu_s": round(count / cpu)}
    return found


def baseline(tokens: dict[str, np.ndarray], batch: int, workers: int) -> Iterator[Any]:
    """The usual way: items one by one, collated, shuffled by torch."""
    columns = [torch.from_numpy(tokens[name][:, 0].view(np.int16)) for name in ("gen", "disc")]
    loader = DataLoader(
        TensorDataset(*columns, torch.from_numpy(tokens["label"])), batch, shuffle=True, num_workers=workers
    )
    for gen, disc, label in itertools.chain.from_iterable(itertools.repeat(loader)):
        yield gen.long(), disc.long(), label.long()


def from_shards(tokens: dict[str, np.ndarray], batch: int) -> dict[str, float]:
    """The same set from a shard directory on disk: seconds until the first batch, and what stays in memory."""
    rows, step = len(tokens["label"]), 1 << 16
    with tempfile.TemporaryDirectory() as folder:
        spec = ShardSpec(rows, [{"name": "centre"}], (16, 16), CODES, WORDS)
        write_shards(Path(folder) / "set", spec, lambda: blocks(tokens, step), index_of(rows))
        for column in ("gen", "disc"):
            tokens[column] = tokens[column][:1]  # the source goes, so that memory is the loader's alone
        before, began = status("VmRSS"), perf_counter()
        table = table_from_shards(Path(folder) / "set")
        loader = ResidentLoader(table, batch, 0)
        next(loader)
        ready = perf_counter() - began
    held = table.gen.nbytes + table.disc.nbytes
    beyond = (status("VmRSS") - before - held) / 2**20
    return {"ready_s": round(ready, 2), "tokens_mb": round(held / 2**20), "beyond_tokens_mb": round(beyond)}


def blocks(tokens: dict[str, np.ndarray], step: int) -> Iterator[Block]:
    """The set in pieces, as a writer takes it."""
    for start in range(0, len(tokens["label"]), step):
        part = {name: values[start : start + step] for name, values in tokens.items()}
        yield Block(**part, status=np.zeros(len(part["label"]), np.uint8))


def index_of(rows: int) -> Any:
    """An index with the fewest columns."""
    import pyarrow as pa

    empty = pa.array([""] * rows)
    keys = pa.array([f"{n:08d}" for n in range(rows)])
    return pa.table({"key": keys, "split": pa.array(["train"] * rows), "label_name": empty, "reason": empty})


def main() -> None:
    """Measure, print ratios, write JSON."""
    parser = arguments(__doc__.splitlines()[0], "loader")
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--seconds", type=float, default=10.0, help="for each loader")
    args = parser.parse_args()
    rows = 50_000 if args.small else 1_281_167
    tokens = synthetic(rows)
    makes = {
        "resident": lambda: ResidentLoader(
            TokenTable.of(tokens["gen"], tokens["disc"], tokens["label"]), args.batch, seed=0
        ),
        "dataloader_0_workers": lambda: baseline(tokens, args.batch, 0),
        "dataloader_2_workers": lambda: baseline(tokens, args.batch, 2),
    }
    found = measure(makes, args.batch, args.seconds)
    theirs = max(found[f"dataloader_{n}_workers"]["images_per_s"] for n in (0, 2))
    ratio = round(found["resident"]["images_per_s"] / theirs, 1)
    setting = {"rows": rows, "batch": args.batch, "threads": torch.get_num_threads(), "load": os.getloadavg()[0]}
    found["from_shards"] = from_shards(tokens, args.batch)
    publish(args.out, {**found, "ratio_images_per_s": ratio, "setting": setting, "machine": machine()})


if __name__ == "__main__":
    main()

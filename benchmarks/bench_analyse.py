"""`semdict analyse` at ImageNet-1k's size: 1,281,167 x 256 pairs of 1,024 x 16,384 ids and 1,000 classes.

The whole command, figures included, in a child process: wall time and peak memory. Baseline of the counting, on fewer
rows: numpy.unique over all pairs of ids held in memory.
Example: python -m benchmarks.bench_analyse --out benchmarks/results/analyse.json      (--small for a quick look)
"""

import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.bench_shards import SIZES, make_raw, part_write
from benchmarks.report import arguments, in_child, machine, publish
from semdict.pipeline.analysis.token_counts import count_tokens
from semdict.pipeline.shards import open_shards


def make(folder: Path, rows: int) -> Path:
    """A shard directory of `rows` random rows."""
    folder.mkdir()
    make_raw(folder, rows, SIZES)
    part_write(folder, rows)
    for name in SIZES:
        (folder / f"{name}.raw").unlink()
    return folder / "shards"


def child(shards: str, out: str) -> None:
    """Run the command; prints its seconds and this process's peak memory."""
    from semdict.cli import main as semdict

    started = time.perf_counter()
    status = semdict(["analyse", shards, "--out", out])
    seconds = time.perf_counter() - started
    assert status == 0
    print(json.dumps({"seconds": seconds, "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))


def compared(path: Path) -> dict[str, float]:
    """Seconds of one pass over the files, and of numpy.unique over pairs that are in memory; both give equal counts."""
    shards = open_shards(path)
    started = time.perf_counter()
    counts = count_tokens(shards)
    ours = time.perf_counter() - started
    loaded = shards.load()
    started = time.perf_counter()
    pairs = loaded.gen.astype(np.int64) * SIZES["disc"] + loaded.disc
    numbers, occurrences = np.unique(pairs, return_counts=True)
    baseline = time.perf_counter() - started
    assert np.array_equal(counts.joint.reshape(-1)[numbers], occurrences)
    return {"ours_s": ours, "unique_s": baseline, "ratio": baseline / ours}


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:4])
        return
    args = arguments(__doc__, "analyse").parse_args()
    rows, few = (2_000, 1_000) if args.small else (1_281_167, 65_536)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        output = in_child("benchmarks.bench_analyse", "--child", str(make(root / "all", rows)), str(root / "out"))
        command = json.loads(output.splitlines()[-1])
        counting = compared(make(root / "few", few))
    publish(
        args.out,
        {"machine": machine(), "rows": rows, "command": command, "rows_compared": few, "counting": counting},
    )


if __name__ == "__main__":
    main()

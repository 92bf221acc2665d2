"""Runs the campaign: `python -m tests.campaign`; finished cases are kept in work/campaign and not run again."""

import argparse
import json
import os
import random
import shutil
import sys
import time
from pathlib import Path

from semdict.pipeline.common.files import write_json
from tests.campaign import child, flips, inputs, kills, record
from tests.campaign.case import Case
from tests.campaign.world import STEPS, make_inputs

GROUPS = ("kills", "flips", "inputs")
COUNTS = Path("docs/results/campaign.json")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.campaign", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30, help="stop then; the next call goes on (default: 30)")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains TEXT")
    parser.add_argument("--folder", type=Path, default=Path("work/campaign"), help="results (default: work/campaign)")
    parser.add_argument("--out", type=Path, default=COUNTS, help=f"counts (default: {COUNTS})")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    return parser.parse_args()


def main() -> int:
    """Run what is left of the campaign, write the counts and print the faults; 1 where there is one."""
    args = arguments()
    folder = args.folder.resolve()
    if args.fresh:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    child.import_everything()
    world = build_world(folder)
    cases = all_cases(world, folder, args.only)
    cases = [case for case in cases if args.only in case.name]
    todo = record.waiting(cases, record.read(folder))
    random.Random(0).shuffle(todo)  # a campaign that is stopped early has tried something of everything
    print(f"{len(cases)} cases, {len(todo)} to run", file=sys.stderr)
    stop = time.monotonic() + 60 * args.minutes
    workers = [start_worker(number, todo[number :: args.jobs], folder, stop) for number in range(args.jobs)]
    for pid in workers:
        os.waitpid(pid, 0)
    results = record.read(folder)
    counts = record.summary(cases, results)
    if not args.only:
        write_json(args.out, counts)
    print("\n".join(record.faults(cases, results)))
    print(json.dumps({"groups": counts["groups"], "faults": counts["faults"]}))
    return int(any(counts["faults"].values()))


def build_world(folder: Path) -> Path:
    """Every command once, in an order in which each finds its inputs; a world of an earlier call is made anew."""
    root = folder / "full"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    made = child.call(lambda: make_inputs(root), root)
    for step in STEPS.values():
        if made.status:
            break
        made = child.run(step.again, root)
    if made.status:
        raise SystemExit(f"the world cannot be made:\n{made.err}")
    shutil.rmtree(root / "work")
    return root


def all_cases(world: Path, folder: Path, only: str) -> list[Case]:
    """Every case of the campaign, in a fixed order."""
    return [*kills.cases(world, folder, only), *flips.cases(world, folder, only), *inputs.cases(world)]


def start_worker(number: int, cases: list[Case], folder: Path, stop: float) -> int:
    """A process that runs some cases, one after the other, until the time is over; returns its id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        for case in cases:
            if time.monotonic() > stop:
                break
            record.append(folder / f"results-{number}.jsonl", case, case.run(folder / f"case-{number}"))
    finally:
        os._exit(0)


if __name__ == "__main__":
    sys.exit(main())

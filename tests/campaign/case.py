"""A case: an identity, from which its random numbers follow, and a check that returns a verdict."""

import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tests.campaign.child import CPU_SECONDS, Outcome

MEMORY = 1_500_000_000  # bytes of resident memory that no bad input may exceed
LINES = 2  # of an error message
SIGALRM, SIGXCPU = -14, -24


@dataclass(frozen=True)
class Verdict:
    """ok: as promised. fault: one of FAULTS otherwise, with a text. inputs: files that the case tried."""

    kind: str  # what happened: killed | not reached | harmless | detected | accepted | refused
    fault: str = ""
    text: str = ""
    inputs: int = 1
    peak: int = 0
    seconds: float = 0.0


FAULTS = ("differing", "leftovers", "partial", "silent", "traceback", "message", "memory", "time", "failed")


@dataclass(frozen=True)
class Case:
    """`group/kind/number`, and the function that checks it in an empty folder of its own."""

    name: str
    check: Callable[[Path], Verdict] = field(repr=False)

    @property
    def group(self) -> str:
        return self.name.split("/")[0]

    @property
    def kind(self) -> str:
        """Name without its number."""
        return self.name.rsplit("/", 1)[0]

    def run(self, folder: Path) -> Verdict:
        """Check the case in `folder`, which is emptied before and afterwards."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            return self.check(folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def concerns(only: str, label: str) -> bool:
    """Whether cases whose names begin with `label` may contain the text `only`."""
    return only in label or only.startswith(label)


def rng_of(name: str) -> np.random.Generator:
    """Random numbers of a case: the same in every campaign."""
    return np.random.default_rng(zlib.crc32(name.encode()))


def fault_of(outcome: Outcome) -> tuple[str, str]:
    """The fault in how a run ended, and a text; ("", "") if it ended as promised, whatever its status."""
    tail = " | ".join(outcome.lines[-4:])[-600:]
    if "Traceback (most recent call last)" in outcome.err:
        return "traceback", tail
    if outcome.status in (SIGALRM, SIGXCPU):
        return "time", f"killed after {outcome.seconds:.0f} s, {CPU_SECONDS} s of CPU allowed"
    if outcome.status not in (0, 1, 2):
        return "traceback", f"status {outcome.status}: {tail}"
    if outcome.peak > MEMORY:
        return "memory", f"{outcome.peak / 1e6:.0f} MB"
    message = [line for line in outcome.lines if not line.startswith("usage:")]
    reported = not message and outcome.out.strip()  # `shards verify` prints what it was asked for
    if outcome.status and not reported and not 1 <= len(message) <= LINES and not is_usage(outcome):
        return "message", f"{len(message)} lines: {tail}"
    return "", ""


def is_usage(outcome: Outcome) -> bool:
    """Whether argparse has refused the command line, and shown its usage."""
    return outcome.status == 2 and "error:" in outcome.err

"""Kills: every command dies before each of its file events, is run again, and must publish the same bytes."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.campaign import child
from tests.campaign.case import Case, Verdict, concerns, fault_of
from tests.campaign.compare import Snapshot
from tests.campaign.world import STEPS, Step, clone

# Written while a trainer runs, to be looked at: complete only at its end.
LIVE = ("/plots/", "/log.jsonl")
# Commands whose earlier output may be there already; a kill must leave the old or the new one. Trainers refuse it.
REPLACING = ("manifest", "sample-features", "kmeans", "encode", "export pt", "export webdataset", "export hf", "import",
             "vcq encode", "report")  # fmt: skip


@dataclass(frozen=True)
class Reference:
    """A run that is not killed: what it leaves, and how many file events it has."""

    step: Step
    world: Path
    replacing: bool
    events: str
    after: Snapshot

    @classmethod
    def of(cls, step: Step, world: Path, folder: Path, replacing: bool) -> "Reference":
        """Run the step once in a copy of the world."""
        root = prepare(step, world, folder, replacing)
        outcome = child.run(step.again, root)
        if outcome.status:
            raise RuntimeError(f"`semdict {step.words}` fails without any fault: {outcome.err[-2000:]}")
        return cls(step, world, replacing, outcome.events, Snapshot(root, world))


def prepare(step: Step, world: Path, folder: Path, replacing: bool = False) -> Path:
    """A copy of the world in which the step has not run, or (replacing) has run before."""
    root = folder / "world"
    shutil.rmtree(root, ignore_errors=True)
    clone(world, root, () if replacing else step.outs)
    return root


def cases(world: Path, folder: Path, only: str = "") -> Iterator[Case]:
    """One case per file event of every command, and one more where a half-written file can be left."""
    for name, step in STEPS.items():
        for replacing in (False, True) if name in REPLACING else (False,):
            label = f"kills/{name}{' over an earlier output' if replacing else ''}"
            if not concerns(only, label):
                continue
            reference = Reference.of(step, world, folder / "reference", replacing)
            for event, letter in enumerate(reference.events, 1):
                for torn in (False, True) if letter == child.RENAME else (False,):
                    yield Case(f"{label}/{event:04d}{'-torn' if torn else ''}", Kill(reference, event, torn))


@dataclass(frozen=True)
class Kill:
    """One kill; with `torn`, the file that is to be renamed is cut to half first."""

    reference: Reference
    event: int
    torn: bool

    def __call__(self, folder: Path) -> Verdict:
        step, world = self.reference.step, self.reference.world
        root = prepare(step, world, folder, self.reference.replacing)
        before = Snapshot(root, world)
        outcome = child.run(step.again, root, kill_at=self.event, torn=self.torn)
        if outcome.status != -9:
            return Verdict("not reached")
        partial = self.partial(before, Snapshot(root, world))
        if partial:
            return Verdict("killed", "partial", f"{partial[:3]} is neither the old file nor the new one")
        outcome = child.run(step.again, root)
        if outcome.status:
            fault, text = fault_of(outcome)
            return Verdict("killed", fault or "failed", text or " | ".join(outcome.lines)[-600:])
        after = Snapshot(root, world)
        if extra := after.leftovers(self.reference.after):
            return Verdict("killed", "leftovers", f"{extra[:3]}")
        if unlike := after.differences(self.reference.after):
            return Verdict("killed", "differing", f"{unlike[:3]}")
        return Verdict("killed", peak=outcome.peak, seconds=outcome.seconds)

    def partial(self, before: Snapshot, now: Snapshot) -> list[str]:
        """Published files that are neither as before nor as at the end."""
        old, new = before.digests, self.reference.after.digests
        return [
            name
            for name, digest in now.published(self.reference.step.outs).items()
            if digest not in (old.get(name), new.get(name)) and not any(live in f"/{name}" for live in LIVE)
        ]

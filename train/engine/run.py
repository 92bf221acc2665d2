"""Where a run waits and where it ends: a work folder per fingerprint, published by one rename when the run is complete.

DVC deletes a stage's outputs before it runs the stage, so a run that is under way lives in work/<kind>-<fingerprint>/,
where the same command finds it again after a kill.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from semdict.pipeline.common.errors import SemdictError, UsageError
from semdict.pipeline.common.files import remove, sha256_file, sha256_json, write_json
from semdict.pipeline.common.publish import check_output, occupied, publish_staged
from semdict.pipeline.execute.locks import lock
from semdict.pipeline.execute.store import WORK
from semdict.train.engine import dist
from semdict.train.engine.checkpoint import differences, plain
from semdict.train.engine.model_file import CARD


def fingerprint(settings: dict[str, Any]) -> str:
    """16 hex digits over everything in `settings`, which holds all that shapes the result and nothing else."""
    return sha256_json(plain(settings))[:16]


@dataclass
class Place:
    """The folders of one run and what it is."""

    kind: str
    settings: dict[str, Any]
    out: Path
    root: Path = WORK

    @property
    def fingerprint(self) -> str:
        """Names the run."""
        return fingerprint(self.settings)

    @property
    def folder(self) -> Path:
        """Where the run waits until it is complete."""
        return Path(self.root) / f"{self.kind}-{self.fingerprint}"

    def card(self, folder: Path) -> dict[str, Any] | None:
        """The card of a complete run in `folder`; None where there is none."""
        path = folder / CARD
        try:
            return json.loads(path.read_text())
        except FileNotFoundError:
            return None
        except ValueError:
            raise SemdictError(f"{path} is damaged; remove {folder} and run again") from None

    def published(self, resume: bool) -> dict[str, Any] | None:
        """The card of this very run if `out` holds it (then there is nothing to do); None if it must be trained.

        UsageError when `out` holds another run, or holds one and `resume` was not asked for: nothing is overwritten.
        """
        check_output(self.out, "run")
        if not occupied(self.out):
            return None
        card = self.card(self.out)
        if card["fingerprint"] == self.fingerprint and resume:
            return card
        changed = "; ".join(differences(card["settings"], plain(self.settings)))
        why = f"of other settings ({changed}; there -> now)" if changed else "already complete; --resume keeps it"
        raise UsageError(f"{self.out} holds a run {why}. Give another --out, or remove that folder first")

    def unfinished_others(self) -> list[str]:
        """Names of work folders of the same kind that hold other settings."""
        return sorted(p.name for p in Path(self.root).glob(f"{self.kind}-*") if p.is_dir() and p != self.folder)

    def complete(self, numbers: dict[str, Any]) -> dict[str, Any]:
        """Mark the run complete: the card is written, with the SHA-256 of every model file."""
        numbers = {**numbers, "files": {path.name: sha256_file(path) for path in sorted(self.folder.glob("*.pt"))}}
        card = {"kind": self.kind, "fingerprint": self.fingerprint, "settings": plain(self.settings), **numbers}
        write_json(self.folder / CARD, card)
        return card

    def publish(self) -> None:
        """Put the work folder in the place of `out`, without what is only needed to continue.

        UsageError when another run was published there meanwhile: this one waits in its work folder.
        """
        self.published(resume=True)
        remove(self.folder / "checkpoints")
        publish_staged(self.folder, self.out, "run")


@contextmanager
def held(place: Place, world: dist.World, resume: bool) -> Iterator[None]:
    """Hold the run's lock on rank 0 (BusyError tells a second run); without `resume` what waits is thrown away."""
    if not world.first:
        dist.barrier()
        yield
        return
    with lock(place.folder.name, place.root):
        if not resume:
            remove(place.folder)
        place.folder.mkdir(parents=True, exist_ok=True)
        dist.barrier()
        yield

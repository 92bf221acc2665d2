"""Checkpoints: whole files of plain tensors, numbers and text; the newest is named by a `last` pointer, old ones go.

A file holds everything that a run needs to continue bit-exactly: step, modules, optimisers, gradient scaler, loader
position, settings and their fingerprint. There is no generator state to keep: every draw of a run is a function of its
seed and step (train.draws).
"""

from pathlib import Path
from typing import Any

import torch

from semdict.pipeline.common.errors import WeightsError
from semdict.pipeline.common.files import remove, write_aside
from semdict.pipeline.common.safeload import load_checkpoint

FORMAT = 1
LAST = "last"
PARTS = ("format", "step", "modules", "optimisers", "scaler", "loader", "settings", "fingerprint")


def save(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write `step-00000123.pt`, point `last` at it, and delete all but the `keep` newest; returns the file.

    Killed at any moment, `last` names a whole file: the file is complete before the pointer moves, and the pointer is
    moved before anything is deleted.
    """
    path = Path(folder) / f"step-{step:08d}.pt"
    with write_aside(path) as aside:
        torch.save({"format": FORMAT, "step": step, **state}, aside)
    with write_aside(path.with_name(LAST)) as aside:
        aside.write_text(path.name + "\n")
    for old in stored(folder)[: -max(1, keep)]:
        if old != path:
            remove(old)
    return path


def stored(folder: Path) -> list[Path]:
    """The checkpoint files in a folder, oldest first."""
    return sorted(Path(folder).glob("step-*.pt"))


def last(folder: Path) -> Path | None:
    """The file that the `last` pointer names; None where nothing was saved yet.

    WeightsError when the pointer names a file that is not there, or is not a plain file name.
    """
    pointer = Path(folder) / LAST
    if not pointer.exists():
        return None
    name = pointer.read_text().strip()
    path = Path(folder) / name
    if path.parent != Path(folder) or not path.is_file():
        left = ", ".join(p.name for p in stored(folder)) or "none"
        raise WeightsError(f"{pointer} names {name!r}, which is not in {folder}; write one of these into it: {left}")
    return path


def load(path: Path, fingerprint: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Read a checkpoint of this run; WeightsError when it is damaged, unsafe, or of other settings (then named)."""
    state = load_checkpoint(path)
    missing = [part for part in PARTS if part not in state]
    if missing or state["format"] != FORMAT:
        lacks = ", ".join(missing) or "that format"
        raise WeightsError(f"{path} is not a checkpoint of format {FORMAT}: it lacks {lacks}")
    if state["fingerprint"] != fingerprint:
        changed = "; ".join(differences(state["settings"], settings)) or "the code that wrote it"
        raise WeightsError(
            f"{path} belongs to another run and was not continued. It differs in: {changed} (checkpoint -> now). "
            "Set these back, or start anew without --resume"
        )
    return state


def differences(theirs: dict[str, Any], mine: dict[str, Any], prefix: str = "") -> list[str]:
    """One `key: theirs -> mine` per leaf in which two nested settings differ."""
    found = []
    for key in sorted(theirs.keys() | mine.keys(), key=str):
        a, b = theirs.get(key, "absent"), mine.get(key, "absent")
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{key}.")
        elif plain(a) != plain(b):
            found.append(f"{prefix}{key}: {a} -> {b}")
    return found


def plain(value: Any) -> Any:
    """A value as JSON would give it back: tuples become lists, all the way down, so that settings compare and hash."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value

"""Checkpoints: complete files of plain tensors, numbers and text; the pointer `last` names the newest and its SHA-256.

A file holds everything that a run needs to continue bit-exactly: step, modules, optimisers, gradient scaler, position
of the dataloader, settings and their fingerprint. There is no generator state: every random number of a run is a
function of its seed and step (engine/rng.py).
"""

from pathlib import Path
from typing import Any

import torch

from semdict.pipeline.common.errors import WeightsError
from semdict.pipeline.common.files import atomic_write, remove, sha256_file
from semdict.pipeline.common.safeload import load_checkpoint

FORMAT = 1
LAST = "last"  # one line as `sha256sum` writes it: digest, two spaces, file name
PARTS = ("format", "step", "modules", "optimisers", "scaler", "loader", "settings", "fingerprint")


def save(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write `step-00000123.pt`, point `last` at it, and delete all but the `keep` newest; returns the file.

    If killed at any moment, `last` names a complete file: the file is complete before the pointer moves, and the
    pointer is moved before anything is deleted.
    """
    path = Path(folder) / f"step-{step:08d}.pt"
    with atomic_write(path) as staged:
        torch.save({"format": FORMAT, "step": step, **state}, staged)
    point_to(path)
    for old in stored(folder)[: -max(1, keep)]:
        if old != path:
            remove(old)
    return path


def point_to(path: Path) -> None:
    """Make `path` the checkpoint that `last` names."""
    with atomic_write(path.with_name(LAST)) as staged:
        staged.write_text(f"{sha256_file(path)}  {path.name}\n")


def stored(folder: Path) -> list[Path]:
    """The checkpoint files in a folder, oldest first."""
    return sorted(Path(folder).glob("step-*.pt"))


def last(folder: Path) -> Path | None:
    """The checkpoint that `last` names, checked against its SHA-256; None where nothing was saved yet.

    Raises WeightsError if the pointer does not name a file of this folder, or if the file is not the one that was
    saved; the message names the other checkpoints and the command that points to one of them.
    """
    pointer = Path(folder) / LAST
    if not pointer.exists():
        return None
    digest, _, name = pointer.read_text().strip().partition("  ")
    path = Path(folder) / name
    if path.parent != Path(folder) or not path.is_file():
        raise WeightsError(f"{pointer} names {name!r}, which is not in {folder}; {_others(Path(folder), path)}")
    if sha256_file(path) != digest:
        raise WeightsError(f"{path} is damaged: its SHA-256 is not the one in {pointer}; {_others(Path(folder), path)}")
    return path


def _others(folder: Path, unusable: Path) -> str:
    """How to continue from another checkpoint of the folder."""
    names = [path.name for path in stored(folder) if path != unusable]
    if not names:
        return "there is no other checkpoint: start anew without --resume"
    command = f"cd {folder} && sha256sum {names[-1]} > {LAST}"
    return f"other checkpoints: {', '.join(names)}; to continue from the newest: {command}"


def load(path: Path, fingerprint: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Read a checkpoint of this run; WeightsError if it is damaged, unsafe, or of other settings (then named)."""
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


def differences(stored: dict[str, Any], current: dict[str, Any], prefix: str = "") -> list[str]:
    """One `key: stored -> current` per leaf in which two nested settings differ."""
    changed = []
    for key in sorted(stored.keys() | current.keys(), key=str):
        a, b = stored.get(key, "absent"), current.get(key, "absent")
        if isinstance(a, dict) and isinstance(b, dict):
            changed += differences(a, b, f"{prefix}{key}.")
        elif plain(a) != plain(b):
            changed.append(f"{prefix}{key}: {a} -> {b}")
    return changed


def plain(value: Any) -> Any:
    """A value as JSON would return it: tuples become lists at any depth, so that settings compare and hash."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value

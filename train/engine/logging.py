"""Logs of a run: a JSONL file, plots in the files that DVC reads, and whatever trackers follow it.

The JSONL file is the one source; a resumed run cuts it back to its checkpoint and writes the plots again from it.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from semdict.pipeline.common.files import atomic_write
from semdict.train.engine.trackers import TrackerFactory


class RunLog:
    """Scalars of one run, written by rank 0 only.

    folder: gets log.jsonl. reports: gets plots/<scalar>.tsv (columns step and the scalar's name: the layout of
    DVCLive), readable by `dvc plots` while the run is in progress; None = no reports. trackers: get every line too.
    """

    def __init__(
        self, folder: Path, reports: Path | None = None, trackers: Sequence[TrackerFactory] = (), at_step: int = 0
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.reports = folder / "log.jsonl", reports
        rows = cut_back(self.path, at_step)
        self._file = self.path.open("a")
        self._plots: dict[str, Any] = {}
        if reports is not None:
            remove_plots(reports / "plots")
            for row in rows:
                self._plot(row)
        opened = (factory(folder, at_step) for factory in trackers)
        self._trackers = [tracker for tracker in opened if tracker is not None]

    def write(self, step: int, scalars: dict[str, float], speed: dict[str, float]) -> None:
        """Add one line: scalars, which are plotted too, and speed, which is only logged."""
        row = {"step": step, **{name: _number(value) for name, value in scalars.items()}}
        self._file.write(json.dumps({**row, "speed": speed}) + "\n")
        self._file.flush()
        if self.reports is not None:
            self._plot(row)
        for tracker in self._trackers:
            tracker.write(step, {**scalars, **speed})

    def picture(self, step: int, name: str, image_HWC: Any) -> None:
        """Show a uint8 RGB array in the trackers."""
        for tracker in self._trackers:
            tracker.picture(step, name, image_HWC)

    def close(self) -> None:
        """Flush and close every file."""
        self._file.close()
        for file in self._plots.values():
            file.close()
        for tracker in self._trackers:
            tracker.close()

    def _plot(self, row: dict[str, Any]) -> None:
        for name, value in row.items():
            if name in ("step", "speed"):
                continue
            if name not in self._plots:
                path = self.reports / "plots" / f"{name}.tsv"
                path.parent.mkdir(parents=True, exist_ok=True)
                self._plots[name] = path.open("w", buffering=1)
                self._plots[name].write(f"step\t{name}\n")
            self._plots[name].write(f"{row['step']}\t{value}\n")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a log.jsonl; a last line that a kill cut short is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def cut_back(path: Path, step: int) -> list[dict[str, Any]]:
    """Remove what a killed run logged after its last checkpoint; returns the remaining rows."""
    rows = [row for row in read_log(path) if row["step"] <= step]
    if path.exists():
        with atomic_write(path) as staged:
            staged.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def remove_plots(folder: Path) -> None:
    """Remove the curves of an earlier run, recognised by their first column; other files stay."""
    for path in folder.glob("*.tsv"):
        with path.open("rb") as file:
            ours = file.read(5) == b"step\t"
        if ours:
            path.unlink()


def _number(value: float) -> float | str:
    """JSON has no NaN: a number that is none is written as text."""
    return value if math.isfinite(value) else str(value)

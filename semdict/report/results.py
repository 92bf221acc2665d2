"""Reads the files that stages write to reports/PRESET and runs/PRESET."""

import csv
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from semdict.pipeline.common.errors import SemdictError, UsageError


@dataclass(frozen=True)
class Curve:
    """One quantity over steps, epochs or positions."""

    name: str
    x_name: str
    x: list[float]
    y: list[float]


class Results:
    """Files of one preset below `root`; raises UsageError when there are none at all."""

    def __init__(self, preset: str, root: Path = Path()):
        self.preset, self.reports, self.runs = preset, root / "reports" / preset, root / "runs" / preset
        if not self.reports.is_dir():
            presets = sorted(path.name for path in (root / "reports").glob("*/") if path.is_dir())
            raise UsageError(f"{self.reports}: no results; there are {presets or 'none'}; dvc repro makes them")

    def read(self, name: str) -> dict[str, Any] | None:
        """reports/PRESET/NAME as a dictionary, None if there is no such file; SemdictError if it is no JSON object."""
        path = self.reports / name
        if not path.exists():
            return None
        try:
            content = json.loads(path.read_text())
        except ValueError as error:
            raise SemdictError(f"{path}: not JSON ({error}); make it again") from error
        if not isinstance(content, dict):
            raise SemdictError(f"{path}: holds no table of results; make it again")
        return content

    def masked_runs(self) -> list[str]:
        """Names of the masked-token runs, sorted: those whose metrics.json compares losses with chance."""
        names = sorted(path.parent.name for path in self.reports.glob("*/metrics.json"))
        return [name for name in names if "chance" in (self.read(f"{name}/metrics.json") or {})]

    def scores(self, run: str) -> dict[str, dict[str, Any]]:
        """Measure -> its score file, for every measure computed for a run."""
        names = sorted(path.stem for path in (self.reports / run).glob("*.json"))
        files = {name: self.read(f"{run}/{name}.json") or {} for name in names}
        return {name: file for name, file in files.items() if "protocol" in file}

    def curves(self, folder: str) -> dict[str, Curve]:
        """Name -> curve of every plots/NAME.tsv of a run with more than one point."""
        paths = sorted((self.reports / folder / "plots").glob("*.tsv"))
        curves = {path.stem: read_curve(path, path.stem, "\t") for path in paths}
        return {name: curve for name, curve in curves.items() if len(curve.x) > 1}

    def table_curve(self, name: str, y: str) -> Curve | None:
        """One column of a CSV file over its first column."""
        path = self.reports / name
        return read_curve(path, y, ",") if path.exists() else None


def read_curve(path: Path, y: str, delimiter: str) -> Curve:
    """Column `y` over the first column of a delimited file; rows with an empty or non-finite value are left out."""
    with path.open(newline="") as file:
        reader = csv.DictReader(file, delimiter=delimiter)
        x_name = (reader.fieldnames or [""])[0]
        rows = [(row[x_name], row.get(y)) for row in reader]
    try:
        points = [(float(x), float(value)) for x, value in rows if x and value]
    except ValueError as error:
        raise SemdictError(f"{path}: {error}; make it again") from error
    finite = [point for point in points if math.isfinite(point[1])]
    return Curve(y, x_name, [x for x, _ in finite], [value for _, value in finite])

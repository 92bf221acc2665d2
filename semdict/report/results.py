"""What the stages left in reports/PRESET and runs/PRESET, read without judging it."""

import csv
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from semdict.pipeline.common.errors import SemdictError, UsageError

NOT_TRAINERS = ("vcq", "ar", "vcq-encode")


@dataclass(frozen=True)
class Curve:
    """One quantity over steps, epochs or positions."""

    name: str
    x_name: str
    x: list[float]
    y: list[float]


class Results:
    """Files of one preset below `root`; UsageError when there are none at all."""

    def __init__(self, preset: str, root: Path = Path()):
        self.preset, self.reports, self.runs = preset, root / "reports" / preset, root / "runs" / preset
        if not self.reports.is_dir():
            there = sorted(found.name for found in (root / "reports").glob("*/") if found.is_dir())
            raise UsageError(f"{self.reports}: no results; there are {there or 'none'}; dvc repro makes them")

    def read(self, name: str) -> dict[str, Any] | None:
        """reports/PRESET/NAME as a dictionary, None when it is not there; SemdictError when it is no JSON object."""
        path = self.reports / name
        if not path.exists():
            return None
        try:
            found = json.loads(path.read_text())
        except ValueError as error:
            raise SemdictError(f"{path}: not JSON ({error}); make it again") from error
        if not isinstance(found, dict):
            raise SemdictError(f"{path}: holds no table of results; make it again")
        return found

    def trainers(self) -> list[str]:
        """Names of the runs of `semdict pretrain` that left metrics, LEASE first."""
        names = {path.parent.name for path in self.reports.glob("*/metrics.json")} - set(NOT_TRAINERS)
        return sorted(names, key=lambda name: (name != "lease", name))

    def curves(self, folder: str) -> dict[str, Curve]:
        """Name -> curve, of every plots/NAME.tsv of a run."""
        found = {}
        for path in sorted((self.reports / folder / "plots").glob("*.tsv")):
            curve = read_curve(path, path.stem, "\t")
            if len(curve.x) > 1:
                found[path.stem] = curve
        return found

    def table_curve(self, name: str, y: str) -> Curve | None:
        """One column of a CSV over its first column."""
        path = self.reports / name
        return read_curve(path, y, ",") if path.exists() else None


def read_curve(path: Path, y: str, delimiter: str) -> Curve:
    """Two columns of a delimited file; rows with an empty or non-finite value are left out."""
    with path.open(newline="") as file:
        reader = csv.DictReader(file, delimiter=delimiter)
        x_name = (reader.fieldnames or [""])[0]
        rows = [(row[x_name], row.get(y)) for row in reader]
    try:
        numbers = [(float(x), float(value)) for x, value in rows if x and value]
    except ValueError as error:
        raise SemdictError(f"{path}: {error}; make it again") from error
    finite = [pair for pair in numbers if math.isfinite(pair[1])]
    return Curve(y, x_name, [x for x, _ in finite], [value for _, value in finite])

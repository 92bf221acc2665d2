"""Reads the files that stages write to reports/PRESET and runs/PRESET."""

import csv
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from semdict.pipeline.common.errors import SemdictError, UsageError

SAMPLING = ("generate.json", "sampling.json")  # cards of masked-token and autoregressive samples


@dataclass(frozen=True)
class Curve:
    """One quantity over steps, epochs or positions."""

    name: str
    x_name: str
    x: list[float]
    y: list[float]


@dataclass(frozen=True)
class Confusion:
    """counts (C, C) int64: images of class i (rows) taken for class j."""

    classes: list[str]
    counts: np.ndarray

    def worst(self, pairs: int) -> list[tuple[str, str, int]]:
        """(actual, predicted, images) of the most frequent mistakes, the worst first."""
        wrong = self.counts - np.diag(np.diag(self.counts))
        order = np.argsort(-wrong, axis=None, kind="stable")[:pairs]
        cells = zip(*np.unravel_index(order, wrong.shape), strict=True)
        return [(self.classes[i], self.classes[j], int(wrong[i, j])) for i, j in cells if wrong[i, j]]


class Results:
    """Files of one preset below `root`; raises UsageError when there are none at all."""

    def __init__(self, preset: str, root: Path = Path()):
        self.preset, self.root = preset, root
        self.reports, self.runs = root / "reports" / preset, root / "runs" / preset
        if not self.reports.is_dir():
            presets = sorted(path.name for path in (root / "reports").glob("*/") if path.is_dir())
            raise UsageError(f"{self.reports}: no results; there are {presets or 'none'}; dvc repro makes them")

    def read(self, name: str) -> dict[str, Any] | None:
        """reports/PRESET/NAME as a dictionary, None if there is no such file; SemdictError if it is no JSON object."""
        path = self.reports / name
        return read_object(path) if path.exists() else None

    def masked_runs(self) -> list[str]:
        """Names of the masked-token runs, sorted: those whose metrics.json compares losses with chance."""
        names = sorted(path.parent.name for path in self.reports.glob("*/metrics.json"))
        return [name for name in names if "chance" in (self.read(f"{name}/metrics.json") or {})]

    def scores(self, run: str) -> dict[str, dict[str, Any]]:
        """Measure -> its score file, for every measure computed for a run."""
        names = sorted(path.stem for path in (self.reports / run).glob("*.json"))
        files = {name: self.read(f"{run}/{name}.json") or {} for name in names}
        return {name: file for name, file in files.items() if "protocol" in file}

    def sample_sets(self) -> list[str]:
        """Names of all sets of samples, sorted: those with scores and those with a card of their sampling."""
        scored = {path.parent.name for path in self.reports.glob("*/scores.json")}
        made = {path.parent.name for card in SAMPLING for path in self.runs.glob(f"*/{card}")}
        return sorted(scored | made)

    def sampling(self, name: str) -> dict[str, Any]:
        """How a set of samples was made: its card, or what its score file repeats of it."""
        for card in SAMPLING:
            if (path := self.runs / name / card).exists():
                return read_object(path)
        protocol = (self.read(f"{name}/scores.json") or {}).get("protocol") or [{}]
        return (protocol[0].get("samples") or {}).get("sampling") or {}

    def confusion(self, run: str, measure: str) -> Confusion | None:
        """Actual and predicted classes of a run's test images, None if the measure left no file."""
        path = self.reports / run / f"{measure}_confusion.csv"
        if not path.exists():
            return None
        with path.open(newline="") as file:
            pairs = [(row.get("actual") or "", row.get("predicted") or "") for row in csv.DictReader(file)]
        classes = sorted({name for pair in pairs for name in pair})
        index = {name: number for number, name in enumerate(classes)}
        counts = np.zeros((len(classes), len(classes)), np.int64)
        for actual, predicted in pairs:
            counts[index[actual], index[predicted]] += 1
        return Confusion(classes, counts)

    def curves(self, folder: str) -> dict[str, Curve]:
        """Name -> curve of every plots/NAME.tsv of a run with more than one point."""
        paths = sorted((self.reports / folder / "plots").glob("*.tsv"))
        curves = {path.stem: read_curve(path, path.stem, "\t") for path in paths}
        return {name: curve for name, curve in curves.items() if len(curve.x) > 1}

    def table_curve(self, name: str, y: str) -> Curve | None:
        """One column of a CSV file over its first column."""
        path = self.reports / name
        return read_curve(path, y, ",") if path.exists() else None


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object; SemdictError if the file holds anything else."""
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise SemdictError(f"{path}: not JSON ({error}); make it again") from error
    if not isinstance(content, dict):
        raise SemdictError(f"{path}: holds no table of results; make it again")
    return content


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

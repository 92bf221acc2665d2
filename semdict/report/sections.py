"""What the page shows, in its order; a section without results is not there."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from semdict.report.charts import chart
from semdict.report.pictures import inline
from semdict.report.results import Curve, Results

NONE = "–"


@dataclass
class Table:
    """Cells as text; the first column names the rows."""

    head: list[str]
    rows: list[list[str]]
    title: str = ""


@dataclass
class Figure:
    """A data URI with its caption; kind is chart, picture or whole (the page's width)."""

    uri: str
    caption: str
    kind: str = "picture"


@dataclass
class Section:
    """One heading and what stands under it; details: summary -> text that opens on a click."""

    anchor: str
    title: str
    text: str = ""
    tables: list[Table] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    details: dict[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.tables or self.figures)

    def picture(self, path: Path, caption: str, kind: str = "picture") -> None:
        """Add a picture where there is one."""
        if path.exists():
            self.figures.append(Figure(inline(path), f"{caption} ({path.name})", kind))

    def panel(self, title: str, curves: dict[str, Curve], chance: float | None = None) -> None:
        """Add a chart of those curves that have points."""
        if drawn := {name: curve for name, curve in curves.items() if curve.x}:
            self.figures.append(Figure(chart(title, drawn, chance), title, "chart"))

    def detail(self, name: str, found: dict[str, Any] | None) -> None:
        """Add a whole result file."""
        if found is not None:
            self.details[name] = json.dumps(found, indent=1, sort_keys=True, ensure_ascii=False)


@dataclass(frozen=True)
class Missing:
    """A result that is not there, and the command that makes it."""

    name: str
    command: str


def sections(results: Results) -> list[Section]:
    """Those that have something to show."""
    parts = (tokens(results), trainers(results), vcq(results), entropy(results), comparisons(results))
    return [part for part in parts if part]


def tokens(results: Results) -> Section:
    """The images, both dictionaries, and what comes back when a sample is decoded."""
    part = Section("tokens", "Tokens")
    rows = []
    if manifest := results.read("manifest.json"):
        for split, found in manifest["splits"].items():
            rows.append([f"images, {split}", f"{found['images']:,} ({found['bad']:,} bad)"])
        rows += [[f"status {name}", f"{count:,}"] for name, count in manifest["status"].items()]
        rows.append(["classes", f"{manifest['classes']:,}"])
    if kmeans := results.read("kmeans.json"):
        rows += [[f"k-means, {name}", number(value)] for name, value in scalars(kmeans).items()]
    if encode := results.read("encode.json"):
        rows += [[f"decoded back, {name}", number(value)] for name, value in scalars(encode["probe"]).items()]
        differing = encode["probe"].get("tokens_unlike_float32", {})
        rows += [[f"tokens unlike float32, {name}", f"{share:.3%}"] for name, share in differing.items()]
    if rows:
        part.tables.append(Table(["", ""], rows))
    caption = "Images, their generative tokens decoded back, their discriminative words as colours"
    part.picture(results.reports / "reconstructions.png", caption, "whole")
    if objective := results.table_curve("kmeans_objective.csv", "objective"):
        part.panel("k-means objective (sum of squared distances)", {"objective": objective})
    return part


def trainers(results: Results) -> Section:
    """Every objective: losses beside chance, scores of encoder and samples, curves, grids."""
    part = Section("trainers", "Trainers")
    names = results.trainers()
    columns = {name: trainer_numbers(results, name) for name in names}
    keys = list(dict.fromkeys(key for found in columns.values() for key in found))
    if keys:
        rows = [[key, *(columns[name].get(key, NONE) for name in names)] for key in keys]
        part.tables.append(Table(["", *names], rows))
    curves = {name: results.curves(name) for name in names}
    for quantity in dict.fromkeys(key for found in curves.values() for key in found):
        chances = [(results.read(f"{name}/metrics.json") or {}).get("chance", {}).get(quantity) for name in names]
        same = {chance for chance in chances if chance is not None}
        drawn = {name: found[quantity] for name, found in curves.items() if quantity in found}
        part.panel(quantity.replace("_", " "), drawn, same.pop() if len(same) == 1 else None)
    for name in names:
        part.picture(results.runs / f"{name}-samples" / "grid.png", f"{name}: samples")
        part.picture(results.reports / f"{name}-samples" / "nearest.png", f"{name}: samples, nearest training images")
        for file in ("metrics", "probe", "knn", "few_shot"):
            part.detail(f"{name}/{file}.json", results.read(f"{name}/{file}.json"))
        scores = results.read(f"{name}-samples/scores.json")
        part.detail(f"{name}-samples/scores.json", scores)
        part.reasons += reasons(name, scores)
    return part


def trainer_numbers(results: Results, name: str) -> dict[str, str]:
    """Row -> cell of one objective."""
    metrics = results.read(f"{name}/metrics.json") or {}
    chance, final = metrics.get("chance", {}), metrics.get("final", {})
    found = {}
    for key in sorted(chance, key=lambda key: (key != "reconstruction", key)):
        if key in final:
            found[f"{key.replace('_', ' ')}, nats"] = f"{final[key]:.2f} (chance {chance[key]:.2f})"
    for file, title in (("probe", "linear probe, top-1 %"), ("knn", "k-NN, top-1 %")):
        if score := results.read(f"{name}/{file}.json"):
            found[title] = f"{score['top1']:.1f}"
    few = results.read(f"{name}/few_shot.json") or {}
    counts = sorted(int(key.split("_")[1]) for key in few if re.fullmatch(r"top1_\d+_shot", key))
    for count in counts:
        cell = f"{few[f'top1_{count}_shot']:.1f} ± {few[f'std_{count}_shot']:.1f}"
        found[f"{count} images a class, top-1 %"] = cell
    for key, value in scalars(results.read(f"{name}-samples/scores.json") or {}).items():
        if not key.endswith("_std"):
            found[key.replace("_", " ")] = number(value)
    return found


def vcq(results: Results) -> Section:
    """The 1-D tokenizer, its autoregressive model and samples."""
    part = Section("vcq", "VCQ", "A 1-D tokenizer whose codebook grows along the sequence, and a model of its tokens.")
    for folder, title in (("vcq", "tokenizer, last step"), ("ar", "autoregressive model, last step")):
        metrics = results.read(f"{folder}/metrics.json")
        if metrics:
            found = scalars(metrics) | scalars(metrics.get("final", {}))
            part.tables.append(two_columns(title, found))
            part.detail(f"{folder}/metrics.json", metrics)
    evaluated = results.read("vcq/evaluate.json")
    if evaluated:
        part.tables.append(two_columns("evaluation", scalars(evaluated)))
        part.detail("vcq/evaluate.json", evaluated)
        part.reasons += reasons("vcq", evaluated)
    for folder, title in (("vcq", "tokenizer"), ("ar", "autoregressive model")):
        for name, curve in results.curves(folder).items():
            part.panel(f"{title}: {name.replace('_', ' ')}", {name: curve})
    if usage := results.table_curve("vcq/utilisation.csv", "utilisation"):
        part.panel("share of codes in use, by position", {"utilisation": usage})
    part.picture(results.reports / "vcq" / "reconstructions.png", "Originals and their reconstructions")
    for draw in ("guided", "unguided"):
        part.picture(results.runs / f"ar-samples-{draw}" / "grid.png", f"Samples by class, {draw}")
    return part


def entropy(results: Results) -> Section:
    """Where token sets run out of information."""
    part = Section("entropy", "Entropy along the sequence")
    found = results.read("entropy/entropy.json") or {}
    sets = {name: scalars(numbers) for name, numbers in found.items() if isinstance(numbers, dict)}
    if sets:
        keys = list(dict.fromkeys(key for numbers in sets.values() for key in numbers))
        rows = [[key.replace("_", " "), *(number(numbers.get(key)) for numbers in sets.values())] for key in keys]
        part.tables.append(Table(["", *sets], rows))
    part.picture(results.reports / "entropy" / "entropy.png", "Bits left after each position, bits of each", "whole")
    return part


def comparisons(results: Results) -> Section:
    """The tables of `make replicate`."""
    part = Section("comparisons", "Comparisons", "Mean and standard deviation over seeds, beside the papers' numbers.")
    for name in ("lease", "vcq"):
        path = results.reports / "replicate" / f"{name}.md"
        if path.exists():
            part.tables += markdown_tables(path.read_text())
    return part


def absent(results: Results) -> list[Missing]:
    """Results that the stages make and that are not there."""
    expected = {
        "manifest.json": "dvc repro manifest",
        "kmeans.json": "dvc repro kmeans",
        "encode.json": "dvc repro encode",
        "vcq/metrics.json": "dvc repro vcq_train",
        "ar/metrics.json": "dvc repro ar_train",
        "vcq/evaluate.json": "dvc repro vcq_evaluate",
        "entropy/entropy.json": "dvc repro entropy",
        "replicate/lease.json": "python -m replicate.lease",
        "replicate/vcq.json": "python -m replicate.vcq",
    }
    for name in ("lease", "sorcen", "mage"):
        expected[f"{name}/metrics.json"] = f"dvc repro pretrain_{name}"
        expected[f"{name}/probe.json"] = f"dvc repro evaluate@{name}"
        expected[f"{name}-samples/scores.json"] = f"dvc repro score@{name}"
    return [Missing(name, command) for name, command in expected.items() if not (results.reports / name).exists()]


def scalars(found: dict[str, Any]) -> dict[str, Any]:
    """Entries that are one number or word."""
    return {key: value for key, value in found.items() if isinstance(value, str | int | float)}


def number(value: Any) -> str:
    """A number as a reader wants it."""
    if value is None:
        return NONE
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def two_columns(title: str, found: dict[str, Any]) -> Table:
    """Name and value."""
    return Table(["", ""], [[key.replace("_", " "), number(value)] for key, value in found.items()], title)


def reasons(name: str, scores: dict[str, Any] | None) -> list[str]:
    """Why scores are absent, as the file says it."""
    missing = [entry for entry in (scores or {}).get("missing", []) if isinstance(entry, dict)]
    return [f"{name}: no {score}: {why}" for entry in missing for score, why in entry.items()]


def markdown_tables(text: str) -> list[Table]:
    """The tables of a Markdown text, each under the heading before it."""
    found: list[Table] = []
    title, rows = "", []
    for line in [*text.splitlines(), ""]:
        if line.startswith("#"):
            title = line.lstrip("# ")
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
        elif rows:
            found.append(Table(rows[0], rows[2:], title))
            rows = []
    return found

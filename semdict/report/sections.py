"""Sections of the page, in order. A section without results is left out."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from semdict.report.images import chart, inline
from semdict.report.results import Curve, Results

NONE = "–"
TITLES = {"probe": "linear probe", "knn": "k-NN", "finetune": "fine-tuning"}  # of measures; others by their file's name


@dataclass
class Table:
    """Cells as text; the first column names the rows."""

    head: list[str]
    rows: list[list[str]]
    title: str = ""


@dataclass
class Figure:
    """A data URI with its caption; kind is chart, picture or whole (full page width)."""

    uri: str
    caption: str
    kind: str = "picture"


@dataclass
class Section:
    """A heading and its content; notes: why scores are missing; details: summary -> text that unfolds on a click."""

    anchor: str
    title: str
    text: str = ""
    tables: list[Table] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    details: dict[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.tables or self.figures)

    def picture(self, path: Path, caption: str, kind: str = "picture") -> None:
        """Add a picture file if it exists."""
        if path.exists():
            self.figures.append(Figure(inline(path), f"{caption} ({path.name})", kind))

    def panel(self, title: str, curves: dict[str, Curve], chance: float | None = None) -> None:
        """Add a chart of the curves that have points."""
        if drawn := {name: curve for name, curve in curves.items() if curve.x}:
            self.figures.append(Figure(chart(title, drawn, chance), title, "chart"))

    def detail(self, name: str, content: dict[str, Any] | None) -> None:
        """Add a whole result file if it exists."""
        if content is not None:
            self.details[name] = json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False)


@dataclass(frozen=True)
class Missing:
    """A result that does not exist, and the command that computes it."""

    name: str
    command: str


def sections(results: Results) -> list[Section]:
    """The sections that have something to show."""
    parts = (
        tokens(results), masked_models(results), vcq(results), codebooks(results), entropy(results),
        comparisons(results),
    )  # fmt: skip
    return [part for part in parts if part]


def tokens(results: Results) -> Section:
    """Image counts, both codebooks, and a sample of images decoded from their tokens."""
    part = Section("tokens", "Tokens")
    rows = []
    if manifest := results.read("manifest.json"):
        for split, counts in manifest["splits"].items():
            rows.append([f"images, {split}", f"{counts['images']:,} ({counts['bad']:,} bad)"])
        rows += [[f"status {name}", f"{count:,}"] for name, count in manifest["status"].items()]
        rows.append(["classes", f"{manifest['classes']:,}"])
    if kmeans := results.read("kmeans.json"):
        rows += [[f"k-means, {name.replace('_', ' ')}", number(value)] for name, value in scalars(kmeans).items()]
    if encode := results.read("encode.json"):
        preflight = scalars(encode["preflight"])
        rows += [[f"decoded back, {name.replace('_', ' ')}", number(value)] for name, value in preflight.items()]
        differing = encode["preflight"].get("tokens_unlike_float32", {})
        rows += [[f"tokens unlike float32, {name}", f"{share:.3%}"] for name, share in differing.items()]
    if rows:
        part.tables.append(Table(["", ""], rows))
    caption = "Images, their generative tokens decoded, their discriminative tokens as colours"
    part.picture(results.reports / "reconstructions.png", caption, "whole")
    if objective := results.table_curve("kmeans_objective.csv", "objective"):
        part.panel("k-means objective (sum of squared distances)", {"objective": objective})
    return part


def masked_models(results: Results) -> Section:
    """Every masked-token run: losses beside chance, scores of encoder and samples, curves, sample grids."""
    part = Section("masked", "Masked-token models")
    names = results.masked_runs()
    columns = {name: run_cells(results, name) for name in names}
    keys = list(dict.fromkeys(key for cells in columns.values() for key in cells))
    if keys:
        rows = [[key, *(columns[name].get(key, NONE) for name in names)] for key in keys]
        part.tables.append(Table(["", *names], rows))
    curves = {name: results.curves(name) for name in names}
    for quantity in dict.fromkeys(key for run in curves.values() for key in run):
        chances = {results.read(f"{name}/metrics.json")["chance"].get(quantity) for name in names} - {None}
        drawn = {name: run[quantity] for name, run in curves.items() if quantity in run}
        part.panel(quantity.replace("_", " "), drawn, chances.pop() if len(chances) == 1 else None)
    for name in names:
        part.picture(results.runs / f"{name}-samples" / "grid.png", f"{name}: samples")
        part.picture(results.reports / f"{name}-samples" / "nearest.png", f"{name}: samples, nearest training images")
        part.detail(f"{name}/metrics.json", results.read(f"{name}/metrics.json"))
        for measure, score in results.scores(name).items():
            part.detail(f"{name}/{measure}.json", score)
        scores = results.read(f"{name}-samples/scores.json")
        part.detail(f"{name}-samples/scores.json", scores)
        part.notes += absent_scores(name, scores)
    return part


def run_cells(results: Results, name: str) -> dict[str, str]:
    """Row title -> cell of one masked-token run."""
    metrics = results.read(f"{name}/metrics.json") or {}
    chance, final = metrics.get("chance", {}), metrics.get("final", {})
    cells = {}
    for key in sorted(chance, key=lambda key: (key != "reconstruction", key)):
        if key in final:
            cells[f"{key.replace('_', ' ')}, nats"] = f"{final[key]:.2f} (chance {chance[key]:.2f})"
    for measure, score in results.scores(name).items():
        if "top1" in score:
            cells[f"{TITLES.get(measure, measure.replace('_', ' '))}, top-1 %"] = f"{score['top1']:.1f}"
        counts = sorted(int(key.split("_")[1]) for key in score if re.fullmatch(r"top1_\d+_shot", key))
        for count in counts:
            cell = f"{score[f'top1_{count}_shot']:.1f} ± {score[f'std_{count}_shot']:.1f}"
            cells[f"{count} images per class, top-1 %"] = cell
    for key, value in scalars(results.read(f"{name}-samples/scores.json") or {}).items():
        if not key.endswith("_std"):
            cells[key.replace("_", " ")] = number(value)
    return cells


def vcq(results: Results) -> Section:
    """The 1-D tokenizer, its autoregressive model and samples."""
    part = Section("vcq", "VCQ", "A 1-D tokenizer whose codebook grows along the sequence, and a model of its tokens.")
    for folder, title in (("vcq", "tokenizer, last step"), ("ar", "autoregressive model, last step")):
        if metrics := results.read(f"{folder}/metrics.json"):
            part.tables.append(two_columns(title, scalars(metrics) | scalars(metrics.get("final", {}))))
            part.detail(f"{folder}/metrics.json", metrics)
    if evaluated := results.read("vcq/evaluate.json"):
        part.tables.append(two_columns("evaluation", scalars(evaluated)))
        part.detail("vcq/evaluate.json", evaluated)
        part.notes += absent_scores("vcq", evaluated)
    for folder, title in (("vcq", "tokenizer"), ("ar", "autoregressive model")):
        for name, curve in results.curves(folder).items():
            part.panel(f"{title}: {name.replace('_', ' ')}", {name: curve})
    if usage := results.table_curve("vcq/utilisation.csv", "utilisation"):
        part.panel("share of codes in use, by position", {"utilisation": usage})
    part.picture(results.reports / "vcq" / "reconstructions.png", "Originals and their reconstructions")
    for path in sorted(results.runs.glob("ar-samples-*/grid.png")):
        part.picture(path, f"Class-conditional samples, {path.parent.name.removeprefix('ar-samples-')}")
    return part


def codebooks(results: Results) -> Section:
    """The two codebooks of the token set compared."""
    part = Section("codebooks", "Generative against discriminative tokens")
    if content := results.read("analyse/analyse.json"):
        directions = {"H(GEN | DISC)": content["gen_given_disc"], "H(DISC | GEN)": content["disc_given_gen"]}
        keys = list(scalars(content["gen_given_disc"]))
        rows = [[key.replace("_", " "), *(number(of[key]) for of in directions.values())] for key in keys]
        part.tables.append(Table(["", *directions], rows))
        part.detail("analyse/analyse.json", content)
    captions = {
        "conditional_entropy": "Conditional entropy of every token, in nats",
        "class_tokens": "Most frequent tokens of a class",
        "pmi": "Pointwise mutual information of the strongest pairs",
    }
    for name, caption in captions.items():
        part.picture(results.reports / "analyse" / f"{name}.png", caption)
    return part


def entropy(results: Results) -> Section:
    """Information along the sequence of each token set."""
    part = Section("entropy", "Entropy along the sequence")
    content = results.read("entropy/entropy.json") or {}
    sets = {name: scalars(values) for name, values in content.items() if isinstance(values, dict)}
    if sets:
        keys = list(dict.fromkeys(key for values in sets.values() for key in values))
        rows = [[key.replace("_", " "), *(number(values.get(key)) for values in sets.values())] for key in keys]
        part.tables.append(Table(["", *sets], rows))
    part.picture(results.reports / "entropy" / "entropy.png", "Bits left after each position, bits of each", "whole")
    return part


def comparisons(results: Results) -> Section:
    """The tables of `make replicate`."""
    part = Section("comparisons", "Comparisons", "Mean and standard deviation over seeds, beside the papers' numbers.")
    for path in sorted((results.reports / "replicate").glob("*.md")):
        part.tables += markdown_tables(path.read_text())
    return part


def absent(results: Results) -> list[Missing]:
    """Results that do not exist: those of the token stages and of VCQ, and the scores of every masked-token run."""
    expected = {
        "manifest.json": "dvc repro manifest",
        "kmeans.json": "dvc repro kmeans",
        "encode.json": "dvc repro encode",
        "vcq/metrics.json": "dvc repro vcq_train",
        "ar/metrics.json": "dvc repro ar_train",
        "vcq/evaluate.json": "dvc repro vcq_evaluate",
        "analyse/analyse.json": "dvc repro analyse",
        "entropy/entropy.json": "dvc repro entropy",
    }
    for name in results.masked_runs():
        run = f"runs/{results.preset}/{name}"
        expected[f"{name}/probe.json"] = f"semdict evaluate probe --model {run}"
        expected[f"{name}/knn.json"] = f"semdict evaluate knn --model {run}"
        expected[f"{name}-samples/scores.json"] = f"semdict evaluate fid --samples {run}-samples"
    return [Missing(name, command) for name, command in expected.items() if not (results.reports / name).exists()]


def scalars(table: dict[str, Any]) -> dict[str, Any]:
    """The entries that are one number or text."""
    return {key: value for key, value in table.items() if isinstance(value, str | int | float)}


def number(value: Any) -> str:
    """A number with separators and four digits, text as it is, a dash for None."""
    if value is None:
        return NONE
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def two_columns(title: str, values: dict[str, Any]) -> Table:
    """A table of names and values."""
    return Table(["", ""], [[key.replace("_", " "), number(value)] for key, value in values.items()], title)


def absent_scores(name: str, scores: dict[str, Any] | None) -> list[str]:
    """One line per score that could not be computed, with the reason that the score file states."""
    entries = [entry for entry in (scores or {}).get("missing", []) if isinstance(entry, dict)]
    return [f"{name}: no {score}: {reason}" for entry in entries for score, reason in entry.items()]


def markdown_tables(text: str) -> list[Table]:
    """The tables of a Markdown text, each titled by the heading before it."""
    tables: list[Table] = []
    title, rows = "", []
    for line in [*text.splitlines(), ""]:
        if line.startswith("#"):
            title = line.lstrip("# ")
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
        elif rows:
            tables.append(Table(rows[0], rows[2:], title))
            rows = []
    return tables

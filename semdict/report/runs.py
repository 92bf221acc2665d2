"""Runs side by side: one row per encoder or set of samples, one column per measure, the best value of each marked."""

import re
from typing import Any

from semdict.report.parts import NONE, Cell, Table, cells, number, scalars
from semdict.report.results import Results

TITLES = {"probe": "linear probe", "knn": "k-NN", "finetune": "fine-tuning"}  # of measures; others by their file's name
LOWER_IS_BETTER = ("nats", "frechet", "fid", "kid", "loss", "bits")
HIGHER_IS_BETTER = ("top-1", "top1", "top5", "precision", "recall", "f1", "psnr")
Row = dict[str, Cell]


def encoder_rows(results: Results) -> dict[str, Row]:
    """Masked-token run -> column title -> cell."""
    return {name: encoder_row(results, name) for name in results.masked_runs()}


def encoder_row(results: Results, name: str) -> Row:
    """Accuracies of a run's frozen encoder, then its final losses beside chance."""
    row: Row = {}
    scores = results.scores(name)
    for measure in [*(name for name in TITLES if name in scores), *(name for name in scores if name not in TITLES)]:
        score, title = scores[measure], TITLES.get(measure, measure.replace("_", " "))
        if "top1" in score:
            row[f"{title}, top-1 %"] = Cell(f"{score['top1']:.1f}", score["top1"])
        for count in sorted(int(key.split("_")[1]) for key in score if re.fullmatch(r"top1_\d+_shot", key)):
            mean, spread = score[f"top1_{count}_shot"], score[f"std_{count}_shot"]
            row[f"{count} per class, top-1 %"] = Cell(f"{mean:.1f} ± {spread:.1f}", mean)
    metrics = results.read(f"{name}/metrics.json") or {}
    chance, final = metrics.get("chance", {}), metrics.get("final", {})
    for key in sorted(chance, key=lambda key: (key != "reconstruction", key)):
        if key in final:
            cell = Cell(f"{final[key]:.2f} (chance {chance[key]:.2f})", final[key])
            row[f"{key.replace('_', ' ')}, nats"] = cell
    return row


def sample_rows(results: Results) -> dict[str, Row]:
    """Set of samples -> column title -> cell: how they were made, then their scores."""
    return {name: sample_row(results, name) for name in results.sample_sets()}


def sample_row(results: Results, name: str) -> Row:
    """Task, images and sampling parameters, and all scores of one set."""
    sampling = results.sampling(name)
    row: Row = {}
    task = sampling.get("task") or (f"class-conditional, {sampling['draw']}" if "draw" in sampling else None)
    if task:
        row["task"] = Cell(str(task))
    for key in ("images", "steps", "temperature", "scale"):
        if isinstance(sampling.get(key), int | float):
            row["guidance" if key == "scale" else key] = Cell(number(sampling[key]), float(sampling[key]))
    scores = scalars(results.read(f"{name}/scores.json") or {})
    nearest = results.read(f"{name}/nearest.json") or {}
    if "nearest_cosine" in nearest:
        scores["cosine to the nearest training image"] = nearest["nearest_cosine"]
    scores |= ar_scores(results, name)
    for key, value in scores.items():
        if not key.endswith("_std") and key != "images":
            spread = scores.get(f"{key}_std")
            shown = number(value) if spread is None else f"{number(value)} ± {number(spread)}"
            row[key.replace("_", " ")] = Cell(shown, float(value) if isinstance(value, int | float) else None)
    return row


def ar_scores(results: Results, name: str) -> dict[str, Any]:
    """Scores of autoregressive samples, which `semdict vcq evaluate` writes into one file for all of its sets."""
    prefix = name.removeprefix("ar-samples-") + "_"
    evaluated = scalars(results.read("vcq/evaluate.json") or {})
    return {key.removeprefix(prefix): value for key, value in evaluated.items() if key.startswith(prefix)}


def side_by_side(rows: dict[str, Row], title: str, first: str) -> Table:
    """A sortable table of the rows; the best value of a column is marked where two rows have one."""
    columns = ordered_columns(rows)
    best = {column: best_value(column, rows) for column in columns}
    body = []
    for name, row in rows.items():
        shown = [row.get(column, Cell(NONE)) for column in columns]
        with_best = [
            Cell(cell.text, cell.sort, cell.sort is not None and cell.sort == best[column])
            for column, cell in zip(columns, shown, strict=True)
        ]
        body.append([*cells(name), *with_best])
    return Table([first, *columns], body, title, sortable=True)


def ordered_columns(rows: dict[str, Row]) -> list[str]:
    """Every column of any row: each where the rows that have it put it, before the columns that follow there."""
    columns: list[str] = []
    for row in rows.values():
        position = 0
        for key in row:
            if key in columns:
                position = columns.index(key) + 1
            else:
                columns.insert(position, key)
                position += 1
    return columns


def best_value(column: str, rows: dict[str, Row]) -> float | None:
    """The best number of a column; None where fewer than two rows have one or no direction is better."""
    values = [row[column].sort for row in rows.values() if column in row and row[column].sort is not None]
    better = direction(column)
    return better(values) if len(set(values)) > 1 and better else None


def direction(column: str) -> Any:
    """min, max or None: which values of a measure are better."""
    name = column.lower()
    if any(part in name for part in LOWER_IS_BETTER):
        return min
    if any(part in name for part in HIGHER_IS_BETTER) or name == "is":
        return max
    return None


def best_row(rows: dict[str, Row], columns: list[str]) -> tuple[str, str, Cell] | None:
    """(row, column, cell) of the best value in the first of the columns that any row has."""
    for column in columns:
        having = {name: row[column] for name, row in rows.items() if column in row and row[column].sort is not None}
        better = direction(column)
        if having and better:
            name = better(having, key=lambda name: having[name].sort)
            return name, column, having[name]
    return None

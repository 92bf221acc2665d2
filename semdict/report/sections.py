"""Sections of the page, in order. A section without results is left out."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from semdict.report import charts
from semdict.report.parts import Cell, Fold, Section, Table, Tile, cells, markdown_tables, number, scalars, two_columns
from semdict.report.pictures import Pictures
from semdict.report.provenance import provenance
from semdict.report.results import Curve, Results
from semdict.report.runs import best_row, encoder_rows, sample_rows, side_by_side

if TYPE_CHECKING:
    from semdict.pipeline.shards import TokenShards

# which score names the best run of the head line, the first that there is
ENCODER_SCORES = ("linear probe, top-1 %", "k-NN, top-1 %", "fine-tuning, top-1 %")
SAMPLE_SCORES = ("fid val50k", "fid adm", "teacher frechet distance")
CONFUSIONS = {"probe": "linear probe", "knn": "k-NN"}
GROUPS = {"grad_norm": "gradient norm", "lr": "learning rate"}  # ending of a curve's name -> title of its chart
# score file of an encoder -> action of `semdict evaluate`
KNOWN_MEASURES = {"probe": "probe", "knn": "knn", "few_shot": "few-shot"}
# files of the token stages and the commands that compute them
TOKEN_STAGES = {
    "manifest.json": "dvc repro manifest",
    "kmeans.json": "dvc repro kmeans",
    "encode.json": "dvc repro encode",
}
VCQ_STAGES = {
    "vcq/metrics.json": "dvc repro vcq_train",
    "ar/metrics.json": "dvc repro ar_train",
    "vcq/evaluate.json": "dvc repro vcq_evaluate",
}


@dataclass(frozen=True)
class Missing:
    """A result that does not exist, and the command that computes it."""

    name: str
    command: str


class Page:
    """Everything that the page shows of one preset."""

    def __init__(self, results: Results):
        self.results, self.pictures = results, Pictures()
        self.encoders, self.samples = encoder_rows(results), sample_rows(results)

    @cached_property
    def shards(self) -> "TokenShards | None":
        """The preset's token set, if it is on this machine."""
        from semdict.pipeline.shards import open_shards

        path = self.results.root / "shards" / self.results.preset
        return open_shards(path) if (path / "tokens.zarr").is_dir() else None

    @cached_property
    def set_summary(self) -> dict[str, Any]:
        """Counts and sizes of the token set; {} without one."""
        from semdict.pipeline.shards.command import summary

        return summary(self.shards.path) if self.shards is not None else {}

    @property
    def title(self) -> str:
        """The token set's title, else the preset's name."""
        return self.set_summary.get("title") or f"semdict: {self.results.preset}"

    def sections(self) -> list[Section]:
        """The sections that have something to show."""
        branches = (tokens, encoders, samples, vcq, codebooks)
        parts = [branch(self) for branch in branches]
        parts += [entropy(self.results), comparisons(self.results), provenance(self.results)]
        shown = [part for part in parts if part]
        if self.pictures.left_out and shown:
            names = ", ".join(str(path) for path in self.pictures.left_out)
            shown[-1].notes.append(f"Pictures beyond the page's size limit, left out: {names}")
        return shown


def head(page: Page) -> list[Tile]:
    """The head line: data set, tokens, best runs."""
    tiles = []
    manifest, numbers = page.results.read("manifest.json") or {}, page.set_summary
    splits = {name: counts["images"] for name, counts in manifest.get("splits", {}).items()} or numbers.get(
        "splits", {}
    )
    if splits:
        remark = ", ".join(f"{count:,} {name}" for name, count in splits.items())
        classes = f"; {manifest['classes']:,} classes" if manifest.get("classes") else ""
        tiles.append(Tile("images", f"{sum(splits.values()):,}", remark + classes))
    if numbers:
        books = numbers["codebooks"]
        grid = "×".join(map(str, numbers["grid"]))
        codes = " and ".join(f"{book['size']:,} {name}" for name, book in books.items())
        tiles.append(Tile("tokens an image", grid, f"codebooks: {codes}"))
        bits = ", ".join(
            f"{name} {book['bits_per_token']:.2f}" for name, book in books.items() if book["bits_per_token"]
        )
        tiles.append(Tile("size", megabytes(numbers["bytes"]), f"bits per token: {bits}"))
    encode = page.results.read("encode.json") or {}
    if "psnr_mean" in encode.get("preflight", {}):
        tiles.append(Tile("decoded back", f"{encode['preflight']['psnr_mean']:.1f} dB", "mean PSNR of the tokenizer"))
    for rows, scores, name in ((page.encoders, ENCODER_SCORES, "encoder"), (page.samples, SAMPLE_SCORES, "samples")):
        if best := best_row(rows, list(scores)):
            run, column, cell = best
            tiles.append(Tile(f"{'best ' if len(rows) > 1 else ''}{name}: {run}", cell.text, column))
    return tiles


def megabytes(size: int) -> str:
    """Bytes as kB, MB or GB, decimal."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if size >= factor:
            return f"{size / factor:.2f} {unit}"
    return f"{size / 1e3:.1f} kB"


def tokens(page: Page) -> Section:
    """Image counts, both codebooks, their usage, patches of words, and images decoded from their tokens."""
    from semdict.report.words import gallery

    results, part = page.results, Section("tokens", "Tokens")
    for title, rows in (("images and codebook", token_rows(results)), ("token set", codebook_rows(page.set_summary))):
        if rows:
            part.tables.append(Table(["", ""], rows, title))
    if page.shards is not None:
        part.chart(charts.usage(page.shards.counts))
    if objective := results.table_curve("kmeans_objective.csv", "objective"):
        part.chart(charts.lines("k-means objective: sum of squared distances", {"objective": objective}))
    caption = (
        "Token maps. From top to bottom: image, its generative tokens decoded, its discriminative tokens as colours"
    )
    part.picture(page.pictures.file(results.reports / "reconstructions.png", caption, "whole"))
    if page.shards is not None:
        part.words, reason = gallery(results, page.shards, page.pictures)
        part.notes += [reason] if reason else []
    return part


def token_rows(results: Results) -> list[list[Cell]]:
    """Counts of the manifest, k-means, and the check by decoding."""
    rows = []
    if manifest := results.read("manifest.json"):
        for split, counts in manifest["splits"].items():
            rows.append(cells(f"images, {split}", f"{counts['images']:,} ({counts['bad']:,} bad)"))
        bad = {name: count for name, count in manifest["status"].items() if name != "OK"}
        rows += [cells(f"status {name}", f"{count:,}") for name, count in bad.items()]
        rows.append(cells("classes", f"{manifest['classes']:,}"))
    if kmeans := results.read("kmeans.json"):
        rows += [cells(f"k-means, {name.replace('_', ' ')}", number(value)) for name, value in scalars(kmeans).items()]
    if encode := results.read("encode.json"):
        preflight = scalars(encode["preflight"])
        rows += [cells(f"decoded back, {name.replace('_', ' ')}", number(value)) for name, value in preflight.items()]
        differing = encode["preflight"].get("tokens_unlike_float32", {})
        rows += [cells(f"tokens unlike float32, {name}", f"{share:.3%}") for name, share in differing.items()]
    return rows


def codebook_rows(numbers: dict[str, Any]) -> list[list[Cell]]:
    """Use, entropy and stored size of each codebook."""
    rows = []
    for name, book in numbers.get("codebooks", {}).items():
        rows.append(cells(f"{name}, codes in use", f"{book['used']:,} of {book['size']:,}"))
        entropy_bits = book["order0_entropy_bits"]
        rows.append(cells(f"{name}, order-0 entropy", f"{entropy_bits:.2f} bits (perplexity {2**entropy_bits:,.0f})"))
        rows.append(cells(f"{name}, stored", f"{book['bytes']:,} bytes, {book['bits_per_token']} bits per token"))
    return rows


def encoders(page: Page) -> Section:
    """Every masked-token run: accuracies and losses side by side, probe curves, confusion, training curves."""
    results, part = page.results, Section("encoders", "Encoders")
    names = list(page.encoders)
    if names:
        part.tables.append(side_by_side(page.encoders, "", "run"))
    probes = {name: results.table_curve(f"{name}/probe_curve.csv", "top1") for name in names}
    probes = {name: curve for name, curve in probes.items() if curve is not None}
    part.chart(charts.lines("Linear probe: accuracy on the test split", probes, y_title="top-1 %", order=names))
    curves = {name: results.curves(name) for name in names}
    for quantity in ordered_quantities(curves):
        chances = {results.read(f"{name}/metrics.json")["chance"].get(quantity) for name in names} - {None}
        drawn = {name: run[quantity] for name, run in curves.items() if quantity in run}
        unit = "nats" if chances else ""
        chance = chances.pop() if len(chances) == 1 else None
        title = f"Training: {quantity.replace('_', ' ')}"
        part.chart(charts.lines(title, drawn, chance, y_title=unit, order=names))
    for name in names:
        add_confusion(part, results, name)
    for name in names:
        part.dump(f"{name}/metrics.json", results.read(f"{name}/metrics.json"))
        for measure, score in results.scores(name).items():
            part.dump(f"{name}/{measure}.json", score)
    return part


def ordered_quantities(curves: dict[str, dict[str, Curve]]) -> list[str]:
    """Names of all training curves: losses first, optimizer's quantities last."""
    names = dict.fromkeys(key for run in curves.values() for key in run)
    return sorted(names, key=lambda name: (name in ("grad_norm", "lr"), name != "reconstruction"))


def add_confusion(part: Section, results: Results, name: str) -> None:
    """A heat map of a run's mistakes, or the most frequent ones where there are too many classes for one."""
    for measure, title in CONFUSIONS.items():
        matrix = results.confusion(name, measure)
        if matrix is None:
            continue
        if len(matrix.classes) <= charts.MATRIX_CLASSES:
            chart = charts.confusion(f"{name}: confusion of the {title}, % of each class", matrix)
            worst = [f"{actual} taken for {predicted} ({count})" for actual, predicted, count in matrix.worst(3)]
            chart.note = f"Most frequent: {', '.join(worst)}." if worst else ""
            part.chart(chart)
        else:
            rows = [cells(actual, predicted, f"{count:,}") for actual, predicted, count in matrix.worst(20)]
            table = Table(["actual", "predicted", "images"], rows)
            part.folds.append(Fold(f"{name}: most frequent mistakes of the {title}", table=table))
        return


def samples(page: Page) -> Section:
    """Every set of samples, those made by hand among them: scores side by side, grids, nearest training images."""
    results, part = page.results, Section("samples", "Samples")
    if page.samples:
        part.tables.append(side_by_side(page.samples, "", "samples"))
    for name in page.samples:
        part.picture(page.pictures.file(results.runs / name / "grid.png", name))
    for name in page.samples:
        caption = f"{name}: each sample beside its nearest training images"
        if picture := page.pictures.file(results.reports / name / "nearest.png", caption, "whole"):
            part.folds.append(Fold(f"{name}: nearest training images", pictures=[picture]))
        scores = results.read(f"{name}/scores.json")
        part.dump(f"{name}/scores.json", scores)
        part.folds += absent_scores(name, scores)
    return part


def vcq(page: Page) -> Section:
    """The 1-D tokenizer and its autoregressive model; its samples stand with the others."""
    results = page.results
    part = Section("vcq", "VCQ", "A 1-D tokenizer whose codebook grows along the sequence, and a model of its tokens.")
    for folder, title in (("vcq", "tokenizer"), ("ar", "autoregressive model")):
        if metrics := results.read(f"{folder}/metrics.json"):
            part.tables.append(two_columns(title, headlines(metrics)))
            part.dump(f"{folder}/metrics.json", metrics)
    if evaluated := results.read("vcq/evaluate.json"):
        probes = {key: value for key, value in scalars(evaluated).items() if key.startswith("probe_")}
        if probes:
            part.tables.append(two_columns("first-k-token probe, %", probes))
        sets = tuple(f"{name.removeprefix('ar-samples-')}_" for name in page.samples)
        rest = {key: value for key, value in scalars(evaluated).items() if not key.startswith(("probe_", *sets))}
        part.tables.append(two_columns("reconstruction and codes", rest))
        part.dump("vcq/evaluate.json", evaluated)
        part.folds += absent_scores("vcq", evaluated)
    if share := results.table_curve("vcq/utilisation.csv", "utilisation"):
        part.chart(charts.lines("Share of codes in use, by position", {"utilisation": share}))
    for folder, title in (("vcq", "tokenizer"), ("ar", "autoregressive model")):
        for quantity, curves in grouped(results.curves(folder)).items():
            part.chart(charts.lines(f"{title}: {quantity}", curves))
    caption = "Originals and their reconstructions"
    part.picture(page.pictures.file(results.reports / "vcq" / "reconstructions.png", caption, "whole"))
    return part


def headlines(metrics: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a trainer's metrics.json that describe its result, without weights and last losses."""
    nested = {f"{key} {name}": number for key, entry in metrics.items() for name, number in nested_scalars(key, entry)}
    return {key: value for key, value in scalars(metrics).items() if not key.startswith("weight_")} | nested


def nested_scalars(key: str, entry: Any) -> list[tuple[str, Any]]:
    """Named numbers one level down, those of the last step aside."""
    return list(scalars(entry).items()) if isinstance(entry, dict) and key != "final" else []


def grouped(curves: dict[str, Curve]) -> dict[str, dict[str, Curve]]:
    """Title -> the curves of one chart: losses, the discriminator's losses, gradient norms, learning rates."""
    groups: dict[str, dict[str, Curve]] = {}
    for name, curve in curves.items():
        ending = next((title for end, title in GROUPS.items() if name.endswith(end)), None)
        title = ending or ("discriminator" if name.startswith("discriminator_") else "losses")
        groups.setdefault(title, {})[name.removeprefix("discriminator_") if title == "discriminator" else name] = curve
    return groups


def codebooks(page: Page) -> Section:
    """The two codebooks of the token set compared."""
    results, part = page.results, Section("codebooks", "Generative against discriminative tokens")
    if content := results.read("analyse/analyse.json"):
        directions = {"H(GEN | DISC)": content["gen_given_disc"], "H(DISC | GEN)": content["disc_given_gen"]}
        rows = [
            cells(key.replace("_", " "), *(number(of[key]) for of in directions.values()))
            for key in scalars(content["gen_given_disc"])
        ]
        part.tables.append(Table(["", *directions], rows))
        part.dump("analyse/analyse.json", content)
    captions = {
        "conditional_entropy": "Conditional entropy of every token, in nats",
        "class_tokens": "Most frequent tokens of a class",
        "pmi": "Pointwise mutual information of the strongest pairs",
    }
    for name, caption in captions.items():
        part.picture(page.pictures.file(results.reports / "analyse" / f"{name}.png", caption))
    return part


def entropy(results: Results) -> Section:
    """Information along the sequence of each token set."""
    part = Section("entropy", "Entropy along the sequence")
    content = results.read("entropy/entropy.json") or {}
    sets = {name: scalars(values) for name, values in content.items() if isinstance(values, dict)}
    if sets:
        keys = list(dict.fromkeys(key for values in sets.values() for key in values))
        rows = [cells(key.replace("_", " "), *(number(values.get(key)) for values in sets.values())) for key in keys]
        part.tables.append(Table(["", *sets], rows))
    for column, title in (
        ("remaining", "Bits left after each position"),
        ("entropy", "Conditional entropy of each position"),
    ):
        curves = {name: results.table_curve(f"entropy/{name}.csv", column) for name in sets}
        curves = {name: curve for name, curve in curves.items() if curve is not None}
        part.chart(charts.lines(title, curves, y_title="bits"))
    return part


def comparisons(results: Results) -> Section:
    """The tables of `make replicate`."""
    part = Section("comparisons", "Comparisons", "Mean and standard deviation over seeds, beside the papers' numbers.")
    for path in sorted((results.reports / "replicate").glob("*.md")):
        part.tables += markdown_tables(path.read_text())
    return part


def absent(results: Results) -> list[Missing]:
    """What is begun and not complete: nothing of a branch of the pipeline that has not been started.

    Token stages if one of them ran (an imported set has none), VCQ's if one of them ran, and of every masked-token run
    the measures that another run has; the linear probe and the samples where no run has any.
    """
    expected: dict[str, str] = {}
    for stages in (TOKEN_STAGES, VCQ_STAGES):
        if any((results.reports / name).exists() for name in stages):
            expected |= stages
    runs = results.masked_runs()
    measures = {"probe"} | {measure for name in runs for measure in results.scores(name)}
    sampled = [name for name in runs if (results.reports / f"{name}-samples" / "scores.json").exists()]
    for name in runs:
        run = f"runs/{results.preset}/{name}"
        for measure in sorted(measures & KNOWN_MEASURES.keys()):
            expected[f"{name}/{measure}.json"] = f"semdict evaluate {KNOWN_MEASURES[measure]} --model {run}"
        if sampled or (results.runs / f"{name}-samples").exists():
            expected[f"{name}-samples/scores.json"] = f"semdict evaluate fid --samples {run}-samples"
    return [Missing(name, command) for name, command in expected.items() if not (results.reports / name).exists()]


def absent_scores(name: str, scores: dict[str, Any] | None) -> list[Fold]:
    """Scores that could not be computed, with the reasons that the score file states."""
    entries = [entry for entry in (scores or {}).get("missing", []) if isinstance(entry, dict)]
    lines = [f"{score}: {reason}" for entry in entries for score, reason in entry.items()]
    return [Fold(f"{name}: scores that were not computed", "\n".join(lines))] if lines else []

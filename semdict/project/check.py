"""`semdict check`: everything that can be known about params.yaml before work starts.

Values and types first; then the images, the models' names, files and grids, the sizes of batches and the folders that
DVC asks for. Files of weights are mapped, not read; of images only names are listed, unless there is a manifest.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from semdict.pipeline.common.errors import ManifestError, SemdictError
from semdict.pipeline.common.hub import is_hub_name
from semdict.pipeline.config import paths
from semdict.pipeline.config.command import awaited_folders, missing_inputs, watched_folders
from semdict.pipeline.config.params import add_params_arguments, params_of
from semdict.pipeline.config.presets import PRESETS, preset_names
from semdict.pipeline.config.schema import Params
from semdict.project.counts import Counts, counts_of_listing, counts_of_manifest, too_few

EXAMPLE = """examples:
  semdict check
  semdict check --set kmeans.k=512       the same with a value changed
  semdict check --no-images              without listing the images: for millions of files on a slow drive

Exit status 0: nothing is wrong, though files may be missing yet; 1: a stage would fail, or scores mean nothing."""


@dataclass
class Report:
    """What is as it should be, what is missing yet, and what is wrong."""

    fine: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The file to check."""
    add_params_arguments(parser)
    parser.add_argument("--no-images", action="store_true", help="do not list the images where there is no manifest")


def run(args: argparse.Namespace) -> int:
    """Check all; one line per finding."""
    params = params_of(args)
    print(f"{args.params}: preset {params.preset} is valid")
    report = check(params, list_files=not args.no_images)
    for line in report.fine:
        print(f"  {line}")
    for line in report.missing:
        print(f"  not there yet: {line}")
    for line in report.wrong:
        print(f"  wrong: {line}")
    return 1 if report.wrong else 0


def check(params: Params, list_files: bool = True) -> Report:
    """All checks; none stops the others."""
    report = Report(missing=[f"{path} ({key})" for key, path in missing_inputs(params)])
    report.wrong += wrong_splits(params)
    checks: list[Callable[[Params, Report], None]] = [check_preset, check_models, check_dvc]
    for one in checks:
        try:
            one(params, report)
        except SemdictError as error:
            report.wrong.append(str(error).replace("\n", " "))
    counts = check_images(params, report, list_files)
    if counts is not None:
        report.wrong += too_few(params, counts)
    return report


def check_preset(params: Params, report: Report) -> None:
    """The preset's name is that of a file, which `semdict preset --complete` needs."""
    if PRESETS.is_dir() and params.preset not in preset_names():
        report.wrong.append(
            f"preset: {params.preset} is not the name of a file {PRESETS}/{params.preset}.yaml; there are: "
            f"{', '.join(preset_names())}"
        )


def check_images(params: Params, report: Report, list_files: bool) -> Counts | None:
    """Images per split and class: from the manifest, else from a listing; images that two splits share."""
    manifest_path = paths.manifest(params.preset)
    try:
        if manifest_path.is_file():
            counts, shared = counts_of_manifest(manifest_path)
            report.fine.append(f"images: {counts} ({manifest_path})")
            trained = used_splits(params, tested=False)
            tested = used_splits(params, tested=True) - trained
            for pair in shared:
                line = f"{pair}; remove them from one, or list them once and divide them by manifest.shares"
                serious = bool(set(pair.splits) & trained) and bool(set(pair.splits) & tested)
                (report.wrong if serious else report.fine).append(line)
            return counts
        if not list_files:
            return None
        counts = counts_of_listing(params.manifest)
    except ManifestError as error:
        if "does not exist" not in str(error):
            report.wrong.append(str(error))
        elif not any(key.startswith("manifest.images") for key, _ in missing_inputs(params)):
            report.missing.append(str(error))  # a pattern that no file has
        return None
    report.fine.append(f"images: {counts}")
    report.fine.append("images that two splits share are found by `dvc repro manifest`, which reads them")
    return counts


def check_models(params: Params, report: Report) -> None:
    """The tokenizer's layout, the teacher's name, layer and file, and that both have the same grid."""
    from semdict.pipeline.tokenizers import inspect_features, inspect_tokenizer

    cfg, features = params.vqgan, params.features
    side: int | None = None
    if is_hub_name(cfg.weights):
        report.fine.append(f"tokenizer: {cfg.weights}, fetched by the first stage unless it is in the hub's cache")
    elif Path(cfg.weights).exists():
        tokenizer = inspect_tokenizer(cfg.weights, cfg.layout, cfg.ema)
        grid = tokenizer.grid(params.pixels.size)
        side = grid[0] if len(grid) == 2 else None
        shape = " x ".join(map(str, grid))
        report.fine.append(f"tokenizer: {cfg.weights}, {tokenizer.codebook_size:,} codes, {shape} cells")
    weights = features.weights
    if weights and not is_hub_name(weights) and not Path(weights).exists():
        weights = None
    arguments = {**features.model_dump(), "weights": weights}
    known = inspect_features(**arguments, **({"grid": side} if side else {}))
    if known is None:
        return
    cells, dim = known
    if side is not None and cells != side:
        report.wrong.append(
            f"the teacher {features.model} has {cells} x {cells} cells (features.image_size, features.pool), the "
            f"tokenizer {side} x {side} at {params.pixels.size} pixels; set features.image_size: null"
        )
    if side is not None or features.image_size is not None:
        report.fine.append(f"teacher: {features.model}, {dim} features, {cells} x {cells} cells")
    centroids = params.kmeans.centroids
    if centroids and Path(centroids).exists():
        check_centroids(params, dim)


def check_centroids(params: Params, dim: int) -> None:
    """An existing codebook has the teacher's width."""
    from semdict.pipeline.common.safeload import load_array

    shape = load_array(params.kmeans.centroids, mmap=True).shape
    if len(shape) != 2 or shape[1] != dim:
        raise SemdictError(f"{params.kmeans.centroids} has shape {shape}, features of {params.features.model} {dim}")


def check_dvc(params: Params, report: Report) -> None:
    """Every section and key that dvc.yaml names is in params.yaml; the folders that its stages wait for are there."""
    from semdict.pipeline.config.yaml import read_yaml

    if not Path("dvc.yaml").is_file():
        return
    stages = read_yaml(Path("dvc.yaml"))["stages"]
    tree = params.model_dump(by_alias=True)
    objectives = params.pretrain.entries()
    for name, stage in stages.items():
        for key in stage.get("params", []):
            names = [key.replace("${item.objective}", own) for own in objectives] if "${item" in key else [key]
            report.wrong += [
                f"dvc.yaml: stage {name} watches {one}: no such key" for one in names if not _has(tree, one)
            ]

    try:
        folders = [*awaited_folders(Path()), *watched_folders(params)]
    except SemdictError as error:
        report.missing.append(f"a DVC repository ({error}); run `git init` and `dvc init`, or work in a clone")
        return
    absent = [folder for folder in folders if not folder.exists()]
    if absent:
        names = ", ".join(str(path.relative_to(Path.cwd()) if path.is_absolute() else path) for path in absent[:3])
        report.missing.append(f"{len(absent)} folders that DVC asks for ({names}, ...): `semdict preset --complete`")


def _has(tree: object, dotted: str) -> bool:
    for part in dotted.split("."):
        if not isinstance(tree, dict) or part not in tree:
            return False
        tree = tree[part]
    return True


def wrong_splits(params: Params) -> list[str]:
    """Keys that name a split which manifest.images does not have."""
    known = set(params.manifest.images)
    return [
        f"{key} names the split {split}, manifest.images has {', '.join(sorted(known))}"
        for key, splits in splits_of(params)
        for split in splits
        if split not in known
    ]


def used_splits(params: Params, tested: bool) -> set[str]:
    """Splits that a section trains on, or tests on."""
    words = ("test", "held_out", "scores", "generate") if tested else ("train", ".splits")
    return {split for key, splits in splits_of(params) if any(word in key for word in words) for split in splits}


def splits_of(params: Params) -> Iterator[tuple[str, list[str]]]:
    """(key of params.yaml, splits that it names) of every stage that reads them; [] = all."""
    yield "sample_features.splits", params.sample_features.splits
    yield "pretrain.splits", params.pretrain.splits
    for name in ("condition", "vcq", "ar"):
        section = getattr(params, name)
        yield f"{name}.splits", section.splits
        yield f"{name}.held_out", section.held_out
    for name in ("evaluate", "vcq_evaluate"):
        section = getattr(params, name)
        yield f"{name}.train_splits", section.train_splits
        yield f"{name}.test_splits", section.test_splits
    yield "generate.split", [params.generate.split]
    yield "scores.split", [params.scores.split]

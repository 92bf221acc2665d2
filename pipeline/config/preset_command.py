"""`semdict preset NAME`: writes params.yaml for a preset and makes the folders that its DVC graph will fill.

`dvc repro` asks its run cache before it prints a stage, and for that hashes every dependency, also with --dry (DVC
issue 9818). An empty folder can be hashed, a missing one ends the graph: so each dependency is a folder, made here.
"""

import argparse
from pathlib import Path

from dvc.exceptions import DvcException
from dvc.repo import Repo

from semdict.pipeline.common.errors import UsageError
from semdict.pipeline.common.files import atomic_write
from semdict.pipeline.config.checks import missing_inputs
from semdict.pipeline.config.params import validate
from semdict.pipeline.config.presets import PRESETS, complete, preset_names, render
from semdict.pipeline.config.schema import Params
from semdict.pipeline.config.yaml import parse_yaml

EXAMPLE = """examples:
  semdict preset in1k          params.yaml for presets/in1k.yaml; yours is kept as params.yaml.before
  semdict preset --complete    add what params.yaml lacks, keep every value it has
  dvc repro --dry              every stage that would run, in order"""
PARAMS = Path("params.yaml")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which preset, or --complete."""
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("name", nargs="?", help=f"one of presets/*.yaml ({', '.join(preset_names()) or 'none here'})")
    which.add_argument("--complete", action="store_true", help="add the keys that params.yaml lacks, keep its values")


def run(args: argparse.Namespace) -> int:
    """Writes params.yaml, makes the folders, names what is missing."""
    if not Path("dvc.yaml").is_file():
        raise UsageError(f"{Path.cwd()} has no dvc.yaml; run it in the project's folder")
    text = complete(PARAMS) if args.complete else render(args.name)
    source = PARAMS if args.complete else PRESETS / f"{args.name}.yaml"
    params = validate(parse_yaml(text, str(source)), str(source))  # a wrong preset is refused before anything changes
    write_params(text, PARAMS)
    for folder in [*watched_folders(params), *awaited_folders(Path())]:
        folder.mkdir(parents=True, exist_ok=True)
    print(f"{PARAMS}: preset {params.preset}")
    for key, path in missing_inputs(params):
        print(f"  not there yet: {path} ({key})")
    return 0


def write_params(text: str, path: Path) -> None:
    """Writes `text` to `path`; other contents of `path` are kept as <path>.before."""
    if path.exists() and path.read_text(errors="replace") != text:
        with atomic_write(path.with_name(f"{path.name}.before")) as staged:
            staged.write_bytes(path.read_bytes())
    with atomic_write(path) as staged:
        staged.write_text(text)


def watched_folders(params: Params) -> list[Path]:
    """Folders that DVC watches for the sake of a file that the user puts there."""
    named = [(getattr(params.inputs, name), path) for name, _, path in params.watched()]
    return [Path(folder) for folder, path in named if path and folder != path]


def awaited_folders(root: Path) -> list[Path]:
    """Every dependency in dvc.yaml that is another stage's output; UsageError if DVC cannot tell."""
    try:
        graph = Repo(str(root)).index.stages
    except DvcException as error:
        raise UsageError(f"{root.resolve()}: {error}") from None
    stages = [stage for stage in graph if Path(stage.path) == (root / "dvc.yaml").resolve()]
    outputs = {Path(out.fs_path) for stage in stages for out in stage.outs}
    inputs = {Path(dep.fs_path) for stage in stages for dep in stage.deps}
    return sorted(outputs & inputs)

"""`semdict preset NAME`: put presets/NAME.yaml in force, and make the folders that its graph will fill.

`dvc repro` asks its run cache before it prints a stage, and for that hashes every dependency, also with --dry (DVC
issue 9818). An empty folder can be hashed, a missing one ends the graph: so each dependency is a folder, and made here.
"""

import argparse
from pathlib import Path

from dvc.exceptions import DvcException
from dvc.repo import Repo

from semdict.pipeline.common.errors import UsageError
from semdict.pipeline.common.files import write_aside
from semdict.pipeline.config.checks import missing_inputs
from semdict.pipeline.config.params import load_params
from semdict.pipeline.config.schema import Params

EXAMPLE = """example:
  semdict preset in1k          presets/in1k.yaml becomes params.yaml; yours is kept as params.yaml.before
  dvc repro --dry              every stage that would run, in order"""
PRESETS, PARAMS = Path("presets"), Path("params.yaml")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which preset."""
    parser.add_argument("name", help="presets/NAME.yaml")


def run(args: argparse.Namespace) -> int:
    """Copy the preset, make the folders, name what is missing."""
    if not Path("dvc.yaml").is_file():
        raise UsageError(f"{Path.cwd()} has no dvc.yaml; run it in the project's folder")
    source = PRESETS / f"{args.name}.yaml"
    if not source.is_file():
        known = ", ".join(sorted(path.stem for path in PRESETS.glob("*.yaml")))
        raise UsageError(f"no preset {args.name!r}; there are: {known}")
    settings = load_params(source)  # a wrong one is refused before anything changes
    put_in_force(source, PARAMS)
    for folder in [*watched_folders(settings), *awaited_folders(Path())]:
        folder.mkdir(parents=True, exist_ok=True)
    print(f"params.yaml: preset {settings.preset} is in force")
    for key, path in missing_inputs(settings):
        print(f"  not there yet: {path} ({key})")
    return 0


def put_in_force(source: Path, params: Path) -> None:
    """Copy `source` over `params`, whose other contents are kept as params.yaml.before."""
    wanted = source.read_bytes()
    if params.exists() and params.read_bytes() != wanted:
        with write_aside(params.with_name(f"{params.name}.before")) as aside:
            aside.write_bytes(params.read_bytes())
    with write_aside(params) as aside:
        aside.write_bytes(wanted)


def watched_folders(settings: Params) -> list[Path]:
    """Folders that DVC watches for the sake of a file that the user puts there."""
    named = [(getattr(settings.inputs, name), path) for name, _, path in settings.watched()]
    return [Path(folder) for folder, path in named if path and folder != path]


def awaited_folders(root: Path) -> list[Path]:
    """Every dependency in dvc.yaml that is another stage's output; UsageError if DVC cannot tell."""
    try:
        graph = Repo(str(root)).index.stages
    except DvcException as error:
        raise UsageError(f"{root.resolve()}: {error}") from None
    stages = [stage for stage in graph if Path(stage.path) == (root / "dvc.yaml").resolve()]
    made = {Path(out.fs_path) for stage in stages for out in stage.outs}
    asked = {Path(dep.fs_path) for stage in stages for dep in stage.deps}
    return sorted(made & asked)

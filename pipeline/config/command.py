"""`semdict preset` writes params.yaml and makes the folders that its DVC graph fills.

`dvc repro` asks its run cache before it prints a stage, and for that hashes every dependency, also with --dry (DVC
issue 9818). An empty folder can be hashed, a missing one ends the graph: so each dependency is a folder, made here.
"""

import argparse
from pathlib import Path

from semdict.pipeline.common.errors import UsageError
from semdict.pipeline.common.files import atomic_write
from semdict.pipeline.common.hub import is_hub_name
from semdict.pipeline.config.params import validate
from semdict.pipeline.config.presets import PRESETS, complete, preset_names, render
from semdict.pipeline.config.schema import Params
from semdict.pipeline.config.yaml import parse_yaml

PARAMS = Path("params.yaml")


class Preset:
    """Writes params.yaml for a preset."""

    EXAMPLE = """examples:
  semdict preset in1k          params.yaml for presets/in1k.yaml; yours is kept as params.yaml.before
  semdict preset --complete    add what params.yaml lacks, keep every value it has
  dvc repro --dry              every stage that would run, in order"""

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Which preset, or --complete."""
        which = parser.add_mutually_exclusive_group(required=True)
        names = ", ".join(preset_names()) or "none here"
        which.add_argument("name", nargs="?", help=f"one of presets/*.yaml ({names})")
        which.add_argument("--complete", action="store_true", help="add the keys that params.yaml lacks")

    @staticmethod
    def run(args: argparse.Namespace) -> int:
        """Write params.yaml, make the folders, name what is missing."""
        refuse_outside_project()
        text = complete(PARAMS) if args.complete else render(args.name)
        params = activate(text, PARAMS if args.complete else PRESETS / f"{args.name}.yaml")
        print(f"{PARAMS}: preset {params.preset}")
        for key, path in missing_inputs(params):
            print(f"  not there yet: {path} ({key})")
        return 0


def refuse_outside_project() -> None:
    """UsageError where the current folder has no dvc.yaml."""
    if not Path("dvc.yaml").is_file():
        raise UsageError(f"{Path.cwd()} has no dvc.yaml; run it in the project's folder")


def activate(text: str, source: Path) -> Params:
    """Make a text from file `source` the params.yaml of the project, and make the folders that DVC asks for.

    ParamsError, before anything changes, where the text is not valid.
    """
    params = validate(parse_yaml(text, str(source)), str(source))
    write_params(text, PARAMS)
    for folder in [*watched_folders(params), *awaited_folders(Path())]:
        folder.mkdir(parents=True, exist_ok=True)
    return params


def missing_inputs(params: Params) -> list[tuple[str, str]]:
    """(parameter, path) of every input that a stage will ask for and that does not exist."""
    wanted = [(f"manifest.images.{split}", path) for split, path in params.manifest.images.items()]
    wanted.append(("vqgan.weights", params.vqgan.weights))
    optional = {"features.weights": params.features.weights, "kmeans.centroids": params.kmeans.centroids}
    wanted += [(key, path) for key, path in optional.items() if path]
    networks = params.vcq.perceptual if params.vcq.perceptual_weight else []
    if not any(Path(network.weights).exists() for network in networks):  # the first that is there serves
        wanted += [("vcq.perceptual", network.weights) for network in networks]
    if params.vcq.warm_perceptual and params.vcq.perceptual_weight:
        wanted.append(("vcq.warm_perceptual", params.vcq.warm_perceptual.weights))
    return [
        (key, path)
        for key, path in wanted
        if not any(c in path for c in "*?{") and not is_hub_name(path) and not Path(path).exists()
    ]


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
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        graph = Repo(str(root)).index.stages
    except DvcException as error:
        raise UsageError(f"{root.resolve()}: {error}") from None
    stages = [stage for stage in graph if Path(stage.path) == (root / "dvc.yaml").resolve()]
    outputs = {Path(out.fs_path) for stage in stages for out in stage.outs}
    inputs = {Path(dep.fs_path) for stage in stages for dep in stage.deps}
    return sorted(outputs & inputs)

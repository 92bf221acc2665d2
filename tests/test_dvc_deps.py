"""What each stage of dvc.yaml watches: all code that shapes its result, the parameters it uses, and nothing else."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from dvc.repo import Repo

from semdict.cli import COMMANDS, Group
from semdict.pipeline.config.params import load_params
from semdict.pipeline.execute.code_identity import PACKAGES, import_closure
from semdict.train.masked.objectives import OBJECTIVES
from tests.test_dvc import ROOT, call, project

STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
PACKAGE_FOLDERS = {name: ROOT / name.rpartition(".")[2] for name in PACKAGES}

# Code that a stage imports and that does not shape its result, by folder or file, with the reason.
EVERYWHERE = {
    "pipeline/execute/": "decides where and when chunks are computed, not what is in them",
    "pipeline/kmeans/neighbours.py": "makes the stored neighbour table when shards are written",
}
PICTURES = {
    "pipeline/images/": "draws the pictures that show progress",
    "pipeline/tokenizers/": "decodes the pictures that show progress",
}
ENCODER_ONLY = ("pipeline/shards/", "train/data/")
UNSHAPED: dict[str, dict[str, str]] = {
    "analyse": {"pipeline/images/": "imported with the manifest, of which this stage reads the sizes"},
    "pretrain": PICTURES,
    "ar_sample": dict.fromkeys(("pipeline/shards/", "train/data/"), "imported with the trainer"),
    "vcq_evaluate": dict.fromkeys(ENCODER_ONLY, "imported with the encoder's measures, which this stage does not call"),
}


def modules(stage: str) -> list[str]:
    """The modules that a stage's commands run."""
    commands = STAGES[stage]["cmd"]
    found = []
    for command in [commands] if isinstance(commands, str) else commands:
        _, name, *rest = command.split()
        entry = COMMANDS[name]
        found.append((entry.actions[rest[0]] if isinstance(entry, Group) else entry).module)
    return found


def closure(stage: str) -> set[str]:
    """Every non-empty file of the project that a stage's code imports, relative to the repository."""
    files = {path for name in modules(stage) for path in import_closure(name, PACKAGE_FOLDERS).values()}
    return {path.relative_to(ROOT).as_posix() for path in files if path.stat().st_size}


def watched(stage: str) -> list[str]:
    """The code folders among a stage's deps, with a slash at the end."""
    return [f"{dep}/" for dep in STAGES[stage]["deps"] if dep.startswith(("pipeline/", "train/"))]


def unshaped(stage: str) -> dict[str, str]:
    """Folders and files that a stage imports without depending on them."""
    mine = EVERYWHERE | UNSHAPED.get(stage, {})
    return {name: why for name, why in mine.items() if not name.startswith(tuple(watched(stage)))}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_the_folders_of_all_code_that_shapes_its_result(stage):
    outside = {file for file in closure(stage) if not file.startswith((*watched(stage), *unshaped(stage)))}
    assert outside == set(), f"add their folders to deps of {stage} in dvc.yaml"


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_watches_no_folder_that_it_does_not_import(stage):
    files = closure(stage)
    assert [folder for folder in watched(stage) if not any(file.startswith(folder) for file in files)] == []


@pytest.mark.parametrize("stage", UNSHAPED)
def test_no_exception_is_out_of_date(stage):
    files = closure(stage)
    assert [name for name in UNSHAPED[stage] if not any(file.startswith(name) for file in files)] == []


def leaves(tree: dict, prefix: str = "") -> Iterator[str]:
    """Dotted keys of every value."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def test_every_parameter_is_watched_by_a_stage_or_listed_here():
    """Whole sections and single keys, so that a new key cannot be forgotten."""
    params = {key for stage in STAGES.values() for key in stage["params"]}
    params |= {f"pretrain.{objective}" for objective in OBJECTIVES}
    by_hand = (
        "runtime",
        "inputs",
        "objectives",
        "conditioned",
        "vqgan_train",
        "manifest.layout",
    )  # not results
    keys = leaves(load_params(ROOT / "params.yaml").model_dump(by_alias=True))
    unwatched = [key for key in keys if not any(f"{key}.".startswith(f"{name}.") for name in (*params, *by_hand))]
    assert unwatched == []
    assert not any(f"{name}.".startswith("runtime.") for name in params)


@pytest.fixture(scope="module")
def committed(tmp_path_factory) -> Path:
    """A project whose stages count as up to date: placeholder outputs, recorded by `dvc commit`."""
    folder = project(tmp_path_factory.mktemp("deps") / "project")
    call(folder, "semdict", "preset", "demo")
    params = folder / "params.yaml"
    params.write_text(params.read_text().replace("\nconditioned: []", "\nconditioned: [lease]"))  # every stage
    repo = Repo(str(folder))
    for stage in repo.index.stages:
        for out in stage.outs:
            path = Path(out.fs_path)
            if path.exists():
                continue
            if path.suffix in (".json", ".csv", ".png", ".ckpt", ".pth"):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("{}")
            else:
                path.mkdir(parents=True)
                (path / "placeholder").write_text(stage.addressing)
    repo.close()
    call(folder, "dvc", "commit", "-q", "-f")
    return folder


def changed(folder: Path) -> set[str]:
    """Names of the stages that `dvc status` lists; a matrix counts as one stage."""
    with Repo(str(folder)) as repo:
        return {name.rpartition(":")[2].partition("@")[0] for name in repo.status()}


def test_nothing_is_to_do_at_the_start(committed):
    assert changed(committed) == set()


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_an_edit_of_shaping_code_is_seen_and_an_edit_elsewhere_is_not(committed, stage):
    """`dvc status` on the file of the stage's closure that is named by the fewest stages, and on code outside of it."""
    users = {file: {s for s in STAGES if file.startswith(tuple(watched(s)))} for s in STAGES for file in closure(s)}
    mine = min((f for f in closure(stage) if stage in users[f]), key=lambda f: (len(users[f]), f))
    other = next((f for f in sorted(users) if users[f] and stage not in users[f]), "semdict/cli.py")
    for file in (mine, other):
        path = committed / file
        before = path.read_bytes()
        path.write_bytes(before + b"\nEDITED = True\n")
        try:
            assert changed(committed) == users.get(file, set()), file
        finally:
            path.write_bytes(before)


def edited(folder: Path, key: str) -> set[str]:
    """The stages that see another value of a parameter."""
    path = folder / "params.yaml"
    before = path.read_text()
    tree = yaml.safe_load(before)
    section = tree
    *sections, name = key.split(".")
    for part in sections:
        section = section[part]
    section[name] = "changed"
    path.write_text(yaml.safe_dump(tree))
    try:
        return changed(folder)
    finally:
        path.write_text(before)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "stages"),
    [
        ("runtime.device", set()),
        ("runtime.log_every", set()),
        ("runtime.scheduler", set()),
        ("condition.epochs", {"condition"}),
        ("kmeans.iterations", {"kmeans"}),
        ("encode.batch", {"encode"}),
        ("pixels.crop", {"sample_features", "encode", "score", "vcq_encode", "vcq_evaluate"}),
        ("pretrain.epochs", {"pretrain"}),
        ("vcq.steps", {"vcq_train"}),
        ("vcq_encode.batch", {"vcq_encode"}),
        ("ar.steps", {"ar_train"}),
        ("ar_sample.scale", {"ar_sample"}),
        ("evaluate.knn.k", {"evaluate"}),
        ("generate.steps", {"generate", "generate_class"}),
        ("scores.batch", {"score", "vcq_evaluate"}),
        ("manifest.layout", {"manifest"}),
    ],
)
def test_a_parameter_is_seen_by_the_stages_that_use_it(committed, key, stages):
    assert edited(committed, key) == stages


@pytest.mark.slow
def test_a_key_of_one_objective_leaves_the_others_alone(committed):
    path = committed / "params.yaml"
    shutil.copy2(path, committed / "kept.yaml")
    path.write_text(path.read_text().replace("    neighbours: 5", "    neighbours: 6"))
    try:
        with Repo(str(committed)) as repo:
            assert {name.rpartition(":")[2] for name in repo.status()} == {"pretrain@lease"}
    finally:
        shutil.copy2(committed / "kept.yaml", path)

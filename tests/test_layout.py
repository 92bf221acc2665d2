"""The layout of the project: who may import whom, how large files are, and what the wheel contains."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Folders from low to high: one may import itself and the ones in lines above its own.
TIERS = (
    ("pipeline.common",),
    ("pipeline.config",),
    ("pipeline.execute",),
    ("pipeline.images",),
    ("pipeline.manifest",),
    ("pipeline.tokenizers",),
    ("pipeline.kmeans",),
    ("pipeline.shards",),
    ("pipeline.encode", "pipeline.analysis"),
    ("train.engine",),
    ("train.data",),
    ("train.masked", "train.vcq"),
    ("train.vqgan",),
    ("train.ar",),
    ("train.eval",),
    ("semdict",),
    ("semdict.project",),
    ("semdict.report",),
)
LONGEST_FILE = 400
PRETRAIN_LINES = 2500
# Folders that run on a machine with torch, numpy and timm only; other packages are imported inside functions.
LEAN = ("train", "pipeline/tokenizers", "pipeline/kmeans", "pipeline/analysis")
LEAN_PACKAGES = {"torch", "numpy", "timm", "tqdm", "semdict"}  # timm depends on tqdm


def modules() -> dict[str, Path]:
    """Name -> file of all modules in the wheel; `pipeline.x` and `train.x` without the leading `semdict.`"""
    files = [path for folder in ("pipeline", "train") for path in (ROOT / folder).rglob("*.py")]
    files += [path for part in ("*.py", "project/*.py", "report/*.py") for path in (ROOT / "semdict").glob(part)]
    names = {path: str(path.relative_to(ROOT).with_suffix("")).replace("/", ".") for path in files}
    return {name.removesuffix(".__init__"): path for path, name in names.items()}


MODULES = modules()


def outside(tree: ast.AST, *conditions: str) -> Iterator[ast.AST]:
    """All nodes but those under an `if` whose test contains one of the conditions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and any(condition in ast.unparse(node.test) for condition in conditions):
            continue
        yield node
        yield from outside(node, *conditions)


def imports(path: Path, *conditions: str) -> set[str]:
    """The project's modules that a file imports, inside functions too, but not under an `if` with a condition."""
    imported = set()
    for node in outside(ast.parse(path.read_text()), *conditions):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "semdict":
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            imported |= {short(name) if short(name) in MODULES else short(node.module) for name in names}
        elif isinstance(node, ast.Import):
            imported |= {short(alias.name) for alias in node.names if short(alias.name) in MODULES}
    return imported


def short(name: str) -> str:
    """`semdict.train.x` -> `train.x`; `semdict.cli` stays."""
    rest = name.removeprefix("semdict.")
    return rest if rest.split(".")[0] in ("pipeline", "train") else name


GRAPH = {name: imports(path, "__main__") - {name} for name, path in MODULES.items()}


def folder(name: str) -> str:
    """The room of a module: `pipeline.images`, `semdict.report`, or `semdict` for the files at the top."""
    parts = name.split(".")
    if parts[0] in ("pipeline", "train"):
        return ".".join(parts[:2])
    rooms = {name for tier in TIERS for name in tier}
    return ".".join(parts[:2]) if ".".join(parts[:2]) in rooms else "semdict"


def test_imports_name_modules_that_exist():
    assert {name for names in GRAPH.values() for name in names} <= set(MODULES)


def test_no_file_imports_itself_through_others():
    try:
        list(TopologicalSorter(GRAPH).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_folders_import_only_lower_ones():
    level = {name: number for number, tier in enumerate(TIERS) for name in tier}
    wrong = [
        f"{name} -> {other}"
        for name, others in GRAPH.items()
        for other in others
        if folder(other) != folder(name) and level[folder(other)] >= level[folder(name)]
    ]
    assert not wrong


def test_the_design_page_lists_the_folders_in_this_order():
    page = (ROOT / "docs" / "design.md").read_text()
    listed = re.findall(r"^\| `([a-z/]+)/` \|", page, re.MULTILINE)
    assert [name.replace("/", ".") for name in listed] == [name for tier in TIERS for name in tier]


def test_every_file_is_in_a_folder_with_a_place_in_the_order():
    loose = [name for name in MODULES if name.count(".") < 2 and name.split(".")[0] in ("pipeline", "train")]
    packages = {"pipeline", "train"} | {name for tier in TIERS for name in tier}
    assert set(loose) <= packages
    assert {folder(name) for name in MODULES} - {"pipeline", "train"} <= packages


def test_no_file_is_too_long():
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in MODULES.values()}
    assert {name: count for name, count in lines.items() if count > LONGEST_FILE} == {}


def test_pretraining_imports_little_of_train():
    """The trainer is short, objectives and dataloaders of a table aside; no measure is among what it imports."""
    reached, todo = set(), ["train.masked.pretrain"]
    while todo:
        name = todo.pop()
        if name not in reached:
            reached.add(name)
            used = imports(MODULES[name], "__main__", "TYPE_CHECKING")
            todo += [other for other in used if folder(other).split(".")[0] in ("pipeline", "train")]
    trainer = {name: len(MODULES[name].read_text().splitlines()) for name in reached if name.startswith("train.")}
    assert sum(trainer.values()) < PRETRAIN_LINES, sorted(trainer.items(), key=lambda item: -item[1])
    assert not [name for name in trainer if name.startswith("train.eval.")]


def test_validated_parameters_bring_the_tables_of_train_and_no_trainer():
    """The schema reads the names of objectives and measures from two tables, the only arrow from pipeline to train."""
    script = (
        "import json, sys\nfrom semdict.pipeline.config.params import load_params\nload_params('params.yaml')\n"
        "print(json.dumps([name for name in sys.modules if name.startswith(('semdict.train.', 'torch'))]))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    packages = {"semdict.train.masked", "semdict.train.eval"}
    tables = {"semdict.train.masked.objectives", "semdict.train.eval.measures"}
    assert set(json.loads(done.stdout)) == packages | tables


@pytest.mark.parametrize("parent", LEAN)
def test_lean_folders_need_torch_numpy_and_timm_only(parent):
    outside = {}
    for path in (ROOT / parent).rglob("*.py"):
        tree = ast.parse(path.read_text())
        names = [alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module for node in tree.body if isinstance(node, ast.ImportFrom)]
        packages = {name.split(".")[0] for name in names} - LEAN_PACKAGES - sys.stdlib_module_names
        if packages:
            outside[str(path.relative_to(ROOT))] = packages
    assert outside == {}


def packages_of_the_tree() -> set[str]:
    """Every folder with an `__init__.py`, by its import name."""
    packages = {path.parent for path in MODULES.values() if path.name == "__init__.py"}
    names = {str(path.relative_to(ROOT)).replace("/", ".") for path in packages}
    return {name if name.startswith("semdict") else f"semdict.{name}" for name in names}


def test_pyproject_lists_every_package():
    """setuptools cannot find packages that are mapped to other folders."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert set(settings["packages"]) == packages_of_the_tree()
    folders = {path.parent for path in MODULES.values()}
    assert {folder for folder in folders if not (folder / "__init__.py").exists()} == set()


@pytest.mark.slow
def test_the_wheel_holds_one_top_level_package(tmp_path):
    build = tmp_path / "source"
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if name.split("/")[0] in ("pipeline", "train", "semdict", "pyproject.toml", "README.md", "LICENSE", "presets"):
            (build / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, build / name)
    code = f"from setuptools.build_meta import build_wheel; build_wheel({str(tmp_path)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=build, capture_output=True, text=True, check=False, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("semdict-*.whl")
    files = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert {name.split("/")[0] for name in files} == {"semdict"}
    modules = {
        name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in files if name[-3:] == ".py"
    }
    assert modules == {name if name.startswith("semdict") else f"semdict.{name}" for name in MODULES}
    assert {"semdict/report/page.html", "semdict/py.typed"} <= set(files)


def test_names_are_the_words_of_the_field():
    """Private words that stood for cfg, result, rng, sampler, context, paths, discriminator, locked and others."""
    private = {"given", "found", "chosen", "told", "held", "drawer", "drawers", "canvases", "places", "marked", "turns"}
    private |= {"adversary", "what", "aside", "say"}
    wrong = set()
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            names = {getattr(node, field, None) for field in ("id", "arg", "attr", "name", "asname")}
            wrong |= {f"{name}: {word}" for word in names & private}
    assert not wrong

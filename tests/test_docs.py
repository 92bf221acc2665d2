"""Documents name only what exists: links, files, commands, options, stages and imports."""

import argparse
import ast
import re
import subprocess
import sys
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from semdict.cli import COMMANDS, Group, load
from semdict.train.masked.objectives import OBJECTIVES

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("*/README.md"), *(ROOT / "docs").glob("*.md")])
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
# Folders whose files are part of the project; names in other folders are examples or results.
TRACKED = (
    "pipeline/",
    "train/",
    "semdict/",
    "tests/",
    "tools/",
    "docs/",
    "presets/",
    "demo/",
    "benchmarks/",
    "replicate/",
)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def text_of(page: Path) -> str:
    """A page without its diffs, which name files that do not exist yet."""
    return re.sub(r"```diff\n.*?```", "", page.read_text(), flags=re.DOTALL)


def test_pages_are_found():
    assert {"README.md", "docs/design.md", "shards/README.md"} <= {name(page) for page in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if target.startswith(("http://", "https://", "#")):
            continue
        path, _, anchor = target.partition("#")
        assert (page.parent / path).exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.+)$", (page.parent / path).read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^a-z0-9 -]", "", head.lower()).replace(" ", "-") for head in heads}, target


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_of_the_project_exist(page):
    for path in re.findall(r"`([\w./*-]+/[\w./*-]*)`", text_of(page)):
        known = path.split("/")[0] in TRACKED and not path.startswith("demo/assets")
        if known and not (ROOT / path).exists():
            assert any(fnmatch(name(file), path) for file in ROOT.glob("*/**/*")), path


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "extending.md"], ids=name)
def test_commands_exist(page):
    """But for the ones that extending.md adds, which its own test runs."""
    for command, action in re.findall(r"\bsemdict ([a-z][a-z-]+)(?: ([a-z][a-z-]+))?", code_of(page)):
        assert command in COMMANDS, f"semdict {command}"
        entry = COMMANDS[command]
        if isinstance(entry, Group) and action:
            assert action in entry.actions, f"semdict {command} {action}"


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "extending.md"], ids=name)
def test_options_exist(page):
    for line in re.findall(r"\bsemdict ([a-z][^`#\n]+)", code_of(page).replace("\\\n", " ")):
        words = line.split()
        entry, rest = COMMANDS[words[0]], words[1:]
        if isinstance(entry, Group):
            entry, rest = entry.actions.get(rest[0]) if rest else None, rest[1:]
        if entry is not None:
            parser = argparse.ArgumentParser()
            load(entry).add_arguments(parser)
            used = {word.partition("=")[0] for word in rest if word.startswith("--")}
            assert used <= {"--help", *parser._option_string_actions}, line


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_stages_exist(page):
    for words in re.findall(r"\bdvc (?:repro|push|pull) ([^`#\n]+)", code_of(page)):
        for word in words.split():
            stage, _, item = word.partition("@")
            if re.fullmatch(r"[a-z_]+", stage):
                assert stage in STAGES, word
                assert not item or ("matrix" in STAGES[stage] and item in OBJECTIVES), word


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_imports_work(page):
    for block in re.findall(r"```python\n(.*?)```", text_of(page), re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("semdict"):
                module = import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


def code_of(page: Path) -> str:
    """The commands of a page: code blocks but for Python, and code inside lines."""
    text = text_of(page)
    blocks = [code for kind, code in re.findall(r"```(\w*)\n(.*?)```", text, re.DOTALL) if kind != "python"]
    return "\n".join([*blocks, *re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))])


def test_the_python_api_is_written_from_the_docstrings(tmp_path):
    """`make docs`: a page per module of the Makefile's list, with the functions that other programs call."""
    text = (ROOT / "Makefile").read_text()
    modules = re.search(r"^API := ((?:.*\\\n)*.*)$", text, re.MULTILINE)[1].replace("\\\n", " ").split()
    command = [sys.executable, "-m", "pdoc", "--output-directory", str(tmp_path), *modules]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    for module, function in (("semdict", "load_model"), ("semdict.pipeline.shards", "open_shards")):
        page = (tmp_path / f"{module.replace('.', '/')}.html").read_text()
        assert f'id="{function}"' in page

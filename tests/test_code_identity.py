"""The identity of a stage's code: what changes it, what does not, and which files it covers."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from semdict.cli import COMMANDS, Group
from semdict.pipeline.common.errors import SemdictError
from semdict.pipeline.execute.code_identity import code_identity, identity_of, import_closure

ROOT = Path(__file__).resolve().parent.parent
ENCODERS = ("semdict.pipeline.encode.stage", "semdict.pipeline.kmeans.sample_features", "semdict.train.vcq.encode")

PACKAGE = {
    "__init__.py": "",
    "stage.py": (
        '"""A stage."""\nfrom typing import TYPE_CHECKING\n\nimport json\nfrom pkg import direct\n'
        "from pkg.sub.names import f\n"
        "if TYPE_CHECKING:\n    from pkg import types_only\nelse:\n    from pkg import run_time\n\n\n"
        'def work():\n    """Works."""\n    from . import lazy\n    return lazy, "semdict.no.module"\n'
    ),
    "direct.py": "X = 1\n",
    "types_only.py": "T = int\n",
    "run_time.py": "R = 1\n",
    "lazy.py": "from .sub import deep\n",
    "settings.py": "S = 1\n",
    "unused.py": "U = 1\n",
    "sub/__init__.py": "",
    "sub/names.py": "from pkg import settings\n\n\ndef f(x: int) -> int:\n    # a comment\n    return x + 1\n",
    "sub/deep.py": 'class Deep:\n    """Deep."""\n\n    async def g(self):\n        """Docstring only."""\n',
}


@pytest.fixture
def package(tmp_path) -> Path:
    for name, text in PACKAGE.items():
        path = tmp_path / "pkg" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "pkg"


def identity(folder: Path) -> str:
    """Identity of pkg.stage; `settings` is excluded."""
    return identity_of(import_closure("pkg.stage", {"pkg": folder}, excluded=("pkg.settings",)))


def test_the_closure_holds_what_runs(package):
    closure = import_closure("pkg.stage", {"pkg": package}, excluded=("pkg.settings",))
    inside = {"stage", "direct", "run_time", "lazy", "sub", "sub.names", "sub.deep"}
    assert set(closure) == {"pkg", *(f"pkg.{name}" for name in inside)}


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("stage.py", '"""A stage."""', '"""A stage that works."""'),
        ("stage.py", '    """Works."""\n', ""),
        ("sub/names.py", "    # a comment\n", "    # another\n\n"),
        ("sub/names.py", "x + 1", "(x  + 1)  # same"),
        ("sub/deep.py", "Docstring only", "Another docstring"),
        ("types_only.py", "int", "str"),
        ("settings.py", "1", "2"),
        ("unused.py", "1", "2"),
    ],
)
def test_an_edit_that_does_not_run_keeps_the_identity(package, file, old, new):
    before = identity(package)
    text = (package / file).read_text()
    assert old in text
    (package / file).write_text(text.replace(old, new))
    assert identity(package) == before


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("sub/names.py", "x + 1", "x + 2"),
        ("sub/names.py", "x + 1", "x - 1"),
        ("sub/names.py", "x + 1", "x + True"),
        ("direct.py", "1", "1.0"),
        ("run_time.py", "1", "2"),
        ("sub/deep.py", '"""Docstring only."""', "return 1"),
        ("sub/__init__.py", "", "Y = 1"),
        ("lazy.py", "deep", "deep as d"),
    ],
)
def test_an_edited_expression_changes_the_identity(package, file, old, new):
    before = identity(package)
    path = package / file
    path.write_text(path.read_text().replace(old, new) if old else new)
    assert identity(package) != before


def test_the_identity_does_not_depend_on_the_folder(package, tmp_path):
    shutil.copytree(package, tmp_path / "elsewhere" / "pkg")
    assert identity(package) == identity(tmp_path / "elsewhere" / "pkg")


def test_an_unknown_module_is_refused():
    for name in ("semdict.pipeline.encode.no_such_module", "numpy"):
        with pytest.raises(SemdictError, match=name):
            code_identity(name)


@pytest.mark.parametrize("module", ENCODERS)
def test_every_file_of_the_closure_counts_and_no_other(module, tmp_path):
    """On a copy of the project: one more statement in any file of the closure is noticed, in other files it is not."""
    roots = {f"semdict.{name}": tmp_path / name for name in ("pipeline", "train")}
    for folder in roots.values():
        shutil.copytree(ROOT / folder.name, folder, ignore=shutil.ignore_patterns("__pycache__"))
    closure = import_closure(module, roots)
    before = identity_of(closure)
    assert before == code_identity(module), "the copy is the same code"
    assert not any(name.startswith("semdict.pipeline.config") for name in closure)
    for path in sorted(p for folder in roots.values() for p in folder.rglob("*.py")):
        text = path.read_text()
        path.write_text(f"{text}\n_ADDED = 1\n")
        assert (identity_of(import_closure(module, roots)) != before) == (path in closure.values()), path
        path.write_text(text)


def test_code_that_shapes_tokens_is_in_the_closures_of_the_encoders():
    """Files that were missing from the lists kept by hand."""
    roots = {f"semdict.{name}": ROOT / name for name in ("pipeline", "train")}
    vcq = import_closure("semdict.train.vcq.encode", roots)
    assert {"semdict.train.engine.layers", "semdict.train.vcq.schedule", "semdict.pipeline.common.device"} <= vcq.keys()
    paired = import_closure("semdict.pipeline.encode.stage", roots)
    assert {"semdict.pipeline.tokenizers.vqgan", "semdict.pipeline.images.crops"} <= paired.keys()
    assert not any(name.startswith("semdict.train") for name in paired), "pipeline never imports train"


def test_the_identity_is_known_for_every_command():
    actions = [entry.actions.values() if isinstance(entry, Group) else [entry] for entry in COMMANDS.values()]
    modules = {command.module.partition(":")[0] for commands in actions for command in commands}
    for module in modules:
        if module.startswith(("semdict.pipeline.", "semdict.train.")) and ".config." not in module:
            assert len(code_identity(module)) == 16


def test_a_module_run_as_a_program_has_its_own_identity():
    """`python -m semdict.pipeline.common.progress` calls itself __main__."""
    script = (
        "import runpy, sys\nfrom semdict.pipeline.execute.code_identity import code_identity\n"
        "class Spec: name = 'semdict.pipeline.common.progress'\n"
        "sys.modules['__main__'].__spec__ = Spec\nprint(code_identity('__main__'))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == code_identity("semdict.pipeline.common.progress")

"""Identity of the code behind a result: a hash over everything that a stage's module imports from this project.

The imports are read from the syntax trees, nothing is imported. Comments, docstrings and formatting do not count, so a
killed run continues across an edited comment and starts anew across an edited expression.
"""

import ast
import importlib
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from semdict.pipeline.common.errors import SemdictError
from semdict.pipeline.common.files import sha256_json

PACKAGES = ("semdict.pipeline", "semdict.train")
# The validated parameters are part of every fingerprint themselves; the code that checks them does not shape a result.
EXCLUDED = ("semdict.pipeline.config",)
DIGITS = 16
MODULE_NAME = re.compile(r"semdict(\.[a-z_0-9]+){2,}")


@cache
def code_identity(module_name: str) -> str:
    """16 hex digits over the syntax trees of `module_name` and of all project modules that it imports.

    Imports inside functions count, imports under `if TYPE_CHECKING` do not. A string that equals a module's name counts
    as an import of it (tables of lazily imported modules). `__main__` stands for the module that `python -m` runs.
    SemdictError when the module has no source file.
    """
    if module_name == "__main__":
        module_name = sys.modules["__main__"].__spec__.name
    roots = {name: Path(importlib.import_module(name).__path__[0]) for name in PACKAGES}
    return identity_of(import_closure(module_name, roots))


def identity_of(closure: Mapping[str, Path]) -> str:
    """16 hex digits over module names and syntax trees; independent of the order and of where the files are."""
    return sha256_json({name: _summary(path.read_bytes()).digest for name, path in closure.items()})[:DIGITS]


def import_closure(module_name: str, roots: Mapping[str, Path], excluded: tuple[str, ...] = EXCLUDED) -> dict:
    """Module name -> source file of `module_name`, of what it imports, and of the packages around these.

    `roots` maps a package name to its folder; modules outside these packages and under `excluded` are left out.
    """
    closure: dict[str, Path] = {}
    waiting = [module_name]
    while waiting:
        name = waiting.pop()
        if name in closure or _inside(name, excluded):
            continue
        path = _source(name, roots)
        if path is None:
            if name == module_name:
                raise SemdictError(f"{module_name} is no module of {' or '.join(roots)} with a source file")
            continue  # a name inside a module, or a module of another distribution
        closure[name] = path
        parent = name.rpartition(".")[0]
        package = name if path.name == "__init__.py" else parent
        waiting += [parent, *(_absolute(imported, package) for imported in _summary(path.read_bytes()).imports)]
    return closure


def _source(name: str, roots: Mapping[str, Path]) -> Path | None:
    """The source file of a module, None if it is none of `roots`."""
    for root, folder in roots.items():
        if _inside(name, (root,)):
            base = folder.joinpath(*name.removeprefix(root).strip(".").split("."))
            return next((p for p in (base / "__init__.py", base.with_suffix(".py")) if p.is_file()), None)
    return None


def _inside(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


@dataclass(frozen=True)
class _Summary:
    """A source file: the SHA-256 of its syntax tree, and the names that may be imported modules ("..x" is relative)."""

    digest: str
    imports: tuple[str, ...]


@cache
def _summary(source: bytes) -> _Summary:
    tree = ast.parse(source)
    return _Summary(sha256_json(_canonical(tree)), tuple(_imported(tree)))


def _imported(tree: ast.AST) -> Iterator[str]:
    """Every name that may be an imported module, at any depth of the code."""
    for node in _run_time_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield base
            yield from (f"{base}.{alias.name}" if node.module else f"{base}{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and MODULE_NAME.fullmatch(node.value):
            yield node.value


def _absolute(name: str, package: str) -> str:
    """`name` as seen from `package`; "..x" counts from the package above."""
    tail = name.lstrip(".")
    if not (level := len(name) - len(tail)):
        return name
    parts = package.split(".")
    return ".".join([*parts[: len(parts) - level + 1], *filter(None, [tail])])


def _run_time_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but the bodies of `if TYPE_CHECKING`."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            waiting += node.orelse
        else:
            waiting += ast.iter_child_nodes(node)


def _canonical(node: Any) -> Any:
    """A syntax tree as nested lists without positions, comments and docstrings; the same in every Python version.

    Empty and absent fields are left out: new versions of Python add fields.
    """
    if isinstance(node, list):
        return [_canonical(item) for item in node]
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = dict(ast.iter_fields(node))
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and _is_text(node.body):
        fields["body"] = node.body[1:]
    return [type(node).__name__, *([name, _canonical(v)] for name, v in fields.items() if v not in (None, []))]


def _is_text(body: list[ast.stmt]) -> bool:
    """Whether a body begins with a docstring."""
    first = body[0] if body else None
    return isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)

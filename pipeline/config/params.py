"""The one door to params.yaml: read, validate, override, and say what is wrong with a key."""

import argparse
import difflib
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from semdict.pipeline.common.errors import ParamsError
from semdict.pipeline.config.schema import Params

DEFAULT_PATH = Path("params.yaml")


def load_params(path: str | Path = DEFAULT_PATH, overrides: list[str] | None = None) -> Params:
    """Read `path`, apply `section.key=value` overrides, validate the whole; ParamsError names every wrong key."""
    path = Path(path)
    try:
        tree = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise ParamsError(f"{path} does not exist; `make preset NAME=demo` makes one") from None
    except yaml.YAMLError as error:
        raise ParamsError(f"{path} is not YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ParamsError(f"{path} must hold sections (a YAML mapping), found {type(tree).__name__}")
    for override in overrides or []:
        _set(tree, override)
    try:
        return Params.model_validate(_tuples(tree))
    except ValidationError as error:
        raise ParamsError("\n".join(_explain(path, tree, item) for item in error.errors())) from None


def add_params_arguments(parser: argparse.ArgumentParser) -> None:
    """--params and --set, the same for every stage."""
    parser.add_argument("--params", default=DEFAULT_PATH, type=Path, help="default: params.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a parameter")


def params_of(args: argparse.Namespace) -> Params:
    """The validated parameters that the command line asked for."""
    return load_params(args.params, args.set)


def _set(tree: dict, override: str) -> None:
    """Put `section.key=value` into the tree; the value is read as YAML."""
    dotted, found, text = override.partition("=")
    if not found:
        raise ParamsError(f"--set {override}: expected section.key=value")
    *sections, key = dotted.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ParamsError(f"--set {override}: {section} is not a section")
    tree[key] = yaml.safe_load(text)


def _tuples(value: Any) -> Any:
    """YAML whole numbers stay integers; nothing is coerced but a mapping's keys to text."""
    if isinstance(value, dict):
        return {str(key): _tuples(item) for key, item in value.items()}
    return [_tuples(item) for item in value] if isinstance(value, list) else value


def _explain(path: Path, tree: dict, item: dict) -> str:
    """One line for one validation error: the dotted key, what is wrong, the nearest valid key or the given value."""
    location = [str(part) for part in item["loc"]]
    dotted = ".".join(location)
    if item["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.4)
        hint = f"did you mean {'.'.join([*location[:-1], near[0]])}?" if near else f"known: {', '.join(known)}"
        return f"{path}: {dotted} is unknown; {hint}"
    if item["type"] == "missing":
        return f"{path}: {dotted} is required"
    said = item["msg"].removeprefix("Value error, ")
    if isinstance(item["input"], dict):  # a rule over a whole section: the message names its keys
        return ": ".join(filter(None, [str(path), dotted, said]))
    return f"{path}: {dotted}: {said} (found {item['input']!r})"


def _known_keys(location: list[str]) -> list[str]:
    """The keys that the section at `location` accepts."""
    model: Any = Params
    for part in location:
        fields = getattr(model, "model_fields", {})
        name = next((n for n, f in fields.items() if part in (n, f.alias)), None)
        model = fields[name].annotation if name else None
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        return []
    return sorted(field.alias or name for name, field in model.model_fields.items())

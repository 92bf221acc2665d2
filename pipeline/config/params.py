"""Reads params.yaml: parse, override, validate, and say what is wrong with a key."""

import argparse
import difflib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from semdict.pipeline.common.errors import ParamsError
from semdict.pipeline.config.naming import fill_named_paths
from semdict.pipeline.config.schema import Params
from semdict.pipeline.config.yaml import parse_yaml, read_yaml

DEFAULT_PATH = Path("params.yaml")
SHOWN_KEYS, MORE_KEYS = 2, 10  # wrong keys that a message explains, and that it names besides
SHOWN = 80  # characters of a wrong value that a message repeats


def load_params(path: str | Path = DEFAULT_PATH, overrides: list[str] | None = None) -> Params:
    """Reads `path`, applies `section.key=value` overrides, validates the whole; ParamsError names every wrong key."""
    path = Path(path)
    tree = read_yaml(path)
    if not isinstance(tree, dict):
        raise ParamsError(f"{path} must contain sections (a YAML mapping), not {type(tree).__name__}")
    for text in overrides or []:
        override(tree, text)
    return validate(tree, str(path))


def validate(tree: dict[str, Any], source: str) -> Params:
    """Parameters from nested mappings; `source` names them in errors. ParamsError explains the first two wrong keys."""
    try:
        return Params.model_validate(_text_keys(tree))
    except ValidationError as error:
        lines = [_explain(source, tree, item) for item in error.errors()]
        if len(lines) > SHOWN_KEYS:
            rest = [shown(".".join(map(str, item["loc"]))) for item in error.errors()[1:]]
            more = f" and {len(rest) - MORE_KEYS} more" if len(rest) > MORE_KEYS else ""
            lines = [lines[0], f"{source}: wrong too: {', '.join(rest[:MORE_KEYS])}{more}"]
        raise ParamsError("\n".join(lines)) from None


def add_params_arguments(parser: argparse.ArgumentParser) -> None:
    """--params and --set, the same for every command."""
    parser.add_argument("--params", default=DEFAULT_PATH, type=Path, help="default: params.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a parameter")


def params_of(args: argparse.Namespace) -> Params:
    """The validated parameters that a command line names; the paths that its --name decides are filled in."""
    params = load_params(args.params, args.set)
    fill_named_paths(args, params.preset)
    return params


def override(tree: dict, text: str) -> None:
    """Puts `section.key=value` into the tree; the value is read as YAML."""
    dotted, equals, value = text.partition("=")
    if not equals or not all(dotted.split(".")):
        raise ParamsError(f"--set {shown(text)}: expected section.key=value")
    *sections, key = dotted.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ParamsError(f"--set {shown(text)}: {section} is not a section")
    tree[key] = parse_yaml(value, f"--set {dotted}")


def _text_keys(value: Any) -> Any:
    """The same tree with every mapping key as text (YAML allows numbers)."""
    if isinstance(value, dict):
        return {str(key): _text_keys(item) for key, item in value.items()}
    return [_text_keys(item) for item in value] if isinstance(value, list) else value


def _explain(source: str, tree: dict, item: dict) -> str:
    """One line for one validation error: the dotted key, what is wrong, and the way out."""
    location = [str(part) for part in item["loc"]]
    dotted = ".".join(location)
    if item["type"] == "extra_forbidden":
        return f"{source}: {dotted} is unknown; {_nearest(location)}"
    if item["type"] == "missing":
        return f"{source}: {dotted} is missing; `semdict preset --complete` adds what is missing with its default"
    problem = item["msg"].removeprefix("Value error, ")
    if isinstance(item["input"], dict):  # a rule over a whole section: the message names its keys
        return ": ".join(filter(None, [source, dotted, problem]))
    return f"{source}: {dotted}: {problem} (the value is {shown(item['input'])})"


def _nearest(location: list[str]) -> str:
    """The valid key nearest to an unknown one, or all that the section accepts."""
    known = known_keys(location[:-1])
    near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.4)
    return f"did you mean {'.'.join([*location[:-1], near[0]])}?" if near else f"known: {', '.join(known)}"


def shown(value: Any) -> str:
    """A value as a message repeats it, cut to a readable length."""
    text = repr(value) if not isinstance(value, str) or len(value) <= SHOWN else repr(value[:SHOWN])
    return text if len(text) <= SHOWN + 2 else text[:SHOWN] + "..."


def known_keys(location: list[str]) -> list[str]:
    """The keys that the section at `location` accepts; [] where there is no section."""
    model: Any = Params
    for part in location:
        fields = getattr(model, "model_fields", {})
        name = next((n for n, f in fields.items() if part in (n, f.alias)), None)
        model = fields[name].annotation if name else None
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        return []
    return sorted(field.alias or name for name, field in model.model_fields.items())

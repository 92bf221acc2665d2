"""Presets: presets/base.yaml with every default, overlays with what differs, and params.yaml written from both."""

import re
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap

from semdict.pipeline.common.errors import ParamsError, UsageError
from semdict.pipeline.common.hub import is_hub_name
from semdict.pipeline.config.schema import NO_FILE
from semdict.pipeline.config.yaml import read_yaml

PRESETS = Path("presets")
BASE = "base"
NULL = "tag:yaml.org,2002:null"
EXTENDS = "extends"  # key of an overlay: the preset that it changes, base if absent
# key of `inputs`, and the key of the file that it stands for
INPUT_OF = {
    "vqgan": ("vqgan", "weights"),
    "features": ("features", "weights"),
    "centroids": ("kmeans", "centroids"),
}
HEADER = """# Complete parameters of preset {name}, written by `semdict preset {name}` from presets/base.yaml and presets/{name}.yaml.
# Lines marked [{name}] differ from the base{yours}. Change values here; every command and `dvc repro` reads this file.
"""  # noqa: E501


def preset_names(folder: Path = PRESETS) -> list[str]:
    """Names of the presets in a folder, without the base."""
    return sorted(path.stem for path in folder.glob("*.yaml") if path.stem != BASE)


def resolve(name: str, folder: Path = PRESETS) -> dict[str, Any]:
    """The complete parameters of a preset as nested mappings, not yet validated.

    UsageError for an unknown preset; ParamsError names a key that presets/base.yaml does not have.
    """
    return _merged(_overlays(name, folder), folder)


def complete(params: Path, folder: Path = PRESETS) -> str:
    """Text of params.yaml with its own values, and the preset's for every key that it lacks."""
    own = _mapping(params)
    name = own.get("preset")
    if name not in preset_names(folder):
        raise UsageError(
            f"{params}: preset {name!r} is none of {', '.join(preset_names(folder))}; set `preset:` to one"
        )
    overlays = _overlays(name, folder)
    preset = _merged(overlays, folder)
    changed = {key: value for key, value in own.items() if key != "preset"}
    return _render(name, [*overlays, (params, changed)], preset, folder, mark_last="yours")


def render(name: str, folder: Path = PRESETS) -> str:
    """Text of a complete params.yaml: the base's comments, the preset's values, changed lines marked `[name]`."""
    overlays = _overlays(name, folder)
    return _render(name, overlays, {}, folder)


def _overlays(name: str, folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """(file, its mapping) of a preset and of those that it extends, the most general first."""
    chain: list[tuple[Path, dict[str, Any]]] = []
    while name != BASE:
        path = folder / f"{name}.yaml"
        if not path.is_file():
            raise UsageError(f"no preset {name!r}; there are: {', '.join(preset_names(folder))}")
        if path in (file for file, _ in chain):
            raise ParamsError(f"{path}: presets extend each other in a circle")
        tree = _mapping(path)
        if not chain and tree.get("preset") != name:
            raise ParamsError(f"{path}: preset is {tree.get('preset')!r}, it must be the file's name: preset: {name}")
        chain.append((path, {key: value for key, value in tree.items() if key != EXTENDS}))
        name = str(tree.get(EXTENDS, BASE))
    return chain[::-1]


def _mapping(path: Path) -> dict[str, Any]:
    tree = read_yaml(path)
    if not isinstance(tree, dict):
        raise ParamsError(f"{path} must contain sections (a YAML mapping), not {type(tree).__name__}")
    return tree


def _merged(overlays: list[tuple[Path, dict[str, Any]]], folder: Path) -> dict[str, Any]:
    """The base with every overlay put over it, and `inputs` derived where no overlay names them."""
    tree, base = (_mapping(folder / f"{BASE}.yaml") for _ in range(2))
    for path, overlay in overlays:
        for keys in _leaves(overlay, base, path):  # open mappings, such as manifest.images, are replaced as a whole
            _put(tree, keys, _value(overlay, keys))
    stated = {key for _, overlay in overlays for key in overlay.get("inputs", {})}
    for key, path in _derived_inputs(tree).items():
        if key not in stated:
            tree["inputs"][key] = path
    return tree


def _derived_inputs(tree: dict[str, Any]) -> dict[str, str]:
    """What DVC watches for each file named elsewhere: the folder around it, or the file where it has none."""
    files = {key: tree[section][name] for key, (section, name) in INPUT_OF.items()}
    networks = tree["vcq"]["perceptual"]
    files["perceptual"] = networks[0].get("weights") if networks else None
    return {key: _watched_path(path) for key, path in files.items()}


def _watched_path(file: str | None) -> str:
    """The folder around a file of the project, NO_FILE for no local file.

    The file itself where it lies in the project's own folder or outside of the project: DVC would hash all that lies
    beside it, the project too where the folder is around it.
    """
    if not file or is_hub_name(file):
        return NO_FILE
    folder = Path(file).parent.as_posix()
    return file if folder == "." or ".." in Path(file).parts or Path(file).is_absolute() else folder


def _leaves(overlay: dict[str, Any], base: dict[str, Any], path: Path, above: tuple[str, ...] = ()) -> list[tuple]:
    """Key paths of the values that an overlay sets; ParamsError names a key that the base does not have."""
    leaves = []
    for key, value in overlay.items():
        here = (*above, key)
        if key not in base:
            raise ParamsError(f"{path}: {'.'.join(map(str, here))} is unknown; known: {', '.join(map(str, base))}")
        if isinstance(value, dict) and isinstance(base[key], dict) and base[key]:  # empty in the base: any keys
            leaves += _leaves(value, base[key], path, here)
        else:
            leaves.append(here)
    return leaves


def _value(tree: Any, keys: tuple[str, ...]) -> Any:
    for key in keys:
        tree = tree[key]
    return tree


def _put(tree: Any, keys: tuple[str, ...], value: Any) -> None:
    _value(tree, keys[:-1])[keys[-1]] = value


def _render(
    name: str,
    overlays: list[tuple[Path, dict[str, Any]]],
    preset: dict[str, Any],
    folder: Path,
    mark_last: str = "",
) -> str:
    """The base as text with merged values in it; the last overlay's changes are marked `mark_last` if that is given."""
    yaml = YAML()
    yaml.width, yaml.preserve_quotes = 4096, True
    yaml.representer.add_representer(type(None), lambda representer, _: representer.represent_scalar(NULL, "null"))
    tree: CommentedMap = yaml.load((folder / f"{BASE}.yaml").read_text())
    plain, merged = _mapping(folder / f"{BASE}.yaml"), _merged(overlays, folder)
    marks: dict[tuple[str, ...], str] = {}
    for keys in _leaves(merged, plain, folder / f"{BASE}.yaml"):
        value = _value(merged, keys)
        if value != _value(plain, keys):
            _put(tree, keys, _flow(value))
            changed_by_user = mark_last and value != _value(preset, keys)
            marks[keys] = mark_last if changed_by_user else name
    text = _dump(yaml, tree)
    body = _marked(text, marks, yaml)
    header = HEADER.format(name=name, yours=", [yours] from the preset" if mark_last else "")
    return header + "\n" + body[body.index("preset:") :]


def _flow(value: Any) -> Any:
    """Lists and open mappings on one line, so that every value stands beside its key and its comment."""
    from ruamel.yaml.comments import CommentedSeq

    if isinstance(value, dict):
        node: Any = CommentedMap({key: _flow(item) for key, item in value.items()})
    elif isinstance(value, list):
        node = CommentedSeq([_flow(item) for item in value])
    else:
        return value
    node.fa.set_flow_style()
    return node


def _dump(yaml: YAML, tree: CommentedMap) -> str:
    stream = StringIO()
    yaml.dump(tree, stream)
    return stream.getvalue()


def _marked(text: str, marks: dict[tuple[str, ...], str], yaml: YAML) -> str:
    """The text with `[mark]` in the comment of every line that sets one of the keys."""
    tree, lines = yaml.load(text), text.split("\n")
    for keys, mark in marks.items():
        section = _value(tree, keys[:-1])
        number = section.lc.key(keys[-1])[0]
        code, hash_, comment = lines[number].rpartition(" # ")
        line = f"{code} # [{mark}] {comment}" if hash_ else f"{lines[number]} # [{mark}]"
        lines[number] = line.rstrip()
    return "\n".join(re.sub(r"(?<=\S) +# ", " # ", line) for line in lines)  # ruamel keeps the columns of the base

"""How the classes of a second dataset map to those that the training images have."""

import difflib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from semdict.pipeline.common.errors import UsageError


@dataclass(frozen=True)
class ClassMap:
    """targets: label in the second dataset -> training labels; a label that is not in it is not scored."""

    name: str
    targets: dict[int, frozenset[int]]
    path: str | None

    def training_classes(self) -> list[int]:
        """Every training label that something maps to, ascending."""
        return sorted(set().union(*self.targets.values()))


def load_class_map(
    name: str, path: str | None, theirs: list[str], used: np.ndarray, ours: list[str], trained: np.ndarray
) -> ClassMap:
    """Read a class map (YAML or JSON mapping: their class -> our class or a list), or map equal names onto each other.

    theirs, ours: class names by label; used, trained: labels of the second dataset's and of the training images.
    UsageError when the file is no such mapping, names a class that the second dataset does not have or that has no
    training images, or when names differ and there is no file.
    """
    our_label = _labels("training", ours)
    our_label = {ours[label]: our_label[ours[label]] for label in np.unique(trained).tolist()}
    if path is None:
        return _by_name(name, theirs, np.unique(used), our_label)
    tree = _read(name, path)
    their_label = _labels(f"{name} (second dataset)", theirs)
    targets = {}
    for left, right in tree.items():
        names = right if isinstance(right, list) else [right]
        if not names:
            raise UsageError(f"{path}: class {left!r} maps to nothing; leave the line out instead")
        label = _known(path, left, their_label, f"the second dataset {name}")
        targets[label] = frozenset(_known(path, one, our_label, "the training set") for one in names)
    return ClassMap(name, targets, path)


def _by_name(name: str, theirs: list[str], used: np.ndarray, our_label: dict[str, int]) -> ClassMap:
    missing = [theirs[label] for label in used if theirs[label] not in our_label]
    if missing:
        raise UsageError(
            f"{len(missing)} classes of {name} have no training images (first: {missing[0]!r}); say how they map in "
            f"a file and set evaluate.knn.second.{name}.class_map to it"
        )
    return ClassMap(name, {int(label): frozenset([our_label[theirs[label]]]) for label in used}, None)


def _read(name: str, path: str) -> dict[str, object]:
    import yaml

    try:
        text = Path(path).read_text()
        tree = json.loads(text) if path.endswith(".json") else yaml.safe_load(text)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror} (evaluate.knn.second.{name}.class_map)") from None
    except (ValueError, yaml.YAMLError) as error:
        raise UsageError(f"{path} is neither YAML nor JSON: {error}") from None
    if not isinstance(tree, dict) or not tree:
        raise UsageError(f"{path} must hold a mapping, class of {name} -> training class")
    return tree


def _labels(side: str, names: list[str]) -> dict[str, int]:
    labels = {name: label for label, name in enumerate(names)}
    if len(labels) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UsageError(f"{side}: two classes are called {twice!r}, so names cannot be mapped")
    return labels


def _known(path: str, name: object, labels: dict[str, int], where: str) -> int:
    text = str(name)
    if text not in labels:
        near = difflib.get_close_matches(text, labels, n=1)
        some = ", ".join(list(labels)[:3])
        hint = f"; did you mean {near[0]!r}?" if near else f"; there are {len(labels)}, the first: {some}"
        raise UsageError(f"{path}: {text!r} is no class of {where}{hint}")
    return labels[text]

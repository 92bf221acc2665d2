"""Class maps: from the classes of a second dataset to those of the training images."""

import difflib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from semdict.pipeline.common.errors import UsageError


@dataclass(frozen=True)
class ClassMap:
    """targets: label in the second dataset -> training labels; images of other labels are not scored."""

    name: str
    targets: dict[int, frozenset[int]]
    path: str | None

    def training_classes(self) -> list[int]:
        """Every training label that a class maps to, ascending."""
        return sorted(set().union(*self.targets.values()))


def load_class_map(
    name: str, path: str | None, names: list[str], labels: np.ndarray, train_names: list[str], train_labels: np.ndarray
) -> ClassMap:
    """Read a class map (YAML or JSON mapping: class of the second dataset -> training class or a list of them).

    Without a path every class maps to the training class of the same name. names: of the second dataset's classes, by
    label; labels: of its images; train_names, train_labels likewise. UsageError when the file is no such mapping, names
    a class that the second dataset does not have or that has no training images, or, without a file, when a class has
    no training images.
    """
    train_label = _labels("training", train_names)
    trained = {train_names[label] for label in np.unique(train_labels).tolist()}
    train_label = {name: label for name, label in train_label.items() if name in trained}
    if path is None:
        return _by_name(name, names, np.unique(labels), train_label)
    label_of = _labels(f"{name} (second dataset)", names)
    targets = {}
    for source, target in _read(name, path).items():
        target_names = target if isinstance(target, list) else [target]
        if not target_names:
            raise UsageError(f"{path}: class {source!r} maps to nothing; leave the line out instead")
        label = _known(path, source, label_of, f"the second dataset {name}")
        targets[label] = frozenset(_known(path, one, train_label, "the training set") for one in target_names)
    return ClassMap(name, targets, path)


def _by_name(name: str, names: list[str], used: np.ndarray, train_label: dict[str, int]) -> ClassMap:
    missing = [names[label] for label in used if names[label] not in train_label]
    if missing:
        raise UsageError(
            f"{len(missing)} classes of {name} have no training images (first: {missing[0]!r}); map them in a file and "
            f"set evaluate.knn.second.{name}.class_map to it"
        )
    return ClassMap(name, {int(label): frozenset([train_label[names[label]]]) for label in used}, None)


def _read(name: str, path: str) -> dict[str, object]:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        text = Path(path).read_text(encoding="utf-8")
        # type "base" makes nothing but text, lists and mappings: a class may be called 010 or no
        tree = json.loads(text) if path.endswith(".json") else YAML(typ="base", pure=True).load(text)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror} (evaluate.knn.second.{name}.class_map)") from None
    except (ValueError, YAMLError, RecursionError) as error:
        raise UsageError(f"{path} is neither YAML nor JSON: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(tree, dict) or not tree:
        raise UsageError(f"{path} must hold a mapping, class of {name} -> training class")
    return tree


def _labels(side: str, names: list[str]) -> dict[str, int]:
    """Name -> label; UsageError when two classes have one name."""
    labels = {name: label for label, name in enumerate(names)}
    if len(labels) < len(names):
        duplicate = next(name for name in names if names.count(name) > 1)
        raise UsageError(f"{side}: two classes are called {duplicate!r}, so names cannot be mapped")
    return labels


def _known(path: str, name: object, labels: dict[str, int], where: str) -> int:
    """The label of a class; UsageError with the nearest name when there is no such class."""
    text = str(name)
    if text not in labels:
        near = difflib.get_close_matches(text, labels, n=1)
        first = ", ".join(list(labels)[:3])
        hint = f"; did you mean {near[0]!r}?" if near else f"; there are {len(labels)}, the first: {first}"
        raise UsageError(f"{path}: {text!r} is no class of {where}{hint}")
    return labels[text]

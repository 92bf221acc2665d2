"""The overlay that `semdict init` writes: what differs from preset `small` for the images and models at hand."""

from io import StringIO
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq

from semdict.pipeline.config.params import validate
from semdict.pipeline.config.presets import resolve
from semdict.pipeline.config.schema import Params
from semdict.project.images import Images
from semdict.project.models import TeacherChoice, TokenizerChoice

EXTENDS = "small"
CELLS = 8  # a side, of preset small
STEPS = 2500  # of pretraining, where the preset's epochs would give fewer
POINTS_PER_WORD = 64  # features that a centroid needs; FAISS warns below 39


def small() -> Params:
    """The preset that overlays extend."""
    return validate(resolve(EXTENDS), EXTENDS)


def overlay(
    name: str,
    images: Images,
    tokenizer: TokenizerChoice,
    teacher: TeacherChoice,
    size: int | None,
    card: dict[str, str],
) -> dict[str, Any]:
    """Nested mappings of preset `name`.

    size: pixels a side, None = 8 cells of the tokenizer. card: title, licence and source of the token set.
    """
    base = small()
    pixels = size or (CELLS * tokenizer.stride if tokenizer.stride else base.pixels.size)
    manifest = {"images": images.images, "shares": dict(images.shares), "label_key": images.label_key}
    tree = {
        "preset": name,
        "extends": EXTENDS,
        "manifest": manifest,
        "pixels": {"size": pixels},
        "vqgan": {"weights": tokenizer.weights},
        "features": {"model": teacher.model, "weights": teacher.weights},
        "shards": card,
        **_fitted(base, images, pixels // (tokenizer.stride or 16)),
    }
    return {key: value for key, value in tree.items() if value not in ({}, None)}


def _fitted(base: Params, images: Images, cells: int) -> dict[str, Any]:
    """Numbers of preset small that this many images do not allow."""
    trained, held_out = images.counts["train"], sum(images.counts.values()) - images.counts["train"]
    batch = min(base.pretrain.batch, power_of_two(trained // 8))
    epochs = max(base.pretrain.epochs, STEPS * batch // trained)
    words = min(base.kmeans.k, power_of_two(trained * cells**2 // POINTS_PER_WORD))
    sections: dict[str, Any] = {}
    if words < base.kmeans.k:
        sections["kmeans"] = {"k": max(2, words)}
    if batch < base.pretrain.batch or epochs > base.pretrain.epochs:
        sections["pretrain"] = {"epochs": epochs, "batch": batch, "warmup_epochs": max(1, epochs // 20)}
    if held_out < base.generate.images:
        sections["generate"] = {"images": max(2, held_out)}
    if images.classes:
        sections["evaluate"] = _fitted_evaluate(base, images, trained)
    return {key: value for key, value in sections.items() if value}


def _fitted_evaluate(base: Params, images: Images, trained: int) -> dict[str, Any]:
    """Shots and batches of section evaluate that the smallest class allows."""
    cfg = base.evaluate
    shots = [n for n in cfg.few_shot.shots if n <= images.fewest] or [1]
    few_shot = {"shots": shots, "batch": min(cfg.few_shot.batch, shots[0] * images.classes)}
    section: dict[str, Any] = {}
    if trained < 2 * cfg.probe.batch:
        section["probe"] = {"batch": power_of_two(trained // 2)}
    if shots != cfg.few_shot.shots or few_shot["batch"] != cfg.few_shot.batch:
        section["few_shot"] = few_shot
    return section


def power_of_two(limit: int) -> int:
    """The largest power of two that is at most `limit`, at least 2."""
    return max(2, 1 << max(limit, 1).bit_length() - 1)


def text_of(tree: dict[str, Any], comment: str) -> str:
    """The overlay as YAML, lists and open mappings on one line, below a comment."""
    yaml = YAML()
    yaml.width = 4096
    yaml.representer.add_representer(
        type(None), lambda representer, _: representer.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    stream = StringIO()
    yaml.dump({key: _node(value, depth=1) for key, value in tree.items()}, stream)
    lines = [f"# {line}".rstrip() for line in comment.splitlines()]
    return "\n".join(lines) + "\n" + stream.getvalue()


def _node(value: Any, depth: int) -> Any:
    """Sections as blocks; lists, and mappings of numbers below the first level, on one line."""
    if isinstance(value, list):
        sequence = CommentedSeq(value)
        sequence.fa.set_flow_style()
        return sequence
    if not isinstance(value, dict):
        return value
    mapping = CommentedMap({key: _node(item, depth + 1) for key, item in value.items()})
    if depth > 1 and all(isinstance(item, int | float) for item in value.values()):
        mapping.fa.set_flow_style()
    return mapping

"""Shared by the measures: arguments, the encoder and its data as params.yaml names them, class checks, score files."""

import argparse
import csv
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from semdict.pipeline.common.device import resolve_device
from semdict.pipeline.common.errors import ShardError
from semdict.pipeline.common.files import write_aside, write_json
from semdict.pipeline.common.memory import keep_freed_memory
from semdict.pipeline.config import paths
from semdict.train.eval.features import FeatureSet, FeatureStore
from semdict.train.eval.image_source import ImageSource
from semdict.train.eval.sources import Source, TokenSource
from semdict.train.masked.encoder import Encoder, load_encoder

if TYPE_CHECKING:
    from semdict.pipeline.config.schema import Params
    from semdict.pipeline.config.schema.evaluate import Evaluate
    from semdict.pipeline.tokenizers.base import Tokenizer


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, data and score files; everything else is in params.yaml, section evaluate."""
    parser.add_argument("--model", type=Path, required=True, help="a run's folder, its model.pt or a released file")
    parser.add_argument("--num-heads", type=int, help="of a released encoder whose width is none of the published")
    parser.add_argument("--decoder-num-heads", type=int, help="likewise")
    parser.add_argument("--shards", type=Path, help="source tokens: token shards (default shards/<preset>)")
    parser.add_argument("--manifest", type=Path, help="source images (default data/<preset>/manifest/manifest.parquet)")
    parser.add_argument("--other-recipe", action="store_true", help="score on tokens of another recipe")
    parser.add_argument("--params", default="params.yaml", type=Path, help="default: params.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a parameter")
    parser.add_argument("--out", type=Path, help="score files (default reports/<preset>/<name of the model>)")
    parser.add_argument("--work", default="work", type=Path, help="where features are kept (default: work)")


@dataclass
class Setup:
    """One call of a measure: its arguments, validated parameters, and the encoder on its device."""

    args: argparse.Namespace
    params: "Params"
    device: torch.device
    encoder: Encoder

    @classmethod
    def of(cls, args: argparse.Namespace, device: torch.device | None = None) -> "Setup":
        """Validated parameters and the encoder on its device."""
        from semdict.pipeline.config.params import load_params

        keep_freed_memory()
        params = load_params(args.params, args.set)
        device = device or torch.device(resolve_device(params.runtime.device))
        encoder = load_encoder(args.model, args.num_heads, args.decoder_num_heads, device)
        return cls(args, params, device, encoder)

    @property
    def cfg(self) -> "Evaluate":
        """Section evaluate."""
        return self.params.evaluate

    @property
    def out(self) -> Path:
        """Folder of the score files."""
        return self.args.out or Path("reports") / self.params.preset / self.encoder.name

    @cached_property
    def store(self) -> FeatureStore:
        """Makes features and keeps them in the work folder."""
        cfg = self.cfg
        return FeatureStore(self.encoder, self.args.work, self.device, cfg.precision, cfg.dtype, cfg.batch)

    @cached_property
    def vqgan(self) -> "Tokenizer":
        """The tokenizer of source images."""
        from semdict.pipeline.tokenizers import load_tokenizer

        cfg = self.params.vqgan
        return load_tokenizer(cfg.weights, self.device, cfg.layout, cfg.ema)

    def sources(self) -> tuple[Source, Source, int]:
        """Training and test source, and the number of classes; ShardError when their classes do not agree."""
        train, test = self.source(self.cfg.train_splits), self.source(self.cfg.test_splits)
        return train, test, same_classes(train, test)

    def source(self, splits: list[str]) -> Source:
        """Tokens or images, as evaluate.source says."""
        preset = self.params.preset
        if self.cfg.source == "tokens":
            return self.token_source(self.args.shards or Path("shards") / preset, splits)
        path = self.args.manifest or paths.manifest(preset)
        return self.image_source(path, self.params.manifest.images, splits)

    def token_source(self, path: Path, splits: list[str]) -> TokenSource:
        """Tokens of some splits of a shard directory, [] = all."""
        return TokenSource(path, splits, self.encoder, self.device, self.args.other_recipe)

    def image_source(self, manifest: Path, images: dict[str, str], splits: list[str]) -> ImageSource:
        """Images of some splits of a manifest, [] = all, in the crops of the protocol."""
        from semdict.pipeline.images.batches import CropRecipe

        cfg = self.cfg
        recipe = CropRecipe.of(self.params.pixels, ["centre"], crop=cfg.test_crop)
        return ImageSource(
            manifest, images, splits, recipe, self.vqgan, self.encoder, self.device, cfg.batch,
            self.params.runtime.workers, self.args.other_recipe,
        )  # fmt: skip

    def test_set(self, source: Source) -> FeatureSet:
        """Features of the test splits in their one view."""
        return self.store.get(source, self.test_views(source))

    def train_set(self, source: Source) -> FeatureSet:
        """Features of the training splits in the views of evaluate.train_views."""
        return self.store.get(source, self.cfg.train_views if self.cfg.source == "tokens" else source.views)

    def test_views(self, source: Source) -> list[str]:
        """The one view of test images."""
        return [self.cfg.test_view] if self.cfg.source == "tokens" else source.views

    def protocol(self, **details: Any) -> dict[str, Any]:
        """How a score was measured, on which model: part of every score file."""
        return {"model": self.encoder.about(), "source": self.cfg.source, "device": self.device.type, **details}

    def write(self, name: str, scores: dict[str, Any], protocol: dict[str, Any]) -> None:
        """Write <name>.json: the scores (per cent), flat, and their protocol.

        The protocol is in a list of one, since DVC shows every number outside a list as a metric.
        """
        path = self.out / f"{name}.json"
        write_json(path, {**scores, "protocol": [protocol]})
        text = ", ".join(f"{key} {value:.2f}" for key, value in scores.items() if isinstance(value, float))
        print(f"{self.encoder.name} {name}: {text} ({path})", file=sys.stderr)


class Labelled(Protocol):
    """Images with labels: a source, its features, a tokenizer's latents."""

    labels: np.ndarray  # (N,) int64, all >= 0
    names: list[str]  # of the classes, by label


def same_classes(train: Labelled, test: Labelled) -> int:
    """Number of classes, the largest training label + 1.

    ShardError names the test classes that have no training images, and those that have another label in training.
    """
    train_labels, test_labels = np.unique(train.labels).tolist(), np.unique(test.labels).tolist()
    trained = {(train.names[label], label) for label in train_labels}
    missing = [label for label in test_labels if (test.names[label], label) not in trained]
    if not missing:
        return train_labels[-1] + 1
    relabelled = [label for label in missing if test.names[label] in {name for name, _ in trained}]
    if relabelled:
        name = test.names[relabelled[0]]
        number = next(label for other, label in trained if other == name)
        raise ShardError(
            f"class {name!r} has label {number} in training and {relabelled[0]} in the test set; make both splits "
            "with one manifest, which numbers the classes of all splits together"
        )
    raise ShardError(
        f"{len(missing)} of {len(test_labels)} test classes have no training images: "
        f"{_listing([test.names[label] for label in missing])}; training classes are "
        f"{_listing([train.names[label] for label in train_labels])}. A score needs training images of every test "
        "class, under the same name: mend the splits, or choose others (train_splits, test_splits)"
    )


def _listing(names: list[str]) -> str:
    """The first names, quoted, and how many follow."""
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(map(repr, names[:4])) + more


def write_table(path: Path, head: list[str], rows: Iterable[Iterable[Any]]) -> None:
    """Write a CSV file, whole or not at all."""
    with write_aside(path) as staged, staged.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(head)
        writer.writerows(rows)


def write_curve(path: Path, curve: list[dict[str, float]]) -> None:
    """Write a training curve, one row per epoch; a cell is empty where its number was not measured."""
    head = list(dict.fromkeys(name for row in curve for name in row))
    write_table(path, head, [[row.get(name, "") for name in head] for row in curve])


def write_confusion(path: Path, names: list[str], labels: Iterable[int], predicted: Iterable[int]) -> None:
    """Write actual,predicted by class name, one row per test image: the input of `dvc plots`' confusion matrix."""
    rows = ((names[a], names[p]) for a, p in zip(labels, predicted, strict=True))
    write_table(path, ["actual", "predicted"], rows)

"""Set-up of a measure of an encoder: arguments, the encoder and its data as params.yaml names them, score files."""

import argparse
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from semdict.pipeline.common.device import keep_freed_memory, resolve_device
from semdict.pipeline.common.files import write_json
from semdict.pipeline.config import paths
from semdict.pipeline.config.naming import RUN, add_name_argument, required
from semdict.train.eval.common import same_classes
from semdict.train.eval.features import FeatureSet, FeatureStore
from semdict.train.eval.sources import ImageSource, Source, TokenSource
from semdict.train.masked.encoder import Encoder, load_encoder

if TYPE_CHECKING:
    from semdict.pipeline.config.schema import Params
    from semdict.pipeline.config.schema.evaluate import Evaluate
    from semdict.pipeline.tokenizers.base import Tokenizer


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, data and score files; everything else is in params.yaml, section evaluate."""
    from semdict.pipeline.config.params import add_params_arguments

    add_name_argument(parser, model=RUN)
    parser.add_argument("--model", type=Path, help="a run's folder, its model.pt or a released file")
    parser.add_argument("--num-heads", type=int, help="of a released encoder whose width is none of the published")
    parser.add_argument("--decoder-num-heads", type=int, help="likewise")
    parser.add_argument("--shards", type=Path, help="source tokens: token shards (default shards/<preset>)")
    parser.add_argument("--manifest", type=Path, help="source images (default data/<preset>/manifest/manifest.parquet)")
    parser.add_argument("--other-recipe", action="store_true", help="score on tokens of another recipe")
    add_params_arguments(parser)
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
        from semdict.pipeline.config.params import params_of

        keep_freed_memory()
        params = params_of(args)
        device = device or torch.device(resolve_device(params.runtime.device))
        encoder = load_encoder(required(args, "model"), args.num_heads, args.decoder_num_heads, device)
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

"""Train the autoregressive model on the `gen` tokens of a shard directory, also under torchrun."""

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from semdict.pipeline.common.device import DTYPES
from semdict.pipeline.common.errors import ShardError
from semdict.pipeline.common.files import write_json
from semdict.train.ar.model import SHAPES, ArConfig, ArModel, drop_labels, nll_bits
from semdict.train.data.resident import ResidentLoader, class_names, table_from_shards
from semdict.train.data.token_set import recipe_of
from semdict.train.engine import dist
from semdict.train.engine.loop import Batch, Clock, Phase
from semdict.train.engine.lr_schedule import warmup_hold_linear
from semdict.train.engine.model_file import MODEL, save_model
from semdict.train.engine.optim import adamw
from semdict.train.engine.trackers import Chance
from semdict.train.engine.trainer import Components, Trainer, add_run_arguments

if TYPE_CHECKING:
    from semdict.pipeline.config.schema import Ar

EXAMPLE = """examples:
  semdict ar train --shards shards/demo-vcq --out runs/demo/ar
  semdict ar train --resume                                      continue a killed run; a complete one is kept
  torchrun --nproc-per-node 8 -m semdict.train.ar.train --shards shards/in1k-vcq-base

Writes model.pt, and nll.json: bits per position on training and held-out images."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which tokens, and where the run goes; everything else is in params.yaml, section ar."""
    parser.add_argument("--shards", type=Path, help="token shards (default shards/<preset>-vcq)")
    add_run_arguments(parser, "ar")


def run(args: argparse.Namespace) -> int:
    """Train, unless the run is complete."""
    from semdict.pipeline.config.params import params_of

    params = params_of(args)
    with dist.process_group(params.runtime.device) as world:
        recipe = ArTraining(params.ar, args.shards or Path("shards") / f"{params.preset}-vcq")
        Trainer.for_command(recipe, args, params, world, "ar").run()
    return 0


class NextToken:
    """Mean nats per token; some labels are dropped, and label -1 counts as no class."""

    def __init__(self, label_dropout: float) -> None:
        self.label_dropout = label_dropout

    def __call__(
        self, model: nn.Module, batch: Batch, rng: torch.Generator, clock: Clock
    ) -> tuple[Tensor, dict[str, Tensor]]:
        labels_B = drop_labels(labels_of(batch, model), self.label_dropout, model.null_class, rng)
        return model.loss(batch["gen"], labels_B), {}


def labels_of(batch: Batch, model: ArModel) -> Tensor:
    """(B,) labels of a batch, the null class where there is none."""
    if batch["label"] is None:
        return torch.full((len(batch["gen"]),), model.null_class, device=batch["gen"].device)
    return torch.where(batch["label"] < 0, model.null_class, batch["label"])


class ArTraining:
    """Recipe of `semdict ar train`."""

    name = "ar-train"

    def __init__(self, cfg: "Ar", path: Path) -> None:
        from semdict.pipeline.shards import open_shards

        self.cfg, self.path = cfg, path
        shards = open_shards(path)
        self.meta, self.sizes = shards.meta, tuple(int(k) for k in shards.gen_sizes)
        self.identity = {"recipe": recipe_of(shards.meta), "content": shards.content_sha256}
        self.names = class_names(shards.label[:], shards.index["label_name"].to_pylist())

    def settings(self) -> dict[str, Any]:
        """Section ar and the tokens."""
        return {"ar": self.cfg.model_dump(), "data": self.identity}

    def loader(self, trainer: Trainer) -> ResidentLoader:
        """Tokens in memory."""
        cfg, world = self.cfg, trainer.world
        table = table_from_shards(self.path, cfg.splits)
        return ResidentLoader(table, cfg.batch, cfg.seed, world.rank, world.size, world.device)

    def build(self, loader: ResidentLoader, trainer: Trainer) -> Components:
        cfg = self.cfg
        model = ArModel(self.config(max(1, loader.classes)), cfg.seed).to(trainer.world.device)
        lr_schedule = warmup_hold_linear(cfg.lr, cfg.final_lr, cfg.warmup, cfg.hold, cfg.steps)
        optimiser = adamw(model, tuple(cfg.betas), cfg.weight_decay, decay_tables=cfg.decay_tables)
        phase = Phase("model", model, NextToken(cfg.label_dropout), optimiser, lr_schedule, cfg.clip)
        uniform = sum(math.log(k) for k in self.sizes) / len(self.sizes)  # nats of a uniform guess among K_t ids
        chance = Chance({"loss": uniform}, cfg.warmup, "ar.lr or ar.steps")
        return Components([phase], cfg.steps, {"model": model}, chance=chance)

    def config(self, classes: int) -> ArConfig:
        """The shape of the size, or the one in section ar, for these tokens."""
        cfg = self.cfg
        depth, width, heads = SHAPES[cfg.size]
        return ArConfig(
            cfg.depth or depth, cfg.width or width, cfg.heads or heads, self.sizes, classes, cfg.mask_vocab,
            cfg.dropout, cfg.token_dropout, cfg.attention_dropout,
        )  # fmt: skip

    def finish(self, components: Components, loader: ResidentLoader, trainer: Trainer) -> dict[str, Any]:
        """Write the model and nll.json; bits per image by kind of split."""
        model = components.state["model"]
        metrics = {"images_left_out": loader.left_out, "parameters": sum(p.numel() for p in model.parameters())}
        if trainer.world.first:
            metrics["bits_per_image"] = self.likelihood(model, trainer)
            about = {"cfg": trainer.settings["ar"], "token_set": self.meta, "classes": self.names}
            save_model(trainer.folder / MODEL, model, about)
        return metrics

    def likelihood(self, model: ArModel, trainer: Trainer) -> dict[str, float]:
        """Bits per image of training and held-out splits; nll.json gets them per position, beside the sizes K_t."""
        kinds = {"train": self.cfg.splits, "held_out": self.cfg.held_out}
        bits = {kind: self.bits(model, splits, trainer.world.device) for kind, splits in kinds.items() if splits}
        curves = {kind: bits_L.tolist() for kind, (bits_L, _) in bits.items()}
        images = {f"{kind}_images": n for kind, (_, n) in bits.items()}
        write_json(trainer.folder / "nll.json", {"bits": curves, "sizes": list(self.sizes), **images})
        return {kind: sum(curve) for kind, curve in curves.items()}

    def bits(self, model: ArModel, splits: list[str], device: torch.device) -> tuple[Tensor, int]:
        """(L,) bits and the number of images they are the mean of: at most `nll_images`, spread over the splits."""
        table = table_from_shards(self.path, splits)
        n = min(self.cfg.nll_images, len(table.at))
        loader = ResidentLoader(table, 1, 0, device=device)
        indices = torch.linspace(0, len(table.at) - 1, n, dtype=torch.float64).round().long().unique().numpy()
        size = min(n, 64)
        batches = (loader.take(indices[start : start + size]) for start in range(0, len(indices), size))
        precision = self.cfg.precision
        with torch.autocast(device.type, DTYPES[precision], enabled=precision != "float32"):
            return nll_bits(model, ((batch["gen"], labels_of(batch, model)) for batch in batches))


def check_tokenizer(token_set: dict[str, Any], identity: dict[str, Any], path: Path) -> None:
    """ShardError if the tokens that a model was trained on (their metadata) are of another tokenizer than `path`."""
    trained, sha256 = token_set["recipe"].get("gen", {}).get("sha256"), identity.get("sha256")
    if trained and trained != sha256:
        raise ShardError(f"the model was trained on tokens of the tokenizer {trained[:12]}, {path} is {sha256[:12]}")


if __name__ == "__main__":
    from semdict.cli import main

    sys.exit(main(["ar", "train", *sys.argv[1:]]))

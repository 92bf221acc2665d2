"""Train the autoregressive model on the `gen` tokens of a shard directory, alone or under torchrun."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from semdict.pipeline.common.errors import ShardError
from semdict.pipeline.common.files import write_json
from semdict.train.ar.model import SHAPES, ArConfig, ArModel, drop_labels, nll_bits
from semdict.train.data.tokens import ResidentLoader, class_names, recipe_of, table_from_shards
from semdict.train.engine import dist
from semdict.train.engine.batch import Batch
from semdict.train.engine.loop import DTYPES, Clock, Phase, Plan, Run, fit, make_plan
from semdict.train.engine.lr_schedule import warmup_hold_linear
from semdict.train.engine.model_file import MODEL, save_model
from semdict.train.engine.optim import adamw
from semdict.train.engine.run import Place
from semdict.train.engine.stage import add_run_arguments, run_stage

if TYPE_CHECKING:
    from semdict.pipeline.config.schema import Ar, Params

EXAMPLE = """examples:
  semdict ar train --shards shards/demo-vcq --out runs/demo/ar
  semdict ar train --resume                                      continue after a kill; a complete run is left alone
  torchrun --nproc-per-node 8 -m semdict.train.ar.train --shards shards/in1k-vcq-base

Writes model.pt, and nll.json: bits per position on training and held-out images."""
VERSION = 1  # raised when the same settings would train something else
FREE = {"device", "compile", "save_every", "keep", "log_every", "tensorboard", "nll_images"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which tokens, and where the run goes; everything else stands in params.yaml, section ar."""
    parser.add_argument("--shards", type=Path, help="token shards (default shards/<preset>-vcq)")
    add_run_arguments(parser, "ar")


def run(args: argparse.Namespace) -> int:
    """Train, or say that there is nothing to do."""
    from semdict.pipeline.config.params import load_params

    params = load_params(args.params, args.set)
    with dist.joined(params.runtime.device) as world:
        shards = args.shards or Path("shards") / f"{params.preset}-vcq"
        session = Session(params, shards, world, args)
        run_stage(session.place, world, args.resume, session.reports, session.train)
    return 0


class NextToken:
    """Mean nats per token with class labels dropped now and then; label -1 counts as no class."""

    def __init__(self, label_dropout: float) -> None:
        self.label_dropout = label_dropout

    def __call__(
        self, model: nn.Module, batch: Batch, rng: torch.Generator, clock: Clock
    ) -> tuple[Tensor, dict[str, Tensor]]:
        labels_B = drop_labels(classes(batch, model), self.label_dropout, model.null_class, rng)
        return model.loss(batch["gen"], labels_B), {}


def classes(batch: Batch, model: ArModel) -> Tensor:
    """(B,) labels of a batch, the null class where there is none."""
    if batch["label"] is None:
        return torch.full((len(batch["gen"]),), model.null_class, device=batch["gen"].device)
    return torch.where(batch["label"] < 0, model.null_class, batch["label"])


class Session:
    """One call of the command."""

    def __init__(self, params: "Params", path: Path, world: dist.World, args: argparse.Namespace) -> None:
        from semdict.pipeline.shards import open_shards

        self.params, self.given, self.path, self.world = params, params.ar, path, world
        shards = open_shards(path)
        self.meta, self.sizes = shards.meta, tuple(int(k) for k in shards.gen_sizes)
        self.names = class_names(shards.label[:], shards.index["label_name"].to_pylist())
        self.reports = args.reports or Path("reports") / params.preset / "ar"
        settings = identity(params.ar, recipe_of(self.meta))
        self.place = Place("ar-train", settings, args.out or Path("runs") / params.preset / "ar", args.work)

    def train(self) -> dict[str, Any]:
        """Fit, write the model, and measure the likelihood per position on what was and was not trained on."""
        given, world = self.given, self.world
        loader = self.loader(given.splits, given.batch)
        table = loader.table
        labels = 0 if table.label is None else int(table.label.max()) + 1
        model = ArModel(self.config(max(1, labels)), given.seed).to(world.device)
        rate = warmup_hold_linear(given.lr, given.final_lr, given.warmup, given.hold, given.steps)
        optimiser = adamw(model, tuple(given.betas), given.weight_decay)
        phase = Phase("model", model, NextToken(given.label_dropout), optimiser, rate, given.clip)
        place = self.place
        run = Run(place.folder, place.settings, place.fingerprint, self.reports, self.params.runtime.tensorboard)
        means = fit([phase], loader, self.plan(), run, world, {"model": model}, resume=True)
        metrics = {"final": means, "steps": given.steps, "images_left_out": table.left_out}
        metrics |= {"parameters": sum(p.numel() for p in model.parameters())}
        if world.first:
            metrics["bits_per_image"] = self.likelihood(model)
            about = {"settings": place.settings, "tokens": self.meta["recipe"], "classes": self.names}
            save_model(place.folder / MODEL, model, about)
        return metrics

    def config(self, classes: int) -> ArConfig:
        """The size's shape, or the given one, for these tokens."""
        given = self.given
        depth, width, heads = SHAPES[given.size]
        return ArConfig(
            given.depth or depth, given.width or width, given.heads or heads, self.sizes, classes, given.mask_vocab,
            given.dropout, given.token_dropout, given.attention_dropout,
        )  # fmt: skip

    def plan(self) -> Plan:
        """The loop's part of the settings."""
        return make_plan("ar", self.given, self.params.runtime, self.given.steps)

    def loader(self, splits: list[str], batch: int) -> ResidentLoader:
        """Tokens of some splits in memory."""
        world = self.world
        table = table_from_shards(self.path, splits)
        return ResidentLoader(table, batch, self.given.seed, world.rank, world.size, world.device)

    def likelihood(self, model: ArModel) -> dict[str, float]:
        """Bits per image by kind of split; nll.json gets them per position, beside the codebook's log2 K_t."""
        given = self.given
        found = {}
        for kind, splits in {"train": given.splits, "held_out": given.held_out}.items():
            if splits:
                found[kind] = self._bits(model, splits)
        curves = {kind: bits_L.tolist() for kind, (bits_L, _) in found.items()}
        images = {f"{kind}_images": n for kind, (_, n) in found.items()}
        write_json(self.place.folder / "nll.json", {"bits": curves, "sizes": list(self.sizes), **images})
        return {kind: sum(curve) for kind, curve in curves.items()}

    def _bits(self, model: ArModel, splits: list[str]) -> tuple[Tensor, int]:
        """(L,) bits and the images they stand for: at most `nll_images`, spread evenly over the splits."""
        table = table_from_shards(self.path, splits)
        n = min(self.given.nll_images, len(table.at))
        loader = ResidentLoader(table, 1, 0, device=self.world.device)
        at = torch.linspace(0, len(table.at) - 1, n, dtype=torch.float64).round().long().unique().numpy()
        size = min(n, 64)
        batches = (loader.take(at[start : start + size]) for start in range(0, len(at), size))
        kind, precision = self.world.device.type, self.given.precision
        with torch.autocast(kind, DTYPES[precision], enabled=precision != "float32"):
            return nll_bits(model, ((batch["gen"], classes(batch, model)) for batch in batches))


def identity(given: "Ar", recipe: str) -> dict[str, Any]:
    """All that shapes the result: the section without what only concerns watching, and the tokens."""
    chosen = {name: value for name, value in given.model_dump().items() if name not in FREE}
    return {"version": VERSION, "recipe": recipe, **chosen}


def check_tokenizer(tokens: dict[str, Any], identity: dict[str, Any], path: Path) -> None:
    """ShardError when the tokens that a model was trained on came from another tokenizer than `path`."""
    trained, given = tokens.get("gen", {}).get("sha256"), identity.get("sha256")
    if trained and trained != given:
        raise ShardError(f"the model was trained on tokens of the tokenizer {trained[:12]}, {path} is {given[:12]}")


if __name__ == "__main__":
    from semdict.cli import main

    sys.exit(main(["ar", "train", *sys.argv[1:]]))

"""`semdict condition`: teach a pretrained model classes, the decoder alone (LEASE, Table A.5)."""

import argparse
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from semdict.pipeline.common.device import reduced_precision
from semdict.pipeline.common.errors import ShardError, UsageError, WeightsError
from semdict.pipeline.common.files import sha256_file
from semdict.pipeline.common.safeload import load_array, load_tensors
from semdict.train.data.token_set import TokenSet
from semdict.train.data.tokens import ResidentLoader, TokenTable, recipe_of, table_from_shards
from semdict.train.engine import dist
from semdict.train.engine.loop import Phase, Plan, Run, fit, make_plan
from semdict.train.engine.lr_schedule import scaled_lr, warmup_cosine
from semdict.train.engine.model_file import MODEL, save_model
from semdict.train.engine.optim import adamw
from semdict.train.engine.rng import Stream, torch_generator, torch_seed
from semdict.train.engine.run import Place
from semdict.train.engine.stage import add_run_arguments, run_stage, say
from semdict.train.masked.conditional import (
    ConditionalConfig,
    ConditionalTransformer,
    Telling,
    conditions,
)
from semdict.train.masked.encoder import load_encoder
from semdict.train.masked.losses import reconstruction_loss
from semdict.train.masked.masking import draw_masks
from semdict.train.masked.model import MaskedTokenTransformer
from semdict.train.masked.objectives import Masking
from semdict.train.masked.pretrain import AtEpoch

if TYPE_CHECKING:
    from semdict.pipeline.config.schema import Params

EXAMPLE = """examples:
  semdict condition --model runs/demo/lease
  semdict condition --model runs/demo/lease --resume           continue after a kill; a complete run is left alone
  semdict condition --model runs/in1k/lease --embeddings weights/clip_in1k.npy
  semdict condition --model runs/demo/mage --set condition.centroids=false --out runs/demo/mage-classes
  torchrun --nproc-per-node 8 -m semdict.train.masked.condition --model runs/in1k/lease

The encoder and everything else but the decoder stay as they are. Class embeddings are one row per label, for example
CLIP's text embeddings of "An image of a CLASS". `semdict generate --task class` draws from the result."""

VERSION = 1  # raised when the same settings would train something else
FREE = {"device", "compile", "save_every", "keep", "log_every", "tensorboard", "class_embeddings"}
RATIO = 0.75  # of the cells are hidden where held-out images are measured


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, on what, and where it goes; everything else stands in params.yaml, section condition."""
    parser.add_argument("--model", type=Path, required=True, help="a run's folder, its model.pt or a released file")
    parser.add_argument("--num-heads", type=int, help="of a released encoder whose width is none of the published")
    parser.add_argument("--decoder-num-heads", type=int, help="likewise")
    parser.add_argument("--shards", type=Path, help="token shards (default shards/<preset>)")
    parser.add_argument("--embeddings", help="one row per class, .npy or .safetensors; condition.class_embeddings")
    add_run_arguments(parser, "<name of the model>-conditional")


def run(args: argparse.Namespace) -> int:
    """Train, or say that there is nothing to do."""
    from semdict.pipeline.config.params import load_params

    params = load_params(args.params, args.set)
    with dist.joined(params.runtime.device) as world:
        Session(args, params, world).go()
    return 0


class Session:
    """One call of the command."""

    def __init__(self, args: argparse.Namespace, params: "Params", world: dist.World) -> None:
        self.params = params
        given = params.condition
        self.given = given.model_copy(update={"class_embeddings": args.embeddings}) if args.embeddings else given
        self.world, self.resume = world, args.resume
        self.encoder = load_encoder(args.model, args.num_heads, args.decoder_num_heads)
        preset, name = params.preset, f"{self.encoder.name}-conditional"
        self.token_set = TokenSet.open(args.shards or Path("shards") / preset)
        token_set = self.token_set
        self.encoder.check_tokens(token_set.path, token_set.codebook_size, token_set.grid**2, token_set.meta["recipe"])
        self.vectors = class_vectors(self.given.class_embeddings)
        self.reports = args.reports or Path("reports") / preset / name
        self.place = Place("condition", self.identity(), args.out or Path("runs") / preset / name, args.work)

    def identity(self) -> dict[str, Any]:
        """All that shapes the result; of the class embeddings the bytes, not the path."""
        g, encoder = self.given, self.encoder
        chosen = {name: value for name, value in g.model_dump().items() if name not in FREE}
        file = None if g.class_embeddings is None else sha256_file(g.class_embeddings)
        model = {"model": encoder.sha256, "config": encoder.model.config.to_dict()}
        recipe = recipe_of(self.token_set.meta)
        return {"version": VERSION, "recipe": recipe, **model, "class_embeddings": file, **chosen}

    def go(self) -> None:
        """Train as a stage."""
        run_stage(self.place, self.world, self.resume, self.reports, self.train)

    def train(self) -> dict[str, Any]:
        """Build everything, fit, measure and write the model; returns the run's numbers."""
        g, world, place = self.given, self.world, self.place
        loader = self.loader(table_from_shards(self.token_set.path, g.splits))
        held_out = table_from_shards(self.token_set.path, g.held_out) if g.held_out else None
        model = self.model(loader.table).to(world.device)
        say(world, place, f"{loader.steps_per_epoch} steps an epoch of {g.batch} images, {model.null_class} classes")
        steps, warmup = g.epochs * loader.steps_per_epoch, g.warmup_epochs * loader.steps_per_epoch
        rate = warmup_cosine(scaled_lr(g.base_lr, g.batch), warmup, steps, g.min_lr)
        m = g.mask
        masking = Masking(m.mode, m.std, m.min, m.max, m.per_sample)
        objective = AtEpoch(Telling(g.label_dropout, g.word_dropout, masking, g.label_smoothing))
        phase = Phase("model", model, objective, adamw(model, tuple(g.betas), g.weight_decay), rate, g.clip)
        run = Run(place.folder, place.settings, place.fingerprint, self.reports, self.params.runtime.tensorboard)
        final = fit([phase], loader, self.plan(steps), run, world, {"model": model}, resume=True)
        chance = math.log(self.token_set.codebook_size)
        numbers = {"final": final, "chance": chance, "steps": steps, "classes": model.null_class}
        if world.first:
            if held_out is not None:
                numbers["held_out"] = self.measure(model, held_out)
            about = {"settings": place.settings, "corpus": self.token_set.meta, "model": self.encoder.about()}
            save_model(place.folder / MODEL, model, {**about, "step": steps})
        return numbers

    def plan(self, steps: int) -> Plan:
        """The loop's part of the settings."""
        return make_plan("condition", self.given, self.params.runtime, steps)

    def loader(self, table: TokenTable) -> ResidentLoader:
        """Tokens in memory."""
        g, world = self.given, self.world
        return ResidentLoader(table, g.batch, g.seed, world.rank, world.size, world.device)

    def model(self, table: TokenTable) -> ConditionalTransformer:
        """The pretrained model with this decoder dropout, and new rows drawn from the seed."""
        given, base = self.given, self.encoder.model
        classes = self.classes(table)
        vectors = self.vectors
        centroids = self.centroids() if given.centroids else None
        words, word_width = (0, 0) if centroids is None else tuple(centroids.shape)
        config = replace(base.config, dropout=given.dropout)
        width = 0 if vectors is None else vectors.shape[1]
        copy = MaskedTokenTransformer(config)
        copy.load_state_dict(base.state_dict())
        whole = ConditionalConfig(config, classes, width, words, word_width)
        model = ConditionalTransformer(whole, copy, torch_seed(given.seed, Stream.CONDITION_INIT))
        model.fill(vectors, centroids)
        return model

    def classes(self, table: TokenTable) -> int:
        """Rows of the embedding file, or one more than the largest label; UsageError where labels do not fit."""
        most = -1 if table.label is None else int(table.label.max())
        if most < 0:
            raise UsageError(f"{self.token_set.path} has no labels in {self.given.splits}; there is no class to learn")
        if self.vectors is None:
            return most + 1
        if most >= len(self.vectors):
            raise UsageError(
                f"{self.given.class_embeddings} has {len(self.vectors)} rows, {self.token_set.path} has labels up to "
                f"{most}; one row per label is needed"
            )
        return len(self.vectors)

    def centroids(self) -> Tensor:
        """(K, D) dictionary of the shards."""
        if self.token_set.centroids is None or "disc" not in self.token_set.meta["codebooks"]:
            raise ShardError(
                f"{self.token_set.path} holds no words with centroids; set condition.centroids: false for classes only"
            )
        return self.token_set.centroid_tensor()

    def measure(self, model: ConditionalTransformer, table: TokenTable) -> dict[str, float]:
        """Nats per hidden token of held-out images under one fixed masking, told all, the class, or nothing."""
        g = self.given
        n = min(g.held_out_images, len(table.at))
        at = np.linspace(0, len(table.at) - 1, n, dtype=np.int64)
        loader = ResidentLoader(table, 1, g.seed, device=self.world.device)
        sums, images = dict.fromkeys(("told", "class_only", "untold"), 0.0), 0
        model.eval()
        size = min(256, g.batch)
        for start in range(0, n, size):
            batch = loader.take(at[start : start + size])
            rng = torch_generator(g.seed, Stream.HELD_OUT_MASKS, start)
            with torch.inference_mode(), reduced_precision(self.world.device, g.precision):
                for name, nats in held_out_nats(model, batch, rng).items():
                    sums[name] += nats * len(batch["gen"])
            images += len(batch["gen"])
        return {**{name: total / images for name, total in sums.items()}, "images": images}


def held_out_nats(model: ConditionalTransformer, batch: dict[str, Any], rng: torch.Generator) -> dict[str, float]:
    """Mean nats per hidden token of one batch, by what the decoder is told; the encoder runs once."""
    tokens_BL = batch["gen"].long()
    keep_idx, masked_BL, _ = (part.to(tokens_BL.device) for part in draw_masks(*tokens_BL.shape, RATIO, rng))
    labels_B, words_BL = conditions(batch, model)
    labels_B = torch.where(labels_B > model.null_class, model.null_class, labels_B)  # classes it never met
    nobody_B = torch.full_like(labels_B, model.null_class)
    found: dict[str, float] = {}
    latents_BNE = None
    kinds = {"told": (labels_B, words_BL), "class_only": (labels_B, None), "untold": (nobody_B, None)}
    for name, what in kinds.items():
        teller = model.told(*what)
        latents_BNE = teller.encode(tokens_BL, masked_BL, keep_idx) if latents_BNE is None else latents_BNE
        features_BLF = teller.decode(latents_BNE, masked_BL, keep_idx)
        logits_NK = teller.token_logits(features_BLF[:, 1:][masked_BL])
        found[name] = float(reconstruction_loss(logits_NK, tokens_BL[masked_BL], 0.0))
    return found


def class_vectors(path: str | None) -> Tensor | None:
    """(classes, D) float32 from a .npy or .safetensors file of one table; None where no file was named."""
    if path is None:
        return None
    if Path(path).suffix == ".npy":
        found = torch.from_numpy(np.array(load_array(path)))
    else:
        tensors = load_tensors(path)
        if len(tensors) != 1:
            names = ", ".join(list(tensors)[:4])
            raise WeightsError(f"{path} holds {len(tensors)} tensors ({names}), expected one table of class embeddings")
        (found,) = tensors.values()
    if found.ndim != 2 or not found.is_floating_point() or not torch.isfinite(found).all():
        raise WeightsError(f"{path} holds {found.dtype} {tuple(found.shape)}, expected finite floats (classes, width)")
    return found.float()


if __name__ == "__main__":
    from semdict.cli import main

    sys.exit(main(["condition", *sys.argv[1:]]))

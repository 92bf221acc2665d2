"""`semdict condition`: class-conditional fine-tuning of a pretrained model's decoder (LEASE, Table A.5)."""

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
from semdict.pipeline.config.naming import REPORT, RUN, required
from semdict.train.data.resident import ResidentLoader, table_from_shards
from semdict.train.data.token_set import TokenSet
from semdict.train.engine import dist
from semdict.train.engine.loop import Batch, Phase
from semdict.train.engine.lr_schedule import scaled_lr, warmup_cosine
from semdict.train.engine.model_file import MODEL, save_model
from semdict.train.engine.optim import adamw
from semdict.train.engine.rng import Stream, torch_generator, torch_seed
from semdict.train.engine.trackers import Chance
from semdict.train.engine.trainer import Components, Trainer, add_run_arguments
from semdict.train.masked.class_conditional_model import (
    ConditionalConfig,
    ConditionalReconstruction,
    ConditionalTransformer,
    batch_conditions,
)
from semdict.train.masked.encoder import Encoder, load_encoder
from semdict.train.masked.losses import reconstruction_loss
from semdict.train.masked.masking import draw_masks
from semdict.train.masked.model import MaskedTokenTransformer
from semdict.train.masked.objectives.mage import Masking

if TYPE_CHECKING:
    from semdict.pipeline.config.schema import Condition

EXAMPLE = """examples:
  semdict condition --model runs/demo/lease
  semdict condition --model runs/demo/lease --resume           continue a killed run; a complete one is kept
  semdict condition --model runs/in1k/lease --embeddings weights/clip_in1k.npy
  semdict condition --model runs/demo/mage --set condition.centroids=false --out runs/demo/mage-classes
  torchrun --nproc-per-node 8 -m semdict.train.masked.condition --model runs/in1k/lease

The encoder and everything else but the decoder stay as they are. Class embeddings are one row per label, for example
CLIP's text embeddings of "An image of a CLASS". `semdict generate --task class` samples from the result."""

RATIO = 0.75  # share of hidden cells on held-out images


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, on which tokens, and where the run goes; everything else is in params.yaml, section condition."""
    parser.add_argument("--model", type=Path, help="a run's folder, its model.pt or a released file")
    parser.add_argument("--num-heads", type=int, help="of a released encoder whose width is none of the published")
    parser.add_argument("--decoder-num-heads", type=int, help="likewise")
    parser.add_argument("--shards", type=Path, help="token shards (default shards/<preset>)")
    parser.add_argument("--embeddings", help="one row per class, .npy or .safetensors; condition.class_embeddings")
    named = {"model": RUN, "out": f"{RUN}-conditional", "reports": f"{REPORT}-conditional"}
    add_run_arguments(parser, "<name of the model>-conditional", named)


def run(args: argparse.Namespace) -> int:
    """Train, unless the run is complete."""
    from semdict.pipeline.config.params import params_of

    params = params_of(args)
    cfg = params.condition
    if args.embeddings:
        cfg = cfg.model_copy(update={"class_embeddings": args.embeddings})
    with dist.process_group(params.runtime.device) as world:
        encoder = load_encoder(required(args, "model"), args.num_heads, args.decoder_num_heads)
        recipe = Conditioning(cfg, encoder, TokenSet.open(args.shards or Path("shards") / params.preset))
        Trainer.for_command(recipe, args, params, world, f"{encoder.name}-conditional").run()
    return 0


class Conditioning:
    """Recipe of `semdict condition`: the decoder learns to use the class and the centroids, the rest stays frozen."""

    name = "condition"

    def __init__(self, cfg: "Condition", encoder: Encoder, token_set: TokenSet) -> None:
        self.cfg, self.encoder, self.token_set = cfg, encoder, token_set
        encoder.check_tokens(token_set.path, token_set.codebook_size, token_set.grid**2, token_set.meta["recipe"])
        self.vectors = class_vectors(cfg.class_embeddings)
        self.held_out = table_from_shards(token_set.path, cfg.held_out) if cfg.held_out else None

    def settings(self) -> dict[str, Any]:
        """Section condition (of the class embeddings the bytes, not the path), the tokens and the pretrained model."""
        cfg, encoder = self.cfg.model_dump(), self.encoder
        if self.vectors is not None:
            cfg["class_embeddings"] = sha256_file(self.cfg.class_embeddings)
        model = {"sha256": encoder.sha256, "config": encoder.model.config.to_dict()}
        return {"condition": cfg, "data": self.token_set.identity, "model": model}

    def loader(self, trainer: Trainer) -> ResidentLoader:
        """Tokens in memory."""
        cfg, world = self.cfg, trainer.world
        table = table_from_shards(self.token_set.path, cfg.splits)
        return ResidentLoader(table, cfg.batch, cfg.seed, world.rank, world.size, world.device)

    def build(self, loader: ResidentLoader, trainer: Trainer) -> Components:
        cfg, epoch = self.cfg, loader.steps_per_epoch
        model = self.model(self.classes(loader)).to(trainer.world.device)
        trainer.log(f"{model.null_class} classes")
        steps, peak = cfg.epochs * epoch, scaled_lr(cfg.base_lr, cfg.batch)
        lr_schedule = warmup_cosine(peak, cfg.warmup_epochs * epoch, steps, cfg.min_lr)
        masking = Masking.from_cfg(cfg)
        objective = ConditionalReconstruction(cfg.label_dropout, cfg.word_dropout, masking, cfg.label_smoothing)
        optimiser = adamw(model, tuple(cfg.betas), cfg.weight_decay, decay_tables=cfg.decay_tables)
        phase = Phase("model", model, objective, optimiser, lr_schedule, cfg.clip)
        chance = Chance(self.chance(), cfg.warmup_epochs * epoch, "condition.base_lr or condition.epochs")
        return Components([phase], steps, {"model": model}, chance=chance)

    def chance(self) -> dict[str, float]:
        """The loss at chance, in nats."""
        return {"loss": math.log(self.token_set.codebook_size)}

    def classes(self, loader: ResidentLoader) -> int:
        """Rows of the embedding file, or one more than the largest label; UsageError where labels do not fit."""
        if loader.classes < 1:
            raise UsageError(f"{self.token_set.path} has no labels in {self.cfg.splits}; there is no class to learn")
        if self.vectors is None:
            return loader.classes
        if loader.classes > len(self.vectors):
            raise UsageError(
                f"{self.cfg.class_embeddings} has {len(self.vectors)} rows, {self.token_set.path} has labels up to "
                f"{loader.classes - 1}; one row per label is needed"
            )
        return len(self.vectors)

    def model(self, classes: int) -> ConditionalTransformer:
        """The pretrained model with the decoder dropout of section condition; the seed initialises the new rows."""
        cfg, base = self.cfg, self.encoder.model
        centroids = self.centroids() if cfg.centroids else None
        words, word_width = (0, 0) if centroids is None else tuple(centroids.shape)
        copy = MaskedTokenTransformer(replace(base.config, dropout=cfg.dropout))
        copy.load_state_dict(base.state_dict())
        width = 0 if self.vectors is None else self.vectors.shape[1]
        config = ConditionalConfig(copy.config, classes, width, words, word_width)
        model = ConditionalTransformer(config, copy, torch_seed(cfg.seed, Stream.CONDITION_INIT))
        model.fill(self.vectors, centroids)
        return model

    def centroids(self) -> Tensor:
        """(K, D) codebook of the shards."""
        if self.token_set.centroids is None or "disc" not in self.token_set.meta["codebooks"]:
            raise ShardError(
                f"{self.token_set.path} has no discriminative tokens with centroids; set condition.centroids: false "
                "for classes only"
            )
        return self.token_set.centroid_tensor()

    def finish(self, components: Components, loader: ResidentLoader, trainer: Trainer) -> dict[str, Any]:
        """Write the model, measure it on held-out images; the loss at chance in nats."""
        model = components.state["model"]
        metrics = {"chance": self.chance(), "classes": model.null_class}
        if trainer.world.first:
            if self.held_out is not None:
                metrics["held_out"] = self.held_out_loss(model, trainer.world.device)
            about = {"cfg": trainer.settings["condition"], "token_set": self.token_set.meta, "steps": components.steps}
            save_model(trainer.folder / MODEL, model, {**about, "model": self.encoder.about()})
        return metrics

    def held_out_loss(self, model: ConditionalTransformer, device: torch.device) -> dict[str, float]:
        """Nats per hidden token of held-out images under one fixed masking, by condition (see `conditional_nats`)."""
        cfg, table = self.cfg, self.held_out
        n = min(cfg.held_out_images, len(table.at))
        indices = np.linspace(0, len(table.at) - 1, n, dtype=np.int64)
        loader = ResidentLoader(table, 1, cfg.seed, device=device)
        sums: dict[str, float] = {}
        model.eval()
        size = min(256, cfg.batch)
        for start in range(0, n, size):
            batch = loader.take(indices[start : start + size])
            rng = torch_generator(cfg.seed, Stream.HELD_OUT_MASKS, start)
            with torch.inference_mode(), reduced_precision(device, cfg.precision):
                for name, nats in conditional_nats(model, batch, rng).items():
                    sums[name] = sums.get(name, 0.0) + nats * len(batch["gen"])
        return {**{name: total / n for name, total in sums.items()}, "images": n}


def conditional_nats(model: ConditionalTransformer, batch: Batch, rng: torch.Generator) -> dict[str, float]:
    """Mean nats per hidden token of a batch: conditional (class and centroids), class_only, unconditional.

    The encoder runs once.
    """
    tokens_BL = batch["gen"].long()
    keep_idx, masked_BL, _ = (part.to(tokens_BL.device) for part in draw_masks(*tokens_BL.shape, RATIO, rng))
    labels_B, words_BL = batch_conditions(batch, model)
    labels_B = torch.where(labels_B > model.null_class, model.null_class, labels_B)  # classes that training lacks
    null_B = torch.full_like(labels_B, model.null_class)
    latents_BNE = model.base.encode(tokens_BL, masked_BL, keep_idx)
    nats = {}
    for name, condition in {
        "conditional": (labels_B, words_BL),
        "class_only": (labels_B, None),
        "unconditional": (null_B, None),
    }.items():
        conditioned = model.conditioned(*condition)
        features_BLF = conditioned.decode(latents_BNE, masked_BL, keep_idx)
        logits_NK = conditioned.token_logits(features_BLF[:, 1:][masked_BL])
        nats[name] = float(reconstruction_loss(logits_NK, tokens_BL[masked_BL], 0.0))
    return nats


def class_vectors(path: str | None) -> Tensor | None:
    """(classes, D) float32 from a .npy or .safetensors file of one table; None where no file was named."""
    if path is None:
        return None
    if Path(path).suffix == ".npy":
        array = load_array(path)
        if array.dtype.kind not in "iuf":
            raise WeightsError(f"{path} holds {array.dtype} {array.shape}, expected finite floats (classes, width)")
        table = torch.from_numpy(np.array(array))
    else:
        tensors = load_tensors(path)
        if len(tensors) != 1:
            names = ", ".join(list(tensors)[:4])
            raise WeightsError(f"{path} holds {len(tensors)} tensors ({names}), expected one table of class embeddings")
        (table,) = tensors.values()
    if table.ndim != 2 or not table.is_floating_point() or not torch.isfinite(table).all():
        raise WeightsError(f"{path} holds {table.dtype} {tuple(table.shape)}, expected finite floats (classes, width)")
    return table.float()


if __name__ == "__main__":
    from semdict.cli import main

    sys.exit(main(["condition", *sys.argv[1:]]))

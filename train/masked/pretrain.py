"""`semdict pretrain`: LEASE, Sorcen, MAGE and other objectives on cached token shards, also under torchrun."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from semdict.pipeline.common.errors import UsageError
from semdict.train.data.token_set import TokenSet
from semdict.train.engine import dist
from semdict.train.engine.logging import RunLog
from semdict.train.engine.loop import Clock, Hook, Loader, Phase
from semdict.train.engine.lr_schedule import scaled_lr, warmup_cosine
from semdict.train.engine.model_file import MODEL, save_model
from semdict.train.engine.optim import adamw
from semdict.train.engine.trackers import Chance
from semdict.train.engine.trainer import Components, Trainer, add_run_arguments
from semdict.train.masked.model import MaskedTokenTransformer, model_config
from semdict.train.masked.monitor import Pictures, WithClassifier
from semdict.train.masked.objectives import OBJECTIVES, objective_class

if TYPE_CHECKING:
    from semdict.pipeline.config.schema import Params

EXAMPLE = """examples:
  semdict pretrain --objective lease --shards shards/demo --out runs/demo/lease
  semdict pretrain --objective lease --resume                     continue a killed run; a complete one is kept
  semdict pretrain --objective mage --set pretrain.epochs=400 --set pretrain.lambda=0.3 --out runs/mage-400
  torchrun --nproc-per-node 8 -m semdict.train.masked.pretrain --objective sorcen --shards shards/in1k"""

SIZES = ("width", "depth", "heads", "decoder_width", "decoder_depth", "decoder_heads")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to train, on which tokens, and where the run goes; everything else is in params.yaml."""
    parser.add_argument("--objective", required=True, metavar="NAME", help=f"one of {', '.join(OBJECTIVES)}")
    parser.add_argument("--shards", type=Path, help="token shards (default shards/<preset>), or a folder of their tars")
    parser.add_argument("--centroids", type=Path, help="(K, D) .npy for lease where the token set itself has none")
    add_run_arguments(parser, "<objective>")


def run(args: argparse.Namespace) -> int:
    """Train, unless the run is complete."""
    from semdict.pipeline.config.params import params_of

    objective_class(args.objective)
    params = params_of(args)
    with dist.process_group(params.runtime.device) as world:
        shards = args.shards or Path("shards") / params.preset
        token_set = TokenSet.open(shards, params.pretrain.loader, args.centroids)
        recipe = Pretraining(args.objective, params, token_set)
        Trainer.for_command(recipe, args, params, world, args.objective).run()
    return 0


class Pretraining:
    """Recipe of `semdict pretrain`: one model, one objective, AdamW with warm-up and cosine decay."""

    def __init__(self, objective: str, params: "Params", token_set: TokenSet) -> None:
        self.name, self.cfg = f"pretrain-{objective}", params.pretrain
        self.objective, self.token_set, self.vqgan = objective, token_set, params.vqgan
        self.objective_class, self.own = objective_class(objective), self.cfg.section(objective)

    def settings(self) -> dict[str, Any]:
        """Section pretrain without the other objectives' sections, and the tokens."""
        values, extra = self.cfg.values(self.objective), self.objective_class.settings(self.token_set)
        return {"objective": self.objective, "pretrain": values, "data": self.token_set.identity, **extra}

    def loader(self, trainer: Trainer) -> Loader:
        """Tokens in memory, or streamed from tars."""
        cfg, world = self.cfg, trainer.world
        return self.token_set.dataloader(cfg.splits, cfg.batch, cfg.seed, world.rank, world.size, world.device)

    def build(self, loader: Loader, trainer: Trainer) -> Components:
        cfg, device = self.cfg, trainer.world.device
        model = self.model().to(device)
        objective = self.objective_class.from_cfg(cfg, self.own, model, self.token_set)
        if cfg.online_classifier:
            if loader.classes < 1:
                raise UsageError("online_classifier needs labels and a resident loader; set it to false")
            objective = WithClassifier(objective, model, model.config.width, loader.classes, cfg.seed)
        objective = objective.to(device)
        epoch = loader.steps_per_epoch
        steps, peak = cfg.epochs * epoch, scaled_lr(cfg.base_lr, cfg.batch)
        lr_schedule = warmup_cosine(peak, cfg.warmup_epochs * epoch, steps, cfg.min_lr)
        trained = nn.ModuleDict({"model": model, "objective": objective})
        optimiser = adamw(trained, tuple(cfg.betas), cfg.weight_decay, decay_tables=cfg.decay_tables)
        phase = Phase("model", model, objective, optimiser, lr_schedule, cfg.clip)

        def move_averages(clock: Clock, _log: RunLog | None) -> None:
            objective.after_step(model, clock, cfg.epochs)

        hooks = [move_averages, *self.picture_hooks(model, loader, trainer)]
        chance = Chance(self.chance(objective), cfg.warmup_epochs * epoch, "pretrain.base_lr or pretrain.epochs")
        return Components([phase], steps, {"model": model, "objective": objective}, hooks, chance)

    def chance(self, objective: nn.Module) -> dict[str, float]:
        """The objective's losses at chance, in nats."""
        return objective.chance(self.token_set.codebook_size, self.cfg.batch // self.cfg.accumulate)

    def model(self) -> MaskedTokenTransformer:
        """The objective's model at the size of section pretrain, initialised from the seed."""
        cfg, token_set = self.cfg, self.token_set
        changes = {name: getattr(cfg, name) for name in SIZES if getattr(cfg, name) is not None}
        changes |= self.objective_class.architecture_from(self.own, token_set)
        changes |= {"grid": token_set.grid, "dropout": cfg.dropout}
        config = model_config(self.objective, cfg.size, token_set.codebook_size, **changes)
        return MaskedTokenTransformer(config, cfg.seed)

    def picture_hooks(self, model: MaskedTokenTransformer, loader: Loader, trainer: Trainer) -> list[Hook]:
        """A grid of reconstructions every `runtime.picture_every` steps, from rank 0."""
        if not trainer.runtime.picture_every or not trainer.world.first:
            return []
        from semdict.pipeline.tokenizers import load_tokenizer

        cfg, token_set = self.vqgan, self.token_set
        vqgan = load_tokenizer(cfg.weights, trainer.world.device, cfg.layout, cfg.ema)
        if vqgan.codebook_size != token_set.codebook_size:
            raise UsageError(
                f"{cfg.weights} has {vqgan.codebook_size} codes, {token_set.path} has {token_set.codebook_size}"
            )
        tokens_BL = loader.sample(trainer.runtime.pictures)
        pictures = Pictures(vqgan, tokens_BL, self.cfg.seed, trainer.folder / "pictures")
        return [pictures.hook(model, trainer.runtime.picture_every)]

    def finish(self, components: Components, loader: Loader, trainer: Trainer) -> dict[str, Any]:
        """Write the model; its losses at chance, in nats, and the rows that were left out for their status."""
        state = components.state
        if trainer.world.first:
            about = {"cfg": trainer.settings["pretrain"], "token_set": self.token_set.meta, "steps": components.steps}
            save_model(trainer.folder / MODEL, state["model"], about)
        return {"chance": self.chance(state["objective"]), "images_left_out": loader.left_out}


if __name__ == "__main__":
    from semdict.cli import main

    sys.exit(main(["pretrain", *sys.argv[1:]]))

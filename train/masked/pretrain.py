"""`semdict pretrain`: LEASE, Sorcen or MAGE on cached token shards, alone or under torchrun."""

import argparse
import hashlib
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from semdict.pipeline.common.errors import UsageError
from semdict.train.data.token_set import TokenSet
from semdict.train.data.tokens import ResidentLoader, recipe_of, table_from_shards
from semdict.train.engine import dist
from semdict.train.engine.batch import Loader
from semdict.train.engine.logging import RunLog
from semdict.train.engine.loop import Clock, Phase, Plan, Run, fit, make_plan
from semdict.train.engine.lr_schedule import scaled_lr, warmup_cosine
from semdict.train.engine.model_file import MODEL, save_model
from semdict.train.engine.optim import adamw
from semdict.train.engine.run import Place
from semdict.train.engine.stage import add_run_arguments, run_stage, say
from semdict.train.masked.model import FAMILIES, MaskedTokenTransformer, model_config
from semdict.train.masked.objectives import Lease, Mage, Masking, Sorcen
from semdict.train.masked.online import WithClassifier

if TYPE_CHECKING:
    from semdict.pipeline.config.schema import Params, Pretrain

EXAMPLE = """examples:
  semdict pretrain --objective lease --shards shards/demo --out runs/demo/lease
  semdict pretrain --objective lease --resume                     continue after a kill; a complete run is left alone
  semdict pretrain --objective mage --set pretrain.epochs=400 --set pretrain.lambda=0.3 --out runs/mage-400
  torchrun --nproc-per-node 8 -m semdict.train.masked.pretrain --objective sorcen --shards shards/in1k"""

VERSION = 1  # raised when the same settings would train something else
SIZES = ("width", "depth", "heads", "decoder_width", "decoder_depth", "decoder_heads")
# settings that change how a run is watched, kept or carried out, but not what it computes
FREE = {"device", "compile", "save_every", "keep", "log_every", "picture_every", "pictures", "tensorboard"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to train, on what, and where it goes; everything else stands in params.yaml."""
    parser.add_argument("--objective", choices=FAMILIES, required=True)
    parser.add_argument("--shards", type=Path, help="token shards (default shards/<preset>), or a folder of their tars")
    parser.add_argument("--centroids", type=Path, help="(K, D) .npy for lease where the token set itself holds none")
    add_run_arguments(parser, "<objective>")


def run(args: argparse.Namespace) -> int:
    """Train, or say that there is nothing to do."""
    from semdict.pipeline.config.params import load_params

    params = load_params(args.params, args.set)
    with dist.joined(params.runtime.device) as world:
        return Session(args, params, world).go()


class Session:
    """One call of the command."""

    def __init__(self, args: argparse.Namespace, params: "Params", world: dist.World) -> None:
        self.params, self.given, self.world, self.objective = params, params.pretrain, world, args.objective
        self.resume, preset, name = args.resume, params.preset, args.objective
        streaming = self.given.loader == "streaming"
        self.token_set = TokenSet.open(args.shards or Path("shards") / preset, streaming, args.centroids)
        self.reports = args.reports or Path("reports") / preset / name
        settings = identity(name, self.given, recipe_of(self.token_set.meta))
        if name == "lease":  # they may come from a file of their own
            settings["centroids"] = hashlib.sha256(self.token_set.centroid_tensor().numpy().tobytes()).hexdigest()[:16]
        self.place = Place(f"pretrain-{name}", settings, args.out or Path("runs") / preset / name, args.work)

    def go(self) -> int:
        """0 when the run is complete, now or before."""
        run_stage(self.place, self.world, self.resume, self.reports, self.train)
        return 0

    def train(self) -> dict[str, Any]:
        """Build everything, fit and write the model; returns the run's numbers."""
        given, world = self.given, self.world
        loader = self.loader()
        model = self.model().to(world.device)
        objective = self.bound(model, loader).to(world.device)
        trained = nn.ModuleDict({"model": model, "objective": objective})
        steps = given.epochs * loader.steps_per_epoch
        rate = warmup_cosine(
            scaled_lr(given.base_lr, given.batch), given.warmup_epochs * loader.steps_per_epoch, steps, given.min_lr
        )
        optimiser = adamw(trained, tuple(given.betas), given.weight_decay)
        phase = Phase("model", model, AtEpoch(objective), optimiser, rate, given.clip)
        hooks = [self.after_step(model, objective), *self.picture_hooks(model, loader)]
        parts = {"model": model, "objective": objective}
        means = fit([phase], loader, self.plan(steps), self.run(), world, parts, hooks, resume=True)
        metrics = {"final": means, "chance": self.chance(), "steps": steps, "images_left_out": self.left_out}
        if world.first:
            about = {"objective": self.objective, "settings": self.place.settings, "corpus": self.token_set.meta}
            save_model(self.place.folder / MODEL, model, {**about, "step": steps})
        return metrics

    def plan(self, steps: int) -> Plan:
        """The loop's part of the settings."""
        return make_plan(self.objective, self.given, self.params.runtime, steps)

    def run(self) -> Run:
        """The loop's folders."""
        place = self.place
        return Run(place.folder, place.settings, place.fingerprint, self.reports, self.params.runtime.tensorboard)

    def loader(self) -> Loader:
        """Tokens in memory, or streamed from tars."""
        given, world = self.given, self.world
        if given.loader == "streaming":
            from semdict.train.data.streaming import StreamingLoader

            place = (world.rank, world.size, world.device)
            loader: Any = StreamingLoader(self.token_set.path, given.splits, given.batch, given.seed, *place)
            self.left_out, self.classes = loader.left_out, 0
        else:
            table = table_from_shards(self.token_set.path, given.splits)
            loader = ResidentLoader(table, given.batch, given.seed, world.rank, world.size, world.device)
            self.left_out, self.classes = table.left_out, int(table.label.max()) + 1
        counts = f"{loader.steps_per_epoch} steps an epoch of {given.batch} images, {self.left_out} rows left out"
        say(world, self.place, counts)
        return loader

    def model(self) -> MaskedTokenTransformer:
        """The objective's family at the given size, drawn from the seed."""
        given, token_set = self.given, self.token_set
        changes: dict[str, Any] = {k: getattr(given, k) for k in SIZES if getattr(given, k) is not None}
        changes |= {"grid": token_set.grid, "dropout": given.dropout}
        if self.objective == "lease":
            width = token_set.centroid_tensor().shape[1]
            sides = {"encoder": (width, 0), "decoder": (0, width), "both": (width, width)}[given.lease.contrast]
            changes |= dict(zip(("encoder_words", "decoder_words"), sides, strict=True))
        if self.objective == "sorcen":
            changes |= {"projector": tuple(given.sorcen.projector), "predictor": tuple(given.sorcen.predictor)}
        return MaskedTokenTransformer(
            model_config(self.objective, given.size, token_set.codebook_size, **changes), given.seed
        )

    def bound(self, model: MaskedTokenTransformer, loader: Loader) -> nn.Module:
        """The objective, with the online classifier beside it where that was asked for."""
        objective = build_objective(self.objective, self.given, model, self.token_set)
        if not self.given.online_classifier:
            return objective
        if self.classes < 1:
            raise UsageError("online_classifier needs labels and a resident loader; set it to false")
        return WithClassifier(objective, model, model.config.width, self.classes, self.given.seed)

    def after_step(self, model: nn.Module, objective: nn.Module) -> Callable[[Clock, RunLog | None], None]:
        """Averages move here, once per optimiser step."""
        epochs = self.given.epochs
        return lambda clock, _log: objective.after_step(model, clock.epoch, epochs)

    def picture_hooks(self, model: nn.Module, loader: Any) -> list[Callable[[Clock, RunLog | None], None]]:
        """A grid of reconstructions every `picture_every` steps, from rank 0."""
        every, weights = self.params.runtime.picture_every, Path(self.params.vqgan.weights)
        if not every or not self.world.first:
            return []
        from semdict.pipeline.tokenizers import load_tokenizer
        from semdict.train.masked.pictures import Pictures

        cfg = self.params.vqgan
        vqgan = load_tokenizer(weights, self.world.device, cfg.layout, cfg.ema)
        if vqgan.codebook_size != self.token_set.codebook_size:
            raise UsageError(
                f"{weights} has {vqgan.codebook_size} codes, {self.token_set.path} has {self.token_set.codebook_size}"
            )
        pictures = Pictures(vqgan, loader.sample(self.params.runtime.pictures), self.given.seed)

        def hook(clock: Clock, log: RunLog | None) -> None:
            if (clock.step + 1) % every == 0:
                path = self.place.folder / "pictures" / f"step-{clock.step + 1:08d}.png"
                image_HWC = pictures.draw(model, path)
                if log is not None:
                    log.picture(clock.step + 1, "reconstruction", image_HWC)

        return [hook]

    def chance(self) -> dict[str, float]:
        """Each loss of a model that knows nothing (nats): a uniform guess among codes, words, or the batch's images."""
        guesses = {"reconstruction": math.log(self.token_set.codebook_size)}
        if self.objective == "lease":
            sides = {"both": ("encoder", "decoder")}.get(self.given.lease.contrast, (self.given.lease.contrast,))
            guesses |= {f"contrast_{side}": math.log(len(self.token_set.centroid_tensor())) for side in sides}
        if self.objective == "sorcen":
            guesses["echo_contrast"] = math.log(self.given.batch // self.given.accumulate)
        return guesses


class AtEpoch(nn.Module):
    """An objective(model, batch, rng, epoch) as the loop calls it; a module, so that its own parameters are seen."""

    def __init__(self, objective: nn.Module) -> None:
        super().__init__()
        self.objective = objective

    def forward(
        self, model: nn.Module, batch: dict, rng: torch.Generator, clock: Clock
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return self.objective(model, batch, rng, clock.epoch)


def identity(objective: str, given: "Pretrain", recipe: str) -> dict[str, Any]:
    """All that shapes the result: the section without what only concerns watching, or other objectives."""
    unused = FREE | ({"lease", "sorcen"} - {objective}) | ({"lambda"} if objective == "mage" else set())
    chosen = {name: value for name, value in given.model_dump(by_alias=True).items() if name not in unused}
    return {"objective": objective, "version": VERSION, "recipe": recipe, **chosen}


def build_objective(name: str, given: "Pretrain", model: MaskedTokenTransformer, token_set: TokenSet) -> Mage:
    """The objective with its section's settings."""
    mask, smoothing = given.mask, given.label_smoothing
    masking = Masking(mask.mode, mask.std, mask.min, mask.max, mask.per_sample)
    if name == "lease":
        o = given.lease
        return Lease(
            token_set.centroid_tensor(), o.contrast, o.neighbours, given.contrast_weight, o.tau, o.alpha,
            masking, smoothing,
        )  # fmt: skip
    if name == "sorcen":
        o = given.sorcen
        return Sorcen(
            model, given.contrast_weight, o.temperature, o.top, None if o.as_released else o.echo_warmup_epochs,
            o.uniform_weight, o.momentum, o.as_released, masking=masking, smoothing=smoothing, gather=dist.gather,
        )  # fmt: skip
    return Mage(masking, smoothing)


if __name__ == "__main__":
    from semdict.cli import main

    sys.exit(main(["pretrain", *sys.argv[1:]]))

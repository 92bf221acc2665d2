"""End-to-end fine-tuning on images tokenised as they come (LEASE, Table A.3), alone or under torchrun.

B images, L grid cells, C classes.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semdict.pipeline.common.device import DTYPES
from semdict.pipeline.common.errors import UsageError
from semdict.pipeline.config import paths as places
from semdict.train.data.augment import TimmAugmentation
from semdict.train.data.images import ImageLoader, ImageRows
from semdict.train.engine import dist
from semdict.train.engine.batch import Batch
from semdict.train.engine.logging import RunLog
from semdict.train.engine.loop import Clock, Phase, Plan, Run, fit, make_plan
from semdict.train.engine.lr_schedule import scaled_lr, warmup_cosine
from semdict.train.engine.model_file import MODEL, save_model
from semdict.train.engine.rng import Stream, numpy_seed
from semdict.train.engine.run import Place
from semdict.train.engine.stage import run_stage, say
from semdict.train.eval.classifier import Classifier, layer_groups
from semdict.train.eval.common import Setup, add_common_arguments, same_classes, write_confusion
from semdict.train.eval.image_source import ImageSource
from semdict.train.eval.linear_head import top_accuracy

EXAMPLE = """examples:
  semdict evaluate fine-tune --model runs/demo/lease
  semdict evaluate fine-tune --model runs/demo/lease --resume          continue after a kill
  torchrun --nproc-per-node 8 -m semdict.train.eval.finetune --model runs/in1k/lease

Always trains from images. Writes finetune.json and finetune_confusion.csv; the classifier goes to --run."""

VERSION = 1  # raised when the same settings would train something else
FREE = {"compile", "save_every", "keep", "log_every", "eval_every", "tensorboard"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, on what, and where it goes."""
    add_common_arguments(parser)
    parser.add_argument("--run", type=Path, help="the fine-tuned model (default runs/<preset>/<name>-finetune)")
    parser.add_argument("--resume", action="store_true", help="continue a killed run; keep a complete one as it is")


def run(args: argparse.Namespace) -> int:
    """Fine-tune, or say that there is nothing to do; then write the scores."""
    from semdict.pipeline.config.params import load_params

    with dist.joined(load_params(args.params, args.set).runtime.device) as world:
        Session(Setup.of(args, world.device), world).go()
    return 0


class Session:
    """One call of the command."""

    def __init__(self, setup: Setup, world: dist.World) -> None:
        self.setup, self.world, self.given = setup, world, setup.cfg.finetune
        g, args, preset = self.given, setup.args, setup.params.preset
        self.manifest = args.manifest or places.manifest(preset)
        images = setup.params.manifest.images
        self.train_source = setup.image_source(self.manifest, images, setup.cfg.train_splits)
        self.test_source = setup.image_source(self.manifest, images, setup.cfg.test_splits)
        self.classes = same_classes(self.train_source, self.test_source)
        mixing, rows = bool(g.mixup or g.cutmix), g.batch // world.size // g.accumulate
        if mixing and rows % 2:
            raise UsageError(f"mixup and cutmix pair images: {rows} a micro-batch is odd; change batch or accumulate")
        name = f"{setup.encoder.name}-finetune"
        self.place = Place("finetune", self.identity(), args.run or Path("runs") / preset / name, args.work)

    def identity(self) -> dict[str, Any]:
        """All that shapes the result."""
        chosen = {name: value for name, value in self.given.model_dump().items() if name not in FREE}
        encoder = self.setup.encoder
        sources = {"train": self.train_source.identity, "test": self.test_source.identity}
        return {
            "version": VERSION,
            "model": encoder.sha256,
            "config": encoder.model.config.to_dict(),
            **sources,
            **chosen,
        }

    def go(self) -> None:
        """Train as a stage, and tell."""
        setup = self.setup
        card = run_stage(self.place, self.world, setup.args.resume, setup.out / "finetune", self.train)
        if not self.world.first:
            return
        scores = {name: card["metrics"][name] for name in ("top1", "top5", "loss")}
        predicted = np.load(self.place.out / "predicted.npy", allow_pickle=False)
        names, labels = self.train_source.names, self.test_source.labels
        good = predicted >= 0
        write_confusion(setup.out / "finetune_confusion.csv", names, labels[good], predicted[good])
        setup.write("finetune", scores, self.protocol())

    def protocol(self) -> dict[str, Any]:
        """How it was measured."""
        train = {**self.train_source.about, "views": ["random resized crop, flip, RandAugment; new every epoch"]}
        test = {**self.test_source.about, "views": self.test_source.views}
        said = {**self.given.model_dump(), "measure": "fine-tuning", "train": train, "test": test}
        return {**self.setup.protocol(), **said, "source": "images", "classes": self.classes}

    def train(self) -> dict[str, Any]:
        """Build everything, fit, score and write the model; returns the run's numbers."""
        g, world, setup = self.given, self.world, self.setup
        loader = self.loader()
        model = Classifier(setup.encoder.model, self.classes, g.drop_path, g.dropout, g.embedding_dropout, g.seed)
        model = model.to(world.device)
        groups = layer_groups(model, g.weight_decay, g.layer_decay)
        optimiser = torch.optim.AdamW(groups, lr=0.0, betas=tuple(g.betas), fused=True)
        steps, warmup = g.epochs * loader.steps_per_epoch, g.warmup_epochs * loader.steps_per_epoch
        rate = warmup_cosine(scaled_lr(g.base_lr, g.batch), warmup, steps, g.min_lr)
        objective = Classify(self.train_source, self.classes, g.mixup, g.cutmix, g.label_smoothing)
        phase = Phase("model", model, objective, optimiser, rate, g.clip)
        test = HeldOut(self.test_source, world, g.precision, setup.cfg.batch)
        say(world, self.place, f"{loader.steps_per_epoch} steps an epoch of {g.batch} images, {self.classes} classes")
        try:
            place = self.place
            run = Run(
                place.folder,
                place.settings,
                place.fingerprint,
                setup.out / "finetune",
                setup.params.runtime.tensorboard,
            )
            hooks = [self.watch(model, test)]
            final = fit([phase], loader, self.plan(steps), run, world, {"model": model}, hooks, resume=True)
        finally:
            loader.close()
        scores, predicted = test.score(model)
        if world.first:
            np.save(self.place.folder / "predicted.npy", predicted)
            save_model(self.place.folder / MODEL, model, {"settings": self.place.settings})
        return {**scores, "loss": final["loss"], "steps": steps, "final": final}

    def loader(self) -> ImageLoader:
        """Augmented training images of this rank."""
        g, world, source = self.given, self.world, self.train_source
        folders = dict(self.setup.params.manifest.images)
        images = ImageRows(source.manifest, folders, source.rows, source.recipe.decoding)
        scale = (g.crop_scale[0], g.crop_scale[1])
        augment = TimmAugmentation(g.seed, g.rand_augment, scale, source.recipe.crop.size)
        return ImageLoader(
            images, augment, g.batch, g.seed, world.rank, world.size, world.device, self.setup.params.runtime.workers,
            processes=True,
        )  # fmt: skip

    def plan(self, steps: int) -> Plan:
        """The loop's part of the settings."""
        return make_plan("fine-tune", self.given, self.setup.params.runtime, steps)

    def watch(self, model: Classifier, test: "HeldOut"):
        """A hook: the test set every `eval_every` epochs."""

        def hook(clock: Clock, log: RunLog | None) -> None:
            done, remainder = divmod(clock.step + 1, clock.steps_per_epoch)
            if remainder == 0 and done % self.given.eval_every == 0 and done < self.given.epochs:
                scores, _ = test.score(model)
                model.train()
                if log is not None:
                    log.write(clock.step + 1, {f"test_{name}": value for name, value in scores.items()}, {})

        return hook


class Classify:
    """Cross-entropy (nats) on images that are mixed, then tokenised without gradient; targets mixed and smoothed alike.

    mixup, cutmix: parameters of the Beta distributions, 0 = off; with both on, each has half of the batches (timm).
    """

    def __init__(self, source: ImageSource, classes: int, mixup: float, cutmix: float, smoothing: float) -> None:
        from timm.data.mixup import Mixup

        self.source, self.smoothing = source, smoothing
        settings = {"mixup_alpha": mixup, "cutmix_alpha": cutmix, "label_smoothing": smoothing, "num_classes": classes}
        self.mixing = Mixup(**settings) if mixup or cutmix else None

    def __call__(
        self, model: nn.Module, batch: Batch, rng: torch.Generator, clock: Clock
    ) -> tuple[Tensor, dict[str, Tensor]]:
        images, target = batch["images"].float().div(255), batch["label"]
        if self.mixing is not None:
            with numpy_seeded(rng):
                images, target = self.mixing(images, target)
        logits_BC = model(self.source.codes(images))
        smoothing = 0.0 if self.mixing else self.smoothing
        return F.cross_entropy(logits_BC.float(), target, label_smoothing=smoothing), {}


@contextmanager
def numpy_seeded(rng: torch.Generator) -> Iterator[None]:
    """NumPy's global generator, from which timm draws, seeded by that of a step and its rows, and then put back."""
    before = np.random.get_state()
    np.random.seed(numpy_seed(rng.initial_seed(), Stream.MIXING, getattr(rng, "start", 0)))
    try:
        yield
    finally:
        np.random.set_state(before)


class HeldOut:
    """The test crops as tokens, made once; this rank's share of them."""

    def __init__(self, source: ImageSource, world: dist.World, precision: str, batch: int) -> None:
        self.source, self.world, self.precision, self.batch = source, world, precision, batch
        self.mine = np.array_split(np.arange(len(source.rows)), world.size)[world.rank]
        self.shown: list[tuple[Tensor, np.ndarray]] = []

    def tokens(self) -> list[tuple[Tensor, np.ndarray]]:
        """(tokens (B, L) int32, positions (B,)) by batch, bad images left out; small enough to keep."""
        if not self.shown:
            for shown in self.source.narrowed(self.mine).stream(self.source.crop, self.batch):
                good = np.setdiff1d(np.arange(len(shown.tokens)), shown.bad)
                ids = shown.tokens[torch.from_numpy(good).to(shown.tokens.device)].to(torch.int32).cpu()
                self.shown.append((ids, self.mine[shown.start + good]))
        return self.shown

    @torch.no_grad()
    def score(self, model: Classifier) -> tuple[dict[str, float], np.ndarray]:
        """(top1 and top5 in per cent, class of each test image or -1) over all ranks; leaves evaluation mode on."""
        device = self.world.device
        model.eval()
        ranked_N5 = torch.full((len(self.source.rows), 5), -1, dtype=torch.int64)
        for ids, at in self.tokens():
            with torch.autocast(device.type, DTYPES[self.precision], enabled=self.precision != "float32"):
                logits_BC = model(ids.to(device).long())
            top = logits_BC.topk(min(5, logits_BC.shape[1])).indices.cpu()
            ranked_N5[torch.from_numpy(at), : top.shape[1]] = top
        merged = torch.stack([torch.from_numpy(part) for part in dist.collect(ranked_N5.numpy())]).amax(dim=0)
        good = merged[:, 0] >= 0
        return top_accuracy(merged[good], self.source.labels[good.numpy()]), merged[:, 0].numpy()


if __name__ == "__main__":
    from semdict.cli import main

    sys.exit(main(["evaluate", "fine-tune", *sys.argv[1:]]))

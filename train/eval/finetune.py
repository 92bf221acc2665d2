"""End-to-end fine-tuning on augmented images that are tokenised as they come (LEASE, Table A.3).

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
from semdict.pipeline.config import paths
from semdict.train.data.augment import TimmAugmentation
from semdict.train.data.images import ImageLoader, ImageRows
from semdict.train.engine import dist
from semdict.train.engine.logging import RunLog
from semdict.train.engine.loop import Batch, Clock, Hook, Phase
from semdict.train.engine.lr_schedule import scaled_lr, warmup_cosine
from semdict.train.engine.model_file import MODEL, save_model
from semdict.train.engine.rng import Stream, numpy_seed
from semdict.train.engine.trainer import Components, Trainer
from semdict.train.eval.classifier import Classifier, layer_groups
from semdict.train.eval.common import same_classes, top_accuracy, write_confusion
from semdict.train.eval.setup import Setup, add_common_arguments
from semdict.train.eval.sources import ImageSource

EXAMPLE = """examples:
  semdict evaluate fine-tune --model runs/demo/lease
  semdict evaluate fine-tune --model runs/demo/lease --resume          continue after a kill
  torchrun --nproc-per-node 8 -m semdict.train.eval.finetune --model runs/in1k/lease

Always trains from images. Writes finetune.json and finetune_confusion.csv; the classifier goes to --run."""

PREDICTED = "predicted.npy"  # (N,) int64: class of each test image, -1 where it cannot be decoded


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, on which images, and where the run goes."""
    add_common_arguments(parser)
    parser.add_argument("--run", type=Path, help="the fine-tuned model (default runs/<preset>/<name>-finetune)")
    parser.add_argument("--resume", action="store_true", help="continue a killed run; keep a complete one as it is")


def run(args: argparse.Namespace) -> int:
    """Fine-tune, unless the run is complete; then write the scores."""
    from semdict.pipeline.config.params import params_of

    with dist.process_group(params_of(args).runtime.device) as world:
        setup = Setup.of(args, world.device)
        recipe = FineTuning(setup, world)
        preset, name = setup.params.preset, f"{setup.encoder.name}-finetune"
        out, reports = args.run or Path("runs") / preset / name, setup.out / "finetune"
        card = Trainer(recipe, setup.params.runtime, world, out, reports, args.work, args.resume).run()
        if world.first:
            recipe.write_scores(card["metrics"], out)
    return 0


class FineTuning:
    """Recipe of `semdict evaluate fine-tune`: the encoder as a classifier, AdamW with layer-wise learning rates."""

    name = "finetune"

    def __init__(self, setup: Setup, world: dist.World) -> None:
        self.setup, self.cfg = setup, setup.cfg.finetune
        manifest, images = setup.args.manifest or paths.manifest(setup.params.preset), setup.params.manifest.images
        self.train_source = setup.image_source(manifest, images, setup.cfg.train_splits)
        self.test_source = setup.image_source(manifest, images, setup.cfg.test_splits)
        self.classes = same_classes(self.train_source, self.test_source)
        rows = self.cfg.batch // world.size // self.cfg.accumulate
        if (self.cfg.mixup or self.cfg.cutmix) and rows % 2:
            raise UsageError(f"mixup and cutmix pair images: {rows} a micro-batch is odd; change batch or accumulate")
        self.test_set = TestSet(self.test_source, world, self.cfg.precision, setup.cfg.batch)

    def settings(self) -> dict[str, Any]:
        """Section evaluate.finetune, the images of both sets, and the pretrained model."""
        encoder, evaluate = self.setup.encoder, {"batch": self.setup.cfg.batch, "finetune": self.cfg.model_dump()}
        data = {"train": self.train_source.identity, "test": self.test_source.identity}
        model = {"sha256": encoder.sha256, "config": encoder.model.config.to_dict()}
        return {"evaluate": evaluate, "data": data, "model": model}

    def loader(self, trainer: Trainer) -> ImageLoader:
        """Augmented training images of this rank."""
        cfg, world, source, workers = self.cfg, trainer.world, self.train_source, trainer.runtime.workers
        folders = dict(self.setup.params.manifest.images)
        images = ImageRows(source.manifest, folders, source.rows, source.recipe.decoding)
        scale = (cfg.crop_scale[0], cfg.crop_scale[1])
        augment = TimmAugmentation(cfg.seed, cfg.rand_augment, scale, source.recipe.crop.size)
        return ImageLoader(
            images, augment, cfg.batch, cfg.seed, world.rank, world.size, world.device, workers, processes=True
        )  # fmt: skip

    def build(self, loader: ImageLoader, trainer: Trainer) -> Components:
        cfg, epoch = self.cfg, loader.steps_per_epoch
        encoder = self.setup.encoder.model
        model = Classifier(encoder, self.classes, cfg.drop_path, cfg.dropout, cfg.embedding_dropout, cfg.seed)
        model = model.to(trainer.world.device)
        trainer.log(f"{self.classes} classes")
        groups = layer_groups(model, cfg.weight_decay, cfg.layer_decay)
        optimiser = torch.optim.AdamW(groups, lr=0.0, betas=tuple(cfg.betas), fused=True)
        steps, peak = cfg.epochs * epoch, scaled_lr(cfg.base_lr, cfg.batch)
        lr_schedule = warmup_cosine(peak, cfg.warmup_epochs * epoch, steps, cfg.min_lr)
        objective = Classify(self.train_source, self.classes, cfg.mixup, cfg.cutmix, cfg.label_smoothing)
        phase = Phase("model", model, objective, optimiser, lr_schedule, cfg.clip)
        return Components([phase], steps, {"model": model}, [self.evaluation(model)])

    def evaluation(self, model: Classifier) -> Hook:
        """Score the test set every `eval_every` epochs, but for the last, and log it."""
        cfg = self.cfg

        def evaluate(clock: Clock, log: RunLog | None) -> None:
            epoch, remainder = divmod(clock.step + 1, clock.steps_per_epoch)
            if remainder == 0 and epoch % cfg.eval_every == 0 and epoch < cfg.epochs:
                scores, _ = self.test_set.score(model)
                model.train()
                if log is not None:
                    log.write(clock.step + 1, {f"test_{name}": value for name, value in scores.items()}, {})

        return evaluate

    def finish(self, components: Components, loader: ImageLoader, trainer: Trainer) -> dict[str, Any]:
        """Score the test set; write the classifier and the predicted classes."""
        model = components.state["model"]
        scores, predicted_N = self.test_set.score(model)
        if trainer.world.first:
            np.save(trainer.folder / PREDICTED, predicted_N)
            save_model(trainer.folder / MODEL, model, {"cfg": trainer.settings["evaluate"]["finetune"]})
        return scores

    def write_scores(self, metrics: dict[str, Any], run: Path) -> None:
        """finetune.json and finetune_confusion.csv from a complete run."""
        setup, labels_N = self.setup, self.test_source.labels
        predicted_N = np.load(run / PREDICTED, allow_pickle=False)
        good = predicted_N >= 0
        path = setup.out / "finetune_confusion.csv"
        write_confusion(path, self.train_source.names, labels_N[good], predicted_N[good])
        scores = {"top1": metrics["top1"], "top5": metrics["top5"], "loss": metrics["final"]["loss"]}
        setup.write("finetune", scores, self.protocol())

    def protocol(self) -> dict[str, Any]:
        """How the scores were measured."""
        train = {**self.train_source.about, "views": ["random resized crop, flip, RandAugment; new every epoch"]}
        test = {**self.test_source.about, "views": self.test_source.views}
        measure = {**self.cfg.model_dump(), "measure": "fine-tuning", "train": train, "test": test}
        return {**self.setup.protocol(), **measure, "source": "images", "classes": self.classes}


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
    """Seed NumPy's global generator, which timm uses, from that of the step and its rows; restore it at the end."""
    before = np.random.get_state()
    np.random.seed(numpy_seed(rng.initial_seed(), Stream.MIXING, getattr(rng, "start", 0)))
    try:
        yield
    finally:
        np.random.set_state(before)


class TestSet:
    """Tokens of the test crops, computed once; each rank has its share of them."""

    __test__ = False  # for pytest: not a test class

    def __init__(self, source: ImageSource, world: dist.World, precision: str, batch: int) -> None:
        self.source, self.world, self.precision, self.batch = source, world, precision, batch
        self.share = np.array_split(np.arange(len(source.rows)), world.size)[world.rank]
        self._batches: list[tuple[Tensor, np.ndarray]] = []

    def batches(self) -> list[tuple[Tensor, np.ndarray]]:
        """(tokens (B, L) int32, positions (B,)) without undecodable images; small enough to keep."""
        if not self._batches:
            for batch in self.source.narrowed(self.share).stream(self.source.crop, self.batch):
                good = np.setdiff1d(np.arange(len(batch.tokens)), batch.bad)
                ids_BL = batch.tokens[torch.from_numpy(good).to(batch.tokens.device)].to(torch.int32).cpu()
                self._batches.append((ids_BL, self.share[batch.start + good]))
        return self._batches

    @torch.no_grad()
    def score(self, model: Classifier) -> tuple[dict[str, float], np.ndarray]:
        """(top1 and top5 in per cent, class of each test image or -1) over all ranks; leaves evaluation mode on."""
        device = self.world.device
        model.eval()
        ranked_N5 = torch.full((len(self.source.rows), 5), -1, dtype=torch.int64)
        for ids_BL, positions in self.batches():
            with torch.autocast(device.type, DTYPES[self.precision], enabled=self.precision != "float32"):
                logits_BC = model(ids_BL.to(device).long())
            top = logits_BC.topk(min(5, logits_BC.shape[1])).indices.cpu()
            ranked_N5[torch.from_numpy(positions), : top.shape[1]] = top
        merged = torch.stack([torch.from_numpy(part) for part in dist.gather_objects(ranked_N5.numpy())]).amax(dim=0)
        good = merged[:, 0] >= 0
        return top_accuracy(merged[good], self.source.labels[good.numpy()]), merged[:, 0].numpy()


if __name__ == "__main__":
    from semdict.cli import main

    sys.exit(main(["evaluate", "fine-tune", *sys.argv[1:]]))

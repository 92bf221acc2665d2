"""Train the 1-D tokenizer and its discriminator on the images of a manifest, alone or under torchrun."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from semdict.pipeline.common.device import to_device
from semdict.pipeline.common.files import write_json
from semdict.pipeline.config import paths as places
from semdict.train.data.images import ImageLoader, ImageRows, RandomCrop, centre_crops, usable_rows
from semdict.train.engine import dist
from semdict.train.engine.batch import Batch
from semdict.train.engine.ema import Ema
from semdict.train.engine.logging import RunLog
from semdict.train.engine.loop import DTYPES, Clock, Phase, Plan, Run, fit, make_plan
from semdict.train.engine.lr_schedule import ramp, warmup_hold_linear
from semdict.train.engine.model_file import TOKENIZER, save_model
from semdict.train.engine.optim import adamw
from semdict.train.engine.run import Place
from semdict.train.engine.stage import add_run_arguments, run_stage, say
from semdict.train.vcq.discriminator import PatchGan
from semdict.train.vcq.objective import LossWeights, TokenizerObjective
from semdict.train.vcq.perceptual import PerceptualSource, choose_perceptual, load_perceptual
from semdict.train.vcq.tokenizer import PRESETS, Tokenizer1d, TokenizerConfig
from semdict.train.vcq.usage import CodeReset, CodeUsage, Revival

if TYPE_CHECKING:
    from semdict.pipeline.config.schema import Params, Vcq

VERSION = 1  # raised when the same settings would train something else
FREE = {
    "device",
    "compile",
    "save_every",
    "keep",
    "log_every",
    "tensorboard",
    "workers",
    "usage_images",
    "measured_images",
}
EXAMPLE = """examples:
  semdict vcq train --manifest data/demo/manifest/manifest.parquet --out runs/demo/vcq
  semdict vcq train --resume                                     continue after a kill; a complete run is left alone
  semdict vcq train --set vcq.schedule=constant --out runs/demo/vcq-constant
  torchrun --nproc-per-node 8 -m semdict.train.vcq.train

Writes tokenizer.pt (averaged weights), tokenizer-raw.pt, usage.json and reconstructions.png."""
RAW = "tokenizer-raw.pt"  # weights of the last step; TOKENIZER holds their average
SHAPE = ("image_size", "patch", "tokens", "latent_queries", "schedule", "k_min", "power", "dim", "l2", "beta",
         "codebook_weight")  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which images, and where the run goes; everything else stands in params.yaml, section vcq."""
    parser.add_argument("--manifest", type=Path, help="default: data/<preset>/manifest/manifest.parquet")
    add_run_arguments(parser, "vcq")


def run(args: argparse.Namespace) -> int:
    """Train, or say that there is nothing to do."""
    from semdict.pipeline.config.params import load_params

    params = load_params(args.params, args.set)
    with dist.joined(params.runtime.device) as world:
        session = Session(params, world, args)
        run_stage(session.place, world, args.resume, session.reports, session.train)
    return 0


def config_of(given: "Vcq") -> TokenizerConfig:
    """The size's shape with what params.yaml changes."""
    base = PRESETS[given.size]
    changes: dict[str, Any] = {name: getattr(given, name) for name in SHAPE}
    changes |= {name: tuple(getattr(given, name)) for name in ("encoder", "decoder") if getattr(given, name)}
    return replace(base, **changes, k_max=given.k_max or base.k_max)


class Turns:
    """Both objectives of a step: the tokenizer's, which leaves its pictures in the batch, and the discriminator's."""

    def __init__(
        self, objective: TokenizerObjective, critic: PatchGan, usage: CodeUsage, start: int, over: int
    ) -> None:
        self.objective, self.critic, self.usage = objective, critic, usage
        self.start, self.over = start, over  # of quantization
        self.revival: Revival | None = None

    def tokenizer(
        self, model: nn.Module, batch: Batch, rng: torch.Generator, clock: Clock
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Generator loss; leaves "fake" in the batch and counts the codes."""
        out = model(batch["images"], ramp(clock.step, self.start, self.over))
        batch["fake"] = out.images.detach()
        self.usage.add(out.ids)
        if self.revival:
            self.revival.see(out.latents, out.ids)
        return self.objective.generator(out, batch["images"], self.critic, clock.step, rng)

    def discriminator(
        self, model: nn.Module, batch: Batch, rng: torch.Generator, clock: Clock
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Hinge loss on the same pictures."""
        return self.objective.discriminator(batch["fake"], batch["images"], model, clock.step, rng)


class Session:
    """One call of the command."""

    def __init__(self, params: "Params", world: dist.World, args: argparse.Namespace) -> None:
        from semdict.pipeline.manifest.table import load_manifest

        self.params, self.given, self.world = params, params.vcq, world
        self.manifest = load_manifest(args.manifest or places.manifest(params.preset))
        self.objective = build_objective(params.vcq, world.device)
        self.reports = args.reports or Path("reports") / params.preset / "vcq"
        settings = identity(params.vcq, self.manifest.sha256[:16], self.objective)
        self.place = Place("vcq-train", settings, args.out or Path("runs") / params.preset / "vcq", args.work)

    def train(self) -> dict[str, Any]:
        """Fit both networks, write averaged and raw tokenizer, measure both on held-out images."""
        given, world, place = self.given, self.world, self.place
        loader = self.loader()
        model = Tokenizer1d(config_of(given), given.seed).to(world.device)
        critic = PatchGan(given.discriminator_channels, seed=given.seed).to(world.device)
        average = Ema(model, ["encoder", "quantizer", "decoder"])
        usage = CodeUsage(model.codebook_sizes)
        say(world, place, f"perceptual loss: {self.objective.describe()['perceptual']}")
        kept = {"model": model, "critic": critic, "average": average}
        if given.lecam_weight:
            kept["lecam"] = self.objective.lecam
        run = Run(place.folder, place.settings, place.fingerprint, self.reports, self.params.runtime.tensorboard)
        try:
            turns = Turns(self.objective, critic, usage, given.quantize_start, given.quantize_ramp)
            phases = self.phases(model, critic, turns)
            hooks = [self.averaging(average, model), self.counting(usage)]
            if given.reset_patience:
                kept["reset"] = reset = CodeReset(model.codebook_sizes, given.reset_protected, given.reset_patience)
                turns.revival = Revival(reset, model.quantizer, average["quantizer"], phases[0].optimiser, given.seed)
                hooks.insert(0, lambda clock, _log: turns.revival.after_step(clock.step))
            means = fit(phases, loader, self.plan(), run, world, kept, hooks, resume=True)
        finally:
            loader.close()
        metrics = {"final": means, "steps": given.steps, "images_replaced": len(loader.replaced)}
        if turns.revival:
            metrics["codes_reset"] = turns.revival.reset.done
        metrics |= {"parameters": sum(p.numel() for p in model.parameters()), **self.objective.describe()}
        return metrics | (self.finish(model, average) if world.first else {})

    def phases(self, model: Tokenizer1d, critic: PatchGan, turns: Turns) -> list[Phase]:
        """The tokenizer's turn and, from its start on, the discriminator's."""
        given = self.given
        rate = warmup_hold_linear(given.lr, given.final_lr, given.warmup, given.hold, given.steps)
        made = [(model, turns.tokenizer, 0)]
        if given.adversarial_weight:
            made.append((critic, turns.discriminator, given.discriminator_start))
        names = ("tokenizer", "discriminator")
        return [
            Phase(name, net, turn, adamw(net, tuple(given.betas), given.weight_decay), rate, given.clip, start)
            for name, (net, turn, start) in zip(names, made, strict=False)
        ]

    def plan(self) -> Plan:
        """The loop's part of the settings."""
        return make_plan("vcq", self.given, self.params.runtime, self.given.steps)

    def images(self, splits: list[str]) -> ImageRows:
        """Usable images of some splits."""
        from semdict.pipeline.images.decode import DecodeSpec

        pixels, rows = self.params.pixels, usable_rows(self.manifest, splits)
        return ImageRows(self.manifest, dict(self.params.manifest.images), rows, DecodeSpec.of(pixels))

    def loader(self) -> ImageLoader:
        """Random crops of the training images."""
        given, world = self.given, self.world
        images, crop = self.images(given.splits), RandomCrop(given.image_size, given.seed)
        return ImageLoader(
            images,
            crop,
            given.batch,
            given.seed,
            world.rank,
            world.size,
            world.device,
            self.params.runtime.workers,
            floats=True,
        )

    def averaging(self, average: Ema, model: nn.Module):
        """A short run is averaged over less: the decay grows to `ema` as (1 + step) / (10 + step)."""
        return lambda clock, _log: average.update(model, min(self.given.ema, (1 + clock.step) / (10 + clock.step)))

    def counting(self, usage: CodeUsage):
        """Write usage.json, mean and per position, each time the window is full, and open a new one."""
        batch = self.given.batch // self.world.size
        every = max(1, self.given.usage_images // batch)

        def hook(clock: Clock, log: RunLog | None) -> None:
            if (clock.step + 1) % every and clock.step + 1 < self.given.steps:
                return
            if log is not None:
                utilisation_L, used_L = usage.per_position()
                curves = {"utilisation": utilisation_L.tolist(), "used": used_L.tolist()}
                write_json(self.place.folder / "usage.json", {"step": clock.step + 1, **usage.summary(), "at": curves})
            usage.clear()

        return hook

    def finish(self, model: Tokenizer1d, average: Ema) -> dict[str, Any]:
        """Write both tokenizers and a grid of held-out reconstructions; PSNR in dB of each."""
        from semdict.pipeline.images.visualize import psnr, save_grid

        given, folder = self.given, self.place.folder
        held_out = self.images(given.held_out or given.splits)
        pixels = centre_crops(held_out, given.image_size, given.measured_images, self.params.runtime.workers)
        save_model(folder / RAW, model, {"settings": self.place.settings})
        found, rows = {"psnr_raw": float(psnr(pixels, self.reconstruct(model, pixels)).mean())}, [pixels]
        for name, part in average.parts.items():
            getattr(model, name).load_state_dict(part.state_dict())
        save_model(folder / TOKENIZER, model, {"settings": self.place.settings})
        rows.append(self.reconstruct(model, pixels))
        found["psnr"] = float(psnr(*rows).mean())
        save_grid(folder / "reconstructions.png", rows, ["original", "tokens\nback to pixels"])
        return {**found, "measured_images": len(pixels)}

    @torch.no_grad()
    def reconstruct(self, model: Tokenizer1d, pixels_NHWC: np.ndarray) -> np.ndarray:
        """(N, H, W, 3) uint8 through tokens and back."""
        model.eval()
        kind, precision, parts = self.world.device.type, self.given.precision, []
        for start in range(0, len(pixels_NHWC), 32):
            images = to_device(pixels_NHWC[start : start + 32], self.world.device)
            with torch.autocast(kind, DTYPES[precision], enabled=precision != "float32"):
                back = model.decode(model.encode(images))
            parts.append((back.float() * 255 + 0.5).floor().byte().permute(0, 2, 3, 1).cpu().numpy())
        return np.concatenate(parts)


def build_objective(given: "Vcq", device: torch.device) -> TokenizerObjective:
    """Losses with their weights; WeightsError when a perceptual loss is wanted and no network is there."""
    weights = LossWeights(
        given.l1_weight, given.perceptual_weight, given.adversarial_weight, given.discriminator_weight,
        given.augment, given.discriminator_start, given.discriminator_ramp, given.lecam_weight,
    )  # fmt: skip
    perceptual = None
    if given.perceptual_weight:
        perceptual = choose_perceptual([PerceptualSource(**source.model_dump()) for source in given.perceptual], device)
    warm = None
    if given.warm_steps and given.warm_perceptual:
        warm = load_perceptual(PerceptualSource(**given.warm_perceptual.model_dump()), device)
    return TokenizerObjective(weights, perceptual, warm, given.warm_steps)


def identity(given: "Vcq", images: str, objective: TokenizerObjective) -> dict[str, Any]:
    """All that shapes the result: the section without what only concerns watching, the images, the networks used."""
    chosen = {name: value for name, value in given.model_dump().items() if name not in FREE}
    return {"version": VERSION, "images": images, **chosen, "networks": objective.describe()}


if __name__ == "__main__":
    from semdict.cli import main

    sys.exit(main(["vcq", "train", *sys.argv[1:]]))

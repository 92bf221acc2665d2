"""Train the 1-D tokenizer and its discriminator on the images of a manifest, also under torchrun."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from semdict.pipeline.common.device import DTYPES, to_device
from semdict.pipeline.common.files import write_json
from semdict.pipeline.config import paths
from semdict.train.data.images import ImageLoader, ImageRows, RandomCrop, centre_crops, usable_rows
from semdict.train.engine import dist
from semdict.train.engine.ema import Ema
from semdict.train.engine.logging import RunLog
from semdict.train.engine.loop import Batch, Clock, Hook, Objective, Phase
from semdict.train.engine.lr_schedule import ramp, warmup_hold_linear
from semdict.train.engine.model_file import TOKENIZER, save_model
from semdict.train.engine.optim import adamw
from semdict.train.engine.trainer import Components, Trainer, add_run_arguments
from semdict.train.vcq.discriminator import PatchGan
from semdict.train.vcq.objective import LossWeights, TokenizerObjective
from semdict.train.vcq.perceptual import PerceptualSource, choose_perceptual, load_perceptual
from semdict.train.vcq.tokenizer import PRESETS, Tokenizer1d, TokenizerConfig
from semdict.train.vcq.usage import CodeReset, CodeResetStep, CodeUsage

if TYPE_CHECKING:
    from semdict.pipeline.config.schema import Params, Vcq, VqganTrain
    from semdict.pipeline.manifest.table import Manifest

EXAMPLE = """examples:
  semdict vcq train --manifest data/demo/manifest/manifest.parquet --out runs/demo/vcq
  semdict vcq train --resume                                     continue a killed run; a complete one is kept
  semdict vcq train --set vcq.schedule=constant --out runs/demo/vcq-constant
  torchrun --nproc-per-node 8 -m semdict.train.vcq.train

Writes tokenizer.pt (averaged weights), tokenizer-raw.pt, usage.json and reconstructions.png."""
RAW = "tokenizer-raw.pt"  # weights of the last step; TOKENIZER holds their average
SHAPE = ("image_size", "patch", "tokens", "latent_queries", "schedule", "k_min", "power", "dim", "l2", "beta",
         "codebook_weight")  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which images, and where the run goes; everything else is in params.yaml, section vcq."""
    parser.add_argument("--manifest", type=Path, help="default: data/<preset>/manifest/manifest.parquet")
    add_run_arguments(parser, "vcq")


def run(args: argparse.Namespace) -> int:
    """Train, unless the run is complete."""
    from semdict.pipeline.config.params import params_of
    from semdict.pipeline.manifest.table import load_manifest

    params = params_of(args)
    with dist.process_group(params.runtime.device) as world:
        manifest = load_manifest(args.manifest or paths.manifest(params.preset))
        Trainer.for_command(VcqTraining(params, manifest, world.device), args, params, world, "vcq").run()
    return 0


def config_of(cfg: "Vcq") -> TokenizerConfig:
    """The configuration of the size, with the shape keys of section vcq."""
    base = PRESETS[cfg.size]
    changes: dict[str, Any] = {name: getattr(cfg, name) for name in SHAPE}
    changes |= {name: tuple(getattr(cfg, name)) for name in ("encoder", "decoder") if getattr(cfg, name)}
    return replace(base, **changes, k_max=cfg.k_max or base.k_max)


class TokenizerStep:
    """The two objectives of a training step as the loop calls them, on the same micro-batch.

    The tokenizer's adds its reconstructions to the batch as "fake", where the discriminator's finds them; it also
    counts the codes and, where code reset is on, passes the encoder outputs on. start, over: steps at which
    quantization begins and over which it grows to full strength.
    """

    def __init__(
        self, losses: TokenizerObjective, discriminator: PatchGan, usage: CodeUsage, start: int, over: int
    ) -> None:
        self.losses, self.network, self.usage = losses, discriminator, usage
        self.start, self.over = start, over
        self.reset: CodeResetStep | None = None

    def tokenizer(
        self, model: nn.Module, batch: Batch, rng: torch.Generator, clock: Clock
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Generator loss."""
        out = model(batch["images"], ramp(clock.step, self.start, self.over))
        batch["fake"] = out.images.detach()
        self.usage.add(out.ids)
        if self.reset:
            self.reset.add(out.latents, out.ids)
        return self.losses.generator(out, batch["images"], self.network, clock.step, rng)

    def discriminator(
        self, model: nn.Module, batch: Batch, rng: torch.Generator, clock: Clock
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Hinge loss on the same reconstructions."""
        return self.losses.discriminator(batch["fake"], batch["images"], model, clock.step, rng)


class VcqTraining:
    """Recipe of `semdict vcq train`: two phases, the tokenizer and, from its start on, the discriminator."""

    name = "vcq-train"
    section = "vcq"  # of params.yaml

    def __init__(self, params: "Params", manifest: "Manifest", device: torch.device) -> None:
        self.params, self.cfg, self.manifest = params, getattr(params, self.section), manifest
        self.losses = build_objective(self.cfg, device)

    def settings(self) -> dict[str, Any]:
        """Its own section and pixels (but the crop), the images, and the networks of the perceptual losses."""
        pixels = self.params.pixels.model_dump(exclude={"crop"})
        networks = self.losses.describe()
        return {
            self.section: self.cfg.model_dump(),
            "pixels": pixels,
            "data": self.manifest.sha256,
            "networks": networks,
        }

    def images(self, splits: list[str]) -> ImageRows:
        """Usable images of some splits."""
        from semdict.pipeline.images.decode import DecodeSpec

        pixels, rows = self.params.pixels, usable_rows(self.manifest, splits)
        return ImageRows(self.manifest, dict(self.params.manifest.images), rows, DecodeSpec.of(pixels))

    def loader(self, trainer: Trainer) -> ImageLoader:
        """Random crops of the training images."""
        cfg, world, workers = self.cfg, trainer.world, trainer.runtime.workers
        images, crop = self.images(cfg.splits), RandomCrop(cfg.image_size, cfg.seed)
        return ImageLoader(
            images, crop, cfg.batch, cfg.seed, world.rank, world.size, world.device, workers, floats=True
        )  # fmt: skip

    def build(self, loader: ImageLoader, trainer: Trainer) -> Components:
        cfg, device = self.cfg, trainer.world.device
        model = Tokenizer1d(config_of(cfg), cfg.seed).to(device)
        discriminator = PatchGan(cfg.discriminator_channels, seed=cfg.seed).to(device)
        average = Ema(model, ["encoder", "quantizer", "decoder"])
        usage = CodeUsage(model.codebook_sizes)
        trainer.log(f"perceptual loss: {self.losses.describe()['perceptual']}")
        step = TokenizerStep(self.losses, discriminator, usage, cfg.quantize_start, cfg.quantize_ramp)
        phases = [self.phase("tokenizer", model, step.tokenizer)]
        if cfg.adversarial_weight:
            phases.append(self.phase("discriminator", discriminator, step.discriminator, cfg.discriminator_start))
        state = {"model": model, "discriminator": discriminator, "average": average, "usage": usage}
        hooks = [self.averaging(average, model), self.counting(usage, trainer)]
        if cfg.lecam_weight:
            state["lecam"] = self.losses.lecam
        if cfg.reset_patience:
            state["reset"] = reset = CodeReset(model.codebook_sizes, cfg.reset_protected, cfg.reset_patience)
            step.reset = CodeResetStep(reset, model.quantizer, average["quantizer"], phases[0].optimiser, cfg.seed)
            hooks.insert(0, step.reset)
        return Components(phases, cfg.steps, state, hooks)

    def phase(self, name: str, module: nn.Module, objective: Objective, start: int = 0) -> Phase:
        """A phase with the optimiser and the learning-rate schedule of the section."""
        cfg = self.cfg
        lr_schedule = warmup_hold_linear(cfg.lr, cfg.final_lr, cfg.warmup, cfg.hold, cfg.steps)
        optimiser = adamw(module, tuple(cfg.betas), cfg.weight_decay, decay_tables=False)
        return Phase(name, module, objective, optimiser, lr_schedule, cfg.clip, start)

    def averaging(self, average: Ema, model: nn.Module) -> Hook:
        """Move the average; its decay grows to `ema` as (1 + step) / (10 + step), so a short run is averaged too."""
        return lambda clock, _log: average.update(model, min(self.cfg.ema, (1 + clock.step) / (10 + clock.step)))

    def counting(self, usage: CodeUsage, trainer: Trainer) -> Hook:
        """Write usage.json, means and per position, each time the window is full, and open a new window."""
        cfg, path = self.cfg, trainer.folder / "usage.json"
        every = max(1, cfg.usage_images // (cfg.batch // trainer.world.size))

        def write_usage(clock: Clock, log: RunLog | None) -> None:
            if (clock.step + 1) % every and clock.step + 1 < cfg.steps:
                return
            if log is not None:
                utilisation_L, used_L = usage.per_position()
                curves = {"utilisation": utilisation_L.tolist(), "used": used_L.tolist()}
                write_json(path, {"step": clock.step + 1, **usage.summary(), "at": curves})
            usage.clear()

        return write_usage

    def finish(self, components: Components, loader: ImageLoader, trainer: Trainer) -> dict[str, Any]:
        """Write both tokenizers and a grid of held-out reconstructions; PSNR in dB of each."""
        state = components.state
        metrics = {"images_replaced": len(loader.replaced), **self.losses.describe()}
        metrics["parameters"] = sum(p.numel() for p in state["model"].parameters())
        if reset := state.get("reset") or state.get("codebook"):
            metrics["codes_reset"] = reset.done
        return metrics | (self.publish(state["model"], state["average"], trainer) if trainer.world.first else {})

    def publish(self, model: Tokenizer1d, average: Ema, trainer: Trainer) -> dict[str, Any]:
        """Write the tokenizer of the last step, then the averaged one, and measure both on held-out images."""
        from semdict.pipeline.images.visualize import psnr, save_grid

        cfg, folder = self.cfg, trainer.folder
        held_out = self.images(cfg.held_out or cfg.splits)
        pixels = centre_crops(held_out, cfg.image_size, cfg.measured_images, trainer.runtime.workers)
        about = {"cfg": trainer.settings["vcq"], "steps": cfg.steps}
        save_model(folder / RAW, model, about)
        raw = self.reconstruct(model, pixels, trainer.world.device)
        for name, part in average.parts.items():
            getattr(model, name).load_state_dict(part.state_dict())
        save_model(folder / TOKENIZER, model, about)
        averaged = self.reconstruct(model, pixels, trainer.world.device)
        save_grid(folder / "reconstructions.png", [pixels, averaged], ["original", "tokens\nback to pixels"])
        scores = {"psnr_raw": float(psnr(pixels, raw).mean()), "psnr": float(psnr(pixels, averaged).mean())}
        return {**scores, "measured_images": len(pixels)}

    @torch.no_grad()
    def reconstruct(self, model: Tokenizer1d, pixels_NHW3: np.ndarray, device: torch.device) -> np.ndarray:
        """(N, H, W, 3) uint8 through tokens and back."""
        model.eval()
        precision, parts = self.cfg.precision, []
        for start in range(0, len(pixels_NHW3), 32):
            images = to_device(pixels_NHW3[start : start + 32], device)
            with torch.autocast(device.type, DTYPES[precision], enabled=precision != "float32"):
                decoded = model.decode(model.encode(images))
            parts.append((decoded.float().clamp(0, 1) * 255 + 0.5).floor().byte().permute(0, 2, 3, 1).cpu().numpy())
        return np.concatenate(parts)


def build_objective(cfg: "Vcq | VqganTrain", device: torch.device) -> TokenizerObjective:
    """Losses with their weights; WeightsError if a perceptual loss has a weight and no network of it is found."""
    weights = LossWeights(
        cfg.l1_weight, cfg.perceptual_weight, cfg.adversarial_weight, cfg.discriminator_weight,
        cfg.augment, cfg.discriminator_start, cfg.discriminator_ramp, cfg.lecam_weight,
    )  # fmt: skip
    perceptual = None
    if cfg.perceptual_weight:
        perceptual = choose_perceptual([PerceptualSource(**source.model_dump()) for source in cfg.perceptual], device)
    warm = None
    if cfg.warm_steps and cfg.warm_perceptual:
        warm = load_perceptual(PerceptualSource(**cfg.warm_perceptual.model_dump()), device)
    return TokenizerObjective(weights, perceptual, warm, cfg.warm_steps)


if __name__ == "__main__":
    from semdict.cli import main

    sys.exit(main(["vcq", "train", *sys.argv[1:]]))

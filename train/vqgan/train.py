"""Train a VQGAN on the images of a manifest, also under torchrun: reconstruction, perceptual and adversarial loss."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from semdict.pipeline.config import paths
from semdict.pipeline.tokenizers.base import save_tokenizer
from semdict.pipeline.tokenizers.compact import CompactTokenizer
from semdict.pipeline.tokenizers.vqgan import Sizes
from semdict.train.data.images import ImageLoader, centre_crops
from semdict.train.engine import dist
from semdict.train.engine.ema import Ema
from semdict.train.engine.loop import Batch, Clock
from semdict.train.engine.lr_schedule import ramp
from semdict.train.engine.model_file import TOKENIZER
from semdict.train.engine.trainer import Components, Trainer, add_run_arguments
from semdict.train.vcq.discriminator import PatchGan
from semdict.train.vcq.objective import TokenizerObjective
from semdict.train.vcq.train import VcqTraining
from semdict.train.vqgan.model import MovingCodebook, Vqgan

if TYPE_CHECKING:
    from semdict.pipeline.config.schema import VqganTrain

EXAMPLE = """examples:
  semdict vqgan train --manifest data/photos/manifest/manifest.parquet --out weights/photos-vqgan
  semdict vqgan train --resume                       continue a killed run; a complete one is kept
  semdict vqgan train --set vqgan_train.codes=4096 --out weights/vqgan-4096
  torchrun --nproc-per-node 8 -m semdict.train.vqgan.train

Writes tokenizer.pt, which vqgan.weights is to name, and reconstructions.png."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which images, and where the run goes; everything else is in params.yaml, section vqgan_train."""
    parser.add_argument("--manifest", type=Path, help="default: data/<preset>/manifest/manifest.parquet")
    add_run_arguments(parser, "vqgan")


def run(args: argparse.Namespace) -> int:
    """Train, unless the run is complete."""
    from semdict.pipeline.config.params import params_of
    from semdict.pipeline.manifest.table import load_manifest

    params = params_of(args)
    with dist.process_group(params.runtime.device) as world:
        manifest = load_manifest(args.manifest or paths.manifest(params.preset))
        Trainer.for_command(VqganTraining(params, manifest, world.device), args, params, world, "vqgan").run()
    return 0


def sizes_of(cfg: "VqganTrain") -> Sizes:
    """The sizes of the network that section vqgan_train describes."""
    return Sizes(
        stem=cfg.widths[0],
        widths=tuple(cfg.widths),
        blocks=cfg.blocks,
        decoder_blocks=cfg.decoder_blocks,
        z_channels=cfg.dim,
        codes=cfg.codes,
        dim=cfg.dim,
        strided=False,
        patch=cfg.patch,
    )


class VqganStep:
    """The two objectives of a training step as the loop calls them, on the same micro-batch.

    The model's adds its reconstructions to the batch as "fake", where the discriminator's finds them.
    """

    def __init__(
        self, losses: TokenizerObjective, discriminator: PatchGan, codebook: MovingCodebook, l2_weight: float,
        start: int, over: int,
    ) -> None:  # fmt: skip
        self.losses, self.network, self.codebook = losses, discriminator, codebook
        self.l2_weight, self.start, self.over = l2_weight, start, over

    def model(
        self, model: nn.Module, batch: Batch, rng: torch.Generator, clock: Clock
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Generator loss."""
        out = model(batch["images"], ramp(clock.step, self.start, self.over))
        batch["fake"] = out.images.detach()
        self.codebook.add(out.latents)
        loss, terms = self.losses.generator(out, batch["images"], self.network, clock.step, rng)
        terms["l2"] = (out.images.float() - batch["images"]).square().mean()
        return loss + self.l2_weight * terms["l2"], terms

    def discriminator(
        self, model: nn.Module, batch: Batch, rng: torch.Generator, clock: Clock
    ) -> tuple[Tensor, dict[str, Tensor]] | None:
        """Hinge loss on the same reconstructions."""
        return self.losses.discriminator(batch["fake"], batch["images"], model, clock.step, rng)


class VqganTraining(VcqTraining):
    """Recipe of `semdict vqgan train`: images, losses and averaging of the VCQ trainer around a convolutional model."""

    name = "vqgan-train"
    section = "vqgan_train"

    cfg: "VqganTrain"

    def build(self, loader: ImageLoader, trainer: Trainer) -> Components:
        cfg, device = self.cfg, trainer.world.device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cfg.seed)
            model = Vqgan(CompactTokenizer(sizes_of(cfg)), cfg.commitment)
        model = model.to(device, memory_format=torch.channels_last)
        discriminator = PatchGan(cfg.discriminator_channels, seed=cfg.seed).to(device)
        average = Ema(model, ["tokenizer"])
        codebook = MovingCodebook(
            model.tokenizer.quantize.embedding.weight, average["tokenizer"].quantize.embedding.weight,
            cfg.quantize_start, cfg.hold, cfg.codebook_decay, cfg.seed,
        )  # fmt: skip
        step = VqganStep(
            self.losses, discriminator, codebook, cfg.l2_weight, cfg.quantize_start, cfg.quantize_ramp
        )  # fmt: skip
        phases = [self.phase("vqgan", model, step.model)]
        if cfg.adversarial_weight:
            phases.append(self.phase("discriminator", discriminator, step.discriminator, cfg.discriminator_start))
        state = {"model": model, "discriminator": discriminator, "average": average, "codebook": codebook}
        if cfg.lecam_weight:
            state["lecam"] = self.losses.lecam
        return Components(phases, cfg.steps, state, [codebook, self.averaging(average, model)])

    def publish(self, model: Vqgan, average: Ema, trainer: Trainer) -> dict[str, Any]:
        """Write the averaged tokenizer and measure it on held-out images: PSNR in dB, codes used, entropy in bits."""
        from semdict.pipeline.images.visualize import psnr, save_grid

        cfg, folder = self.cfg, trainer.folder
        images = self.images(cfg.held_out or cfg.splits)
        pixels = centre_crops(images, cfg.image_size, cfg.measured_images, trainer.runtime.workers)
        raw = self.reconstruct(model, pixels, trainer.world.device)
        model.tokenizer.load_state_dict(average["tokenizer"].state_dict())
        save_tokenizer(model.tokenizer, folder / TOKENIZER, getattr(torch, cfg.stored))
        averaged = self.reconstruct(model, pixels, trainer.world.device)
        save_grid(folder / "reconstructions.png", [pixels, averaged], ["original", "tokens\nback to pixels"])
        scores = {"psnr_raw": float(psnr(pixels, raw).mean()), "psnr": float(psnr(pixels, averaged).mean())}
        return {**scores, **self.usage(model, pixels, trainer.world.device), "measured_images": len(pixels)}

    @torch.no_grad()
    def usage(self, model: Vqgan, pixels_NHW3: Any, device: torch.device) -> dict[str, float]:
        """Number of codes that occur in the tokens of images (N, H, W, 3) uint8, and their entropy in bits."""
        from semdict.pipeline.common.device import to_device

        parts = [model.encode(to_device(pixels_NHW3[i : i + 32], device)) for i in range(0, len(pixels_NHW3), 32)]
        hits_K = torch.bincount(torch.cat(parts).flatten(), minlength=self.cfg.codes).double()
        share_K = hits_K / hits_K.sum()
        bits = -torch.xlogy(share_K, share_K).sum() / torch.log(torch.tensor(2.0, dtype=torch.float64))
        return {"codes_used": int((hits_K > 0).sum()), "token_entropy_bits": float(bits)}


if __name__ == "__main__":
    from semdict.cli import main

    sys.exit(main(["vqgan", "train", *sys.argv[1:]]))

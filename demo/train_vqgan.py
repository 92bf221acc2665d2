"""Train the demo's stand-in VQGAN in MAGE's layout: `python -m demo.train_vqgan --images DIR --out FILE`.

Trained from coarse to fine (arXiv:1710.10196): images at half the size through the coarse levels, then at full size, so
that most steps are cheap. The training images are drawn separately from those that the pipeline encodes. First an
autoencoder, then a codebook initialised by k-means on its latents and updated as a moving average (VQ-VAE,
arXiv:1711.00937, appendix A.1); unused codes are re-initialised from latents. The loss needs no pretrained network: L1,
L2, and L1 of differences of neighbouring pixels at three scales.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from demo.data import IMAGES, SHIPPED, as_float, draw_batch, draw_training_set, load_split, psnr, record_sum, save_half
from semdict.pipeline.common.files import write_json
from semdict.pipeline.common.nearest import nearest
from semdict.pipeline.tokenizers import load_tokenizer
from semdict.pipeline.tokenizers.mage import MageTokenizer
from semdict.pipeline.tokenizers.vqgan import ResidualBlock, Sizes, Upsample

# B images, D latent channels, N latents (cells of a batch), K codes
SIZES = Sizes(stem=64, widths=(64,) * 4, blocks=1, decoder_blocks=1, z_channels=32, codes=256, dim=32, strided=False)
RIM = 1.0  # amplitude of the border signal that `prepare` adds


@dataclass(frozen=True)
class Stage:
    """Training at a resolution of 64 / 2^finest pixels, through the levels from `finest` on."""

    finest: int
    steps: int
    batch: int
    lr: float


@dataclass(frozen=True)
class Plan:
    """Length and hyper-parameters of the training."""

    images: int = 24000
    stages: tuple[Stage, ...] = (Stage(1, 2000, 16, 2e-3), Stage(0, 800, 16, 1e-3))
    warm_up: int = 200  # steps without a codebook
    commitment: float = 0.1
    decay: float = 0.99

    def scaled(self, scale: float) -> "Plan":
        """The same plan, shorter or longer."""
        stages = tuple(replace(stage, steps=max(2, round(stage.steps * scale))) for stage in self.stages)
        return replace(self, stages=stages, warm_up=max(1, round(self.warm_up * scale)))


def prepare(model: MageTokenizer) -> None:
    """Initialise a model of equal widths so that it trains quickly.

    Residual blocks and upsampling start as the identity, so colours pass through and a level that is added later has no
    effect at first. Group norm over 32 groups of two channels removes mean and scale of an image, and with them its
    colours; a constant signal along the border, of opposite sign in a group's two channels, dominates both statistics.
    """
    width = model.sizes.stem
    sign = torch.ones(width)
    sign[1::2] = -1
    edge = -torch.ones(3, 3)
    edge[1, 1] = 8  # of a constant: 0 inside, positive along the zero-padded border
    rim = (RIM * sign)[:, None, None] * edge
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, ResidualBlock):
                nn.init.zeros_(part.conv2.weight)
            elif isinstance(part, Upsample):
                nn.init.dirac_(part.conv.weight)
                part.conv.weight += 0.02 * torch.randn_like(part.conv.weight)
                nn.init.zeros_(part.conv.bias)
        constant = model.encoder.mid.block_1  # channel 0 of its inner norm becomes a constant, then a rim
        constant.norm2.weight[0], constant.norm2.bias[0] = 0, 1
        constant.conv2.weight[:, 0] = rim / 3
        model.encoder.conv_out.weight[0], model.encoder.conv_out.bias[0] = 0, 1  # latent 0 starts as a constant
        model.decoder.conv_in.weight[0], model.decoder.conv_in.bias[0] = 0, 0
        model.decoder.conv_in.weight[0, 0, 1, 1] = 1
        model.decoder.up[-2].upsample.conv.weight[:, 0] += rim
        for last in (model.encoder.conv_out.weight, model.decoder.conv_out.weight):  # the rim itself cancels
            for parity in (0, 1):
                last[:, parity::2] -= last[:, parity::2].mean(dim=1, keepdim=True)


def encode_from(model: MageTokenizer, images: Tensor, finest: int) -> Tensor:
    """Latents (B, D, 8, 8) of images (B, 3, S, S), S = 64 / 2^finest, through the levels from `finest` on."""
    x = model.encoder.conv_in(images)
    for level in model.encoder.down[finest:]:
        x = level(x)
        if hasattr(level, "downsample"):
            x = level.downsample(x)
    return model.encoder.conv_out(F.silu(model.encoder.norm_out(model.encoder.mid(x))))


def decode_to(model: MageTokenizer, z: Tensor, finest: int) -> Tensor:
    """Images (B, 3, S, S) of latents (B, D, 8, 8), through the levels down to `finest`."""
    x = model.decoder.mid(model.decoder.conv_in(z))
    for index in range(len(model.sizes.widths) - 1, finest - 1, -1):
        level = model.decoder.up[index]
        x = level(x)
        if index > finest:
            x = level.upsample(x)
    return model.decoder.conv_out(F.silu(model.decoder.norm_out(x)))


class Codes:
    """The codebook in training: an exponential moving average of the latents assigned to each code."""

    def __init__(self, table_KD: Tensor, decay: float, rng: torch.Generator) -> None:
        self.table_KD, self.decay, self.rng = table_KD, decay, rng
        self.hits_K = torch.ones(len(table_KD))
        self.sums_KD = torch.zeros_like(table_KD)
        self.recent: list[Tensor] = []

    def remember(self, latents_ND: Tensor, keep: int = 8192) -> None:
        """Store the last `keep` latents, from which codes are re-initialised."""
        self.recent.append(latents_ND.detach().clone())
        while sum(map(len, self.recent)) > keep:
            self.recent.pop(0)

    def begin(self, rounds: int = 10) -> None:
        """Initialise the codes by Lloyd's k-means on the stored latents."""
        pool_ND = torch.cat(self.recent)
        codes = len(self.table_KD)
        rows = torch.randperm(max(len(pool_ND), codes), generator=self.rng)[:codes] % len(pool_ND)
        self.table_KD.copy_(pool_ND[rows])
        for _ in range(rounds):
            ids_N = nearest(pool_ND, self.table_KD)
            hits_K = torch.bincount(ids_N, minlength=codes)
            sums_KD = torch.zeros_like(self.table_KD).index_add_(0, ids_N, pool_ND)
            used = hits_K > 0
            self.table_KD[used] = sums_KD[used] / hits_K[used, None]
        self.sums_KD = self.table_KD * self.hits_K[:, None]

    def update(self, latents_ND: Tensor, ids_N: Tensor) -> None:
        """One step of the moving average; hits are assignments per step relative to a uniform share."""
        share = len(latents_ND) / len(self.table_KD)
        hits_K = torch.bincount(ids_N, minlength=len(self.table_KD)) / share
        sums_KD = torch.zeros_like(self.sums_KD).index_add_(0, ids_N, latents_ND) / share
        self.hits_K.lerp_(hits_K, 1 - self.decay)
        self.sums_KD.lerp_(sums_KD, 1 - self.decay)
        self.table_KD.copy_(self.sums_KD / self.hits_K.clamp_min(1e-4)[:, None])

    def renew(self, below: float = 0.03) -> int:
        """Replace rarely used codes by stored latents; returns their number."""
        dead = (self.hits_K < below).nonzero()[:, 0]
        pool_ND = torch.cat(self.recent)
        self.table_KD[dead] = pool_ND[torch.randint(len(pool_ND), (len(dead),), generator=self.rng)]
        self.hits_K[dead] = 0.3
        self.sums_KD[dead] = self.table_KD[dead] * 0.3
        return len(dead)


def reconstruction_loss(images: Tensor, others: Tensor) -> Tensor:
    """Scalar: L1 + 5 L2 + the mean L1 between differences of neighbouring pixels at full, half and quarter size."""
    error = others - images
    loss = error.abs().mean() + 5 * error.square().mean()
    for _ in range(3):
        loss = loss + 0.3 * ((error[..., 1:] - error[..., :-1]).abs().mean())
        loss = loss + 0.3 * ((error[..., 1:, :] - error[..., :-1, :]).abs().mean())
        error = F.avg_pool2d(error, 2)
    return loss


def shrink(images: Tensor, finest: int) -> Tensor:
    """(N, 3, 64, 64) uint8 -> means over 2^finest x 2^finest pixels, uint8."""
    if finest == 0:
        return images
    return torch.cat([F.avg_pool2d(part.float(), 2**finest).round().byte() for part in images.split(1024)])


def train(images: Tensor, plan: Plan, seed: int, sizes: Sizes = SIZES) -> tuple[MageTokenizer, list[dict]]:
    """Train a VQGAN on images (N, 3, 64, 64) uint8; returns it and its curve. `seed` determines all randomness."""
    rng = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MageTokenizer(sizes)
        prepare(model)
    model = model.to(memory_format=torch.channels_last)
    codes = Codes(model.codebook.requires_grad_(False), plan.decay, rng)
    curve, started, done = [], time.monotonic(), 0
    for stage in plan.stages:
        for step, loss in _run_stage(model, codes, shrink(images, stage.finest), stage, plan, done):
            if step % 100 == 99 or step == done + stage.steps - 1:
                seconds = round(time.monotonic() - started)
                curve.append({"step": step + 1, "level": stage.finest, "loss": round(loss, 4), "seconds": seconds})
                print(curve[-1], flush=True)
        done += stage.steps
    return model.requires_grad_(False).eval(), curve


def _run_stage(
    model: MageTokenizer, codes: Codes, images: Tensor, stage: Stage, plan: Plan, first: int
) -> Iterator[tuple[int, float]]:
    """Run the steps of a stage, numbered from `first`; yields (step, loss)."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=stage.lr, betas=(0.9, 0.95), weight_decay=1e-4)
    lr_schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, stage.lr, stage.steps, pct_start=0.08)
    for step in range(first, first + stage.steps):
        if step == plan.warm_up:
            codes.begin()
        rows, mirrored = draw_batch(stage.batch, len(images), codes.rng)
        batch = as_float(images[rows].flip(3) if mirrored else images[rows])
        loss = _loss(model, codes, batch, stage.finest, plan.commitment if step >= plan.warm_up else None)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        lr_schedule.step()
        if step % 20 == 19 and step > plan.warm_up and stage.finest > 0:
            codes.renew()
        yield step, loss.item()


def _loss(model: MageTokenizer, codes: Codes, images: Tensor, finest: int, commitment: float | None) -> Tensor:
    """The loss of one batch; updates the codebook, or skips quantization if commitment is None."""
    z = encode_from(model, images, finest)
    latents_ND = z.detach().permute(0, 2, 3, 1).reshape(-1, z.shape[1])
    codes.remember(latents_ND)
    if commitment is None:
        return reconstruction_loss(images, decode_to(model, z, finest))
    ids_N = nearest(latents_ND, codes.table_KD)
    quantized = codes.table_KD[ids_N].view(z.shape[0], *z.shape[2:], -1).permute(0, 3, 1, 2)
    codes.update(latents_ND, ids_N)
    straight_through = z + (quantized - z).detach()
    loss = reconstruction_loss(images, decode_to(model, straight_through, finest))
    return loss + commitment * F.mse_loss(z, quantized) / codes.table_KD.var(dim=0).mean().clamp_min(1e-6)


def measure(model: MageTokenizer, images: Tensor, batch: int = 64) -> dict:
    """PSNR (dB, mean and lowest) of images (N, 3, 64, 64) uint8, and the number of codes that they use."""
    values, tokens = [], []
    for part in images.split(batch):
        tokens.append(model.encode(as_float(part)))
        values.append(psnr(as_float(part), model.decode(tokens[-1])))
    hits_K = torch.bincount(torch.cat(tokens).flatten(), minlength=model.codebook_size).double()
    share = hits_K / hits_K.sum()
    bits = -(share * share.clamp_min(1e-12).log2()).sum()
    values = torch.cat(values)
    return {
        "psnr": round(values.mean().item(), 2),
        "psnr_lowest": round(values.min().item(), 2),
        "codes_used": int((hits_K > 0).sum()),
        "codes": model.codebook_size,
        "token_entropy_bits": round(bits.item(), 2),
        "images": len(images),
    }


def save_grid(model: MageTokenizer, images: Tensor, path: str | Path, columns: int = 12) -> None:
    """Write a picture of originals (upper rows) and their reconstructions (lower rows)."""
    from PIL import Image

    originals = as_float(images)
    decoded = model.decode(model.encode(originals)).clamp(0, 1)
    rows = [torch.cat([a, b], dim=2) for a, b in zip(originals.split(columns), decoded.split(columns), strict=True)]
    lines = [torch.cat(list(row), dim=2) for row in rows]
    picture = torch.cat(lines, dim=1).mul(255).round().byte().permute(1, 2, 0).contiguous().numpy()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path, optimize=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m demo.train_vqgan", description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, default=IMAGES, help="folder that `python -m demo.images` wrote")
    parser.add_argument("--out", type=Path, default=SHIPPED / "vqgan.ckpt", help="checkpoint to write")
    parser.add_argument("--grid", type=Path, help="PNG of originals and reconstructions to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="length of the training, 1 = as shipped")
    parser.add_argument("--workers", type=int, default=0, help="drawing processes, 0 = one per core")
    args = parser.parse_args(argv)
    started = time.monotonic()
    plan = Plan().scaled(args.scale)
    model, curve = train(draw_training_set(plan.images, args.seed, args.workers).rgb, plan, args.seed)
    save_half({"state_dict": model.state_dict()}, args.out)
    record_sum(args.out)
    model = load_tokenizer(args.out)
    val, _ = load_split(args.images, "val")
    card = {**measure(model, val), "seconds": round(time.monotonic() - started), "curve": curve}
    write_json(args.out.with_suffix(".json"), card)
    if args.grid:
        save_grid(model, val[:24], args.grid)
    print({key: value for key, value in card.items() if key != "curve"})
    return 0


if __name__ == "__main__":
    sys.exit(main())

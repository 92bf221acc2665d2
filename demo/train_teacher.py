"""Train the demo's stand-in teacher, a small timm ViT: `python -m demo.train_teacher --images DIR --out FILE`.

Supervised: the class of the image from the class token, and for every patch "background" or that class by the share of
the patch that the object covers (token labelling, arXiv:2104.10858), so that patch features carry meaning. It learns
from its own stream of drawn images and never sees the files that the pipeline encodes. Three quarters of the patches are
dropped for most of the training, which then costs a quarter (arXiv:2212.00794).
"""

import argparse
import multiprocessing
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from demo.data import as_float, load_split
from demo.images import CLASSES, picture
from pipeline.files import write_aside, write_json

# B images, L = 256 patches in row-major order, E width
PATCH, SIZE, GRID, HEADS, DEPTH, WIDTH = 14, 224, 16, 3, 6, 96
MODEL = f"vit:patch={PATCH},dim={WIDTH},depth={DEPTH},heads={HEADS},reg=0"  # as params.yaml names it
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)  # ImageNet's, as every timm model expects
STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)


@dataclass(frozen=True)
class Plan:
    """How long and how."""

    images: int = 4000
    steps: int = 1300
    whole: int = 200  # the last steps see all patches
    batch: int = 32
    rate: float = 1e-3

    def scaled(self, scale: float) -> "Plan":
        """The same plan, shorter or longer."""
        counts = {name: max(self.batch, round(getattr(self, name) * scale)) for name in ("images", "steps", "whole")}
        return Plan(**{**self.__dict__, **counts})


def build() -> VisionTransformer:
    """The untrained network: patch 14, 224 pixels, 96 wide, 6 deep; its positions start as 2-D sines and cosines."""
    model = VisionTransformer(
        img_size=SIZE, patch_size=PATCH, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, num_classes=len(CLASSES)
    )
    with torch.no_grad():
        model.pos_embed[:, 1:] = 0.2 * _sine_table()
    return model


def _sine_table() -> Tensor:
    """(L, E): columns then rows, sines then cosines, frequencies 10000^(-i / (E / 4))."""
    rates = 10000.0 ** (-torch.arange(WIDTH // 4) / (WIDTH // 4))
    row, column = torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij")
    angles = [position.flatten()[:, None] * rates for position in (column, row)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)


def _lesson(job: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, int]:
    """One drawn image as the pipeline would crop it, (224, 224, 3) uint8, the object's share of each patch, label."""
    seed, index = job
    drawn, label = picture(seed, "teach", index)
    height, width = drawn.object.shape
    side = min(height, width)
    box = ((width - side) // 2, (height - side) // 2, (width + side) // 2, (height + side) // 2)
    image = Image.fromarray(drawn.rgb).resize((SIZE, SIZE), Image.Resampling.BICUBIC, box)
    share = Image.fromarray(drawn.object).resize((GRID, GRID), Image.Resampling.BOX, box)
    return np.asarray(image), np.asarray(share), label


def draw_lessons(count: int, seed: int, workers: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(images (N, 3, 224, 224) uint8, object's share (N, 16, 16) in [0, 1], labels (N,)) of the teacher's stream."""
    jobs = [(seed, index) for index in range(count)]
    with multiprocessing.get_context("spawn").Pool(workers or len(os.sched_getaffinity(0))) as pool:
        images, shares, labels = zip(*pool.map(_lesson, jobs, chunksize=16), strict=True)
    images = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return images, torch.from_numpy(np.stack(shares)), torch.tensor(labels)


def augment(images: Tensor, shares: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mirror and turn a batch, permute its colour channels, change its brightness; shares (B, 16, 16) turn along."""
    turn, mirror = torch.randint(4, (), generator=rng).item(), torch.randint(2, (), generator=rng).item()
    images, shares = torch.rot90(images, turn, (2, 3)), torch.rot90(shares, turn, (1, 2))
    if mirror:
        images, shares = images.flip(3), shares.flip(2)
    images = images[:, torch.randperm(3, generator=rng)]
    brightness = 0.8 + 0.4 * torch.rand(len(images), 1, 1, 1, generator=rng)
    return as_float(images) * brightness, shares


def forward(model: VisionTransformer, images: Tensor, keep: Tensor | None = None) -> Tensor:
    """images (B, 3, 224, 224) in [0, 1] -> normed tokens (B, 1 + L, E), or only the patches `keep` (B, n) of them."""
    x = model._pos_embed(model.patch_embed((images - MEAN) / STD))
    if keep is not None:
        patches = x[:, 1:].gather(1, keep[..., None].expand(-1, -1, x.shape[-1]))
        x = torch.cat([x[:, :1], patches], dim=1)
    return model.norm(model.blocks(x))


def lesson_loss(tokens: Tensor, shares: Tensor, labels: Tensor, head: nn.Module, patch_head: nn.Module) -> Tensor:
    """Cross-entropy of the image's class, and of every patch against (1 - share) background + share class."""
    background = shares.new_zeros(*shares.shape, len(CLASSES) + 1)
    background[..., -1] = 1 - shares
    background.scatter_(2, labels[:, None, None].expand(-1, shares.shape[1], 1), shares[..., None])
    of_image = F.cross_entropy(head(tokens[:, 0]), labels)
    return of_image + F.cross_entropy(patch_head(tokens[:, 1:]).flatten(0, 1), background.flatten(0, 1))


def train(images: Tensor, shares: Tensor, labels: Tensor, plan: Plan, seed: int) -> tuple[VisionTransformer, list]:
    """Fit the teacher to drawn lessons; returns it with its curve. The seed decides every draw."""
    rng = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model, patch_head = build(), nn.Linear(WIDTH, len(CLASSES) + 1)
    weights = [*model.parameters(), *patch_head.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=plan.rate, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, plan.rate, plan.steps, pct_start=0.1)
    curve, started, order = [], time.monotonic(), torch.empty(0, dtype=torch.int64)
    for step in range(plan.steps):
        if len(order) < plan.batch:
            order = torch.randperm(len(images), generator=rng)
        rows, order = order[: plan.batch], order[plan.batch :]
        batch, share = augment(images[rows], shares[rows], rng)
        share, keep = share.flatten(1), None
        if step < plan.steps - plan.whole:
            keep = torch.rand(share.shape, generator=rng).argsort(dim=1)[:, : share.shape[1] // 4]
            share = share.gather(1, keep)
        loss = lesson_loss(forward(model, batch, keep), share, labels[rows], model.head, patch_head)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 49 or step == plan.steps - 1:
            seconds = round(time.monotonic() - started)
            curve.append({"step": step + 1, "loss": round(loss.item(), 4), "seconds": seconds})
            print(curve[-1], flush=True)
    return model.requires_grad_(False).eval(), curve


def accuracy(model: VisionTransformer, images: Tensor, labels: Tensor, batch: int = 32) -> float:
    """Share of images (N, 3, 256, 256) uint8 whose class the head names, at 224 pixels as the pipeline resizes."""
    right = 0
    for part, of_part in zip(images.split(batch), labels.split(batch), strict=True):
        small = F.interpolate(as_float(part), (SIZE, SIZE), mode="bicubic", antialias=True, align_corners=False)
        right += (model.head(forward(model, small)[:, 0]).argmax(1) == of_part).sum().item()
    return right / len(labels)


def save(model: VisionTransformer, path: str | Path) -> None:
    """A timm state dict, float32."""
    state = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
    with write_aside(path) as aside, aside.open("wb") as file:
        torch.save(state, file)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m demo.train_teacher", description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True, help="folder that `python -m demo.images` wrote")
    parser.add_argument("--out", type=Path, required=True, help="state dict to write, e.g. demo/assets/teacher.pth")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="length of the training, 1 = as shipped")
    parser.add_argument("--workers", type=int, default=0, help="drawing processes, 0 = one per core")
    args = parser.parse_args(argv)
    started = time.monotonic()
    plan = Plan().scaled(args.scale)
    images, shares, labels = draw_lessons(plan.images, args.seed, args.workers)
    model, curve = train(images, shares, labels, plan, args.seed)
    save(model, args.out)
    held_out, truth, names = load_split(args.images / "val")
    truth = torch.tensor([CLASSES.index(name) for name in names])[truth]
    found = {
        "model": MODEL,
        "accuracy": round(accuracy(model, held_out, truth), 4),
        "images": len(held_out),
        "seconds": round(time.monotonic() - started),
        "curve": curve,
    }
    write_json(args.out.with_suffix(".json"), found)
    print({key: value for key, value in found.items() if key != "curve"})
    return 0


if __name__ == "__main__":
    sys.exit(main())

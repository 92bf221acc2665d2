"""Train the demo's stand-in teacher, a small timm ViT: `python -m demo.train_teacher --images DIR --out FILE`.

Supervised: the class token predicts the image's class, every patch the class of the thing in it or the kind of ground,
weighted by the share of the patch that the thing covers (token labelling, arXiv:2104.10858). The training images are
drawn separately and are not the files that the pipeline encodes.
"""

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from demo.data import (
    IMAGES,
    SHIPPED,
    Drawn,
    as_float,
    draw_batch,
    draw_training_set,
    load_split,
    record_sum,
    save_half,
)
from demo.images import CLASSES, GROUNDS, SIZE
from semdict.pipeline.common.files import write_json

# B images, L = 64 patches in row-major order, E width, C = classes and grounds
PATCH, HEADS, DEPTH, WIDTH = 8, 3, 4, 96
GRID = SIZE // PATCH
MODEL = "deit_tiny_patch16_224"  # with KWARGS, as params.yaml names the network to timm
KWARGS = {"patch_size": PATCH, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)  # ImageNet's, as this name's features expect
STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)


@dataclass(frozen=True)
class Plan:
    """Length and hyper-parameters of the training."""

    images: int = 24000
    steps: int = 3000
    batch: int = 64
    lr: float = 2e-3


def build() -> VisionTransformer:
    """The untrained network, its position embedding initialised with 2-D sines and cosines."""
    model = VisionTransformer(
        img_size=SIZE, patch_size=PATCH, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, num_classes=len(CLASSES)
    )
    with torch.no_grad():
        model.pos_embed[:, 1:] = 0.2 * _sine_table()
    return model


def _sine_table() -> Tensor:
    """(L, E): columns then rows, sines then cosines, frequencies 100^(-i / (E / 4))."""
    frequencies = 100.0 ** (-torch.arange(WIDTH // 4) / (WIDTH // 4))
    row, column = torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij")
    angles = [position.flatten()[:, None] * frequencies for position in (column, row)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)


def forward(model: VisionTransformer, images: Tensor) -> Tensor:
    """images (B, 3, 64, 64) in [0, 1] -> normed tokens (B, 1 + L, E)."""
    x = model._pos_embed(model.patch_embed((images - MEAN) / STD))
    return model.norm(model.blocks(x))


def patch_targets(share_BL: Tensor, labels_B: Tensor, ground_B: Tensor) -> Tensor:
    """(B, L, C) distributions: the thing's class with its share of the patch, else the ground."""
    target_BLC = torch.zeros(*share_BL.shape, len(CLASSES) + len(GROUNDS))
    rows = torch.arange(len(labels_B))
    target_BLC[rows, :, labels_B] = share_BL
    target_BLC[rows, :, len(CLASSES) + ground_B] = 1 - share_BL
    return target_BLC


def train(drawn: Drawn, plan: Plan, seed: int) -> tuple[VisionTransformer, list]:
    """Train the teacher on drawn images; returns it and its training curve. `seed` determines all randomness."""
    rng = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model, patch_head = build(), nn.Linear(WIDTH, len(CLASSES) + len(GROUNDS))
    weights = [*model.parameters(), *patch_head.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=plan.lr, betas=(0.9, 0.98), weight_decay=0.05)
    lr_schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, plan.lr, plan.steps, pct_start=0.1)
    curve, started = [], time.monotonic()
    for step in range(plan.steps):
        rows, mirrored = draw_batch(plan.batch, len(drawn.rgb), rng)
        images, share = as_float(drawn.rgb[rows]), F.avg_pool2d(drawn.thing[rows, None].float() / 255, PATCH)
        if mirrored:
            images, share = images.flip(3), share.flip(3)
        target = patch_targets(share.flatten(1), drawn.labels[rows], drawn.ground[rows])
        tokens = forward(model, images)
        loss = F.cross_entropy(model.head(tokens[:, 0]), drawn.labels[rows])
        loss = loss + F.cross_entropy(patch_head(tokens[:, 1:]).flatten(0, 1), target.flatten(0, 1))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        lr_schedule.step()
        if step % 100 == 99 or step == plan.steps - 1:
            seconds = round(time.monotonic() - started)
            curve.append({"step": step + 1, "loss": round(loss.item(), 4), "seconds": seconds})
            print(curve[-1], flush=True)
    return model.requires_grad_(False).eval(), curve


def accuracy(model: VisionTransformer, images: Tensor, labels: Tensor, batch: int = 128) -> float:
    """Share of images (N, 3, 64, 64) uint8 whose class the class token predicts."""
    predicted = torch.cat([model.head(forward(model, as_float(part))[:, 0]).argmax(1) for part in images.split(batch)])
    return round((predicted == labels).float().mean().item(), 4)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m demo.train_teacher", description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, default=IMAGES, help="folder that `python -m demo.images` wrote")
    parser.add_argument("--out", type=Path, default=SHIPPED / "teacher.pth", help="state dict to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=Plan.steps)
    parser.add_argument("--workers", type=int, default=0, help="drawing processes, 0 = one per core")
    args = parser.parse_args(argv)
    started = time.monotonic()
    plan = Plan(steps=args.steps)
    model, curve = train(draw_training_set(plan.images, args.seed, args.workers), plan, args.seed)
    save_half(model.state_dict(), args.out)
    record_sum(args.out)
    card = {
        "model": MODEL,
        "kwargs": KWARGS,
        "accuracy": accuracy(model, *load_split(args.images, "val")),
        "seconds": round(time.monotonic() - started),
        "curve": curve,
    }
    write_json(args.out.with_suffix(".json"), card)
    print({key: value for key, value in card.items() if key != "curve"})
    return 0


if __name__ == "__main__":
    sys.exit(main())

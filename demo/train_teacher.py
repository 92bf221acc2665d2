"""Train the demo's stand-in teacher, a small timm ViT: `python -m demo.train_teacher --images DIR --out FILE`.

Supervised: the class token predicts the image's class, every patch its texture and shape or "background", weighted by
the share of the patch that the object covers (token labelling, arXiv:2104.10858). Training images are drawn separately
and are not the files that the pipeline encodes. Most steps use a window of 8 x 8 patches at their true positions, at a
quarter of the cost; the last steps use whole images.
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

from demo.data import IMAGES, SHIPPED, as_float, load_split, record_sum
from demo.images import CLASSES, SHAPES, TEXTURES, picture
from semdict.pipeline.common.files import atomic_write, write_json

# B images, L = 256 patches in row-major order, E width
PATCH, SIZE, GRID, HEADS, DEPTH, WIDTH = 14, 224, 16, 3, 6, 96
MODEL = "deit_tiny_patch16_224"  # with KWARGS, as params.yaml names the network to timm
KWARGS = {"patch_size": PATCH, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)  # ImageNet's, as every timm model expects
STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)


@dataclass(frozen=True)
class Plan:
    """Length and hyper-parameters of the training."""

    images: int = 8000
    steps: int = 6000
    whole: int = 1200  # number of last steps that use all patches
    window: int = 8  # patches per side of the window in the other steps
    batch: int = 16
    lr: float = 1e-3

    def scaled(self, scale: float) -> "Plan":
        """The same plan, shorter or longer."""
        counts = {name: max(self.batch, round(getattr(self, name) * scale)) for name in ("images", "steps", "whole")}
        return Plan(**{**self.__dict__, **counts})


def build() -> VisionTransformer:
    """The untrained network: patch embedding initialised with cosines, position embedding with 2-D sines and cosines.

    Random initialisation learns neither from so few images.
    """
    model = VisionTransformer(
        img_size=SIZE, patch_size=PATCH, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, num_classes=len(CLASSES)
    )
    with torch.no_grad():
        model.pos_embed[:, 1:] = 0.2 * _sine_table()
        model.patch_embed.proj.weight.copy_(0.15 * _cosine_filters())
    return model


def _cosine_filters() -> Tensor:
    """(E, 3, 14, 14) orthonormal: the 66 lowest 2-D cosines of brightness, the 15 lowest of two colour differences."""
    position = (torch.arange(PATCH) + 0.5) * torch.pi / PATCH
    waves = torch.stack([(position * k).cos() for k in range(PATCH)])
    waves = waves / waves.norm(dim=1, keepdim=True)
    filters = []
    for colour, highest in (((1.0, 1.0, 1.0), 10), ((1.0, 0.0, -1.0), 4), ((1.0, -2.0, 1.0), 4)):
        of_colour = torch.tensor(colour) / torch.tensor(colour).norm()
        pairs = [(i, total - i) for total in range(highest + 1) for i in range(total + 1)]
        filters += [torch.einsum("c,h,w->chw", of_colour, waves[i], waves[j]) for i, j in pairs]
    return torch.stack(filters)


def _sine_table() -> Tensor:
    """(L, E): columns then rows, sines then cosines, frequencies 10000^(-i / (E / 4))."""
    frequencies = 10000.0 ** (-torch.arange(WIDTH // 4) / (WIDTH // 4))
    row, column = torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij")
    angles = [position.flatten()[:, None] * frequencies for position in (column, row)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)


def _draw_example(job: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, int]:
    """One drawn image in the pipeline's crop, (224, 224, 3) uint8, the object's share of each patch, and the label."""
    seed, index = job
    drawn, label = picture(seed, "teach", index)
    height, width = drawn.object.shape
    side = min(height, width)
    box = ((width - side) // 2, (height - side) // 2, (width + side) // 2, (height + side) // 2)
    image = Image.fromarray(drawn.rgb).resize((SIZE, SIZE), Image.Resampling.BICUBIC, box)
    share = Image.fromarray(drawn.object).resize((GRID, GRID), Image.Resampling.BOX, box)
    return np.asarray(image), np.asarray(share), label


def draw_training_set(count: int, seed: int, workers: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(images (N, 3, 224, 224) uint8, object's share (N, 16, 16) in [0, 1], labels (N,)) to train the teacher on."""
    jobs = [(seed, index) for index in range(count)]
    with multiprocessing.get_context("spawn").Pool(workers or len(os.sched_getaffinity(0))) as pool:
        images, shares, labels = zip(*pool.map(_draw_example, jobs, chunksize=16), strict=True)
    images = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return images, torch.from_numpy(np.stack(shares)), torch.tensor(labels)


def augment(images: Tensor, shares: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Flip and rotate a batch and its shares (B, 16, 16); permute the colour channels, change the brightness."""
    quarter_turns, flip = torch.randint(4, (), generator=rng).item(), torch.randint(2, (), generator=rng).item()
    images, shares = torch.rot90(images, quarter_turns, (2, 3)), torch.rot90(shares, quarter_turns, (1, 2))
    if flip:
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


class PatchHeads(nn.Module):
    """Linear heads that predict texture and shape, or background, of each patch. Only used in training."""

    def __init__(self) -> None:
        super().__init__()
        self.texture, self.shape = nn.Linear(WIDTH, len(TEXTURES) + 1), nn.Linear(WIDTH, len(SHAPES) + 1)

    def loss(self, patches: Tensor, shares: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of patches (B, n, E) against (1 - share) background + share kind; shares (B, n)."""
        kinds = (self.texture, labels // len(SHAPES)), (self.shape, labels % len(SHAPES))
        total = shares.new_zeros(())
        for head, kind in kinds:
            logp = head(patches).log_softmax(-1)
            of_kind = logp.gather(2, kind[:, None, None].expand(-1, shares.shape[1], 1))[..., 0]
            total = total - (shares * of_kind + (1 - shares) * logp[..., -1]).mean()
        return total


def draw_window(shares: Tensor, side: int, rng: torch.Generator) -> Tensor:
    """(B, side * side) int64: row-major indices of a window of patches around a random patch of the object.

    shares (B, 256): the share of each patch that the object covers.
    """
    centre = torch.multinomial(shares + 1e-3, 1, generator=rng)
    centre = torch.stack([centre // GRID, centre % GRID], dim=1)
    shift = torch.randint(side // 4, side - side // 4, centre.shape, generator=rng)
    span = (centre - shift).clamp(0, GRID - side) + torch.arange(side)
    return (span[:, 0, :, None] * GRID + span[:, 1, None, :]).flatten(1)


def train(images: Tensor, shares: Tensor, labels: Tensor, plan: Plan, seed: int) -> tuple[VisionTransformer, list]:
    """Train the teacher on drawn images; returns it and its training curve. `seed` determines all randomness."""
    rng = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model, patch_heads = build(), PatchHeads()
    weights = [*model.parameters(), *patch_heads.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=plan.lr, betas=(0.9, 0.98), weight_decay=0.05)
    lr_schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, plan.lr, plan.steps, pct_start=0.1)
    curve, started, order = [], time.monotonic(), torch.empty(0, dtype=torch.int64)
    for step in range(plan.steps):
        if len(order) < plan.batch:
            order = torch.randperm(len(images), generator=rng)
        rows, order = order[: plan.batch], order[plan.batch :]
        batch, share = augment(images[rows], shares[rows], rng)
        share, keep = share.flatten(1), None
        if step < plan.steps - plan.whole:
            keep = draw_window(share, plan.window, rng)
            share = share.gather(1, keep)
        tokens = forward(model, batch, keep)
        loss = patch_heads.loss(tokens[:, 1:], share, labels[rows]) + F.cross_entropy(
            model.head(tokens[:, 0]), labels[rows]
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        lr_schedule.step()
        if step % 50 == 49 or step == plan.steps - 1:
            seconds = round(time.monotonic() - started)
            curve.append({"step": step + 1, "loss": round(loss.item(), 4), "seconds": seconds})
            print(curve[-1], flush=True)
    return model.requires_grad_(False).eval(), curve


def accuracy(model: VisionTransformer, images: Tensor, labels: Tensor, batch: int = 32) -> dict[str, float]:
    """Accuracy of class, texture and shape on images (N, 3, 256, 256) uint8; labels index CLASSES."""
    predictions = []
    for part in images.split(batch):  # to 224 pixels as the pipeline resizes
        small = F.interpolate(as_float(part), (SIZE, SIZE), mode="bicubic", antialias=True, align_corners=False)
        predictions.append(model.head(forward(model, small)[:, 0]).argmax(1))
    predicted = torch.cat(predictions)
    correct = {
        "accuracy": predicted == labels,
        "texture_accuracy": predicted // len(SHAPES) == labels // len(SHAPES),
        "shape_accuracy": predicted % len(SHAPES) == labels % len(SHAPES),
    }
    return {name: round(hits.float().mean().item(), 4) for name, hits in correct.items()}


def save(model: VisionTransformer, path: str | Path) -> None:
    """Write a timm state dict in float32."""
    state = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
    with atomic_write(path) as staged, staged.open("wb") as file:
        torch.save(state, file)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m demo.train_teacher", description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, default=IMAGES, help="folder that `python -m demo.images` wrote")
    parser.add_argument("--out", type=Path, default=SHIPPED / "teacher.pth", help="state dict to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="length of the training, 1 = as shipped")
    parser.add_argument("--workers", type=int, default=0, help="drawing processes, 0 = one per core")
    args = parser.parse_args(argv)
    started = time.monotonic()
    plan = Plan().scaled(args.scale)
    images, shares, labels = draw_training_set(plan.images, args.seed, args.workers)
    model, curve = train(images, shares, labels, plan, args.seed)
    save(model, args.out)
    record_sum(args.out)
    val, labels_val, names = load_split(args.images / "val")
    labels_val = torch.tensor([CLASSES.index(name) for name in names])[labels_val]
    card = {
        "model": MODEL,
        "kwargs": KWARGS,
        **accuracy(model, val, labels_val),
        "images": len(val),
        "seconds": round(time.monotonic() - started),
        "curve": curve,
    }
    write_json(args.out.with_suffix(".json"), card)
    print({key: value for key, value in card.items() if key != "curve"})
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Tokens back to pixels: PSNR and pictures that show whether the tokenizer saw the pixels it expects."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from semdict.pipeline.common.files import atomic_write

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont


class Decoder(Protocol):
    """Generative ids (B, L) on `device` -> images (B, 3, H, W)."""

    device: torch.device

    def decode(self, gen: Tensor) -> Tensor: ...


def to_uint8(images: Tensor) -> np.ndarray:
    """(B, 3, H, W) nominally in [0, 1] -> (B, H, W, 3) uint8, clipped, rounded half up."""
    scaled = images.float().clamp(0, 1).mul(255).add_(0.5).floor_()
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def psnr(originals: np.ndarray, copies: np.ndarray) -> np.ndarray:
    """(B,) float64 dB per image over uint8 pixels, peak 255; infinite where they are equal."""
    errors = originals.astype(np.float64) - copies.astype(np.float64)
    mean_square = np.square(errors).reshape(len(errors), -1).mean(axis=1)
    with np.errstate(divide="ignore"):
        return 20 * math.log10(255) - 10 * np.log10(mean_square)


def reconstruct(tokenizer: Decoder, gen: np.ndarray, batch: int) -> np.ndarray:
    """(n, L) generative ids -> (n, H, W, 3) uint8, decoded `batch` at a time."""
    parts = [
        to_uint8(tokenizer.decode(torch.from_numpy(gen[i : i + batch].astype(np.int64)).to(tokenizer.device)))
        for i in range(0, len(gen), batch)
    ]
    return np.concatenate(parts)


def word_colours(centroids: np.ndarray) -> np.ndarray:
    """(K, D) centroids -> (K, 3) uint8: three main components as red, green, blue, so that similar words look alike."""
    centred = centroids.astype(np.float64) - centroids.mean(axis=0)
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    projected = centred @ directions[:3].T
    projected = np.pad(projected, ((0, 0), (0, 3 - projected.shape[1])))
    low, high = np.percentile(projected, [2, 98], axis=0)
    return (np.clip((projected - low) / np.maximum(high - low, 1e-12), 0, 1) * 255).astype(np.uint8)


def word_maps(words: np.ndarray, colours: np.ndarray, side: int) -> np.ndarray:
    """(n, L) discriminative ids on a square grid -> (n, side, side, 3) uint8, one coloured block per cell."""
    grid = math.isqrt(words.shape[1])
    blocks = colours[words].reshape(len(words), grid, grid, 3)
    return blocks.repeat(side // grid, axis=1).repeat(side // grid, axis=2)


def wrapped(label: str, font: "FreeTypeFont", width: int) -> str:
    """The label with line breaks between words, so that its lines fit `width` pixels; single long words are cut."""
    lines = []
    for part in label.splitlines():
        line = ""
        for word in part.split():
            longer = f"{line} {word}".strip()
            if line and font.getlength(longer) > width:
                lines.append(line)
                longer = word
            while font.getlength(longer) > width:
                longer = longer[:-2] + "…"
            line = longer
        lines.append(line)
    return "\n".join(lines[:4])


def save_grid(path: Path, rows: list[np.ndarray], labels: list[str], columns: int = 8, cell: int = 128) -> None:
    """A PNG of image rows stacked in bands: `rows[k]` (n, H, W, 3) uint8 carries `labels[k]` at its left.

    The letters stay readable where a page shows the picture at half its width. A label that would stand alone before
    every band is written once.
    """
    from PIL import Image, ImageDraw, ImageFont

    n = min(4 * columns, *map(len, rows))
    bands = math.ceil(n / columns)
    gutter, gap = 150, 2
    width, height = gutter + columns * (cell + gap), bands * (len(rows) * (cell + gap) + 10)
    sheet = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(20)
    for i in range(n):
        band, column = divmod(i, columns)
        for k, images in enumerate(rows):
            top = band * (len(rows) * (cell + gap) + 10) + k * (cell + gap)
            tile = Image.fromarray(images[i]).resize((cell, cell), Image.Resampling.LANCZOS)
            sheet.paste(tile, (gutter + column * (cell + gap), top))
            if column == 0 and (len(rows) > 1 or band == 0):
                label = wrapped(labels[k], font, gutter - 8)
                draw.multiline_text((4, top + cell // 2), label, fill="black", font=font, anchor="lm", spacing=2)
    with atomic_write(path) as staged:
        sheet.save(staged, format="PNG")

"""Both dictionaries at once: a batch of crops to one generative and one discriminative word per grid cell."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import WeightsError
from pipeline.features import load_features
from pipeline.kmeans import assign
from pipeline.safeload import load_array
from pipeline.vqgan import load_vqgan

# B crops, L grid cells in row-major order, D feature width, K words
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Tokenizer(Protocol):
    """Images (B, 3, 256, 256) float in [0, 1] on the tokenizer's device -> {"gen": (B, L) int64, ...}."""

    device: torch.device

    def tokens(self, images: Tensor, precision: str) -> dict[str, Tensor]: ...

    def decode(self, gen: Tensor) -> Tensor: ...


class TokenizerSpec(Protocol):
    """A picklable description of a tokenizer; `open` reads its weights."""

    def open(self) -> Tokenizer: ...


def resolve_device(name: str) -> str:
    """ "auto" is the first GPU where there is one, else the CPU."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise WeightsError(f"device {name} was asked for, but torch sees no GPU; use device: auto or cpu")
    return name


@contextmanager
def reduced_precision(device: torch.device, precision: str) -> Iterator[None]:
    """Autocast to `precision`, or true float32: TF32 changes which code is nearest."""
    if precision != "float32":
        with torch.autocast(device.type, dtype=DTYPES[precision]):
            yield
        return
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@dataclass(frozen=True)
class PairSpec:
    """VQGAN weights, teacher and centroids by path or name."""

    vqgan: str
    features_model: str
    features_weights: str | None
    features_layer: int
    features_image_size: int
    centroids: str
    device: str

    def open(self) -> "PairTokenizer":
        """Load all three onto the device, checking that they fit together; WeightsError shows both sides."""
        vqgan = load_vqgan(self.vqgan, device=self.device)
        teacher = load_features(
            self.features_model,
            weights=self.features_weights,
            layer=self.features_layer,
            device=self.device,
            image_size=self.features_image_size,
        )
        centroids = torch.from_numpy(np.ascontiguousarray(load_array(self.centroids), dtype=np.float32))
        if teacher.grid != vqgan.grid:
            raise WeightsError(
                f"grids differ: {self.vqgan} gives {vqgan.grid}x{vqgan.grid} cells, {self.features_model} at "
                f"{self.features_image_size} px gives {teacher.grid}x{teacher.grid}; change features.image_size"
            )
        if centroids.shape[1] != teacher.dim:
            raise WeightsError(
                f"{self.centroids} holds words of width {centroids.shape[1]}, {self.features_model} gives features of "
                f"width {teacher.dim}; the dictionary was made with another teacher"
            )
        return PairTokenizer(vqgan, teacher, centroids.to(self.device), torch.device(self.device))


@dataclass
class PairTokenizer:
    """A loaded pair: `tokens` sees each crop once and gives both words of each cell."""

    vqgan: Any
    teacher: Any
    centroids: Tensor  # (K, D) float32
    device: torch.device

    @torch.inference_mode()
    def tokens(self, images: Tensor, precision: str = "float32") -> dict[str, Tensor]:
        """(B, 3, 256, 256) in [0, 1] -> {"gen": (B, L), "disc": (B, L)} int64; distances always in float32."""
        with reduced_precision(self.device, precision):
            gen = self.vqgan.encode(images)
            features_BLD = self.teacher(images)
        B, L, D = features_BLD.shape
        with reduced_precision(self.device, "float32"):
            disc = assign(features_BLD.float().reshape(B * L, D), self.centroids).reshape(B, L)
        return {"gen": gen, "disc": disc}

    @torch.inference_mode()
    def decode(self, gen: Tensor) -> Tensor:
        """(B, L) generative ids -> (B, 3, 256, 256) nominally in [0, 1], unclipped."""
        return self.vqgan.decode(gen)


def to_device(pixels: np.ndarray, device: torch.device) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in [0, 1] on `device`; copied as bytes, divided there."""
    batch = torch.from_numpy(pixels)
    if device.type == "cuda":
        batch = batch.pin_memory().to(device, non_blocking=True)
    return batch.permute(0, 3, 1, 2).float().div_(255)


def describe(spec: PairSpec, identity: Callable[[Any], dict] = lambda module: module.identity) -> dict:
    """Identities of the three parts (layout, widths, SHA-256 of the weights) for the recipe."""
    tokenizer = spec.open()
    return {
        "gen": {**identity(tokenizer.vqgan), "codebook_size": int(tokenizer.vqgan.codebook_size)},
        "disc": {**identity(tokenizer.teacher), "codebook_size": len(tokenizer.centroids)},
        "centroids": Path(spec.centroids).name,
    }

"""Both dictionaries at once: a batch of crops to one generative and one discriminative word per grid cell."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from semdict.pipeline.common.device import reduced_precision
from semdict.pipeline.common.errors import WeightsError
from semdict.pipeline.common.nearest import nearest
from semdict.pipeline.common.safeload import load_array
from semdict.pipeline.tokenizers.features import load_features
from semdict.pipeline.tokenizers.vqgan import load_vqgan

# B crops, L grid cells in row-major order, D feature width, K words


class Tokenizer(Protocol):
    """Images (B, 3, 256, 256) float in [0, 1] on the tokenizer's device -> {"gen": (B, L) int64, ...}."""

    device: torch.device

    def tokens(self, images: Tensor, precision: str) -> dict[str, Tensor]: ...

    def decode(self, gen: Tensor) -> Tensor: ...


class TokenizerSpec(Protocol):
    """A picklable description of a tokenizer; `open` reads its weights."""

    def open(self) -> Tokenizer: ...


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
        disc = nearest(features_BLD.float().reshape(B * L, D), self.centroids).reshape(B, L)
        return {"gen": gen, "disc": disc}

    @torch.inference_mode()
    def decode(self, gen: Tensor) -> Tensor:
        """(B, L) generative ids -> (B, 3, 256, 256) nominally in [0, 1], unclipped."""
        return self.vqgan.decode(gen)

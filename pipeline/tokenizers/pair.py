"""A tokenizer and a teacher with its codebook: crops to one generative and one discriminative token per grid cell."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from semdict.pipeline.common.device import reduced_precision
from semdict.pipeline.common.errors import WeightsError
from semdict.pipeline.common.inference import Precisions
from semdict.pipeline.common.nearest import nearest
from semdict.pipeline.common.safeload import load_centroids
from semdict.pipeline.tokenizers.base import Tokenizer
from semdict.pipeline.tokenizers.registry import load_tokenizer
from semdict.pipeline.tokenizers.teachers import Teacher, load_features

# B crops, L grid cells in row-major order, D feature width, K centroids


class StreamTokenizer(Protocol):
    """What the encode stages run: one array of token ids per stream ("gen", and "disc" of a pair)."""

    device: torch.device

    def tokens(self, images: Tensor, precision: str) -> dict[str, Tensor]:
        """(B, 3, H, W) float in [0, 1] on the tokenizer's device -> {"gen": (B, L) int64, ...}."""

    def decode(self, gen: Tensor) -> Tensor:
        """(B, L) generative ids -> (B, 3, H, W), nominally in [0, 1]."""


class StreamTokenizerSpec(Protocol):
    """A picklable description of a tokenizer, for worker processes; `open` reads its weights."""

    def open(self) -> StreamTokenizer:
        """Load onto the device of the description."""


@dataclass(frozen=True)
class PairSpec:
    """Tokenizer, teacher and centroids by path or name, and the size of the square images."""

    tokenizer: Mapping[str, Any]  # arguments of load_tokenizer
    features: Mapping[str, Any]  # arguments of load_features
    centroids: str
    device: str
    image_size: int
    compile: bool = False  # the models, on a GPU in reduced precision

    def open(self) -> "PairTokenizer":
        """Load all three onto the device, checking that they fit together; WeightsError shows both sides."""
        tokenizer = load_tokenizer(**self.tokenizer, device=self.device)
        grid = tokenizer.grid(self.image_size)
        side = grid[0] if len(grid) > 1 else math.isqrt(grid[0])
        teacher = load_features(**self.features, device=self.device, grid=side)
        centroids = torch.from_numpy(load_centroids(self.centroids))
        model = self.features["model"]
        if math.prod(grid) != math.prod(teacher.grid) or (len(grid) > 1 and grid != teacher.grid):
            raise WeightsError(
                f"grids differ: {self.tokenizer['path']} gives {_cells(grid)} cells for images of {self.image_size} "
                f"pixels, {model} at {teacher.image_size} pixels gives {_cells(teacher.grid)}: set features.image_size "
                f"to {side * teacher.backbone.stride}, or to null"
            )
        if centroids.shape[1] != teacher.dim:
            raise WeightsError(
                f"{self.centroids} holds centroids of width {centroids.shape[1]}, {model} gives features "
                f"of width {teacher.dim}: the codebook was made with another teacher"
            )
        return PairTokenizer(tokenizer, teacher, centroids.to(self.device), torch.device(self.device), self.compile)


def _cells(grid: tuple[int, ...]) -> str:
    return "x".join(map(str, grid))


@dataclass
class PairTokenizer:
    """A loaded pair: `tokens` reads each crop once and gives both tokens of each cell."""

    tokenizer: Tokenizer
    teacher: Teacher
    centroids: Tensor  # (K, D) float32
    device: torch.device
    compile: bool = False  # the models, on a GPU in reduced precision

    def __post_init__(self) -> None:
        models = {"tokenizer": self.tokenizer, "teacher": self.teacher}
        self.precisions = Precisions(models, self.device, self.compile, compiled_parts=("encoder", "backbone"))

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the cells; tokens of a 1-D tokenizer are as many, but belong to no cell."""
        return self.teacher.grid

    @property
    def gen_sizes(self) -> int | list[int]:
        """Codebook size of the generative tokens, one per position where positions differ (VCQ)."""
        sizes = getattr(self.tokenizer, "codebook_sizes", torch.tensor([self.tokenizer.codebook_size])).tolist()
        return sizes if len(set(sizes)) > 1 else sizes[0]

    @torch.inference_mode()
    def tokens(self, images: Tensor, precision: str = "float32") -> dict[str, Tensor]:
        """(B, 3, H, W) in [0, 1] -> {"gen": (B, L), "disc": (B, L)} int64; distances always in float32."""
        models, count = self.precisions.at(precision), len(images)
        images = self.precisions.padded(images, precision)
        with reduced_precision(self.device, precision):
            gen = models["tokenizer"].encode(images)[:count]
            features_BLD = models["teacher"](images)[:count]
        B, L, D = features_BLD.shape
        disc = nearest(features_BLD.float().reshape(B * L, D), self.centroids).reshape(B, L)
        return {"gen": gen, "disc": disc}

    @torch.inference_mode()
    def decode(self, gen: Tensor) -> Tensor:
        """(B, L) generative ids -> (B, 3, H, W) nominally in [0, 1], unclipped."""
        return self.tokenizer.decode(gen)

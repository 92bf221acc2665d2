"""Frozen feature models: images -> one feature vector per grid cell, which k-means turns into discriminative tokens.

A teacher is a backbone from one of the libraries in BACKBONES, named `library:model`; without a library it is timm's.
"""

import os
from collections.abc import Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semdict.pipeline.common.errors import WeightsError
from semdict.pipeline.tokenizers.timm_backbone import TimmBackbone, inspect_backbone

GRID = 16  # default cells a side: 256-pixel images at stride 16


class Backbone(Protocol):
    """What a library's model has to offer to be a teacher; a module in evaluation mode.

    Its constructor takes (model, weights, layer, image_size, grid, kwargs) as `load_features` does.
    """

    image_size: int  # pixels a side that it sees
    stride: int  # pixels per cell and side
    dim: int  # D, width of a feature
    mean: tuple[float, ...]  # of its training images, per channel, in [0, 1]
    std: tuple[float, ...]
    identity: dict[str, Any]  # JSON-able, with the SHA-256 of the weights

    @staticmethod
    def stride_of(model: str, layer: int, kwargs: dict[str, Any]) -> int:
        """The stride that such a backbone would have."""

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, S, S), mean and std applied -> (B, D, S / stride, S / stride)."""


BACKBONES: dict[str, type] = {"timm": TimmBackbone}


class Teacher(nn.Module):
    """Called on images (B, 3, H, W) in [0, 1] it gives features (B, L, D) float32, cells in row-major order.

    Images are resized (bicubic, antialiased) to what the backbone sees and normalised by its own mean and std. `grid`
    (rows, columns), `dim` D, `identity` for recipes. pool: cells per side of the backbone's map that become one, their
    mean.
    """

    def __init__(self, backbone: Backbone, pool: int = 1) -> None:
        super().__init__()
        self.backbone, self.image_size, self.dim, self.pool = backbone, backbone.image_size, backbone.dim, pool
        if backbone.image_size % (backbone.stride * pool):
            raise WeightsError(
                f"features.image_size {backbone.image_size} is no multiple of {backbone.stride * pool}, the stride of "
                f"{backbone.identity['model']} times features.pool"
            )
        cells = backbone.image_size // backbone.stride // pool
        self.grid = (cells, cells)
        self.register_buffer("mean", torch.tensor(backbone.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(backbone.std).view(3, 1, 1), persistent=False)
        self.identity = {
            "kind": "features",
            "image_size": self.image_size,
            "grid": cells,
            "dim": self.dim,
            "resize": "bicubic antialias",
            "mean": list(backbone.mean),
            "std": list(backbone.std),
            **({"pool": pool} if pool > 1 else {}),
            **backbone.identity,
        }

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images are {tuple(images.shape)}, expected (B, 3, H, W) in [0, 1]")
        size = (self.image_size, self.image_size)
        if images.shape[2:] != size:
            images = F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False)
        features_BDhw = self.backbone((images - self.mean) / self.std)
        if self.pool > 1:
            features_BDhw = F.avg_pool2d(features_BDhw.float(), self.pool)
        if features_BDhw.shape[2:] != self.grid:
            raise WeightsError(
                f"{self.identity['model']} gives {tuple(features_BDhw.shape[2:])} cells for images of "
                f"{self.image_size} pixels, its stride {self.backbone.stride} promises {self.grid}"
            )
        return features_BDhw.flatten(2).mT.float().contiguous()


def load_features(
    model: str,
    weights: str | os.PathLike | None = None,
    layer: int = -1,
    device: str | torch.device = "cpu",
    image_size: int | None = None,
    kwargs: Mapping[str, Any] | None = None,
    grid: int = GRID,
    pool: int = 1,
    near: int | None = None,
) -> Teacher:
    """A frozen feature model in evaluation mode, float32.

    model: a name of timm (`vit_large_patch14_reg4_dinov2.lvd142m`, `convnext_tiny.dinov3_lvd1689m`), or
    `library:name` for another library of BACKBONES. weights: a local checkpoint or `hf-hub:owner/name/file`; without it
    they come from the model's own place on the hub. layer: block of a transformer or stage of a convolutional network,
    counted from the end. image_size: pixels a side that the model sees; by default `grid` cells of its stride times
    `pool`. pool: cells per side that are averaged into one, for a teacher that sees more pixels than the tokenizer.
    near: pixels a side of the images, instead of `grid`: the model sees the multiple of its stride nearest to it.
    kwargs: arguments of the library's model constructor. WeightsError for an unknown name, an unreachable hub, a file
    of another size (both sides shown), a layer that the model lacks, an image size that its stride does not divide.
    """
    library, name = _library(model)
    kwargs = dict(kwargs or {})
    if near is not None and image_size is None:
        grid = max(1, round(near / BACKBONES[library].stride_of(name, layer, kwargs) / pool))
    backbone = BACKBONES[library](name, weights, layer, image_size, grid * pool, kwargs)
    return Teacher(backbone, pool).requires_grad_(False).eval().to(device)


def inspect_features(
    model: str,
    weights: str | os.PathLike | None = None,
    layer: int = -1,
    image_size: int | None = None,
    kwargs: Mapping[str, Any] | None = None,
    grid: int = GRID,
    pool: int = 1,
) -> tuple[int, int] | None:
    """(cells a side, width D) that `load_features` with these arguments would give; None for a library but timm.

    No weights are loaded: names and shapes of a local file are compared with the model's. WeightsError as there.
    """
    library, name = _library(model)
    if library != "timm":
        return None
    cells, dim = inspect_backbone(name, weights, layer, image_size, grid * pool, dict(kwargs or {}))
    if cells % pool:
        raise WeightsError(f"features.pool {pool} does not divide the {cells} x {cells} cells of {model}")
    return cells // pool, dim


def _library(model: str) -> tuple[str, str]:
    """Library and name of `library:name`; timm where no library is named."""
    library, _, name = model.partition(":")
    return (library, name) if name and library in BACKBONES else ("timm", model)

"""What a token set says about itself, before any token is read."""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from semdict.pipeline.common.errors import ShardError
from semdict.pipeline.common.files import sha256_json
from semdict.pipeline.common.safeload import load_array
from semdict.train.engine.loop import Loader

# Dataloaders of token sets: value of pretrain.loader -> module with open_metadata and open_loader.
LOADERS = {"resident": "semdict.train.data.resident", "streaming": "semdict.train.data.streaming"}


@dataclass(frozen=True)
class TokenSet:
    """Metadata of a shard directory or of a folder of exported tars, as the masked-token trainers need it.

    meta: as stored in the set. content_sha256: names the whole content (the SHA-256 of its SHA256SUMS). grid: cells
    along one side. codebook_size: generative ids are below it. centroids: (K, D), entry k is what discriminative id k
    stands for; None where the set has none. loader: a key of LOADERS.
    """

    path: Path
    meta: dict[str, Any]
    content_sha256: str
    grid: int
    codebook_size: int
    centroids: np.ndarray | None

    loader: str = "resident"

    @classmethod
    def open(cls, path: Path, loader: str = "resident", centroids: Path | None = None) -> "TokenSet":
        """Read the metadata of what `loader` reads (shards or exported tars); `centroids` replaces those of the set.

        Raises ShardError if the grid is not square, if positions have codebooks of their own (VCQ), or if the number of
        centroids is not the number of discriminative ids.
        """
        meta, content, stored = import_module(LOADERS[loader]).open_metadata(path)
        grid, gen = meta["grid"], meta["codebooks"]["gen"]
        if len(grid) != 2 or grid[0] != grid[1]:
            raise ShardError(f"{path} has the grid {grid}; these trainers need a square of cells")
        if gen["sizes"] is not None:
            raise ShardError(f"{path} has a codebook size per position; train on it with `semdict ar`")
        if centroids is not None:
            stored = load_array(centroids)
        size = meta["codebooks"].get("disc", {}).get("size")
        if stored is not None and len(stored) != size:
            raise ShardError(f"{centroids or path} has {len(stored)} centroids, the tokens of {path} have {size} words")
        return cls(path, meta, content, grid[0], gen["size"], stored, loader)

    def dataloader(self, splits: list[str], *share: Any) -> Loader:
        """The dataloader over some splits; `share`: batch, seed, rank, world, device."""
        return import_module(LOADERS[self.loader]).open_loader(self.path, splits, *share)

    @property
    def identity(self) -> dict[str, str]:
        """What identifies the tokens in a run's settings: how they were made, and their content."""
        return {"recipe": recipe_of(self.meta), "content": self.content_sha256}

    def centroid_tensor(self) -> Tensor:
        """(K, D) float32; ShardError where the set has none."""
        if self.centroids is None:
            raise ShardError(f"{self.path} holds no centroids, which lease needs; name them by --centroids FILE.npy")
        return torch.from_numpy(np.array(self.centroids, dtype=np.float32))


def recipe_of(meta: dict[str, Any]) -> str:
    """16 hex digits that identify a token set: recipe, images, codebooks and views."""
    parts = {name: meta[name] for name in ("recipe", "fingerprint", "codebooks", "grid", "views", "rows")}
    return sha256_json(parts)[:16]

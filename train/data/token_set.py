"""What a token set says about itself, before any token is read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from semdict.pipeline.common.errors import ShardError
from semdict.pipeline.common.safeload import load_array
from semdict.train.data.tokens import recipe_of


@dataclass(frozen=True)
class TokenSet:
    """Metadata of a shard directory or of a folder of exported tars, as the masked-token trainers need it.

    meta: as stored in the set. content_sha256: names the whole content (the SHA-256 of its SHA256SUMS). grid: cells
    along one side. codebook_size: generative ids are below it. centroids: (K, D), entry k is what discriminative id k
    stands for; None where the set has none.
    """

    path: Path
    meta: dict[str, Any]
    content_sha256: str
    grid: int
    codebook_size: int
    centroids: np.ndarray | None

    @classmethod
    def open(cls, path: Path, streaming: bool = False, centroids: Path | None = None) -> "TokenSet":
        """Read the metadata of shards, or of tars where `streaming`; a `centroids` file replaces those of the set.

        Raises ShardError if the grid is not square, if positions have codebooks of their own (VCQ), or if the number of
        centroids is not the number of discriminative ids.
        """
        if streaming:
            from semdict.train.data.streaming import read_about

            meta = read_about(path)
            content, stored = meta.get("content_sha256", ""), None
        else:
            from semdict.pipeline.shards import open_shards

            shards = open_shards(path)
            meta, content, stored = shards.meta, shards.content_sha256, shards.centroids
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
        return cls(path, meta, content, grid[0], gen["size"], stored)

    @property
    def identity(self) -> dict[str, str]:
        """What identifies the tokens in a run's settings: how they were made, and their content."""
        return {"recipe": recipe_of(self.meta), "content": self.content_sha256}

    def centroid_tensor(self) -> Tensor:
        """(K, D) float32; ShardError where the set has none."""
        if self.centroids is None:
            raise ShardError(f"{self.path} holds no centroids, which lease needs; name them by --centroids FILE.npy")
        return torch.from_numpy(np.array(self.centroids, dtype=np.float32))

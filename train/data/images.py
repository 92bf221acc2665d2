"""Batches of augmented images for the tokenizer: random crop and flip from counters, decoded ahead by threads."""

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from semdict.pipeline.common.errors import ManifestError, UsageError
from semdict.train.engine import rng as draws
from semdict.train.engine.batch import Batch

ORDER, CROP = 1, 3  # streams of the seed
AHEAD = 3  # batches that are decoded before they are asked for


class ImageLoader:
    """Endless shuffled batches {"images": (B, 3, S, S) float32 in [0, 1], "row": (B,)} of this rank's rows.

    The shorter side is resized to S (bicubic, antialias), then a random S x S crop and a coin for the flip (TiTok), all
    drawn from (seed, epoch, row): a resumed run, or another number of ranks, sees the same pictures. A row that
    cannot be decoded is replaced by the next one in the order, and counted in `replaced`.
    """

    def __init__(
        self, manifest, images: dict[str, str], splits: list[str], size: int, batch: int, seed: int,
        rank: int = 0, world: int = 1, device: torch.device | str = "cpu", workers: int = 0, decoder: str = "auto",
        max_pixels: int = 178_956_970,
    ) -> None:  # fmt: skip
        if batch % world:
            raise UsageError(f"a global batch of {batch} cannot be shared evenly by {world} processes")
        rows = manifest.rows_of(splits)
        self.rows = rows[manifest.status[rows] == 0]
        if batch > len(self.rows):
            raise UsageError(f"batch {batch} is larger than the splits {splits} ({len(self.rows)} usable images)")
        self.reader, self.size, self.batch, self.seed = manifest.reader(images), size, batch, seed
        self.rank, self.world, self.device = rank, world, torch.device(device)
        self.decoder, self.max_pixels = decoder, max_pixels
        self.steps_per_epoch = len(self.rows) // batch
        self.recipe = manifest.sha256[:16]
        self.replaced: set[int] = set()
        self._step, self._asked = 0, 0
        self._pool = ThreadPoolExecutor(workers or os.cpu_count() or 1, thread_name_prefix="decode")
        self._waiting: deque[list[Future]] = deque()
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        while len(self._waiting) < AHEAD:
            self._waiting.append(self._submit(self._asked))
            self._asked += 1
        found = [future.result() for future in self._waiting.popleft()]
        self._step += 1
        pixels = torch.from_numpy(np.stack([pixels for pixels, _ in found]))
        rows = torch.tensor([row for _, row in found])
        if self.device.type == "cuda":
            pixels = pixels.pin_memory().to(self.device, non_blocking=True)
        return {"images": pixels.permute(0, 3, 1, 2).float().div_(255), "row": rows.to(self.device)}

    def fixed(self, n: int) -> np.ndarray:
        """(n, S, S, 3) uint8 centre crops of rows spread evenly over the splits, for measures and pictures."""
        chosen = np.linspace(0, len(self.rows) - 1, min(n, len(self.rows))).astype(np.int64)
        return np.stack([f.result() for f in [self._pool.submit(self._centre, int(self.rows[i])) for i in chosen]])

    def close(self) -> None:
        """Let the decode threads go."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it is a position in."""
        return {"step": self._step, "rows": len(self.rows), "batch": self.batch, "recipe": self.recipe}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken; ManifestError when the images are others."""
        mine = self.state_dict()
        for name in ("rows", "batch", "recipe"):
            if state.get(name) != mine[name]:
                raise ManifestError(f"the checkpoint's loader has {name} {state.get(name)}, this run {mine[name]}")
        self._waiting.clear()
        self._step = self._asked = state["step"]

    def _submit(self, step: int) -> list[Future]:
        epoch, within = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, draws.shuffled(len(self.rows), self.seed, ORDER, epoch)
        share = self.batch // self.world
        first = within * self.batch + self.rank * share
        return [self._pool.submit(self._augmented, self._order, at, epoch) for at in range(first, first + share)]

    def _augmented(self, order: np.ndarray, at: int, epoch: int) -> tuple[np.ndarray, int]:
        from semdict.pipeline.images.decode import BadImage

        for offset in range(len(order)):
            row = int(self.rows[order[(at + offset) % len(order)]])
            try:
                image = self._resized(row)
            except BadImage:
                self.replaced.add(row)
                continue
            u = [(int(draws.key(self.seed, CROP, epoch, row, i)) >> 11) / 2**53 for i in range(3)]
            left, top = (int(u[i] * (side - self.size + 1)) for i, side in enumerate(image.size))
            return self._cut(
                image, min(left, image.width - self.size), min(top, image.height - self.size), u[2] < 0.5
            ), row
        raise ManifestError("none of the listed images can be decoded; run `dvc repro -f manifest`")

    def _centre(self, row: int) -> np.ndarray:
        image = self._resized(row)
        return self._cut(image, (image.width - self.size) // 2, (image.height - self.size) // 2, False)

    def _resized(self, row: int):
        """The image with its shorter side at S pixels."""
        from PIL import Image

        from semdict.pipeline.images.decode import decode

        image = Image.fromarray(decode(self.reader.read(row), self.decoder, self.max_pixels))
        scale = self.size / min(image.size)
        shape = (max(self.size, round(image.width * scale)), max(self.size, round(image.height * scale)))
        return image.resize(shape, Image.Resampling.BICUBIC)

    def _cut(self, image, left: int, top: int, flip: bool) -> np.ndarray:
        pixels = np.asarray(image.crop((left, top, left + self.size, top + self.size)))
        return np.ascontiguousarray(pixels[:, ::-1]) if flip else pixels


def as_images(pixels_BHWC: np.ndarray, device: torch.device) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(pixels_BHWC).to(device).permute(0, 3, 1, 2).float().div(255)

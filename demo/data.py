"""The demo's images as tensors, from the files or drawn for the training of the stand-ins; checksums of the weights."""

import io
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from demo.images import CLASSES, picture, workers_map
from semdict.pipeline.common.errors import SemdictError
from semdict.pipeline.common.files import atomic_write, sha256_file

IMAGES = Path("demo/assets/images")  # where `python -m demo.images` draws
SHIPPED = Path(__file__).parent / "weights"  # made by `make demo-weights`
SUMS = "SHA256SUMS"  # in the format of sha256sum
CHUNK = 500  # images that a process draws at a time


class Drawn(NamedTuple):
    """Drawn images: rgb (N, 3, 64, 64) uint8, thing (N, 64, 64) uint8, 255 x the share of a pixel that it covers."""

    rgb: Tensor
    thing: Tensor
    ground: Tensor  # (N,) int64, index into GROUNDS
    labels: Tensor  # (N,) int64, index into CLASSES


def load_split(folder: str | Path, split: str) -> tuple[Tensor, Tensor]:
    """A split that demo.images wrote -> (images (N, 3, 64, 64) uint8, labels (N,) int64), in the order of its tars.

    Raises SemdictError if the folder holds no such split.
    """
    paths = sorted(Path(folder).glob(f"{split}-*.tar"))
    if not paths:
        raise SemdictError(f"{folder} holds no {split}-*.tar; `python -m demo.images --out {folder}` draws them")
    images, labels = [], []
    for path in paths:
        with tarfile.open(path) as tar:
            for member in tar:
                data = tar.extractfile(member).read()
                if member.name.endswith(".jpg"):
                    images.append(np.asarray(Image.open(io.BytesIO(data))))
                else:
                    labels.append(CLASSES.index(data.decode()))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.tensor(labels)


def _draw(job: tuple[int, range]) -> tuple[np.ndarray, ...]:
    seed, indices = job
    drawn, labels = zip(*(picture(seed, "teach", index) for index in indices), strict=True)
    things = np.stack([np.rint(255 * d.thing).astype(np.uint8) for d in drawn])
    return np.stack([d.rgb for d in drawn]), things, np.array([d.ground for d in drawn]), np.array(labels)


def draw_training_set(count: int, seed: int, workers: int = 0) -> Drawn:
    """Images to train the stand-ins on: drawn as those of the files are, but others."""
    jobs = [(seed, range(start, min(start + CHUNK, count))) for start in range(0, count, CHUNK)]
    parts = zip(*workers_map(_draw, jobs, workers), strict=True)
    rgb, thing, ground, labels = (torch.from_numpy(np.concatenate(part)) for part in parts)
    return Drawn(rgb.permute(0, 3, 1, 2).contiguous(), thing, ground, labels)


def draw_batch(count: int, total: int, rng: torch.Generator) -> tuple[Tensor, bool]:
    """`count` random row numbers below `total`, and whether the batch is mirrored."""
    return torch.randint(total, (count,), generator=rng), bool(torch.randint(2, (), generator=rng))


def as_float(images: Tensor) -> Tensor:
    """(B, 3, H, W) uint8 -> float32 in [0, 1], channels last."""
    return images.to(torch.float32, memory_format=torch.channels_last).div_(255)


def psnr(images: Tensor, others: Tensor) -> Tensor:
    """(B,) dB between two batches of images (B, 3, H, W) in [0, 1]; the second is clipped to that range."""
    error = (images - others.clamp(0, 1)).square().mean(dim=(1, 2, 3))
    return -10 * error.clamp_min(1e-10).log10()


def save_half(state: dict, path: str | Path) -> None:
    """Write a state dict, or a mapping of one, with tensors in float16; loaders read them as float32."""

    def half(value: object) -> object:
        if isinstance(value, Tensor):
            return value.half().contiguous().clone()
        return {name: half(part) for name, part in value.items()}

    with atomic_write(path) as staged, staged.open("wb") as file:
        torch.save(half(state), file)


def read_sums(folder: Path) -> dict[str, str]:
    """File name -> hex SHA-256 from the folder's SHA256SUMS; empty if there is no such file."""
    if not (folder / SUMS).is_file():
        return {}
    lines = (folder / SUMS).read_text().splitlines()
    return {name: digest for digest, name in (line.split(maxsplit=1) for line in lines)}


def record_sum(path: Path) -> None:
    """Record the SHA-256 of `path` in SHA256SUMS if it is a shipped file."""
    if path.parent.resolve() != SHIPPED.resolve():
        return
    sums = {**read_sums(path.parent), path.name: sha256_file(path)}
    with atomic_write(path.parent / SUMS) as staged:
        staged.write_text("".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())))

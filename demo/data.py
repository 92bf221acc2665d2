"""The demo's images as tensors, in the pipeline's centre crop; checksums of the shipped weights."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from semdict.pipeline.common.errors import SemdictError
from semdict.pipeline.common.files import atomic_write, sha256_file
from semdict.pipeline.images.crops import Crop, crop_views, expand_views
from semdict.pipeline.images.decode import decode

IMAGES = Path("demo/assets/images")  # where `python -m demo.images` draws
SHIPPED = Path(__file__).parent / "weights"  # made by `make demo-weights`
SUMS = "SHA256SUMS"  # in the format of sha256sum


def load_split(folder: str | Path) -> tuple[Tensor, Tensor, list[str]]:
    """A class-folder tree -> (images (N, 3, 256, 256) uint8, labels (N,) int64, class names), in path order.

    Raises SemdictError if the folder holds no images.
    """
    folder = Path(folder)
    paths = sorted(folder.glob("*/*.jpg"))
    if not paths:
        raise SemdictError(f"{folder} holds no <class>/*.jpg; `python -m demo.images --out {folder.parent}` draws them")
    names = sorted({path.parent.name for path in paths})
    images = np.stack([_crop(path) for path in paths])
    labels = torch.tensor([names.index(path.parent.name) for path in paths])
    return torch.from_numpy(images).permute(0, 3, 1, 2), labels, names


def _crop(path: Path) -> np.ndarray:
    views, _ = crop_views(decode(path.read_bytes()), Crop("resize", 256), expand_views(["centre"]), path.stem, 0)
    return views[0]


def as_float(images: Tensor) -> Tensor:
    """(B, 3, H, W) uint8 -> float32 in [0, 1], channels last."""
    return images.to(torch.float32, memory_format=torch.channels_last).div_(255)


def psnr(images: Tensor, others: Tensor) -> Tensor:
    """(B,) dB between two batches of images (B, 3, H, W) in [0, 1]; the second is clipped to that range."""
    error = (images - others.clamp(0, 1)).square().mean(dim=(1, 2, 3))
    return -10 * error.clamp_min(1e-10).log10()


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

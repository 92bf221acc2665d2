"""Augmentation of fine-tuning: timm's random resized crop, flip and RandAugment, seeded per image."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from semdict.train.engine.rng import Stream, numpy_seed


class TimmAugmentation:
    """Random resized crop (bicubic), flip and RandAugment by timm's name ("" = none): (S, S, 3) uint8.

    The result depends on (seed, epoch, row) alone: the process's global generators, from which timm draws, are seeded
    from them for each image. So images must be augmented one at a time in a process: in worker processes, not threads.
    """

    def __init__(self, seed: int, rand_augment: str, crop_scale: tuple[float, float], size: int) -> None:
        self.seed, self.size, self.transform = seed, size, make_transform(rand_augment, crop_scale, size)

    def __call__(self, rgb_HW3: np.ndarray, epoch: int, row: int) -> np.ndarray:
        from PIL import Image

        seed_all(numpy_seed(self.seed, Stream.AUGMENT, epoch, row))
        return np.asarray(self.transform(Image.fromarray(rgb_HW3))).transpose(1, 2, 0)


def make_transform(rand_augment: str, crop_scale: tuple[float, float], size: int) -> Callable[[Any], Any]:
    """timm's training transform: PIL image -> (3, size, size) uint8; empty corners get timm's fill, ImageNet's mean."""
    from timm.data import auto_augment, create_transform

    transform = create_transform(
        size, is_training=True, scale=crop_scale, color_jitter=None, interpolation="bicubic",
        auto_augment=rand_augment or None, re_prob=0.0, use_prefetcher=True,  # ends with uint8, CHW
    )  # fmt: skip
    for operation in (one for part in transform.transforms for one in getattr(part, "ops", ())):
        if operation.aug_fn is auto_augment.posterize:
            operation.aug_fn = posterize
    return transform


def posterize(image: Any, bits: int, **_: Any) -> Any:
    """timm's posterize; for 0 bits, which timm asks for at full magnitude and Pillow refuses, a black image."""
    from PIL import Image
    from timm.data import auto_augment

    return auto_augment.posterize(image, bits) if bits else Image.new(image.mode, image.size)


def seed_all(seed: int) -> None:
    """Seeds the global generators of Python, NumPy and torch; `seed` is below 2^32."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)

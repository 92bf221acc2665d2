"""Networks whose features images are compared by: torch-fidelity's Inception, and the teacher of params.yaml.

B images of a batch, N of a set, H, W their height and width, D feature width.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from semdict.pipeline.common.errors import WeightsError
from semdict.pipeline.common.files import sha256_file
from semdict.pipeline.common.safeload import load_tensors
from semdict.train.eval.image_sets import ImageSet

if TYPE_CHECKING:
    from semdict.pipeline.config.schema import Params
    from semdict.pipeline.tokenizers.teachers import Teacher

INCEPTION = "inception-v3-compat"
POOL, LOGITS = "2048", "logits_unbiased"  # layers of Inception
PATCH_MEAN = "patch-mean"  # the teacher's

Extractor = Callable[[Tensor], dict[str, Tensor]]  # images (B, 3, H, W) uint8 -> layer -> (B, D)


class MissingWeightsError(WeightsError):
    """A metric cannot be computed; the message names the file that it needs."""


def inception_file(params: "Params") -> Path:
    """The Inception weights as params.yaml says, or cached by torch, or fetched; MissingWeightsError otherwise."""
    cfg = params.scores
    if cfg.inception:
        path = Path(cfg.inception)
        if not path.is_file():
            raise MissingWeightsError(f"scores.inception: {path} does not exist")
    else:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

        path = Path(torch.hub.get_dir()) / "checkpoints" / os.path.basename(URL_INCEPTION_V3)  # noqa: PTH119
        if not path.is_file() and cfg.download:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), progress=False)
            except OSError as error:
                raise MissingWeightsError(
                    f"{path.name} is not at {path.parent} and cannot be fetched ({error}); set scores.inception"
                ) from None
        if not path.is_file():
            raise MissingWeightsError(f"{path.name} is not at {path.parent}; set scores.inception")
    if cfg.inception_sha256 and sha256_file(path) != cfg.inception_sha256:
        raise WeightsError(f"{path} has SHA-256 {sha256_file(path)}, scores.inception_sha256 is another")
    return path


def inception(path: Path, device: torch.device, layers: tuple[str, ...], dtype: str = "float32") -> Extractor:
    """torch-fidelity's Inception with the weights at `path`, computing in `dtype` (float32 or float64)."""
    from torch_fidelity.utils import create_feature_extractor

    with plain_copy(path) as weights:
        network = create_feature_extractor(
            INCEPTION, list(layers), cuda=False, feature_extractor_weights_path=weights, verbose=False,
            feature_extractor_internal_dtype=dtype,
        ).to(device)  # fmt: skip
    return lambda images_B3HW: network.convert_features_tuple_to_dict(network(images_B3HW))


@contextmanager
def plain_copy(path: Path) -> Iterator[str]:
    """A copy of a weights file that holds nothing but tensors: torch-fidelity itself would run a pickle's code."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "weights.pth"
        torch.save(load_tensors(path), copy)
        yield str(copy)


def teacher(params: "Params", device: torch.device) -> tuple[Extractor, "Teacher"]:
    """Mean over patches of the patch features that the discriminative codebook is made from, and the network.

    Without features.image_size it sees images at pixels.size, to the nearest multiple of its stride.
    """
    from semdict.pipeline.tokenizers import load_features

    network = load_features(**params.features.model_dump(), device=device, near=params.pixels.size)
    return lambda images_B3HW: {PATCH_MEAN: network(images_B3HW.float() / 255).mean(1).float()}, network


@torch.no_grad()
def extract(
    images: ImageSet, extractor: Extractor, device: torch.device, batch: int, count: int | None = None
) -> dict[str, Tensor]:
    """Layer -> (N, D) features on the CPU of the first `count` images (None = all), without those in `left_out`."""
    parts: dict[str, list[Tensor]] = {}
    for _, images_B3HW in images.batches(batch, count):
        for layer, features_BD in extractor(images_B3HW.to(device)).items():
            parts.setdefault(layer, []).append(features_BD.cpu())
    return {layer: torch.cat(features) for layer, features in parts.items()}

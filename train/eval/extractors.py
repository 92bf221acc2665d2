"""The networks that images are compared by: torch-fidelity's Inception, and the teacher under a name of its own."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from semdict.pipeline.common.errors import WeightsError
from semdict.pipeline.common.files import sha256_file
from semdict.pipeline.common.safeload import load_tensors

if TYPE_CHECKING:
    from semdict.pipeline.config.schema import Params

INCEPTION = "inception-v3-compat"
TEACHER, TEACHER_LAYER = "semdict-teacher", "patch-mean"


class MissingWeightsError(WeightsError):
    """A metric cannot be computed; the message says what to bring."""


def inception_file(params: "Params") -> Path:
    """The Inception weights as params.yaml says, or cached by torch, or fetched; MissingWeightsError otherwise."""
    given = params.scores
    if given.inception:
        path = Path(given.inception)
        if not path.is_file():
            raise MissingWeightsError(f"scores.inception: {path} does not exist")
    else:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

        path = Path(torch.hub.get_dir()) / "checkpoints" / os.path.basename(URL_INCEPTION_V3)  # noqa: PTH119
        if not path.is_file() and given.download:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), progress=False)
            except OSError as error:
                raise MissingWeightsError(
                    f"{path.name} is not at {path.parent} and cannot be fetched ({error}); set scores.inception"
                ) from None
        if not path.is_file():
            raise MissingWeightsError(f"{path.name} is not at {path.parent}; set scores.inception")
    if given.inception_sha256 and sha256_file(path) != given.inception_sha256:
        raise WeightsError(f"{path} has SHA-256 {sha256_file(path)}, scores.inception_sha256 is another")
    return path


@contextmanager
def plain_copy(path: Path) -> Iterator[str]:
    """A copy of a weights file that holds nothing but tensors: torch-fidelity itself would run a pickle's code."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "weights.pth"
        torch.save(load_tensors(path), copy)
        yield str(copy)


def register_teacher(params: "Params", device: torch.device) -> str:
    """Make the teacher of params.yaml known to torch-fidelity; returns the SHA-256 of its weights.

    Features: (B, D), the mean over patches of the patch features that the words are made from.
    """
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

    from semdict.pipeline.tokenizers import load_features

    given = params.features
    teacher = load_features(given.model, given.weights, given.layer, device=str(device), image_size=given.image_size)

    class TeacherExtractor(FeatureExtractorBase):
        """Patch-mean features of the teacher, in torch-fidelity's interface."""

        def __init__(self, name: str, features_list: list[str], **_: object) -> None:
            super().__init__(name, features_list)
            self.teacher = teacher

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return (TEACHER_LAYER,)

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return TEACHER_LAYER

        @staticmethod
        def can_be_compiled() -> bool:
            return False

        def forward(self, images_BCHW: Tensor) -> tuple[Tensor, ...]:
            return (self.teacher(images_BCHW.to(device).float() / 255).mean(1).float(),)

    FEATURE_EXTRACTORS_REGISTRY[TEACHER] = TeacherExtractor  # replaces an earlier teacher of this process
    return teacher.identity["sha256"]

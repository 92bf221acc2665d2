"""Image scores by the published protocols, through torch-fidelity; every score carries its protocol in its name.

val50k: FID, IS, KID, precision, recall against the 256-pixel validation images (MAGE, Sorcen, LEASE). adm: against
ADM's statistics file (guided-diffusion), features and distance in float64. teacher: the same distances in the features
of this project's teacher, never called FID. Where weights are missing the metric is absent and `missing` says why.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from semdict.pipeline.common.device import resolve_device
from semdict.pipeline.common.errors import UsageError
from semdict.pipeline.common.files import sha256_file
from semdict.train.eval.extractors import (
    INCEPTION,
    TEACHER,
    MissingWeightsError,
    inception_file,
    plain_copy,
    register_teacher,
)
from semdict.train.eval.frechet import frechet_distance, gaussian
from semdict.train.eval.image_sets import ImageSet, read_npz

if TYPE_CHECKING:
    from semdict.pipeline.config.schema import Params

POOL = "2048"
VAL50K = {
    "frechet_inception_distance": "fid_val50k",
    "inception_score_mean": "is",
    "inception_score_std": "is_std",
    "kernel_inception_distance_mean": "kid_val50k",
    "kernel_inception_distance_std": "kid_val50k_std",
    "precision": "precision",
    "recall": "recall",
    "f_score": "f1",
}
TEACHER_NAMES = {
    "frechet_inception_distance": "teacher_frechet_distance",
    "kernel_inception_distance_mean": "teacher_kid",
    "kernel_inception_distance_std": "teacher_kid_std",
    "precision": "teacher_precision",
    "recall": "teacher_recall",
    "f_score": "teacher_f1",
}


@dataclass(frozen=True)
class Scored:
    """scores: metric name -> number; missing: metric name -> why it is not there; extractor: what features were of."""

    scores: dict[str, float]
    missing: dict[str, str]
    extractor: dict[str, Any]


def val50k(samples: ImageSet, reference: ImageSet, params: "Params", name: str = "fid_val50k") -> Scored:
    """FID, IS, KID, precision and recall with the TF-ported Inception; `name` replaces fid_val50k (rfid_val50k)."""
    names = {ours if ours != "fid_val50k" else name: ours for ours in VAL50K.values()}
    try:
        file = inception_file(params)
    except MissingWeightsError as error:
        return Scored({}, dict.fromkeys(names, str(error)), {"name": INCEPTION})
    with plain_copy(file) as weights:
        found = fidelity(samples, reference, params, feature_extractor=INCEPTION, isc=True, feature_layer_prc=POOL,
                         feature_extractor_weights_path=weights)  # fmt: skip
    scores = {VAL50K[key]: value for key, value in found.items()}
    if name != "fid_val50k":
        scores[name] = scores.pop("fid_val50k")
    return Scored(scores, {}, {"name": INCEPTION, "sha256": sha256_file(file)})


def teacher(samples: ImageSet, reference: ImageSet, params: "Params") -> Scored:
    """The distances of `val50k` in the teacher's patch-mean features; the demo's stand-in for scores."""
    sha256 = register_teacher(params, torch.device(resolve_device(params.runtime.device)))
    found = fidelity(samples, reference, params, feature_extractor=TEACHER)
    extractor = {"name": f"teacher {params.features.model}", "features": "mean over patches", "sha256": sha256}
    return Scored({TEACHER_NAMES[key]: value for key, value in found.items()}, {}, extractor)


def fidelity(samples: ImageSet, reference: ImageSet, params: "Params", isc: bool = False, **given: Any) -> dict:
    """torch-fidelity's own numbers; generated images first, as its precision and recall want it."""
    from torch_fidelity import calculate_metrics

    fewest = min(len(samples), len(reference))
    if fewest <= params.scores.neighbours + 1:
        raise UsageError(f"{fewest} images are too few to score: more than {params.scores.neighbours + 1} on each side")
    return calculate_metrics(
        input1=samples, input2=reference, isc=isc, fid=True, kid=True, prc=True, verbose=False, cache=False,
        cuda=resolve_device(params.runtime.device) != "cpu", batch_size=params.scores.batch,
        kid_subsets=params.scores.kid_subsets, kid_subset_size=min(params.scores.kid_subset_size, fewest),
        prc_neighborhood=params.scores.neighbours, save_cpu_ram=True, isc_splits=min(10, len(samples)),
        **given,
    )  # fmt: skip


def adm(samples: ImageSet, statistics: Path, params: "Params") -> Scored:
    """fid_adm against `mu`, `sigma` of an ADM .npz; precision and recall against the first 10,000 of its images.

    Keys of the file: arr_0 (N, 256, 256, 3) uint8, mu (2048,), sigma (2048, 2048), mu_s, sigma_s (of the spatial layer,
    which torch-fidelity's Inception does not offer: sfid_adm is never computed).
    """
    from torch_fidelity.metric_prc import prc_features_to_metric

    reference = read_npz(statistics, ("mu", "sigma", "arr_0"))
    no_sfid = {"sfid_adm": "the extractor has no layer mixed_6/conv"}
    names = ("fid_adm", "is", "is_std", "precision_adm", "recall_adm", "f1_adm")
    try:
        file = inception_file(params)
    except MissingWeightsError as error:
        return Scored({}, dict.fromkeys(names, str(error)) | no_sfid, {"name": INCEPTION})
    with plain_copy(file) as weights:
        found = inception_features(samples, params, weights, (POOL, "logits_unbiased"))
        theirs = inception_features(_Pixels(reference["arr_0"][:10_000]), params, weights, (POOL,))[POOL]
    scores = {"fid_adm": frechet_distance(gaussian(found[POOL].numpy()), (reference["mu"], reference["sigma"]))}
    scores["is"], scores["is_std"] = inception_score(found["logits_unbiased"].numpy())
    relation = prc_features_to_metric(found[POOL], theirs, prc_neighborhood=params.scores.neighbours,
                                      save_cpu_ram=True, verbose=False)  # fmt: skip
    scores |= {f"{key}_adm".replace("f_score", "f1"): value for key, value in relation.items()}
    return Scored(scores, no_sfid, {"name": INCEPTION, "sha256": sha256_file(file), "dtype": "float64"})


def inception_features(images: Any, params: "Params", weights: str, layers: tuple[str, ...]) -> dict:
    """Layer name -> (N, width) features, computed in float64."""
    from torch_fidelity.utils import create_feature_extractor, get_featuresdict_from_dataset

    cuda = resolve_device(params.runtime.device) != "cpu"
    extractor = create_feature_extractor(
        INCEPTION, list(layers), cuda=cuda, feature_extractor_weights_path=weights, verbose=False,
        feature_extractor_internal_dtype="float64",
    )  # fmt: skip
    return get_featuresdict_from_dataset(images, extractor, params.scores.batch, cuda, True, False)


def inception_score(logits_NK: np.ndarray, split: int = 5000) -> tuple[float, float]:
    """exp of the mean divergence from the marginal (Salimans et al., arXiv:1606.03498), mean and std over consecutive
    splits of 5,000, as ADM's evaluator does.
    """
    logits = logits_NK.astype(np.float64)
    logp = logits - logits.max(1, keepdims=True)
    logp -= np.log(np.exp(logp).sum(1, keepdims=True))
    scores = []
    for start in range(0, len(logp), split):
        part = logp[start : start + split]
        marginal = np.log(np.exp(part).mean(0))
        scores.append(np.exp((np.exp(part) * (part - marginal)).sum(1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


class _Pixels(torch.utils.data.Dataset):
    """(N, H, W, 3) uint8 as images (3, H, W)."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, number: int) -> torch.Tensor:
        return torch.from_numpy(self.pixels[number].copy()).permute(2, 0, 1)

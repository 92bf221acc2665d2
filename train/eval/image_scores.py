"""Image scores by the published protocols, with torch-fidelity's metrics; a score's name says its protocol.

val50k: FID, IS, KID, precision, recall against the 256-pixel validation images (MAGE, Sorcen, LEASE). adm: against
ADM's statistics file (guided-diffusion), features and distance in float64. teacher: the same distances in the features
of this project's teacher, never called FID. Without Inception's weights a metric is absent and `missing` says why.

N images of a set, D feature width.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from semdict.pipeline.common.device import resolve_device
from semdict.pipeline.common.errors import UsageError
from semdict.pipeline.common.files import sha256_file
from semdict.train.eval.extractors import (
    INCEPTION,
    LOGITS,
    PATCH_MEAN,
    POOL,
    MissingWeightsError,
    extract,
    inception,
    inception_file,
)
from semdict.train.eval.extractors import teacher as teacher_extractor
from semdict.train.eval.image_sets import ArrayImages, ImageSet, read_npz

if TYPE_CHECKING:
    from semdict.pipeline.config.schema import Params

# torch-fidelity's name -> the name in score files
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
TEACHER = {
    "frechet_inception_distance": "teacher_frechet_distance",
    "kernel_inception_distance_mean": "teacher_kid",
    "kernel_inception_distance_std": "teacher_kid_std",
    "precision": "teacher_precision",
    "recall": "teacher_recall",
    "f_score": "teacher_f1",
}
ADM = ("fid_adm", "is", "is_std", "precision_adm", "recall_adm", "f1_adm")
ADM_REFERENCES = 10_000  # images of ADM's file that precision and recall are measured against
ADM_SPLIT = 5000  # images of one inception score

Statistics = tuple[np.ndarray, np.ndarray]  # mean (D,), covariance (D, D)


@dataclass(frozen=True)
class ImageScores:
    """scores: metric -> number; missing: metric -> why it is absent; extractor: the network behind the features."""

    scores: dict[str, float]
    missing: dict[str, str]
    extractor: dict[str, Any]


def val50k(samples: ImageSet, reference: ImageSet, params: "Params", name: str = "fid_val50k") -> ImageScores:
    """FID, IS, KID, precision and recall with the TF-ported Inception; `name` replaces fid_val50k (rfid_val50k)."""
    names = {**VAL50K, "frechet_inception_distance": name}
    try:
        file = inception_file(params)
    except MissingWeightsError as error:
        return ImageScores({}, dict.fromkeys(names.values(), str(error)), {"name": INCEPTION})
    from torch_fidelity.metric_isc import isc_features_to_metric

    refuse_few(samples, reference, params)
    device = torch.device(resolve_device(params.runtime.device))
    network = inception(file, device, (POOL, LOGITS))
    of_samples = extract(samples, network, device, params.scores.batch)
    of_reference = extract(reference, network, device, params.scores.batch)
    metrics = distances(of_samples[POOL], of_reference[POOL], params)
    metrics |= isc_features_to_metric(of_samples[LOGITS], min(10, len(of_samples[LOGITS])))
    scores = {names[metric]: value for metric, value in metrics.items()}
    return ImageScores(scores, {}, {"name": INCEPTION, "sha256": sha256_file(file)})


def teacher(samples: ImageSet, reference: ImageSet, params: "Params") -> ImageScores:
    """The distances of `val50k` in the teacher's patch-mean features; the demo's stand-in for scores."""
    refuse_few(samples, reference, params)
    device = torch.device(resolve_device(params.runtime.device))
    network, patch_features = teacher_extractor(params, device)
    of_samples = extract(samples, network, device, params.scores.batch)[PATCH_MEAN]
    of_reference = extract(reference, network, device, params.scores.batch)[PATCH_MEAN]
    metrics = distances(of_samples, of_reference, params)
    about = {"name": f"teacher {params.features.model}", "features": "mean over patches"}
    about["sha256"] = patch_features.identity["sha256"]
    return ImageScores({TEACHER[metric]: value for metric, value in metrics.items()}, {}, about)


def adm(samples: ImageSet, statistics: Path, params: "Params") -> ImageScores:
    """fid_adm against `mu`, `sigma` of an ADM .npz; precision and recall against the first 10,000 of its images.

    Keys of the file: arr_0 (N, 256, 256, 3) uint8, mu (2048,), sigma (2048, 2048), mu_s, sigma_s (of the spatial layer,
    which torch-fidelity's Inception does not offer: sfid_adm is never computed).
    """
    from torch_fidelity.metric_fid import fid_features_to_statistics

    reference = read_npz(statistics, ("mu", "sigma", "arr_0"))
    no_sfid = {"sfid_adm": "the extractor has no layer mixed_6/conv"}
    try:
        file = inception_file(params)
    except MissingWeightsError as error:
        return ImageScores({}, dict.fromkeys(ADM, str(error)) | no_sfid, {"name": INCEPTION})
    images = ArrayImages(reference["arr_0"][:ADM_REFERENCES], {"from": str(statistics)})
    refuse_few(samples, images, params)
    device = torch.device(resolve_device(params.runtime.device))
    network = inception(file, device, (POOL, LOGITS), "float64")
    of_samples = extract(samples, network, device, params.scores.batch)
    of_reference = extract(images, network, device, params.scores.batch)[POOL]
    own = fid_features_to_statistics(of_samples[POOL].double())
    scores = {"fid_adm": frechet_distance((own["mu"], own["sigma"]), (reference["mu"], reference["sigma"]))}
    scores["is"], scores["is_std"] = adm_inception_score(of_samples[LOGITS])
    metrics = precision_recall(of_samples[POOL], of_reference, params)
    scores |= {"precision_adm": metrics["precision"], "recall_adm": metrics["recall"], "f1_adm": metrics["f_score"]}
    return ImageScores(scores, no_sfid, {"name": INCEPTION, "sha256": sha256_file(file), "dtype": "float64"})


def refuse_few(samples: ImageSet, reference: ImageSet, params: "Params") -> None:
    """UsageError when a set has too few images for the neighbours of precision and recall."""
    fewest, needed = min(len(samples), len(reference)), params.scores.neighbours + 2
    if fewest < needed:
        raise UsageError(f"{fewest} images are too few to score: both sides need {needed} or more")


def distances(samples_ND: Tensor, reference_ND: Tensor, params: "Params") -> dict[str, float]:
    """torch-fidelity's FID, KID, precision and recall of two sets of features, under its names."""
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric

    size = min(params.scores.kid_subset_size, len(samples_ND), len(reference_ND))
    statistics = [fid_features_to_statistics(features_ND) for features_ND in (samples_ND, reference_ND)]
    return {
        **fid_statistics_to_metric(*statistics, verbose=False),
        **kid_features_to_metric(
            samples_ND, reference_ND, kid_subsets=params.scores.kid_subsets, kid_subset_size=size, verbose=False
        ),
        **precision_recall(samples_ND, reference_ND, params),
    }


def precision_recall(samples_ND: Tensor, reference_ND: Tensor, params: "Params") -> dict[str, float]:
    """precision, recall and f_score (Kynkaanniemi et al., arXiv:1904.06991); generated images first."""
    from torch_fidelity.metric_prc import prc_features_to_metric

    neighbours = params.scores.neighbours
    return prc_features_to_metric(
        samples_ND, reference_ND, prc_neighborhood=neighbours, save_cpu_ram=True, verbose=False
    )


def frechet_distance(one: Statistics, other: Statistics) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) in float64 (Heusel et al., arXiv:1706.08500).

    UsageError when the widths differ.
    """
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    pair = [{"mu": np.asarray(mu, np.float64), "sigma": np.asarray(sigma, np.float64)} for mu, sigma in (one, other)]
    shapes = [(statistics["mu"].shape, statistics["sigma"].shape) for statistics in pair]
    if shapes[0] != shapes[1]:
        raise UsageError(
            f"statistics of shapes {shapes[0]} cannot be compared with {shapes[1]}; the reference is of another network"
        )
    return fid_statistics_to_metric(*pair, verbose=False)[KEY_METRIC_FID]


def adm_inception_score(logits_NK: Tensor) -> tuple[float, float]:
    """Inception score (Salimans et al., arXiv:1606.03498), mean and std over consecutive splits of 5,000 as ADM's.

    torch-fidelity cuts a set into a fixed number of equal splits instead, so it is called for one split at a time.
    """
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

    scores = [
        isc_features_to_metric(part, 1, shuffle=False)[KEY_METRIC_ISC_MEAN] for part in logits_NK.split(ADM_SPLIT)
    ]
    return float(np.mean(scores)), float(np.std(scores))

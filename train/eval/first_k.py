"""What the first k tokens know of the class: a linear probe before and after quantization (VCQ, table 6).

The paper does not say which feature it probed (choice O16). N images, L positions, D code width.
"""

from typing import TYPE_CHECKING

import numpy as np

from semdict.pipeline.common.errors import ManifestError, UsageError
from semdict.train.eval.common import same_classes
from semdict.train.eval.linear_head import HeadPlan
from semdict.train.eval.linear_probe import probe
from semdict.train.eval.vcq_latents import Latents

if TYPE_CHECKING:
    from semdict.pipeline.config.schema.vcq import FirstK


def first_features(latents: Latents, codes_KD: np.ndarray, k: int, feature: str, pool: str) -> np.ndarray:
    """(N, D) for pool mean, (N, k D) for concat: the first k positions of z (feature pre) or of the codes (code)."""
    first_NKD = latents.z[:, :k] if feature == "pre" else codes_KD.astype(np.float16)[latents.ids[:, :k]]
    if pool == "mean":
        return first_NKD.mean(axis=1, dtype=np.float32)
    return np.ascontiguousarray(first_NKD).reshape(len(first_NKD), -1)


def first_k_probe(
    train: Latents, test: Latents, codes_KD: np.ndarray, given: "FirstK", device: str = "cpu"
) -> dict[str, float]:
    """top1 and top5 in per cent by name, such as probe_code_concat_10_top1.

    UsageError for more tokens than there are; ManifestError without labels in both sets; ShardError for a test class
    without training images.
    """
    length = train.ids.shape[1]
    if max(given.first) > length:
        raise UsageError(f"vcq_evaluate.probe.first asks for {max(given.first)} tokens, the tokenizer has {length}")
    if min(train.labels.min(), test.labels.min()) < 0:
        raise ManifestError("some images have no label; the first-k probe needs one for each")
    classes = same_classes(train, test)
    plan = HeadPlan(given.epochs, given.batch, given.base_lr, given.warmup_epochs, given.weight_decay, seed=given.seed)
    found = {}
    for feature in given.features:
        for pool in given.pools:
            for k in given.first:
                rows = [first_features(part, codes_KD, k, feature, pool) for part in (train, test)]
                result = probe(
                    rows[0], train.labels, rows[1], test.labels, plan, classes, device, eval_every=plan.epochs
                )
                name = f"probe_{feature}_{pool}_{k}"
                found |= {f"{name}_top1": result.top1, f"{name}_top5": result.top5}
    return found

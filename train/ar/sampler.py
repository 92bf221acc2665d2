"""Sampling from the autoregressive model: static key-value cache, temperature, guidance, one random stream per image.

Shapes: B images, L positions, K codes at a position.
"""

import numpy as np
import torch
from torch import Tensor

from semdict.train.ar.model import ArModel, KvCache
from semdict.train.engine.guidance import Guidance, combine, scales


def uniforms(seed: int, images_B: list[int], length: int) -> Tensor:
    """(B, L) float64 in [0, 1): the row of image number i is a function of (seed, i) alone, whatever the batch."""
    rows = [np.random.Generator(np.random.Philox(key=[seed, image])).random(length) for image in images_B]
    return torch.from_numpy(np.stack(rows))


@torch.no_grad()
def sample(
    model: ArModel,
    labels_B: Tensor,
    images_B: list[int],
    seed: int = 0,
    temperature: float = 1.0,
    guidance: Guidance | None = None,
    cache: bool = True,
) -> Tensor:
    """(B, L) int64 codes for (B,) int64 classes (`model.null_class` = unconditional).

    images_B: the number of each image in the whole run; with `seed` it fixes the random numbers, so an image does not
    depend on its batch. temperature divides the guided logits. cache=False runs the whole prefix at every position
    instead. The model is in evaluation mode during the call. ValueError for a temperature <= 0 or a wrong label.
    """
    _check(model, labels_B, images_B, temperature)
    sizes = model.sizes("sample")
    scale_L = scales(guidance or Guidance(), model.config.sizes).tolist()
    guided = any(scale_L)
    labels = torch.cat([labels_B, torch.full_like(labels_B, model.null_class)]) if guided else labels_B
    uniform_BL = uniforms(seed, images_B, len(sizes)).to(labels.device)
    ids_BL = torch.zeros(len(labels_B), len(sizes), dtype=torch.int64, device=labels.device)
    training = model.training
    model.eval()
    try:
        outputs = _Cached(model, labels) if cache else _Uncached(model, labels)
        for t, k in enumerate(sizes):
            prefix = ids_BL.repeat(2, 1) if guided else ids_BL
            hidden = outputs(prefix, t)
            logits = torch.nn.functional.linear(hidden, model.head.weight[:k]).float()
            if guided:
                logits = combine(*logits.chunk(2), scale_L[t])
            ids_BL[:, t] = sample_code(logits / temperature, uniform_BL[:, t])
    finally:
        model.train(training)
    return ids_BL


def sample_code(logits_BK: Tensor, uniform_B: Tensor) -> Tensor:
    """(B,) int64: the code at which the cumulative probability passes the uniform number; never one of logit -inf."""
    cumulative_BK = logits_BK.double().softmax(-1).cumsum(-1)
    targets_B1 = uniform_B[:, None] * cumulative_BK[:, -1:]
    return torch.searchsorted(cumulative_BK, targets_B1, right=True).squeeze(1).clamp_max(logits_BK.shape[-1] - 1)


class _Cached:
    """Outputs at position t from the code at t - 1 and the cache; positions must come in order."""

    def __init__(self, model: ArModel, labels: Tensor) -> None:
        self.model, self.labels = model, labels
        self.shared = model.modulation(labels)
        self.cache = KvCache(model.config, len(labels), labels.device, self.shared.dtype)

    def __call__(self, ids_BL: Tensor, t: int) -> Tensor:
        last = ids_BL[:, t - 1 : t] if t else None
        return self.model.step(last, self.labels, self.shared, self.cache, t)[:, 0]


class _Uncached:
    """Outputs at position t from a pass over the whole prefix."""

    def __init__(self, model: ArModel, labels: Tensor) -> None:
        self.model, self.labels = model, labels

    def __call__(self, ids_BL: Tensor, t: int) -> Tensor:
        return self.model.hidden(ids_BL[:, : t + 1], self.labels)[:, t]


def _check(model: ArModel, labels_B: Tensor, images_B: list[int], temperature: float) -> None:
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if len(images_B) != len(labels_B):
        raise ValueError(f"{len(labels_B)} labels, but {len(images_B)} image numbers")
    if len(labels_B) and not 0 <= int(labels_B.min()) <= int(labels_B.max()) <= model.null_class:
        raise ValueError(f"labels must lie in [0, {model.null_class}] ({model.null_class} = no class)")

"""Linear probe on frozen features as in MoCo v3, MAE and MAGE: LARS, batch norm without affine, cosine schedule.

N training images, M test images, V views, E feature width, C classes, B rows of a batch.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from timm.optim import Lars
from torch import Tensor, nn

from semdict.pipeline.common.errors import SemdictError, UsageError
from semdict.pipeline.common.progress import progress
from semdict.train.engine.lr_schedule import scaled_lr, warmup_cosine
from semdict.train.engine.rng import Stream, choice_per_row, permutation
from semdict.train.eval.common import as_tensor, top_accuracy

NORM_EPS = 1e-6  # of the released probe's batch norm
HEAD_STD = 0.01  # of the released probe's weights

Curve = list[dict[str, float]]


@dataclass(frozen=True)
class HeadConfig:
    """Optimisation of a linear head; defaults are LEASE's and Sorcen's tables A.2. base_lr: at a batch of 256."""

    epochs: int = 90
    batch: int = 4096
    base_lr: float = 0.1
    warmup_epochs: int = 0
    weight_decay: float = 0.0
    momentum: float = 0.9
    seed: int = 0


class Batches(Protocol):
    """Shuffled training batches of an epoch: features (B, E) float32 and labels (B,) int64 on one device."""

    steps: int  # batches in an epoch
    width: int  # E

    def __call__(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]: ...


class ArrayBatches:
    """Batches from arrays: features (N, E), or (N, V, E) with one view per image and epoch, chosen at random.

    Arrays may be memory-mapped and of half precision; on a GPU they are moved there once if they fill at most half of
    the free memory. The remainder that fills no batch is left out, other rows each epoch. UsageError when the batch is
    larger than the set.
    """

    def __init__(
        self, features: np.ndarray | list[np.ndarray], labels: np.ndarray, batch: int, seed: int,
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        self.views = views_of(features)
        if {len(view) for view in self.views} != {len(labels)}:
            raise ValueError(f"features of {len(self.views[0])} rows, labels of {len(labels)}")
        if not 2 <= batch <= len(labels):
            raise UsageError(f"batch {batch} must be between 2 and the {len(labels)} training images there are")
        self.device, self.batch, self.seed = torch.device(device), batch, seed
        self.steps, self.width = len(labels) // batch, self.views[0].shape[1]
        self.labels = torch.from_numpy(np.asarray(labels, np.int64)).to(self.device)
        self.features = on_device([as_tensor(view) for view in self.views], self.device)

    def __call__(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = permutation(len(self.labels), self.seed, Stream.PROBE_ORDER, epoch)
        views = choice_per_row(np.arange(len(order)), len(self.views), self.seed, Stream.PROBE_VIEW, epoch)
        for start in range(0, self.steps * self.batch, self.batch):
            rows = order[start : start + self.batch]
            yield self._gather(rows, views[rows]), self.labels[torch.from_numpy(rows).to(self.device)]

    def _gather(self, rows: np.ndarray, views: np.ndarray) -> Tensor:
        """(B, E) float32 features of `rows`, each of its own view."""
        device = self.features[0].device
        if len(self.features) == 1:
            batch_BE = self.features[0].index_select(0, torch.from_numpy(rows).to(device))
        else:
            batch_BE = self.features[0].new_empty(len(rows), self.width)
            for view, features_NE in enumerate(self.features):
                positions = torch.from_numpy(np.flatnonzero(views == view)).to(device)
                batch_BE[positions] = features_NE.index_select(0, torch.from_numpy(rows[views == view]).to(device))
        return batch_BE.to(self.device).float()


def views_of(features: np.ndarray | list[np.ndarray]) -> list[np.ndarray]:
    """One (N, E) array per view, from (N, E), (N, V, E) or such a list."""
    if isinstance(features, list):
        return features
    if features.ndim not in (2, 3):
        raise ValueError(f"features are {features.shape}, expected (N, E) or (N, V, E)")
    return [features] if features.ndim == 2 else [features[:, view] for view in range(features.shape[1])]


def on_device(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    """The tensors on the GPU if they fill at most half of its free memory, else unchanged."""
    if device.type != "cuda":
        return tensors
    room = torch.cuda.mem_get_info(device)[0] / 2
    fits = sum(tensor.numel() * tensor.element_size() for tensor in tensors) <= room
    return [tensor.to(device) for tensor in tensors] if fits else tensors


class LinearHead(nn.Module):
    """Batch norm without affine, then linear: (B, E) -> (B, C) logits."""

    def __init__(self, width: int, classes: int, seed: int = 0) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width, affine=False, eps=NORM_EPS)
        self.linear = nn.Linear(width, classes)
        rng = torch.Generator().manual_seed(seed)
        nn.init.trunc_normal_(self.linear.weight, std=HEAD_STD, generator=rng)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x_BE: Tensor) -> Tensor:
        return self.linear(self.norm(x_BE))


def fit_head(
    batches: Batches, classes: int, cfg: HeadConfig, device: torch.device | str = "cpu",
    after_epoch: Callable[[int, LinearHead], dict[str, float]] | None = None,
) -> tuple[LinearHead, Curve]:  # fmt: skip
    """Train a head; returns it in evaluation mode, and one row per epoch: epoch (from 1), loss (nats), and the entries
    that `after_epoch` (epochs done, head in evaluation mode) returns.

    SemdictError when the loss is not finite.
    """
    head = LinearHead(batches.width, classes, cfg.seed).to(device)
    lr_schedule = warmup_cosine(
        scaled_lr(cfg.base_lr, cfg.batch), cfg.warmup_epochs * batches.steps, cfg.epochs * batches.steps
    )
    optimiser = lars(head, cfg.momentum)
    curve: Curve = []
    step = 0
    for epoch in range(cfg.epochs):
        head.train()
        nats = torch.zeros((), dtype=torch.float64, device=device)
        for x_BE, label_B in batches(epoch):
            for group in optimiser.param_groups:
                group["lr"] = lr_schedule(step)
            loss = F.cross_entropy(head(x_BE), label_B)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            decay_gradient(head, cfg.weight_decay)
            optimiser.step()
            nats += loss.detach()
            step += 1
        if not torch.isfinite(nats):
            raise SemdictError(f"the loss of epoch {epoch + 1} is not finite; lower base_lr, or look at the features")
        head.eval()
        metrics = after_epoch(epoch + 1, head) if after_epoch else {}
        curve.append({"epoch": epoch + 1, "loss": float(nats) / batches.steps, **metrics})
    return head, curve


def lars(head: LinearHead, momentum: float) -> Lars:
    """LARS (arXiv:1708.03888) as MAE probes: trust coefficient 0.001 for the weights, plain momentum SGD for the bias.

    The learning rate is set before every step. timm adds eps to the gradient's norm, which MAE does not.
    """
    groups = [
        {"params": [head.linear.weight], "always_adapt": True},
        {"params": [head.linear.bias], "always_adapt": False},
    ]
    return Lars(groups, lr=0.0, momentum=momentum, weight_decay=0.0, trust_coeff=0.001, eps=0.0)


@torch.no_grad()
def decay_gradient(head: LinearHead, weight_decay: float) -> None:
    """Add weight decay to the gradient of the weights, so that the trust ratio is taken of |g + decay w|, as in MAE.

    timm's own weight decay takes it of |g| + decay |w|, as in the paper.
    """
    head.linear.weight.grad.add_(head.linear.weight, alpha=weight_decay)


@torch.no_grad()
def predict(head: LinearHead, features: np.ndarray, device: torch.device | str = "cpu", batch: int = 4096) -> Tensor:
    """(M, min(5, C)) int64 classes on the CPU, the most likely first, of (M, E) features."""
    ranks = min(5, head.linear.out_features)
    parts = [head(part.to(device).float()).topk(ranks).indices.cpu() for part in as_tensor(features).split(batch)]
    return torch.cat(parts)


@dataclass(frozen=True)
class ProbeResult:
    """top1, top5: per cent of the test images after the last epoch. curve: per epoch loss (nats), top1, top5.

    predicted: (M,) int64 class of each test image.
    """

    top1: float
    top5: float
    loss: float
    curve: Curve
    predicted: np.ndarray
    head: LinearHead


def linear_probe(
    train_features: np.ndarray | list[np.ndarray],
    train_labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
    cfg: HeadConfig | None = None,
    classes: int | None = None,
    device: torch.device | str = "cpu",
    eval_every: int = 1,
) -> ProbeResult:
    """Accuracy of a linear classifier on any frozen features.

    train_features (N, E), or (N, V, E) or a list of V (N, E) with one view per image and epoch, chosen at random;
    test_features (M, E); floats of any precision, memory-mapped or not. Labels (N,), (M,) whole numbers in
    [0, classes); classes None = the largest training label + 1. cfg None = tables A.2. UsageError when the batch
    exceeds N. The same seed gives the same result.
    """
    cfg = cfg or HeadConfig()
    batches = ArrayBatches(train_features, train_labels, cfg.batch, cfg.seed, device)
    count = classes or int(np.max(train_labels)) + 1
    return fit_probe(batches, test_features, test_labels, cfg, count, device, eval_every)


def fit_probe(
    batches: Batches, test_features: np.ndarray, test_labels: np.ndarray, cfg: HeadConfig, classes: int,
    device: torch.device | str = "cpu", eval_every: int = 1, label: str = "",
) -> ProbeResult:  # fmt: skip
    """`linear_probe` for training features that `batches` yields, such as those of new crops in every epoch.

    label: of the progress shown on stderr; "" shows none.
    """
    bar = progress(cfg.epochs, label, "epoch", quiet=not label)

    def evaluate(epoch: int, head: LinearHead) -> dict[str, float]:
        last = not epoch % eval_every or epoch == cfg.epochs
        scores = top_accuracy(predict(head, test_features, device), test_labels) if last else {}
        if scores:
            bar.set_postfix_str(f"top1 {scores['top1']:.2f}", refresh=False)
        bar.update(1)
        return scores

    with bar:
        head, curve = fit_head(batches, classes, cfg, device, evaluate)
    ranked = predict(head, test_features, device)
    return ProbeResult(**top_accuracy(ranked, test_labels), loss=curve[-1]["loss"], curve=curve,
                       predicted=ranked[:, 0].numpy(), head=head)  # fmt: skip

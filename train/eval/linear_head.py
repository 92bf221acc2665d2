"""A linear classifier on frozen features, as MoCo v3, MAE and MAGE probe: LARS, batch norm without affine, cosine.

N images, V views, E feature width, C classes, B rows of a batch.
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
from semdict.train.engine.lr_schedule import scaled_lr, warmup_cosine
from semdict.train.engine.rng import Stream, choice_per_row, permutation

NORM_EPS = 1e-6  # of the released probe's batch norm
HEAD_STD = 0.01  # of the released probe's weights

Curve = list[dict[str, float]]


@dataclass(frozen=True)
class HeadPlan:
    """How a linear head is trained; defaults are LEASE's and Sorcen's Tables A.2. base_lr counts at a batch of 256."""

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
    """Batches from arrays: features (N, E), or (N, V, E) of which one view per image and epoch is drawn.

    Arrays may be memory-mapped and of half precision; on a GPU they are moved there once if they fill at most half of
    what is free. The remainder that fills no batch is left out, other rows each epoch. UsageError when the batch is
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
            raise UsageError(f"batch {batch} must be between 2 and the {len(labels)} images there are")
        self.device, self.batch, self.seed = torch.device(device), batch, seed
        self.steps, self.width = len(labels) // batch, self.views[0].shape[1]
        self.labels = torch.from_numpy(np.asarray(labels, np.int64)).to(self.device)
        self.rows = resident([shared(view) for view in self.views], self.device)

    def __call__(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = permutation(len(self.labels), self.seed, Stream.PROBE_ORDER, epoch)
        views = choice_per_row(np.arange(len(order)), len(self.views), self.seed, Stream.PROBE_VIEW, epoch)
        for start in range(0, self.steps * self.batch, self.batch):
            at = order[start : start + self.batch]
            yield self._gather(at, views[at]), self.labels[torch.from_numpy(at).to(self.device)]

    def _gather(self, at: np.ndarray, views: np.ndarray) -> Tensor:
        """(B, E) float32 rows `at`, each of its own view."""
        home = self.rows[0].device
        if len(self.rows) == 1:
            found = self.rows[0].index_select(0, torch.from_numpy(at).to(home))
        else:
            found = self.rows[0].new_empty(len(at), self.width)
            for view, rows in enumerate(self.rows):
                mine = torch.from_numpy(np.flatnonzero(views == view)).to(home)
                found[mine] = rows.index_select(0, torch.from_numpy(at[views == view]).to(home))
        return found.to(self.device).float()


def views_of(features: np.ndarray | list[np.ndarray]) -> list[np.ndarray]:
    """One (N, E) array per view, from (N, E), (N, V, E) or such a list."""
    if isinstance(features, list):
        return features
    if features.ndim not in (2, 3):
        raise ValueError(f"features are {features.shape}, expected (N, E) or (N, V, E)")
    return [features] if features.ndim == 2 else [features[:, view] for view in range(features.shape[1])]


def shared(rows: np.ndarray) -> Tensor:
    """A tensor on the same memory, which may be a file's; only what cannot be shared is copied."""
    return torch.from_numpy(rows if rows.flags.writeable else np.array(rows))


def resident(rows: list[Tensor], device: torch.device) -> list[Tensor]:
    """The tensors on the GPU if they fill at most half of its free memory, else as they are."""
    if device.type != "cuda":
        return rows
    room = torch.cuda.mem_get_info(device)[0] / 2
    fits = sum(part.numel() * part.element_size() for part in rows) <= room
    return [part.to(device) for part in rows] if fits else rows


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
    batches: Batches, classes: int, plan: HeadPlan, device: torch.device | str = "cpu",
    after_epoch: Callable[[int, LinearHead], dict[str, float]] | None = None,
) -> tuple[LinearHead, Curve]:  # fmt: skip
    """Train a head; returns it in evaluation mode, and one row per epoch: epoch (from 1), loss (nats), what
    `after_epoch` (epochs done, head in evaluation mode) adds.
    """
    head = LinearHead(batches.width, classes, plan.seed).to(device)
    rate = warmup_cosine(
        scaled_lr(plan.base_lr, plan.batch), plan.warmup_epochs * batches.steps, plan.epochs * batches.steps
    )
    optimiser = lars(head, plan.momentum)
    curve: Curve = []
    step = 0
    for epoch in range(plan.epochs):
        head.train()
        nats = torch.zeros((), dtype=torch.float64, device=device)
        for x_BE, label_B in batches(epoch):
            for group in optimiser.param_groups:
                group["lr"] = rate(step)
            loss = F.cross_entropy(head(x_BE), label_B)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            decay_gradient(head, plan.weight_decay)
            optimiser.step()
            nats += loss.detach()
            step += 1
        if not torch.isfinite(nats):
            raise SemdictError(f"the loss of epoch {epoch + 1} is not finite; lower base_lr, or look at the features")
        head.eval()
        more = after_epoch(epoch + 1, head) if after_epoch else {}
        curve.append({"epoch": epoch + 1, "loss": float(nats) / batches.steps, **more})
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
    rows = shared(features)
    parts = [
        head(part.to(device).float()).topk(min(5, head.linear.out_features)).indices.cpu() for part in rows.split(batch)
    ]
    return torch.cat(parts)


def per_cent(ranked_M5: Tensor, labels_M: np.ndarray) -> dict[str, float]:
    """top1 and top5, per cent of the images whose label is the first, among the first five, of the ranked classes."""
    right_M5 = ranked_M5 == torch.from_numpy(np.asarray(labels_M, np.int64))[:, None]
    hits = {"top1": right_M5[:, 0], "top5": right_M5.any(dim=1)}
    return {name: 100.0 * float(hit_M.double().mean()) for name, hit_M in hits.items()}

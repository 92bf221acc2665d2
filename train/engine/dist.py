"""Processes of one run: rank and size, mean over ranks, gather with gradient; the only file that uses process groups.

In a single process every function is the identity. Under torchrun the same calls work over gloo (CPU) or NCCL (GPU).
"""

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as td
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from semdict.pipeline.common.device import resolve_device
from semdict.pipeline.common.errors import UsageError


@dataclass(frozen=True)
class World:
    """This process among all: rank in [0, size), and the device it computes on."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """True on the one rank that writes files and prints."""
        return self.rank == 0


@contextmanager
def process_group(device: str = "auto") -> Iterator[World]:
    """Join the process group that torchrun describes in the environment (if any), and leave it at the end.

    `device` is auto, cpu, cuda or cuda:N; UsageError for a GPU that does not exist.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    own_device = pick_device(device, int(os.environ.get("LOCAL_RANK", "0")) if size > 1 else 0)
    if own_device.type == "cuda":
        torch.cuda.set_device(own_device)
    if size == 1:
        yield World(0, 1, own_device)
        return
    td.init_process_group("nccl" if own_device.type == "cuda" else "gloo")
    try:
        yield World(td.get_rank(), td.get_world_size(), own_device)
    finally:
        td.destroy_process_group()


def pick_device(device: str, local_rank: int = 0) -> torch.device:
    """The torch device of a name of `runtime.device`; "auto" and "cuda" are this rank's GPU, if there is one."""
    device = resolve_device(device)
    if device == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UsageError(f"local rank {local_rank} has no GPU of its own: {torch.cuda.device_count()} visible")
        return torch.device("cuda", local_rank)
    return torch.device(device)


def active() -> bool:
    """True inside a process group."""
    return td.is_available() and td.is_initialized()


def rank() -> int:
    """This process's number, 0 in a single process."""
    return td.get_rank() if active() else 0


def size() -> int:
    """Number of processes."""
    return td.get_world_size() if active() else 1


def barrier() -> None:
    """Wait for every rank."""
    if active():
        td.barrier()


def total(value: Tensor) -> Tensor:
    """Sum over ranks of a tensor of any shape, without gradient."""
    value = value.detach().clone()
    if active():
        td.all_reduce(value)
    return value


def mean(value: Tensor) -> Tensor:
    """Mean over ranks of a tensor of any shape, without gradient; a NaN on one rank reaches all."""
    return total(value) / size()


def broadcast_object(value: object) -> object:
    """Rank 0's value of a small Python object (numbers, strings, lists, dicts), on every rank."""
    box = [value]
    if active():
        td.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: object) -> list:
    """Every rank's small Python object, in rank order, on every rank."""
    if not active():
        return [value]
    values: list = [None] * size()
    td.all_gather_object(values, value)
    return values


def broadcast(value: Tensor) -> None:
    """Give every rank the numbers of rank 0, in place."""
    if active():
        td.broadcast(value, src=0)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        ctx.rows = rows.shape[0]
        parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(size())]
        td.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        td.all_reduce(gradient)
        return gradient[rank() * ctx.rows : (rank() + 1) * ctx.rows]


def gather(rows: Tensor) -> Tensor:
    """(B, ...) on each rank -> (ranks * B, ...) in rank order on all; the gradient goes back to where a row came from.

    The backward pass sums the gradients that the ranks' losses have for these rows, so that a mean of per-rank losses
    over gathered rows, with gradients averaged over ranks, is the gradient of the loss of the global batch.
    """
    return _Gather.apply(rows) if size() > 1 else rows


def average_gradients(module: nn.Module) -> DistributedDataParallel:
    """Wrap a module so that its gradients are averaged over ranks.

    Buffers are not exchanged: a codebook of centroids is large and never changes.
    """
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # the older name
    return DistributedDataParallel(module, **{name: False})

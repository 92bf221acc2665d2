"""What models run on: device names, precision, images on their way to the device, and the CPU's allocator."""

import ctypes
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from semdict.pipeline.common.errors import UsageError
from semdict.pipeline.common.nearest import exact_float32

T = TypeVar("T")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(name: str) -> str:
    """The device that a name stands for: "auto" is the first GPU where there is one, else the CPU."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"runtime.device is {name}, but torch sees no GPU; set it to auto or cpu")
    return name


@contextmanager
def reduced_precision(device: torch.device, precision: str) -> Iterator[None]:
    """Autocast to `precision`, or true float32: TF32 changes which code is nearest."""
    if precision == "float32":
        with exact_float32():
            yield
    else:
        with torch.autocast(device.type, dtype=DTYPES[precision]):
            yield


def to_device(pixels: np.ndarray, device: torch.device) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in [0, 1] on `device`; copied as bytes, divided there."""
    return send(torch.from_numpy(pixels), device).permute(0, 3, 1, 2).float().div_(255)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device; the host does not wait for the copy."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def keep_freed_memory() -> None:
    """Keep large freed blocks in glibc instead of returning each to the kernel; no effect with another C library.

    On a CPU every activation is a fresh block of tens of megabytes, and the page faults of mapping it again took 30 %
    of a VQGAN forward (0.219 -> 0.147 s an image, one thread), and twice the time of decoding a token shard.
    """
    trim_threshold, mmap_threshold = -1, -3  # names of <malloc.h>
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return  # another C library: its allocator has its own rules
    mallopt(mmap_threshold, 1 << 30)
    mallopt(trim_threshold, (1 << 31) - 1)


class HostCopy:
    """Tensors on their way to the host: the copies queue behind the kernels that fill them, `arrays` waits for them.

    A plain `.cpu()` would also wait for everything that was queued since.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._copies = {name: tensor.to("cpu", non_blocking=True) for name, tensor in tensors.items()}
        self._done = None
        if any(tensor.device.type == "cuda" for tensor in tensors.values()):
            self._done = torch.cuda.Event()
            self._done.record()

    def arrays(self) -> dict[str, np.ndarray]:
        """The tensors as arrays, once they have arrived."""
        if self._done is not None:
            self._done.synchronize()
        return {name: copy.numpy() for name, copy in self._copies.items()}


def read_one_late(batches: Iterable[T], queue: Callable[[T], HostCopy]) -> Iterator[tuple[T, dict[str, np.ndarray]]]:
    """Pair each batch with the arrays of queue(batch), one batch late: the GPU has the next queued before the wait."""
    waiting: tuple[T, HostCopy] | None = None
    for batch in batches:
        copies = queue(batch)
        if waiting:
            yield waiting[0], waiting[1].arrays()
        waiting = batch, copies
    if waiting:
        yield waiting[0], waiting[1].arrays()

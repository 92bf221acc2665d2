"""Counter-based random numbers: every number of a run is a function of (seed, stream, counters), not of earlier calls.

A resumed run, another number of processes or another split of a batch into micro-batches therefore sees the same order
of rows, the same views and the same masks, and a checkpoint needs no generator state.
"""

from enum import IntEnum, unique

import numpy as np
import torch
from torch import Tensor

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


@unique
class Stream(IntEnum):
    """Every random stream of the trainers. A number is never used twice and never reused, so streams are independent.

    The comments name the counters that follow the seed and the stream.
    """

    # data loaders
    ROW_ORDER = 1  # epoch: permutation of the training rows
    VIEW = 2  # epoch, per row: which stored view of an image
    RANDOM_CROP = 3  # epoch, row, axis: crop and flip of the tokenizer's training images
    WINDOW_ORDER = 4  # epoch, rank, window: rows within a window of streamed blocks
    BLOCK_ORDER = 5  # epoch: order of the streamed blocks
    # training steps
    STEP = 11  # phase, step: masks, echoes, augmentation of a global batch
    DROPOUT = 12  # phase, step, rank, micro-batch: torch's global generator
    PICTURE_MASKS = 13  # hidden cells of the pictures of a pretraining run
    # measures of a frozen encoder
    PROBE_ORDER = 21  # epoch: rows of a linear probe on cached features
    PROBE_VIEW = 22  # epoch, per row: view of a cached feature
    CROP_ORDER = 23  # epoch: rows of a linear probe on images
    FEW_SHOT = 24  # class: which images of a class are the shots
    CROP_DROPOUT = 25  # epoch, block: torch's global generator while random crops are encoded
    # sampling
    DECODING = 31  # image: Gumbel noise and codes of iterative decoding
    CONTEXT_MASKS = 32  # image: cells to fill of task `reconstruct`
    CONTEXT_ROWS = 33  # (no seed): which real images a task starts from
    # tokenizer and fine-tuning
    CODE_RESET = 41  # step: encoder outputs that replace unused codes
    AUGMENT = 42  # epoch, row: crop, flip and RandAugment of fine-tuning
    MIXING = 43  # first row: mixup and cutmix of a micro-batch; its seed is that of the step
    # class-conditional decoder
    HELD_OUT_MASKS = 51  # first row: masks of the held-out images
    CONDITION_INIT = 52  # initial values of the new rows


def mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's output function, a bijection on uint64 arrays of any shape (Steele et al., OOPSLA 2014)."""
    with np.errstate(over="ignore"):
        x = x + _GOLDEN
        x = (x ^ (x >> np.uint64(30))) * _MIX_1
        x = (x ^ (x >> np.uint64(27))) * _MIX_2
        return x ^ (x >> np.uint64(31))


def stream_key(*counters: int) -> np.uint64:
    """64-bit key of an independent stream from whole numbers >= 0 (seed, Stream, further counters); order matters."""
    state = np.zeros((), dtype=np.uint64)
    for counter in counters:
        state = mix(state ^ mix(np.asarray(int(counter), dtype=np.uint64)))
    return np.uint64(state)


def torch_seed(*counters: int) -> int:
    """`stream_key` as a seed of a torch.Generator: an int in [0, 2^63)."""
    return int(stream_key(*counters)) >> 1


def numpy_seed(*counters: int) -> int:
    """`stream_key` as a seed of NumPy's legacy global generator: an int in [0, 2^32)."""
    return int(stream_key(*counters)) >> 32


def numpy_generator(*counters: int) -> np.random.Generator:
    """A NumPy generator (Philox) of the stream that `counters` name."""
    return np.random.Generator(np.random.Philox(key=int(stream_key(*counters))))


def torch_generator(*counters: int) -> torch.Generator:
    """A torch generator on the CPU, seeded with the stream that `counters` name."""
    return torch.Generator().manual_seed(torch_seed(*counters))


def permutation(n: int, *counters: int) -> np.ndarray:
    """(n,) int64 permutation of range(n), the same on every machine and library version; 0.1 s for 1.28 M rows."""
    return np.argsort(mix(np.arange(n, dtype=np.uint64) ^ stream_key(*counters)), kind="stable")


def choice_per_row(rows: np.ndarray, n: int, *counters: int) -> np.ndarray:
    """int64 of the shape of `rows`: a number in [0, n) per row id, independent of the other rows."""
    hashed = mix(rows.astype(np.uint64) ^ stream_key(*counters))
    return (hashed % np.uint64(n)).astype(np.int64)


class BatchGenerator(torch.Generator):
    """A torch.Generator with the range of rows of the global batch that belongs to its caller; see `rand_rows`.

    Ranks and micro-batches of one step have equal generators with another `start`, so that a number drawn once per
    batch or per group of rows (the mask ratio) is shared, and what is drawn per row belongs to that row wherever it is
    computed.
    """

    start: int  # first row, counted in the global batch
    total: int  # rows of the global batch


def batch_generator(seed: int, start: int, total: int, device: torch.device | str = "cpu") -> BatchGenerator:
    """The generator of rows [start, ...) of a global batch of `total` rows; equal seeds give equal numbers."""
    generator = BatchGenerator(device=device)
    generator.manual_seed(seed)
    generator.start, generator.total = start, total
    return generator


def rand_groups(rows: int, group: int, rng: torch.Generator) -> Tensor:
    """(rows,) float64 uniform in [0, 1): one number for every `group` consecutive rows of the global batch.

    Groups are counted from the global batch's first row, so they depend neither on ranks nor on micro-batches.
    """
    start, total = _span(rows, rng)
    uniform = torch.rand(-(-total // group), generator=rng, device=rng.device, dtype=torch.float64)
    return uniform[torch.arange(start, start + rows, device=rng.device) // group]


def rand_rows(rows: int, *shape: int, rng: torch.Generator) -> Tensor:
    """(rows, *shape) float32 uniform in [0, 1): this caller's slice of the numbers of the global batch.

    With a plain torch.Generator it is torch.rand(rows, *shape); with a BatchGenerator the whole batch is drawn and cut.
    """
    start, total = _span(rows, rng)
    return torch.rand(total, *shape, generator=rng, device=rng.device)[start : start + rows]


def _span(rows: int, rng: torch.Generator) -> tuple[int, int]:
    """First row of the caller in the global batch, and the rows of that batch; a plain generator has the whole."""
    start, total = getattr(rng, "start", 0), getattr(rng, "total", rows)
    if start + rows > total:
        raise ValueError(f"rows [{start}, {start + rows}) reach beyond the global batch of {total}")
    return start, total

"""Common to the dataloaders: the order of an epoch, a rank's share of a batch, a position that can be stored."""

from functools import lru_cache
from typing import Any

import numpy as np

from semdict.pipeline.common.errors import SemdictError, ShardError, UsageError
from semdict.train.engine.loop import Batch
from semdict.train.engine.rng import Stream, permutation


def share_of(batch: int, world: int) -> int:
    """Rows of each rank in a global batch; UsageError when they cannot be equal."""
    if batch % world:
        raise UsageError(f"a global batch of {batch} cannot be shared evenly by {world} processes")
    return batch // world


@lru_cache(maxsize=4)
def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """(n,) int64 read-only permutation of range(n) that depends on the three numbers alone."""
    order = permutation(n, seed, Stream.ROW_ORDER, epoch)
    order.flags.writeable = False
    return order


class Resumable:
    """Endless batches whose position is a number of steps; subclasses set the attributes and define `__next__`.

    A stored position is taken up again only if everything in `identity()` is the same.
    """

    batch: int  # rows of the global batch
    steps_per_epoch: int
    recipe: str  # fingerprint of the data
    left_out = 0  # rows that are never used, for their bad status
    classes = 0  # labels are below it; 0 where the data has none
    error: type[SemdictError] = ShardError
    advice = ""  # appended to the message when a position does not fit
    _step = 0  # batches handed out since the start of the run

    @property
    def epoch(self) -> int:
        """The epoch that the next batch belongs to."""
        return self._step // self.steps_per_epoch

    def __iter__(self) -> "Resumable":
        return self

    def __next__(self) -> Batch:
        raise NotImplementedError

    def close(self) -> None:
        """Release threads or processes; there are none by default."""

    def identity(self) -> dict[str, Any]:
        """Everything that decides the batches at a position."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """The position, and the data it refers to."""
        return {"step": self._step, **self.identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken; raises `error` if the data or the batches differ."""
        for name, value in self.identity().items():
            if state.get(name) != value:
                raise self.error(
                    f"the checkpoint's loader has {name} {state.get(name)}, this run has {name} {value}{self.advice}"
                )
        self._step = state["step"]

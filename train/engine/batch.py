"""What the training loop asks of a dataloader."""

from typing import Any, Protocol

Batch = dict[str, Any]  # name -> tensor with one row per image, or None where the set has no such column


class Loader(Protocol):
    """What the loop needs: endless batches of this rank's rows, and a position that can be stored."""

    batch: int  # rows of the global batch
    steps_per_epoch: int
    recipe: str  # fingerprint of the data

    def __next__(self) -> Batch: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

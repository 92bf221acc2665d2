"""What follows a run besides its log.jsonl and plots: TensorBoard, Weights & Biases, and a warning at chance.

A tracker gets every line of the log; `RunLog` writes to all of them. Another experiment tracker is one more class here
and one more line in `trackers_of`.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from semdict.pipeline.common.errors import UsageError

if TYPE_CHECKING:
    from semdict.pipeline.config.schema import Runtime

NEAR_CHANCE = 0.98  # a loss above this share of its value at chance has learned nothing


class Tracker(Protocol):
    """Follows one run, on rank 0."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """One line of the log."""

    def picture(self, step: int, name: str, image_HWC: Any) -> None:
        """A uint8 RGB array."""

    def close(self) -> None:
        """The end of the run, or of this part of it."""


TrackerFactory = Callable[[Path, int], Tracker | None]  # (folder of the run, step at which it starts or continues)


@dataclass(frozen=True)
class Chance:
    """Losses (nats) of a model that has learned nothing; `after`: steps of warm-up before they are compared.

    keys: what to change in params.yaml, for the message.
    """

    losses: Mapping[str, float]
    after: int
    keys: str


class ChanceWarning:
    """Warns once where a loss is still at chance after the warm-up and a tenth of the steps that follow it."""

    def __init__(self, name: str, chance: Chance, steps: int) -> None:
        self.name, self.chance = name, chance
        self.due = chance.after + (steps - chance.after) // 10
        self.last: int | None = None  # step of the line before, so that a line averages steps after the warm-up only
        self.done = False

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Compare the first line that averages steps after `due` alone."""
        begin, self.last = self.last, step
        if self.done or begin is None or begin < self.due:
            return
        self.done = True
        for loss, chance in self.chance.losses.items():
            if scalars.get(loss, 0.0) > NEAR_CHANCE * chance:
                print(
                    f"{self.name}: warning: after the warm-up, at step {step}, {loss} is {scalars[loss]:.3f} nats, at "
                    f"chance ({chance:.3f}): nothing is learned; raise {self.chance.keys}",
                    file=sys.stderr,
                )

    def picture(self, step: int, name: str, image_HWC: Any) -> None:
        """Nothing to compare."""

    def close(self) -> None:
        """Nothing to close."""


class TensorBoard:
    """Event files in <run>/tensorboard, without what a killed run wrote after its last checkpoint."""

    def __init__(self, folder: Path, at_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=at_step + 1 if at_step else None)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """One point of every curve."""
        for name, value in scalars.items():
            self.board.add_scalar(name, value, step)

    def picture(self, step: int, name: str, image_HWC: Any) -> None:
        """One image."""
        self.board.add_image(name, image_HWC, step, dataformats="HWC")

    def close(self) -> None:
        """Flush the event file."""
        self.board.close()


class WeightsAndBiases:
    """A run of Weights & Biases; WANDB_MODE=offline keeps it in <run>/wandb until `wandb sync`.

    A killed run continues its own curves. UsageError where wandb is not installed.
    """

    def __init__(self, folder: Path, at_step: int, project: str, name: str, settings: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise UsageError(
                "runtime.wandb needs the package wandb: pip install 'semdict[wandb]', or set runtime.wandb: null"
            ) from None
        own = folder / "wandb-id.txt"
        known = own.read_text() if at_step and own.exists() else None
        continued: dict[str, Any] = {"id": known, "resume": "allow"} if known else {}
        self.image = wandb.Image
        self.run = wandb.init(project=project, name=name, dir=str(folder), config=dict(settings), **continued)
        own.write_text(self.run.id)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """One point of every curve; steps that the run has had already are ignored by W&B."""
        self.run.log(dict(scalars), step=step)

    def picture(self, step: int, name: str, image_HWC: Any) -> None:
        """One image."""
        self.run.log({name: self.image(image_HWC)}, step=step)

    def close(self) -> None:
        """Finish the upload."""
        self.run.finish()


def tensorboard(folder: Path, at_step: int) -> Tracker | None:
    """TensorBoard's event files; None where it is not installed."""
    try:
        return TensorBoard(folder, at_step)
    except ImportError:
        return None


def trackers_of(
    runtime: "Runtime",
    name: str,
    settings: Mapping[str, Any],
    chance: Chance | None = None,
    steps: int = 0,
) -> list[TrackerFactory]:
    """The trackers that section runtime asks for, and the warning at chance; each is opened when the run starts."""
    factories: list[TrackerFactory] = []
    if runtime.tensorboard:
        factories.append(tensorboard)
    if runtime.wandb:
        factories.append(lambda folder, step: WeightsAndBiases(folder, step, runtime.wandb, name, settings))
    if chance is not None:
        factories.append(lambda _, __: ChanceWarning(name, chance, steps))
    return factories

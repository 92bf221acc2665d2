"""Batch -> loss -> optimiser step, for every trainer: one `fit` that knows nothing of models, tokens or objectives.

A trainer passes phases (a module with its objective, optimiser and learning-rate schedule: a GAN has two), a loader and
whatever else has a state. In one process or under torchrun the call is the same.
"""

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from semdict.pipeline.common.device import DTYPES, keep_freed_memory
from semdict.pipeline.common.errors import InterruptedRun, SemdictError, UsageError
from semdict.pipeline.common.files import write_json
from semdict.pipeline.common.progress import progress
from semdict.train.engine import checkpoint, dist
from semdict.train.engine.logging import RunLog, read_log
from semdict.train.engine.lr_schedule import LrSchedule
from semdict.train.engine.rng import Stream, batch_generator, torch_seed
from semdict.train.engine.trackers import TrackerFactory

if TYPE_CHECKING:
    from tqdm import tqdm

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # a batch system's end, Ctrl-C, a closed terminal
Batch = dict[str, Any]  # name -> tensor with one row per image, or None where the data has no such column


class Loader(Protocol):
    """A dataloader: endless batches of this rank's rows, and a position that can be stored."""

    batch: int  # rows of the global batch
    steps_per_epoch: int

    def __next__(self) -> Batch: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Clock:
    """The step that is being computed, counted from 0."""

    step: int = 0
    steps_per_epoch: int = 1

    @property
    def epoch(self) -> float:
        """Epochs done, in fractions."""
        return self.step / self.steps_per_epoch


START = Clock()


# (model, this rank's rows, generator of the rows' random numbers, clock) -> (mean loss over the rows, scalars to log)
Objective = Callable[[nn.Module, Batch, torch.Generator, Clock], tuple[Tensor, dict[str, Tensor]]]
# called after every step with the clock of that step and rank 0's log (None on other ranks)
Hook = Callable[[Clock, RunLog | None], None]


class Stateful(Protocol):
    """Anything a checkpoint stores: modules, averages, estimators."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


@dataclass
class Phase:
    """One optimiser with its module and objective. The phases of a step see the same batch, in order, and may add
    entries to it.

    clip: largest gradient norm, 0 = none. start: first step in which the phase takes part.
    """

    name: str
    model: nn.Module
    objective: Objective
    optimiser: torch.optim.Optimizer
    lr_schedule: LrSchedule
    clip: float = 0.0
    start: int = 0


@dataclass(frozen=True)
class Plan:
    """Length, precision and intervals of a run; `accumulate` micro-batches make one step of the loader's batch."""

    steps: int
    seed: int = 0
    accumulate: int = 1
    precision: str = "float32"
    compile: bool = False
    save_every: int = 0  # steps; 0 = only at the end
    keep: int = 2  # checkpoints
    log_every: int = 1  # steps over which logged scalars are averaged
    name: str = "train"


@dataclass
class Run:
    """Folders and identity of a run: work folder, settings and their fingerprint, folder of the reports."""

    folder: Path
    settings: dict[str, Any] = field(default_factory=dict)
    fingerprint: str = ""
    reports: Path | None = None
    trackers: Sequence[TrackerFactory] = ()
    quiet: bool = False

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints and the `last` pointer."""
        return self.folder / "checkpoints"


def fit(
    phases: Sequence[Phase],
    loader: Loader,
    plan: Plan,
    run: Run,
    world: dist.World,
    state: dict[str, Stateful],
    hooks: Sequence[Hook] = (),
    resume: bool = False,
) -> dict[str, float]:
    """Train to `plan.steps`; returns the mean of every logged scalar over the last epoch.

    state: everything that a checkpoint must store besides optimisers and loader, by name; the phases' models among it.
    hooks: called after the updates of every step: averages, pictures, measures.
    resume: continue from the last checkpoint of `run`, if there is one; bit-exactly on the CPU for the same number of
    processes. With another number the rows, views and masks of every step are the same, and without dropout the
    results differ only by the order of additions; dropout masks belong to the rank.
    Raises InterruptedRun after SIGTERM, SIGINT or SIGHUP (a checkpoint is written first), SemdictError on a non-finite
    loss. The global torch generator is re-seeded before every forward pass.
    """
    keep_freed_memory()
    return _Fit(phases, loader, plan, run, world, state, hooks).fit(resume)


class _Bound(nn.Module):
    """An objective as a module, so that DistributedDataParallel sees its forward pass."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: Batch, rng: torch.Generator, clock: Clock) -> tuple[Tensor, dict[str, Tensor]]:
        return self.objective(self.model, batch, rng, clock)


class _Fit:
    """The state of one call of `fit`."""

    def __init__(self, phases, loader, plan, run, world, state, hooks) -> None:
        if (loader.batch // world.size) % plan.accumulate:
            raise UsageError(
                f"batch {loader.batch} on {world.size} processes is not a multiple of accumulate {plan.accumulate}"
            )
        if plan.precision not in DTYPES:
            raise UsageError(f"precision {plan.precision!r} is unknown; known: {', '.join(DTYPES)}")
        self.phases, self.loader, self.plan, self.run, self.world = phases, loader, plan, run, world
        self.state, self.hooks = state, hooks
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=plan.precision == "float16")
        self.signal = 0  # number of the signal that asked for an end
        self.step = 0
        self.window: dict[str, float] = {}  # sums since the last line of the log
        self.window_steps = 0
        self.saved: Path | None = None
        self.bound: list[nn.Module] = []

    def fit(self, resume: bool) -> dict[str, float]:
        if resume:
            self._resume()
        self._prepare()
        run, plan, first = self.run, self.plan, self.world.first
        log = RunLog(run.folder, run.reports, run.trackers, self.step) if first else None
        bar = progress(plan.steps, plan.name, "step", self.step, quiet=run.quiet or not first)
        with bar, contextlib.closing(log) if log else contextlib.nullcontext(), self._signals():
            self._train(log, bar)
        dist.barrier()
        return last_epoch_means(run.folder / "log.jsonl", plan.steps, self.loader.steps_per_epoch)

    def _prepare(self) -> None:
        """Training mode, compiled blocks, and gradients averaged over ranks."""
        for phase in self.phases:
            phase.model.train()
            if self.plan.compile:
                compile_blocks(phase.model)
            bound = _Bound(phase.model, phase.objective)
            self.bound.append(dist.average_gradients(bound) if self.world.size > 1 else bound)

    def _train(self, log: RunLog | None, bar: "tqdm") -> None:
        began = time.perf_counter()
        while self.step < self.plan.steps:
            clock = Clock(self.step, self.loader.steps_per_epoch)
            micro_batches = self._micro_batches(next(self.loader))
            scalars: dict[str, float] = {}
            for index, phase in enumerate(self.phases):
                if self.step >= phase.start:
                    scalars |= self._update(index, phase, micro_batches, clock)
            for hook in self.hooks:
                hook(clock, log)
            self.step += 1
            stopping = scalars.pop("stop") > 0
            now = time.perf_counter()
            speed, began = self.loader.batch / (now - began), now
            self._log(log, scalars, speed)
            bar.set_postfix_str(f"loss {scalars['loss']:.4f}, {speed:,.0f} img/s", refresh=False)
            bar.update(1)
            if stopping or self.step == self.plan.steps or _due(self.step, self.plan.save_every):
                self._save()
            if stopping and self.step < self.plan.steps:
                raise InterruptedRun(
                    f"stopped by a signal after step {self.step} of {self.plan.steps}; everything is in {self.saved}, "
                    "the same command with --resume continues"
                )

    def _update(self, index: int, phase: Phase, micro_batches: list[Batch], clock: Clock) -> dict[str, float]:
        """One optimiser step of one phase; returns its scalars, averaged over micro-batches and ranks."""
        lr = phase.lr_schedule(clock.step)
        for group in phase.optimiser.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        phase.optimiser.zero_grad(set_to_none=True)
        losses, sums = [], {}
        for number, batch in enumerate(micro_batches):
            last = number + 1 == len(micro_batches)
            loss, scalars = self._forward_backward(index, number, batch, clock, last)
            losses.append(loss)
            for name, value in {"loss": loss, **scalars}.items():
                sums[name] = sums.get(name, 0.0) + value.detach().double() / len(micro_batches)
        self.scaler.unscale_(phase.optimiser)
        parameters = [p for group in phase.optimiser.param_groups for p in group["params"]]
        sums["grad_norm"] = nn.utils.clip_grad_norm_(parameters, phase.clip or math.inf).double()
        means = self._mean(sums)
        self._refuse_non_finite(phase, means, losses, micro_batches)
        self.scaler.step(phase.optimiser)
        self.scaler.update()
        stop = means.pop("stop")
        prefix = "" if index == 0 else f"{phase.name}_"
        return {**{prefix + name: value for name, value in {**means, "lr": lr}.items()}, "stop": stop}

    def _forward_backward(
        self, index: int, number: int, batch: Batch, clock: Clock, last: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Add one micro-batch's share to the gradients; ranks exchange them in the last one only."""
        bound, plan = self.bound[index], self.plan
        rows = self.loader.batch // self.world.size // plan.accumulate
        start = (self.world.rank * plan.accumulate + number) * rows
        device = self.world.device
        seed = torch_seed(plan.seed, Stream.STEP, index, clock.step)
        rng = batch_generator(seed, start, self.loader.batch, device)
        torch.manual_seed(torch_seed(plan.seed, Stream.DROPOUT, index, clock.step, self.world.rank, number))
        local = isinstance(bound, DistributedDataParallel) and not last
        with bound.no_sync() if local else contextlib.nullcontext():
            with torch.autocast(device.type, DTYPES[plan.precision], enabled=plan.precision != "float32"):
                loss, scalars = bound(batch, rng, clock)
            self.scaler.scale(loss / plan.accumulate).backward()
        return loss.detach(), scalars

    def _micro_batches(self, batch: Batch) -> list[Batch]:
        """This rank's rows in `accumulate` equal parts; entries without a row axis are shared by all parts."""
        if self.plan.accumulate == 1:
            return [batch]
        rows = self.loader.batch // self.world.size // self.plan.accumulate
        cut = {name: v.split(rows) for name, v in batch.items() if isinstance(v, Tensor) and v.ndim}
        return [{**batch, **{name: parts[i] for name, parts in cut.items()}} for i in range(self.plan.accumulate)]

    def _mean(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Means over ranks, and "stop" > 0 if any rank got a signal: one exchange and one wait per update."""
        names = sorted(sums)
        values = [torch.as_tensor(sums[name], dtype=torch.float64, device=self.world.device) for name in names]
        flag = torch.tensor(float(self.signal != 0), dtype=torch.float64, device=self.world.device)
        return dict(zip([*names, "stop"], dist.mean(torch.stack([*values, flag])).tolist(), strict=True))

    def _refuse_non_finite(
        self, phase: Phase, means: dict[str, float], losses: list[Tensor], micro_batches: list[Batch]
    ) -> None:
        """Stop before the update if the loss or the gradient is not finite; the message names rows and checkpoint.

        Under float16 the scaler handles gradients that overflow, so there only the loss counts.
        """
        watched = ["loss"] if self.scaler.is_enabled() else ["loss", "grad_norm"]
        if all(math.isfinite(means[name]) for name in watched):
            return
        bad = [batch for batch, loss in zip(micro_batches, losses, strict=True) if not torch.isfinite(loss)]
        own_rows = [int(row) for batch in bad or micro_batches for row in batch.get("row", ())]
        ranks = [{"rank": r, "own_loss_is_finite": finite, "rows": rows} for r, (finite, rows) in
                 enumerate(dist.gather_objects((not bad, own_rows)))]  # fmt: skip
        blamed = [rank for rank in ranks if not rank["own_loss_is_finite"]] or ranks
        rows = [row for rank in blamed for row in rank["rows"]]
        report = self.run.folder / f"non-finite-step-{self.step:08d}.json"
        if self.world.first:
            write_json(report, {"step": self.step, "phase": phase.name, "ranks": ranks,
                                "scalars": {name: str(value) for name, value in means.items()}})  # fmt: skip
        shown = ", ".join(map(str, rows[:8])) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
        raise SemdictError(
            f"{phase.name}: loss {means['loss']}, gradient norm {means['grad_norm']} at step {self.step}; nothing was "
            f"updated. Batch rows {shown} (all in {report}); last good checkpoint: {self.saved or 'none yet'}. "
            "A lower base_lr, a smaller clip or float32 usually help"
        )

    def _log(self, log: RunLog | None, scalars: dict[str, float], speed: float) -> None:
        """Add the step's scalars to the window; write its means every `log_every` steps and at the end."""
        for name, value in scalars.items():
            self.window[name] = self.window.get(name, 0.0) + value
        self.window_steps += 1
        if self.step % self.plan.log_every and self.step < self.plan.steps:
            return
        means = {name: total / self.window_steps for name, total in self.window.items()}
        if log is not None:
            log.write(self.step, means, {"images_per_second": round(speed, 2)})
        self.window, self.window_steps = {}, 0

    def _save(self) -> None:
        """Rank 0 writes; every rank waits until the file is complete."""
        if self.world.first:
            state = {
                "modules": {name: part.state_dict() for name, part in self.state.items()},
                "optimisers": {phase.name: phase.optimiser.state_dict() for phase in self.phases},
                "scaler": self.scaler.state_dict(),
                "loader": self.loader.state_dict(),
                "window": {"sums": self.window, "steps": self.window_steps},
                "world": self.world.size,
                "settings": checkpoint.plain(self.run.settings),
                "fingerprint": self.run.fingerprint,
            }
            self.saved = checkpoint.save(self.run.checkpoints, self.step, state, self.plan.keep)
        self.saved = dist.broadcast_object(self.saved)

    def _resume(self) -> None:
        path = checkpoint.last(self.run.checkpoints)
        if path is None:
            return
        state = checkpoint.load(path, self.run.fingerprint, self.run.settings)
        for name, part in self.state.items():
            part.load_state_dict(state["modules"][name])
        for phase in self.phases:
            phase.optimiser.load_state_dict(state["optimisers"][phase.name])
        self.scaler.load_state_dict(state["scaler"])
        self.loader.load_state_dict(state["loader"])
        self.window, self.window_steps = dict(state["window"]["sums"]), state["window"]["steps"]
        self.step, self.saved = state["step"], path

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM, SIGINT and SIGHUP set a flag that the next exchange spreads; the current step is finished first.

        A hang-up that the caller ignores stays ignored (nohup).
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def remember(number: int, _frame: Any) -> None:
            self.signal = number

        ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set()
        before = {number: signal.signal(number, remember) for number in ENDING if number not in ignored}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def compile_blocks(model: nn.Module) -> None:
    """torch.compile each repeated block in place (names of parameters stay); a model without any is compiled whole."""
    blocks = [block for part in model.modules() if isinstance(part, nn.ModuleList) for block in part]
    for part in blocks or [model]:
        part.compile()


def last_epoch_means(log: Path, steps: int, steps_per_epoch: int) -> dict[str, float]:
    """Mean of every scalar over the lines of a log.jsonl that fall into the last epoch."""
    rows = [row for row in read_log(log) if row["step"] > steps - steps_per_epoch]
    names = {name for row in rows for name in row} - {"step", "speed"}
    columns = {name: [row[name] for row in rows if isinstance(row.get(name), float | int)] for name in sorted(names)}
    return {name: sum(values) / len(values) for name, values in columns.items() if values}


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0

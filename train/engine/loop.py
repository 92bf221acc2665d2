"""Batch -> losses -> step, for every trainer: one `fit` that knows nothing of models, tokens or objectives.

A trainer hands over phases (a module, its objective, its optimiser, its schedule: a GAN has two), a loader, and what
else must be stored. Alone or under torchrun the call is the same.
"""

import contextlib
import inspect
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from semdict.pipeline.common.device import DTYPES
from semdict.pipeline.common.errors import InterruptedRun, SemdictError, UsageError
from semdict.pipeline.common.files import write_json
from semdict.pipeline.common.memory import keep_freed_memory
from semdict.train.engine import checkpoint, dist
from semdict.train.engine.batch import Batch, Loader
from semdict.train.engine.logging import Progress, RunLog, read_log
from semdict.train.engine.lr_schedule import LrSchedule
from semdict.train.engine.rng import Stream, batch_generator, torch_seed


@dataclass(frozen=True)
class Clock:
    """Where a run stands while a step is computed; the first step is 0."""

    step: int
    steps_per_epoch: int

    @property
    def epoch(self) -> float:
        """Epochs done, in fractions."""
        return self.step / self.steps_per_epoch


# (model, this rank's rows, a generator for their draws, where the run stands) -> (mean loss over the rows, scalars)
Objective = Callable[[nn.Module, Batch, torch.Generator, Clock], tuple[Tensor, dict[str, Tensor]]]


class Stateful(Protocol):
    """Whatever a checkpoint keeps: modules, averages, estimators."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


@dataclass
class Phase:
    """One optimiser's turn in a step. Phases take turns on the same batch, in order, and may leave things in its dict.

    clip: largest gradient norm, 0 = none. start: first step at which this phase has a turn.
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
    """How long, how precise, how often; `accumulate` micro-batches make one step of the loader's batch."""

    steps: int
    seed: int = 0
    accumulate: int = 1
    precision: str = "float32"
    compile: bool = False
    save_every: int = 0  # steps; 0 = only at the end
    keep: int = 2
    log_every: int = 1  # steps over which logged scalars are averaged
    name: str = "train"


def make_plan(name: str, cfg: Any, runtime: Any, steps: int) -> Plan:
    """A trainer's plan from its section (seed, accumulate, precision) and section `runtime` of params.yaml."""
    options = {key: getattr(cfg, key) for key in ("seed", "accumulate", "precision")}
    options |= {key: getattr(runtime, key) for key in ("compile", "save_every", "keep", "log_every")}
    return Plan(steps=steps, name=name, **options)


@dataclass
class Run:
    """Where a run lives and what it is: its work folder, its settings and their fingerprint, its reports folder."""

    folder: Path
    settings: dict[str, Any] = field(default_factory=dict)
    fingerprint: str = ""
    reports: Path | None = None
    tensorboard: bool = False
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
    kept: dict[str, Stateful],
    after_step: Sequence[Callable[[Clock, RunLog | None], None]] = (),
    resume: bool = False,
) -> dict[str, float]:
    """Train to `plan.steps`; returns the mean of every logged scalar over the last epoch.

    kept: everything with a state that a checkpoint must hold, by name; the phases' models belong in it.
    after_step: called with the step just done (and rank 0's log) once its updates are made: averages, pictures.
    resume: continue from `run.checkpoints`' last, if there is one; bit-exactly on the CPU for the same number of
    processes. On another number the rows, views and masks of every step are the same, and without dropout the
    results differ only by the order of additions; dropout's draws belong to the rank.
    Raises InterruptedRun after SIGTERM or SIGINT (a checkpoint is written first), SemdictError on a non-finite loss.
    The global torch generator is re-seeded before every forward pass.
    """
    keep_freed_memory()
    return _Fit(phases, loader, plan, run, world, kept, after_step).go(resume)


class _Bound(nn.Module):
    """An objective as a module, so that DistributedDataParallel sees its forward pass."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: Batch, rng: torch.Generator, clock: Clock) -> tuple[Tensor, dict[str, Tensor]]:
        return self.objective(self.model, batch, rng, clock)


class _Fit:
    """The state of one call of `fit`."""

    def __init__(self, phases, loader, plan, run, world, kept, after_step) -> None:
        if (loader.batch // world.size) % plan.accumulate:
            raise UsageError(
                f"batch {loader.batch} on {world.size} processes is not a multiple of accumulate {plan.accumulate}"
            )
        if plan.precision not in DTYPES:
            raise UsageError(f"precision {plan.precision!r} is unknown; known: {', '.join(DTYPES)}")
        self.phases, self.loader, self.plan, self.run, self.world = phases, loader, plan, run, world
        self.kept, self.after_step = kept, after_step
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=plan.precision == "float16")
        self.stop_signal = 0
        self.step = 0
        self.window: dict[str, float] = {}  # sums since the last line of the log
        self.window_steps = 0
        self.saved: Path | None = None
        self.bound: list[nn.Module] = []

    def go(self, resume: bool) -> dict[str, float]:
        if resume:
            self._resume()
        self._prepare()
        run, first = self.run, self.world.first
        log = RunLog(run.folder, run.reports, run.tensorboard, self.step) if first else None
        progress = Progress(self.plan.name, self.plan.steps, self.step, run.quiet or not first)
        try:
            with self._signals():
                self._train(log, progress)
        finally:
            progress.end()
            if log is not None:
                log.close()
        dist.barrier()
        return last_epoch_means(run.folder / "log.jsonl", self.plan.steps, self.loader.steps_per_epoch)

    def _prepare(self) -> None:
        """Wrap each phase for its turn: training mode, compiled blocks, gradients averaged over ranks."""
        for phase in self.phases:
            phase.model.train()
            if self.plan.compile:
                compile_blocks(phase.model)
            bound = _Bound(phase.model, phase.objective)
            self.bound.append(over_ranks(bound) if self.world.size > 1 else bound)

    def _train(self, log: RunLog | None, progress: Progress) -> None:
        began = time.perf_counter()
        while self.step < self.plan.steps:
            clock = Clock(self.step, self.loader.steps_per_epoch)
            micros = self._micro_batches(next(self.loader))
            scalars: dict[str, float] = {}
            for index, phase in enumerate(self.phases):
                if self.step >= phase.start:
                    scalars |= self._turn(index, phase, micros, clock)
            for hook in self.after_step:
                hook(clock, log)
            self.step += 1
            self._count(scalars)
            now = time.perf_counter()
            speed = self.loader.batch / (now - began)
            began = now
            if self.step % self.plan.log_every == 0 or self.step == self.plan.steps:
                self._write(log, speed)
            progress.show(self.step, scalars["loss"], speed, force=self.step == self.plan.steps)
            stopping = scalars["stop"] > 0
            if stopping or self.step == self.plan.steps or _due(self.step, self.plan.save_every):
                self._save()
            if stopping and self.step < self.plan.steps:
                raise InterruptedRun(
                    f"stopped by a signal after step {self.step} of {self.plan.steps}; everything is in {self.saved}, "
                    "the same command with --resume continues"
                )

    def _turn(self, index: int, phase: Phase, micros: list[Batch], clock: Clock) -> dict[str, float]:
        """One update of one phase; returns its scalars, averaged over micro-batches and ranks."""
        lr = phase.lr_schedule(clock.step)
        for group in phase.optimiser.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        phase.optimiser.zero_grad(set_to_none=True)
        losses, sums = [], {}
        for number, micro in enumerate(micros):
            loss, scalars = self._forward_backward(index, number, micro, clock, last=number + 1 == len(micros))
            losses.append(loss)
            for name, value in {"loss": loss, **scalars}.items():
                sums[name] = sums.get(name, 0.0) + value.detach().double() / len(micros)
        self.scaler.unscale_(phase.optimiser)
        parameters = [p for group in phase.optimiser.param_groups for p in group["params"]]
        sums["grad_norm"] = nn.utils.clip_grad_norm_(parameters, phase.clip or math.inf).double()
        means = self._mean(sums)
        self._refuse_non_finite(phase, means, losses, micros)
        self.scaler.step(phase.optimiser)
        self.scaler.update()
        stop = means.pop("stop")
        prefix = "" if index == 0 else f"{phase.name}_"
        return {**{prefix + name: value for name, value in {**means, "lr": lr}.items()}, "stop": stop}

    def _forward_backward(
        self, index: int, number: int, micro: Batch, clock: Clock, last: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Add one micro-batch's share to the gradients; ranks exchange them in the last one only."""
        bound, plan = self.bound[index], self.plan
        rows = self.loader.batch // self.world.size // plan.accumulate
        start = (self.world.rank * plan.accumulate + number) * rows
        device = self.world.device
        seed = torch_seed(plan.seed, Stream.STEP, index, clock.step)
        rng = batch_generator(seed, start, self.loader.batch, device)
        torch.manual_seed(torch_seed(plan.seed, Stream.DROPOUT, index, clock.step, self.world.rank, number))
        apart = isinstance(bound, DistributedDataParallel) and not last
        with bound.no_sync() if apart else contextlib.nullcontext():
            with torch.autocast(device.type, DTYPES[plan.precision], enabled=plan.precision != "float32"):
                loss, scalars = bound(micro, rng, clock)
            self.scaler.scale(loss / plan.accumulate).backward()
        return loss.detach(), scalars

    def _micro_batches(self, batch: Batch) -> list[Batch]:
        """This rank's rows in `accumulate` equal parts; what has no row axis is shared by all parts."""
        if self.plan.accumulate == 1:
            return [batch]
        rows = self.loader.batch // self.world.size // self.plan.accumulate
        cut = {name: v.split(rows) for name, v in batch.items() if isinstance(v, Tensor) and v.ndim}
        return [{**batch, **{name: parts[i] for name, parts in cut.items()}} for i in range(self.plan.accumulate)]

    def _mean(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """One exchange and one wait per turn: means over ranks, and whether any rank was told to stop."""
        names = sorted(sums)
        values = [torch.as_tensor(sums[name], dtype=torch.float64, device=self.world.device) for name in names]
        flag = torch.tensor(float(self.stop_signal != 0), dtype=torch.float64, device=self.world.device)
        return dict(zip([*names, "stop"], dist.mean(torch.stack([*values, flag])).tolist(), strict=True))

    def _refuse_non_finite(self, phase: Phase, means: dict[str, float], losses: list[Tensor], micros: list) -> None:
        """Stop before the update if the loss or the gradient is not finite, naming the rows and the way back.

        Under float16 the scaler handles gradients that overflow, so there only the loss counts.
        """
        watched = ["loss"] if self.scaler.is_enabled() else ["loss", "grad_norm"]
        if all(math.isfinite(means[name]) for name in watched):
            return
        bad = [micro for micro, loss in zip(micros, losses, strict=True) if not torch.isfinite(loss)]
        mine = [int(row) for micro in bad or micros for row in micro.get("row", ())]
        found = [{"rank": r, "own_loss_is_finite": ok, "rows": rows} for r, (ok, rows) in
                 enumerate(dist.collect((not bad, mine)))]  # fmt: skip
        named = [one for one in found if not one["own_loss_is_finite"]] or found
        rows = [row for one in named for row in one["rows"]]
        where = self.run.folder / f"non-finite-step-{self.step:08d}.json"
        if self.world.first:
            write_json(where, {"step": self.step, "phase": phase.name, "ranks": found,
                               "scalars": {name: str(value) for name, value in means.items()}})  # fmt: skip
        shown = ", ".join(map(str, rows[:8])) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
        raise SemdictError(
            f"{phase.name}: loss {means['loss']}, gradient norm {means['grad_norm']} at step {self.step}; nothing was "
            f"updated. Batch rows {shown} (all in {where}); last good checkpoint: {self.saved or 'none yet'}. "
            "A lower base_lr, a smaller clip or float32 are the usual ways out"
        )

    def _count(self, scalars: dict[str, float]) -> None:
        for name, value in scalars.items():
            if name != "stop":
                self.window[name] = self.window.get(name, 0.0) + value
        self.window_steps += 1

    def _write(self, log: RunLog | None, speed: float) -> None:
        means = {name: total / self.window_steps for name, total in self.window.items()}
        if log is not None:
            log.write(self.step, means, {"images_per_second": round(speed, 2)})
        self.window, self.window_steps = {}, 0

    def _save(self) -> None:
        """Rank 0 writes; everyone waits until the file is whole."""
        if self.world.first:
            state = {
                "modules": {name: thing.state_dict() for name, thing in self.kept.items()},
                "optimisers": {phase.name: phase.optimiser.state_dict() for phase in self.phases},
                "scaler": self.scaler.state_dict(),
                "loader": self.loader.state_dict(),
                "window": {"sums": self.window, "steps": self.window_steps},
                "world": self.world.size,
                "settings": checkpoint.plain(self.run.settings),
                "fingerprint": self.run.fingerprint,
            }
            self.saved = checkpoint.save(self.run.checkpoints, self.step, state, self.plan.keep)
        self.saved = dist.share(self.saved)

    def _resume(self) -> None:
        path = checkpoint.last(self.run.checkpoints)
        if path is None:
            return
        state = checkpoint.load(path, self.run.fingerprint, self.run.settings)
        for name, thing in self.kept.items():
            thing.load_state_dict(state["modules"][name])
        for phase in self.phases:
            phase.optimiser.load_state_dict(state["optimisers"][phase.name])
        self.scaler.load_state_dict(state["scaler"])
        self.loader.load_state_dict(state["loader"])
        self.window, self.window_steps = dict(state["window"]["sums"]), state["window"]["steps"]
        self.step, self.saved = state["step"], path

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT set a flag that the next exchange spreads; the step under way is finished first."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def remember(number: int, _frame: Any) -> None:
            self.stop_signal = number

        before = {number: signal.signal(number, remember) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def over_ranks(module: nn.Module) -> DistributedDataParallel:
    """Average this module's gradients over ranks; buffers stay alone: a dictionary of centroids is large and fixed."""
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # the older name
    return DistributedDataParallel(module, **{name: False})


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

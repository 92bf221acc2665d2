"""One training command from its settings to the published run; a recipe states what is different about it.

A run is identified by everything that shapes its result: the values of its section of params.yaml, its data and models,
and the code that its module imports. Until it is complete it is in work/<name>-<fingerprint>/, where the same command
finds it after a kill; then the folder replaces the output. (DVC deletes a stage's output before the stage runs.)
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from semdict.pipeline.common.digests import CARD
from semdict.pipeline.common.errors import SemdictError, UsageError
from semdict.pipeline.common.files import remove, sha256_file, sha256_json, write_json
from semdict.pipeline.common.publish import check_output, occupied, publish_staged
from semdict.pipeline.execute.code_identity import code_identity
from semdict.pipeline.execute.locks import lock
from semdict.train.engine import dist
from semdict.train.engine.checkpoint import differences, plain
from semdict.train.engine.loop import Hook, Loader, Phase, Plan, Run, Stateful, fit
from semdict.train.engine.trackers import Chance, trackers_of

if TYPE_CHECKING:
    from semdict.pipeline.config.schema import Params, Runtime

FROM_CFG = ("seed", "accumulate", "precision")  # keys of a trainer's section that the loop needs
DIGESTED = ("*.pt", "nll.json")  # files of a run that other commands read: their SHA-256 is in its card
FROM_RUNTIME = ("compile", "save_every", "keep", "log_every")


@dataclass
class Components:
    """The parts of the loop that a recipe builds.

    state: everything that a checkpoint must store, by name; the phases' models among it. hooks: called after each step.
    chance: losses of a model that has learned nothing; a run that is still there after its warm-up says so.
    """

    phases: Sequence[Phase]
    steps: int
    state: dict[str, Stateful]
    hooks: Sequence[Hook] = ()
    chance: Chance | None = None


class Recipe(Protocol):
    """One trainer's own part. The methods are called in this order, on every rank."""

    name: str  # names the work folder, as in work/pretrain-lease-<fingerprint>
    cfg: Any  # its section of params.yaml

    def settings(self) -> dict[str, Any]:
        """Everything besides the code that shapes the result, as plain data: values, identities of data and models."""
        ...

    def loader(self, trainer: "Trainer") -> Loader: ...

    def build(self, loader: Loader, trainer: "Trainer") -> Components: ...

    def finish(self, components: Components, loader: Loader, trainer: "Trainer") -> dict[str, Any]:
        """Write the models into trainer.folder (rank 0) and measure them; returns further numbers of metrics.json."""
        ...


class Trainer:
    """One run of a recipe: `settings` and `fingerprint` identify it, `folder` is its work folder until it is complete.

    runtime: section `runtime` of params.yaml; no key of it is part of the identity.
    """

    def __init__(
        self,
        recipe: Recipe,
        runtime: "Runtime",
        world: dist.World,
        out: Path,
        reports: Path,
        work: Path = Path("work"),
        resume: bool = False,
    ) -> None:
        self.recipe, self.runtime, self.world, self.resume = recipe, runtime, world, resume
        self.out, self.reports, self.work = Path(out), Path(reports), Path(work)
        self.settings = plain({**recipe.settings(), "code": code_identity(type(recipe).__module__)})
        self.fingerprint = sha256_json(self.settings)[:16]
        self.folder = self.work / f"{recipe.name}-{self.fingerprint}"

    @classmethod
    def for_command(
        cls, recipe: Recipe, args: argparse.Namespace, params: "Params", world: dist.World, name: str
    ) -> "Trainer":
        """The trainer of a command line of `add_run_arguments`; `name` is the default folder in runs/.

        The folder in reports/ has the name of the run's own, so that no run overwrites another's report.
        """
        out = args.out or Path("runs") / params.preset / name
        reports = args.reports or Path("reports") / params.preset / out.resolve().name  # one run, one name
        return cls(recipe, params.runtime, world, out, reports, args.work, args.resume)

    def run(self) -> dict[str, Any]:
        """Train and publish unless this very run is complete; returns its card, the contents of run.json.

        Continues a killed run with `resume`. UsageError where `out` holds another run.
        """
        card = self._published(self.resume)
        if card is not None:
            self.log(f"{self.out} is complete with these settings; nothing to do")
            return card
        with self._locked():
            card = read_card(self.folder) or self._train()
            if self.world.first:
                write_json(self.reports / "metrics.json", card["metrics"])
                self._publish()
            dist.barrier()
        final = ", ".join(f"{name} {value:.4f}" for name, value in card["metrics"].get("final", {}).items())
        self.log(f"{self.out} is complete{': ' + final if final else ''}")
        return card

    def log(self, text: str) -> None:
        """One line on stderr, from rank 0."""
        if self.world.first:
            print(f"{self.recipe.name}: {text}", file=sys.stderr)

    def _train(self) -> dict[str, Any]:
        """Run the recipe in the work folder; returns the card, which rank 0 has written."""
        self._announce()
        recipe, cfg, runtime = self.recipe, self.recipe.cfg, self.runtime
        with closing(recipe.loader(self)) as loader:
            self.log(f"{loader.steps_per_epoch} steps an epoch of {loader.batch} images")
            components = recipe.build(loader, self)
            options = {key: getattr(cfg, key) for key in FROM_CFG}
            options |= {key: getattr(runtime, key) for key in FROM_RUNTIME}
            plan = Plan(components.steps, name=recipe.name, **options)
            trackers = trackers_of(runtime, self.out.name, self.settings, components.chance, components.steps)
            run = Run(self.folder, self.settings, self.fingerprint, self.reports, trackers)
            state, hooks = components.state, components.hooks
            final = fit(components.phases, loader, plan, run, self.world, state, hooks, resume=True)
        metrics = {"final": final, "steps": components.steps, **recipe.finish(components, loader, self)}
        return self._complete(metrics)

    def _complete(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """Write the card: settings, metrics, and the SHA-256 of every file that is read later. Last file of a run."""
        card = {"kind": self.recipe.name, "fingerprint": self.fingerprint, "settings": self.settings}
        card |= {"metrics": metrics}
        if self.world.first:
            files = (path for pattern in DIGESTED for path in self.folder.glob(pattern))
            card["files"] = {path.name: sha256_file(path) for path in sorted(files)}
            write_json(self.folder / CARD, card)
        return card

    def _published(self, resume: bool) -> dict[str, Any] | None:
        """The card of this very run if it is published; None if it must be trained.

        UsageError if `out` holds another run, or this one without `resume`.
        """
        check_output(self.out, "run")
        if not occupied(self.out):
            return None
        card = read_card(self.out)
        if card["fingerprint"] == self.fingerprint and resume:
            return card
        changed = "; ".join(differences(card["settings"], self.settings))
        reason = f"of other settings ({changed}; there -> now)" if changed else "already complete; --resume keeps it"
        raise UsageError(f"{self.out} holds a run {reason}. Give another --out, or remove that folder first")

    def _publish(self) -> None:
        """Replace `out` by the work folder without its checkpoints.

        UsageError if another run was published there meanwhile; this one stays in its work folder.
        """
        self._published(resume=True)
        remove(self.folder / "checkpoints")
        publish_staged(self.folder, self.out, "run")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Lock the run on rank 0 (BusyError in a second process); without `resume` its work folder is emptied."""
        if not self.world.first:
            dist.barrier()
            yield
            return
        with lock(self.folder.name, self.work):
            if not self.resume:
                remove(self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)
            dist.barrier()
            yield

    def _announce(self) -> None:
        """Say whether the run continues, or starts beside unfinished runs of the same recipe."""
        if (self.folder / "checkpoints").exists():
            self.log(f"continuing in {self.folder}")
            return
        others = [p.name for p in self.work.glob(f"{self.recipe.name}-*") if p.is_dir() and p != self.folder]
        if self.resume and others:
            self.log(f"starting anew; unfinished, of other settings or code: {', '.join(sorted(others))}")


def read_card(folder: Path) -> dict[str, Any] | None:
    """The card of a complete run in `folder`; None where there is none."""
    path = folder / CARD
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        raise SemdictError(f"{path} is damaged; remove {folder} and run again") from None


def add_run_arguments(parser: argparse.ArgumentParser, out: str, named_paths: dict[str, str] | None = None) -> None:
    """--params, --set, --name, --out, --reports, --work, --resume; `out` names the default folder in the help.

    named_paths: what --name decides, if not the folders of a run of this name.
    """
    from semdict.pipeline.config.naming import REPORT, RUN, add_name_argument
    from semdict.pipeline.config.params import add_params_arguments

    add_params_arguments(parser)
    add_name_argument(parser, **(named_paths or {"out": RUN, "reports": REPORT}))
    parser.add_argument("--out", type=Path, help=f"the complete run (default runs/<preset>/{out})")
    parser.add_argument("--reports", type=Path, help="metrics and plots (default reports/<preset>/<name of --out>)")
    parser.add_argument("--work", default="work", type=Path, help="folder of unfinished runs")
    parser.add_argument("--resume", action="store_true", help="continue a killed run; keep a complete one as it is")

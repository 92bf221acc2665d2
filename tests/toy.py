"""A trainer small enough to kill: a bag-of-tokens model over random tokens, run as `python tests/toy.py FOLDER ...`."""

import argparse
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semdict.pipeline.common.errors import SemdictError
from semdict.train.data.resident import ResidentLoader, TokenTable
from semdict.train.engine import dist
from semdict.train.engine.loop import Batch, Clock, Phase, Plan, Run, fit
from semdict.train.engine.lr_schedule import warmup_cosine
from semdict.train.engine.optim import adamw
from semdict.train.engine.rng import rand_rows

CODES, LENGTH, ROWS = 8, 6, 50


class Toy(nn.Module):
    """Guess an image's first token from what is not hidden; dropout tests that a step is repeatable."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.word, self.guess, self.drop = nn.Embedding(CODES + 1, 8), nn.Linear(8, CODES), nn.Dropout(dropout)
        rng = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3, generator=rng)


def objective(model: Toy, batch: Batch, rng: torch.Generator, _clock: Clock) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy; hidden cells are drawn from `rng`."""
    tokens_BL = batch["gen"]
    hidden_BL = rand_rows(*tokens_BL.shape, rng=rng) < 0.5
    x_BE = model.drop(model.word(tokens_BL.masked_fill(hidden_BL, CODES)).mean(dim=1))
    nats = F.cross_entropy(model.guess(x_BE), tokens_BL[:, 0])
    return nats, {"nats": nats.detach(), "hidden": hidden_BL.float().mean()}


def table(views: int = 2) -> TokenTable:
    """50 rows, of which 3 are bad."""
    rng = np.random.default_rng(0)
    status = np.zeros(ROWS, np.uint8)
    status[[4, 17, 30]] = 2
    noise = rng.integers(0, CODES, (ROWS, views, LENGTH), dtype=np.uint16)
    own = rng.integers(0, CODES, (ROWS, 1, 1), dtype=np.uint16)  # most cells of an image hold its own code
    return TokenTable.of(np.where(rng.random(noise.shape) < 0.7, own, noise), status=status, recipe="toy")


def train(folder: Path, steps: int = 30, resume: bool = False, device: str = "cpu", **options) -> dict[str, float]:
    """One run; options: dropout, accumulate, save_every, log_every, lr, step_seconds, poison (step), settings."""
    o = {"dropout": 0.0, "accumulate": 1, "save_every": 7, "log_every": 1, "lr": 5e-2, "step_seconds": 0.0} | options
    with dist.process_group(device) as world:
        model = Toy(o["dropout"])
        loader = ResidentLoader(table(), 8, 3, world.rank, world.size)
        optimiser = adamw(model, (0.9, 0.95), 0.05)

        def slow(m: Toy, batch: Batch, rng: torch.Generator, clock: Clock) -> tuple[Tensor, dict[str, Tensor]]:
            time.sleep(o["step_seconds"])
            loss, scalars = objective(m, batch, rng, clock)
            return (loss * float("nan") if clock.step == o.get("poison") else loss), scalars

        phase = Phase("model", model, slow, optimiser, warmup_cosine(o["lr"], 3, steps), clip=1.0)
        plan = Plan(steps, 1, o["accumulate"], save_every=o["save_every"], log_every=o["log_every"])
        settings = {"lr": o["lr"], "steps": steps}
        run = Run(folder, settings, str(settings), folder / "reports", quiet=True)
        return fit([phase], loader, plan, run, world, {"model": model}, resume=resume)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--resume", action="store_true")
    for name, kind in {
        "steps": int,
        "dropout": float,
        "accumulate": int,
        "save_every": int,
        "step_seconds": float,
    }.items():
        parser.add_argument("--" + name.replace("_", "-"), type=kind)
    options = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    try:
        train(**options)
    except SemdictError as error:
        if os.environ.get("RANK", "0") == "0":
            print(error, file=sys.stderr)
        sys.exit(error.exit_code)

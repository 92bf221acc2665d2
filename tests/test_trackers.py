"""What follows a run: TensorBoard, Weights & Biases offline, and the warning of a run that is still at chance."""

import math
import sys

import numpy as np
import pytest

from semdict.pipeline.common.errors import UsageError
from semdict.train.engine.logging import RunLog
from semdict.train.engine.trackers import Chance, ChanceWarning, tensorboard, trackers_of

CHANCE = Chance({"reconstruction": math.log(1024)}, after=100, keys="pretrain.base_lr")


class Runtime:
    tensorboard, wandb = False, None


def test_tensorboard_hides_steps_that_were_done_twice(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for at_step, steps in ((0, (1, 2, 3)), (2, (3,))):
        log = RunLog(tmp_path, None, [tensorboard], at_step)
        for step in steps:
            log.write(step, {"loss": float(step + at_step)}, {"images_per_second": 1.0})
        log.picture(3, "grid", np.zeros((4, 4, 3), np.uint8))
        log.close()
    board = events.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in board.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 5.0)]
    assert [e.step for e in board.Images("grid")] == [3]


def warned(losses: dict[int, float], capsys) -> list[str]:
    """The lines that a run of 1,100 steps with these losses prints; due is step 200."""
    warning = ChanceWarning("lease", CHANCE, steps=1100)
    for step, loss in losses.items():
        warning.write(step, {"reconstruction": loss, "lr": 1.0})
    return capsys.readouterr().err.splitlines()


def test_a_run_at_chance_after_its_warm_up_says_so_once(capsys):
    (line,) = warned(dict.fromkeys(range(20, 500, 20), 6.93), capsys)
    assert "at step 220, reconstruction is 6.930 nats, at chance (6.931)" in line, "the first line after step 200"
    assert "raise pretrain.base_lr" in line


def test_a_run_that_learns_or_is_still_warming_up_says_nothing(capsys):
    assert warned({step: 6.93 if step <= 200 else 6.5 for step in range(20, 500, 20)}, capsys) == []
    assert warned(dict.fromkeys(range(20, 220, 20), 6.93), capsys) == []
    assert warned({180: 6.93, 220: 6.93, 260: 6.5}, capsys) == [], "the window of step 220 holds steps before 200"


def test_a_resumed_run_is_compared_too(capsys):
    assert len(warned({400: 6.93, 420: 6.93, 440: 6.93}, capsys)) == 1


def test_the_runtime_section_chooses_the_trackers(tmp_path):
    assert trackers_of(Runtime(), "lease", {}) == []
    runtime = Runtime()
    runtime.tensorboard, runtime.wandb = True, "project"
    assert len(trackers_of(runtime, "lease", {}, CHANCE, 10)) == 3


def test_weights_and_biases_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    runtime = Runtime()
    runtime.wandb = "semdict-test"
    identities = []
    for at_step, steps in ((0, (1, 2)), (2, (3,))):  # killed after step 2
        log = RunLog(tmp_path, None, trackers_of(runtime, "lease", {"pretrain": {"lambda": 0.1}}), at_step)
        for step in steps:
            log.write(step, {"loss": 1.0 / step}, {"images_per_second": 9.0})
        identities.append(wandb.run.id)
        log.picture(steps[-1], "grid", np.zeros((4, 4, 3), np.uint8))
        log.close()
    assert identities[0] == identities[1], "a killed run continues its own curves"
    stored = list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(stored) == 2
    assert all(path.stat().st_size > 0 for path in stored)
    assert b"images_per_second" in b"".join(path.read_bytes() for path in stored)


def test_without_the_package_the_message_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    runtime = Runtime()
    runtime.wandb = "project"
    with pytest.raises(UsageError, match=r"semdict\[wandb\].*runtime\.wandb: null"):
        RunLog(tmp_path, None, trackers_of(runtime, "lease", {}))

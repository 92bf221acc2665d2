"""Checkpoints: complete or absent, plain data, of the same run, and only the newest ones."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from semdict.pipeline.common.errors import WeightsError
from semdict.train.engine import checkpoint
from semdict.train.engine.logging import RunLog, read_log

ROOT = Path(__file__).resolve().parent.parent


def state(**changes) -> dict:
    parts = {"modules": {"m": {"w": torch.arange(3.0)}}, "optimisers": {}, "scaler": {}, "loader": {"step": 1}}
    return {**parts, "settings": {"lr": 0.1, "mask": {"min": 0.5}}, "fingerprint": "f", **changes}


def test_a_saved_state_is_loaded(tmp_path):
    path = checkpoint.save(tmp_path, 12, state(), keep=2)
    loaded = checkpoint.load(checkpoint.last(tmp_path), "f", {})
    assert path.name == "step-00000012.pt" and loaded["step"] == 12 and loaded["loader"] == {"step": 1}
    assert torch.equal(loaded["modules"]["m"]["w"], torch.arange(3.0))


def test_old_checkpoints_are_deleted_and_last_is_the_newest(tmp_path):
    for step in (5, 10, 100, 1000):
        checkpoint.save(tmp_path, step, state(), keep=2)
        assert checkpoint.last(tmp_path).name == f"step-{step:08d}.pt"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last", "step-00000100.pt", "step-00001000.pt"]


def test_an_empty_folder_has_no_last_checkpoint(tmp_path):
    assert checkpoint.last(tmp_path) is None and checkpoint.last(tmp_path / "absent") is None


@pytest.mark.parametrize(
    "name", ["ab  step-00000099.pt", "ab  ../secret.pt", "", "ab  /etc/passwd", "step-00000003.pt"]
)
def test_a_pointer_to_nothing_is_named(tmp_path, name):
    folder = tmp_path / "run"
    checkpoint.save(folder, 3, state(), keep=2)
    (tmp_path / "secret.pt").write_bytes(b"x")
    (folder / "last").write_text(name)
    with pytest.raises(WeightsError, match=r"which is not in .*sha256sum step-00000003\.pt > last"):
        checkpoint.last(folder)


def test_a_flipped_bit_is_detected_and_the_other_checkpoints_are_named(tmp_path):
    """The command in the message, run as it stands, continues from the newest other checkpoint."""
    for step in (1, 2, 3):
        path = checkpoint.save(tmp_path, step, state(), keep=3)
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(WeightsError) as caught:
        checkpoint.last(tmp_path)
    message = str(caught.value)
    assert "step-00000003.pt is damaged" in message and "step-00000001.pt, step-00000002.pt" in message
    subprocess.run(message.rsplit(": ", 1)[1], shell=True, check=True)
    assert checkpoint.load(checkpoint.last(tmp_path), "f", {})["step"] == 2


def test_without_another_checkpoint_the_message_says_to_start_anew(tmp_path):
    checkpoint.save(tmp_path, 1, state(), keep=1).write_bytes(b"x")
    with pytest.raises(WeightsError, match="no other checkpoint: start anew without --resume"):
        checkpoint.last(tmp_path)


def test_another_run_is_refused_with_every_difference(tmp_path):
    path = checkpoint.save(tmp_path, 3, state(), keep=2)
    with pytest.raises(WeightsError) as caught:
        checkpoint.load(path, "g", {"lr": 0.2, "mask": {"min": 0.6}, "new": 1})
    assert "lr: 0.1 -> 0.2; mask.min: 0.5 -> 0.6; new: absent -> 1" in str(caught.value)


class Trap:
    """A pickle of this makes the reader write a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (Path.write_text, (self.target, "executed"))


def test_a_checkpoint_that_runs_code_is_refused(tmp_path):
    target = tmp_path / "executed"
    path = checkpoint.save(tmp_path / "run", 3, state(modules={"m": Trap(target)}), keep=2)
    with pytest.raises(WeightsError, match="refused and nothing in it was executed"):
        checkpoint.load(path, "f", {})
    assert not target.exists()


@pytest.mark.parametrize("keep", [0, 100, 0.5])
def test_a_damaged_file_is_named(tmp_path, keep):
    path = checkpoint.save(tmp_path, 3, state(), keep=2)
    data = path.read_bytes()
    path.write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
    with pytest.raises(WeightsError, match=r"step-00000003\.pt"):
        checkpoint.load(path, "f", {})


def test_a_file_of_another_kind_is_named(tmp_path):
    torch.save({"model": {}}, tmp_path / "m.pt")
    with pytest.raises(WeightsError, match="it lacks format, step, modules"):
        checkpoint.load(tmp_path / "m.pt", "f", {})


@pytest.mark.slow
def test_killed_while_saving(tmp_path):
    """Kill -9 at the moment the file is written, and at the moment the pointer is: the previous one stays good."""
    checkpoint.save(tmp_path, 1, state(), keep=1)
    for moment in ("torch.save", "pathlib.Path.write_text"):
        code = f"""
import os, signal, pathlib, torch
from pathlib import Path
from semdict.train.engine import checkpoint
def die(*a, **k): os.kill(os.getpid(), signal.SIGKILL)
{moment} = die
checkpoint.save(Path({str(tmp_path)!r}), 2, {{"modules": {{}}}}, keep=1)
"""
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        assert subprocess.run([sys.executable, "-c", code], env=env, check=False).returncode == -signal.SIGKILL
        assert checkpoint.load(checkpoint.last(tmp_path), "f", {})["step"] == 1


leaves = st.one_of(st.integers(-5, 5), st.none(), st.sampled_from(["", "a", "bfloat16"]))
trees = st.dictionaries(st.sampled_from("abc"), st.one_of(leaves, st.dictionaries(st.sampled_from("xy"), leaves)))


@given(trees, trees)
def test_differences_are_none_exactly_for_equal_settings(a, b):
    assert not checkpoint.differences(a, a)
    assert bool(checkpoint.differences(a, b)) == (a != b)


def test_tuples_and_lists_are_the_same_settings():
    assert checkpoint.differences({"betas": (0.9, 0.95)}, {"betas": [0.9, 0.95]}) == []
    assert checkpoint.plain({"betas": ((0.9,), 0.95)}) == {"betas": [[0.9], 0.95]}


def test_log_and_plots_are_cut_back_to_the_checkpoint(tmp_path):
    log = RunLog(tmp_path, tmp_path / "reports")
    for step in (1, 2, 3):
        log.write(step, {"loss": step / 2, "online_loss": float("nan")}, {"images_per_second": 1.0})
    log.close()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # what a kill leaves
    log = RunLog(tmp_path, tmp_path / "reports", at_step=2)
    log.write(3, {"loss": 9.0}, {"images_per_second": 1.0})
    log.close()
    assert [(row["step"], row["loss"]) for row in read_log(tmp_path / "log.jsonl")] == [(1, 0.5), (2, 1.0), (3, 9.0)]
    plot = (tmp_path / "reports" / "plots" / "loss.tsv").read_text()
    assert plot == "step\tloss\n1\t0.5\n2\t1.0\n3\t9.0\n"

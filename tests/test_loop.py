"""The loop: a killed, split or shared run gives the same numbers, and a stopped run names the reason."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from semdict.pipeline.common.errors import InterruptedRun, SemdictError, UsageError, WeightsError
from semdict.train.data.resident import ResidentLoader
from semdict.train.engine import checkpoint, dist
from semdict.train.engine.logging import read_log
from semdict.train.engine.loop import Phase, Plan, Run, fit
from semdict.train.engine.lr_schedule import scaled_lr, warmup_cosine
from semdict.train.engine.optim import adamw, parameter_groups
from tests import toy

ROOT = Path(__file__).resolve().parent.parent
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def start(folder: Path, *options: str, processes: int = 1) -> subprocess.Popen:
    """tests/toy.py as a program of its own, under torchrun where there are several processes."""
    runner = [sys.executable] if processes == 1 else [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
    ]  # fmt: skip
    command = [*runner, str(ROOT / "tests" / "toy.py"), str(folder), *options]
    return subprocess.Popen(command, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def parameters(folder: Path) -> dict[str, torch.Tensor]:
    """The model of the last checkpoint."""
    return checkpoint.load_checkpoint(checkpoint.last(folder / "checkpoints"))["modules"]["model"]


def curve(folder: Path, name: str = "loss") -> list[float]:
    return [row[name] for row in read_log(folder / "log.jsonl")]


def wait_for(path: Path, process: subprocess.Popen, seconds: float = 60.0) -> None:
    """Wait until the file exists."""
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None and time.monotonic() < end, process.stderr.read()
        time.sleep(0.02)


def test_loss_falls_and_a_second_run_is_equal(tmp_path):
    first, second = toy.train(tmp_path / "a", steps=60), toy.train(tmp_path / "b", steps=60)
    assert first == second
    losses = curve(tmp_path / "a")
    assert len(losses) == 60 and sum(losses[-10:]) < sum(losses[:10]) - 0.5
    assert all(torch.equal(a, b) for a, b in zip(*(parameters(tmp_path / n).values() for n in "ab"), strict=True))


def test_kill_9_and_resume_is_bit_exact(tmp_path):
    """A real kill, dropout on, checkpoints at other steps than the log's lines end."""
    toy.train(tmp_path / "whole", steps=30, dropout=0.3, save_every=7)
    broken = tmp_path / "broken"
    process = start(broken, "--steps", "30", "--dropout", "0.3", "--save-every", "7", "--step-seconds", "0.03")
    wait_for(broken / "checkpoints" / "step-00000014.pt", process)
    process.kill()
    process.wait()
    reached = len(curve(broken))
    assert 14 <= reached < 30
    toy.train(broken, steps=30, dropout=0.3, save_every=7, resume=True)
    expected, resumed = parameters(tmp_path / "whole"), parameters(broken)
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    assert curve(broken) == curve(tmp_path / "whole")
    plots = [tmp_path / name / "reports" / "plots" / "loss.tsv" for name in ("whole", "broken")]
    assert plots[0].read_text() == plots[1].read_text()


def test_log_windows_survive_a_resume(tmp_path):
    """Lines average 5 steps, checkpoints fall between: the sums must survive."""
    toy.train(tmp_path / "whole", steps=20, log_every=5, save_every=3)
    folder = tmp_path / "cut"
    toy.train(folder, steps=20, log_every=5, save_every=3)
    checkpoint.point_to(folder / "checkpoints" / "step-00000018.pt")
    toy.train(folder, steps=20, log_every=5, save_every=3, resume=True)
    assert curve(folder) == curve(tmp_path / "whole")


@pytest.mark.parametrize("processes", [1, 2])
def test_micro_batches_and_processes_do_not_change_the_curve(tmp_path, processes):
    """Micro-batches, processes and both at once see the same rows and masks as one process with the whole batch."""
    toy.train(tmp_path / "one", steps=12)
    if processes == 1:
        toy.train(tmp_path / "other", steps=12, accumulate=4)
    else:
        process = start(tmp_path / "other", "--steps", "12", "--accumulate", "2", processes=2)
        assert process.wait(120) == 0, process.stderr.read()
    for name in ("loss", "hidden", "grad_norm"):
        assert curve(tmp_path / "other", name) == pytest.approx(curve(tmp_path / "one", name), rel=2e-5)
    assert len(set(curve(tmp_path / "one", "hidden"))) > 3


def test_resume_with_another_number_of_processes(tmp_path):
    toy.train(tmp_path / "one", steps=14, save_every=7)
    folder = tmp_path / "two"
    toy.train(folder, steps=14, save_every=7)
    checkpoint.point_to(folder / "checkpoints" / "step-00000007.pt")
    process = start(folder, "--steps", "14", "--save-every", "7", "--resume", processes=2)
    assert process.wait(120) == 0, process.stderr.read()
    assert curve(folder) == pytest.approx(curve(tmp_path / "one"), rel=2e-5)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_writes_a_checkpoint_and_ends_the_run(tmp_path, sent):
    process = start(tmp_path, "--steps", "2000", "--step-seconds", "0.01", "--save-every", "0")
    wait_for(tmp_path / "log.jsonl", process)
    time.sleep(0.3)
    process.send_signal(sent)
    assert process.wait(60) == InterruptedRun.exit_code
    message, state = process.stderr.read(), checkpoint.load_checkpoint(checkpoint.last(tmp_path / "checkpoints"))
    assert 0 < state["step"] < 2000 and f"step {state['step']}" in message and "--resume" in message
    assert len(curve(tmp_path)) == state["step"]


def test_an_ignored_hang_up_stays_ignored(tmp_path):
    """nohup: the process goes on after SIGHUP."""
    code = "import signal, sys; from pathlib import Path; signal.signal(signal.SIGHUP, signal.SIG_IGN); "
    code += "from tests import toy; toy.train(Path(sys.argv[1]), steps=60, step_seconds=0.02)"
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=ENV, stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path / "log.jsonl", process)
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 0, process.stderr.read()
    assert len(curve(tmp_path)) == 60


def test_a_non_finite_loss_stops_before_the_update(tmp_path):
    with pytest.raises(SemdictError) as caught:
        toy.train(tmp_path, steps=30, poison=17, save_every=7)
    message = str(caught.value)
    assert "step 17" in message and "step-00000014.pt" in message
    report = json.loads((tmp_path / "non-finite-step-00000017.json").read_text())
    loader = ResidentLoader(toy.table(), 8, 3)
    rows = [next(loader)["row"].tolist() for _ in range(18)][-1]
    assert report["ranks"] == [{"rank": 0, "own_loss_is_finite": False, "rows": rows}]
    assert all(str(row) in message for row in rows)


def test_other_settings_are_refused(tmp_path):
    toy.train(tmp_path, steps=8)
    with pytest.raises(WeightsError, match=r"lr: 0.05 -> 0.02.*without --resume"):
        toy.train(tmp_path, steps=8, lr=0.02, resume=True)


def test_an_uneven_share_is_refused(tmp_path):
    with pytest.raises(UsageError, match="multiple of accumulate 3"):
        toy.train(tmp_path, accumulate=3)


def test_two_phases_of_a_step(tmp_path):
    """A generator and a critic: each phase updates its own parameters, the critic starts late and sees the batch."""
    torch.manual_seed(0)
    maker, critic = nn.Linear(4, 4), nn.Linear(4, 1)
    moved: list[tuple[bool, bool]] = []

    def make(m, batch, rng, clock):
        batch["fake"] = m(torch.rand(8, 4, generator=rng))
        return critic(batch["fake"]).mean(), {}

    def judge(c, batch, rng, clock):
        return -c(batch["fake"].detach()).mean(), {}

    def watch(clock, _log):
        now = [maker.weight.detach().clone(), critic.weight.detach().clone()]
        moved.append(tuple(not torch.equal(a, b) for a, b in zip(before, now, strict=True)))
        before[:] = now

    before = [maker.weight.detach().clone(), critic.weight.detach().clone()]
    phases = [
        Phase("maker", maker, make, adamw(maker, (0.9, 0.95), 0.0), lambda step: 0.1),
        Phase("critic", critic, judge, adamw(critic, (0.9, 0.95), 0.0), lambda step: 0.1, start=2),
    ]
    loader = ResidentLoader(toy.table(), 8, 0)
    state = {"maker": maker, "critic": critic}
    world = dist.World(0, 1, torch.device("cpu"))
    means = fit(phases, loader, Plan(4, save_every=0), Run(tmp_path, quiet=True), world, state, [watch])
    assert moved == [(True, False), (True, False), (True, True), (True, True)]
    assert {"loss", "critic_loss", "critic_lr"} <= means.keys()


def test_schedule_is_a_ramp_and_half_a_cosine():
    lr = warmup_cosine(2.0, 10, 110, floor=0.5)
    assert [lr(0), lr(5), lr(10), lr(60), lr(110), lr(200)] == pytest.approx([0, 1, 2, 1.25, 0.5, 0.5])
    assert scaled_lr(1.5e-4, 4096) == pytest.approx(2.4e-3)


def test_weight_decay_follows_timms_rule():
    """timm decides by shape and the name `bias`: embedding tables and positions are decayed (MAGE, LEASE)."""
    from timm.optim import param_groups_weight_decay

    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Embedding(5, 4))
    model.register_parameter("pos_embed", nn.Parameter(torch.zeros(1, 4, 4)))
    spared_by_timm, decayed_by_timm = param_groups_weight_decay(model, 0.05)
    decayed, spared = parameter_groups(model, 0.05)
    for ours, theirs in ((decayed, decayed_by_timm), (spared, spared_by_timm)):
        assert ours["weight_decay"] == theirs["weight_decay"]
        assert {id(p) for _, p in ours["params"]} == {id(p) for p in theirs["params"]}
    assert {name for name, _ in decayed["params"]} == {"0.weight", "2.weight", "pos_embed"}


def test_tables_can_be_spared_from_weight_decay():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Embedding(5, 4))
    model.register_parameter("pos_embed", nn.Parameter(torch.zeros(1, 4, 4)))
    decayed, spared = parameter_groups(model, 0.05, decay_tables=False)
    assert [name for name, _ in decayed["params"]] == ["0.weight"] and decayed["weight_decay"] == 0.05
    assert {name for name, _ in spared["params"]} == {"0.bias", "1.weight", "1.bias", "2.weight", "pos_embed"}
    assert spared["weight_decay"] == 0.0


def test_training_needs_torch_only():
    """None in sys.modules makes an import fail."""
    names = ["zarr", "dvc", "dask", "distributed", "faiss", "webdataset", "pyarrow", "pydantic", "yaml", "tensorboard"]
    block = f"import sys; sys.modules.update(dict.fromkeys({names}))"
    trainer = "import semdict.train.engine.loop, semdict.train.masked.pretrain, semdict.train.data.streaming"
    code = f"{block}; {trainer}"
    done = subprocess.run([sys.executable, "-c", code], env=ENV, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

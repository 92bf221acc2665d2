"""kill -9 anywhere, a lost worker, a second run, a full disk: the next run writes the same bytes."""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from semdict.pipeline.shards import verify_shards
from semdict.train.engine.model_file import save_model
from semdict.train.vcq.tokenizer import PRESETS, Tokenizer1d
from tests import tiny

KILLS = 24
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("world")
    tiny.make_world(root, encode={"chunk": 1, "batch": 1}, runtime={"workers": 1})
    tiny.run_until_centroids(root)
    return root


@pytest.fixture
def copy(world, tmp_path) -> Path:
    root = tmp_path / "copy"
    shutil.copytree(world, root, ignore=shutil.ignore_patterns("shards", "work", "reports"))
    return root


@pytest.fixture(scope="module")
def reference(world) -> dict[str, str]:
    assert tiny.semdict(world, "encode") == 0
    return tiny.digest(world / "shards" / "tiny")


@pytest.fixture(scope="module")
def child_reference(world, tmp_path_factory) -> dict[str, str]:
    """Of a run in a process of its own: the random VQGAN has nearly tied codes, which settings of torch may turn."""
    root = tmp_path_factory.mktemp("child") / "copy"
    shutil.copytree(world, root, ignore=shutil.ignore_patterns("shards", "work", "reports"))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-m", "semdict", "encode"], cwd=root, env=env, check=True, capture_output=True)
    return tiny.digest(root / "shards" / "tiny")


# One process imports everything once and forks a child per run: a child starts in no time, dies as any process does.
FORK_SERVER = """
import os, sys, torch
torch.set_num_threads(1)
import semdict.pipeline.encode.stage, semdict.train.vcq.encode
from semdict.cli import main
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        os._exit(main(line.split()))
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class ForkServer:
    """Starts `semdict ...` of the source tree `code` in `root`; exit codes are negative for a killed run."""

    def __init__(self, root: Path, code: Path = ROOT):
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(code)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", FORK_SERVER],
            cwd=root,
            env=env,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    def start(self, args: str) -> int:
        """The process id of a run that has just begun."""
        self.process.stdin.write(args + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def wait(self) -> int:
        """Its exit code."""
        return int(self.process.stdout.readline())

    def kill(self, pid: int) -> int:
        with suppress(ProcessLookupError):  # it has ended already
            os.kill(pid, signal.SIGKILL)
        return self.wait()

    def run(self, args: str) -> int:
        self.start(args)
        return self.wait()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


@pytest.fixture
def server(copy):
    child = ForkServer(copy)
    yield child
    child.close()


def progress(root: Path) -> int:
    """Finished chunks of an encode run, and one more once it writes the shards."""
    chunks = len(list((root / "work").glob("*encode-*/chunk-??????.npz")))
    return chunks + bool(list((root / "shards").glob("tiny*.part")))


@pytest.mark.slow
def test_runs_killed_at_random_points_end_in_the_same_bytes(copy, server, child_reference):
    """Each run is killed a random moment after a random further step: start-up, chunks, assembling, publishing."""
    rng, killed = random.Random(0), 0
    while killed < KILLS:
        shutil.rmtree(copy / "shards", ignore_errors=True)
        for _ in range(8):
            pid, target = server.start("encode"), min(progress(copy) + rng.randrange(4), 13)
            while progress(copy) < target and Path(f"/proc/{pid}").exists():
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.05))
            killed += server.kill(pid) == -signal.SIGKILL
        assert server.run("encode") == 0
        assert tiny.digest(copy / "shards" / "tiny") == child_reference
        assert [p.name for p in (copy / "shards").iterdir()] == ["tiny"], "leftovers are removed"
    assert not list((copy / "work").glob("encode-*")), "the work folder is swept once the shards stand"


def test_chunks_finished_before_a_kill_are_not_computed_again(copy, server, child_reference):
    """Half of the chunks are done before a kill; the next run uses the very same files."""
    done = killed_at(copy, server, 6)
    assert 6 <= len(done) < 12
    stamps = {path: path.stat().st_ino for path in done}
    seen: dict[Path, int] = {}
    assert _run_and_watch(server, "encode", copy, seen) == 0
    assert stamps.items() <= seen.items()
    assert tiny.digest(copy / "shards" / "tiny") == child_reference


def killed_at(root: Path, server: ForkServer, chunks: int, command: str = "encode") -> list[Path]:
    """Kill an encode run as soon as it has finished `chunks` chunks; returns the files of these."""
    pid = server.start(command)
    while progress(root) < chunks and Path(f"/proc/{pid}").exists():
        time.sleep(0.001)
    server.kill(pid)
    return list((root / "work").glob("*encode-*/chunk-??????.npz"))


def _run_and_watch(server: ForkServer, args: str, root: Path, seen: dict[Path, int]) -> int:
    """Run to the end; `seen` gets the last inode of every chunk file."""
    pid = server.start(args)
    while True:
        for path in (root / "work").glob("*encode-*/chunk-??????.npz"):
            with suppress(FileNotFoundError):
                seen[path] = path.stat().st_ino
        if not Path(f"/proc/{pid}").exists():
            return server.wait()
        time.sleep(0.002)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["encode", "vcq encode"])
def test_a_run_continues_across_an_edited_comment_and_not_across_edited_code(copy, tmp_path, command):
    """Killed, a comment and a docstring edited: its chunks are used. Killed, a statement added: none of them is."""
    code = tmp_path / "code"
    for folder in ("pipeline", "train", "semdict"):
        shutil.copytree(ROOT / folder, code / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pipeline", "train"):  # the copy's folders under their import names, before an installed package's
        if not (code / "semdict" / name).exists():
            (code / "semdict" / name).symlink_to(f"../{name}")
    vcq = {"chunk": 1, "batch": 1, "views": ["centre"], "psnr_floor": 0.0, "psnr_images": 2}
    tiny.write_params(copy, encode={"chunk": 1, "batch": 1}, vcq_encode=vcq, runtime={"workers": 1})
    tokenizer = copy / "runs" / "tiny" / "vcq" / "tokenizer.pt"
    tokenizer.parent.mkdir(parents=True)
    save_model(tokenizer, Tokenizer1d(replace(PRESETS["tiny"], image_size=256, patch=64)), {})
    server, crops = ForkServer(copy, code), code / "pipeline" / "images" / "crops.py"
    try:
        for edit, kept in (
            (lambda text: text.replace('"""', '"""Edited. ', 1) + "# a comment at the end\n", True),
            (lambda text: text + "_ADDED = 1\n", False),
        ):
            shutil.rmtree(copy / "shards", ignore_errors=True)
            before = {path: path.stat().st_ino for path in killed_at(copy, server, 4, command)}
            assert before
            crops.write_text(edit(crops.read_text()))
            after: dict[Path, int] = {}
            assert _run_and_watch(server, command, copy, after) == 0
            assert before.items() <= after.items(), "finished chunks are not written again"
            anew = {path.name for path in after if path.parent not in {old.parent for old in before}}
            assert len(anew) == (0 if kept else 12), "other code computes every chunk"
    finally:
        server.close()


def test_stale_partial_output_of_other_parameters_is_never_mixed_in(copy, server, child_reference):
    small = {"encode": {"chunk": 1, "batch": 1}, "runtime": {"workers": 1}}
    tiny.write_params(copy, **small, pixels={"crop": {"resize-larger": 1.14}})
    assert killed_at(copy, server, 2), "there must be something stale"
    tiny.write_params(copy, **small)
    assert server.run("encode") == 0
    assert tiny.digest(copy / "shards" / "tiny") == child_reference


@pytest.mark.parametrize("weights", ["vqgan.ckpt", "teacher.pth"])
def test_other_weights_start_anew(copy, server, child_reference, weights):
    make = tiny.make_vqgan if weights == "vqgan.ckpt" else tiny.make_teacher
    make(copy / weights, seed=1)
    assert killed_at(copy, server, 2)
    make(copy / weights, seed=0)
    assert server.run("encode") == 0
    assert tiny.digest(copy / "shards" / "tiny") == child_reference


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_cleanly_with_a_non_zero_status(copy, number, reference):
    command = [sys.executable, "-m", "semdict", "encode"]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    with subprocess.Popen(command, cwd=copy, env=env, stderr=subprocess.PIPE, text=True) as child:
        deadline = time.monotonic() + 120
        while not list((copy / "work").glob("*encode-*/chunk-*.npz")) and time.monotonic() < deadline:
            time.sleep(0.01)
        child.send_signal(number)
        _, errors = child.communicate(timeout=120)
    assert child.returncode == 130, errors
    assert "interrupted" in errors
    assert "Traceback" not in errors
    assert not (copy / "shards" / "tiny").exists()
    assert not list(copy.rglob("*.part")), "no temporary file is left"
    assert not list(copy.rglob("*.lock")), "no lock is left"
    assert tiny.semdict(copy, "encode") == 0
    assert tiny.digest(copy / "shards" / "tiny") == reference


def test_the_second_of_two_runs_is_refused(copy):
    command = [sys.executable, "-m", "semdict", "encode"]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    with subprocess.Popen(command, cwd=copy, env=env, stderr=subprocess.DEVNULL) as first:
        while not (copy / "work" / "locks" / "encode-tiny.lock").exists():
            time.sleep(0.01)
        first.send_signal(signal.SIGSTOP)  # it would be done before the second has started
        second = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True, check=False)
        first.send_signal(signal.SIGCONT)
        assert first.wait() == 0
    assert second.returncode == 1
    assert f'"pid": {first.pid}' in second.stderr
    assert verify_shards(copy / "shards" / "tiny").ok


def test_a_full_disk_is_named_and_the_run_continues_later(copy, reference, monkeypatch, capsys):
    from semdict.pipeline.execute import store as work

    real, written = work.np.savez, []

    def savez(file, **arrays):
        written.append(1)
        if len(written) > 3:
            raise OSError(28, "No space left on device")
        real(file, **arrays)

    monkeypatch.setattr(work.np, "savez", savez)
    assert tiny.semdict(copy, "encode") == 1
    error = capsys.readouterr().err
    assert "chunk-000003.npz cannot be written: no space left" in error and "Traceback" not in error
    monkeypatch.undo()
    assert tiny.semdict(copy, "encode") == 0
    assert tiny.digest(copy / "shards" / "tiny") == reference


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_a_killed_dask_worker_changes_nothing(copy, child_reference):
    """Two workers in processes of their own join a scheduler; one is killed in mid-run."""
    address = f"tcp://127.0.0.1:{free_port()}"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    quiet = {"cwd": copy, "env": env, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    dask = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", address, "--no-dashboard"]
    worker = [sys.executable, "-m", "distributed.cli.dask_worker", address, "--nthreads", "1", "--no-nanny"]
    worker += ["--no-dashboard", "--death-timeout", "60"]
    scheduler = subprocess.Popen(dask, **quiet)
    workers = [subprocess.Popen(worker, **quiet) for _ in range(2)]
    try:
        command = [sys.executable, "-m", "semdict", "encode", "--scheduler", address]
        run = subprocess.Popen(command, cwd=copy, env=env, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 180
        while len(list((copy / "work").glob("*encode-*/chunk-*.npz"))) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        workers[0].kill()
        _, errors = run.communicate(timeout=180)
        assert run.returncode == 0, errors
    finally:
        for process in (*workers, scheduler):
            process.kill()
            process.wait()
    assert tiny.digest(copy / "shards" / "tiny") == child_reference

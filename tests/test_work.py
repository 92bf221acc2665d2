"""Chunks, executors, locks and fingerprints: done chunks are kept, stale ones never match, a second run is refused."""

import ast
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from semdict.pipeline.common.errors import BusyError, SemdictError
from semdict.pipeline.common.files import atomic_write
from semdict.pipeline.execute import dask as on_dask
from semdict.pipeline.execute import processes
from semdict.pipeline.execute.executor import run_chunks
from semdict.pipeline.execute.locks import lock
from semdict.pipeline.execute.store import Chunk, ChunkStore, fingerprint, split_rows


@dataclass
class Doubler:
    """A job whose chunks hold 2 * row; records the chunks it was asked for."""

    fingerprint: str = "abc"
    asked: list[int] = field(default_factory=list)

    def open(self):
        return self

    def process(self, chunks, advance):
        for chunk in chunks:
            self.asked.append(chunk.index)
            advance(len(chunk), 0)
            yield chunk, {"value": 2 * np.arange(chunk.start, chunk.stop), "status": np.zeros(len(chunk), np.uint8)}


@given(rows=st.integers(0, 10_000), size=st.integers(1, 5_000))
def test_chunks_partition_the_rows(rows, size):
    chunks = split_rows(rows, size)
    assert [row for c in chunks for row in range(c.start, c.stop)] == list(range(rows))
    assert all(0 < len(c) <= size for c in chunks)
    assert [c.index for c in chunks] == list(range(len(chunks)))


def test_finished_chunks_are_not_computed_again(tmp_path):
    store, chunks, job = ChunkStore(tmp_path, "s", "abc"), split_rows(10, 3), Doubler()
    run_chunks(job, store, chunks[:2], "in-process", lambda *_: None)
    run_chunks(job, store, chunks, "in-process", lambda *_: None)
    assert job.asked == [0, 1, 2, 3]
    values = np.concatenate([store.read(c)["value"] for c in chunks])
    assert values.tolist() == [2 * i for i in range(10)]


@pytest.mark.parametrize("scheduler", ["in-process", "local-1"])
def test_every_chunk_is_reported_once_with_its_arrays(tmp_path, scheduler):
    """Chunks that are done already and chunks that are computed, in this process and in another."""
    store, chunks, reports, progress = ChunkStore(tmp_path, "s", "abc"), split_rows(10, 3), {}, []
    run_chunks(Doubler(), store, chunks[:2], "in-process", lambda *_: None)

    def finished(chunk, arrays):
        assert chunk not in reports
        reports[chunk] = arrays["value"].tolist()

    run_chunks(Doubler(), store, chunks, scheduler, lambda done, bad: progress.append((done, bad)), finished)
    assert reports == {c: [2 * i for i in range(c.start, c.stop)] for c in chunks}
    assert sorted(progress) == [(1, 0), (3, 0), (3, 0), (3, 0)]


def test_a_local_worker_that_dies_while_it_starts_is_started_again(tmp_path, monkeypatch, capsys):
    """The first attempt's worker ends at once; without a second attempt the run would end with "Nanny failed"."""
    real, attempts = on_dask.worker_options, []

    def options(index, gpus, count):
        attempts.append(index)
        fatal = {"preload": ["import os; os._exit(3)"]} if len(attempts) == 1 else {}
        return {**real(index, gpus, count), **fatal}

    monkeypatch.setattr(on_dask, "worker_options", options)
    store, chunks = ChunkStore(tmp_path, "s", "abc"), split_rows(4, 2)
    run_chunks(Doubler(), store, chunks, "local-1", lambda *_: None)
    assert len(attempts) == 2
    assert "starting anew" in capsys.readouterr().err
    assert all(store.read_if_done(c) is not None for c in chunks)


def test_a_folder_that_workers_do_not_share_is_named(tmp_path, monkeypatch):
    """Chunks that a worker finished elsewhere: the file is not where this process looks."""
    store = ChunkStore(tmp_path, "s", "abc")
    monkeypatch.setattr(ChunkStore, "read_if_done", lambda self, chunk: None)
    with pytest.raises(SemdictError, match="must share the project's folder"):
        run_chunks(Doubler(), store, split_rows(2, 2), "local-1", lambda *_: None)


def test_each_worker_sees_one_of_the_gpus_that_this_process_may_use(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, GPU-8d1a,7")  # the third is none that CUDA knows
    assert processes.visible_gpus() == ["5", "GPU-8d1a"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert processes.visible_gpus() == ["0", "1"]
    seen = [on_dask.worker_options(i, ["5", "GPU-8d1a"], 3)["env"]["CUDA_VISIBLE_DEVICES"] for i in range(3)]
    assert seen == ["5", "GPU-8d1a", "5"]
    assert "CUDA_VISIBLE_DEVICES" not in on_dask.worker_options(0, [], 1)["env"]


def test_one_file_imports_dask():
    root = Path(__file__).resolve().parent.parent
    importing = set()
    for path in (p for folder in ("pipeline", "train") for p in (root / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            if any(name.split(".")[0] in ("dask", "distributed") for name in names):
                importing.add(path.relative_to(root).as_posix())
    assert importing == {"pipeline/execute/dask.py"}


def test_another_recipe_never_sees_the_chunks(tmp_path):
    chunks = split_rows(4, 2)
    run_chunks(Doubler(), ChunkStore(tmp_path, "s", "abc"), chunks, "in-process", lambda *_: None)
    assert not any(ChunkStore(tmp_path, "s", "abd").read_if_done(c) for c in chunks)


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[:-30] + b"\0" * 30])
def test_a_damaged_chunk_is_computed_again(tmp_path, damage):
    store, (chunk,) = ChunkStore(tmp_path, "s", "abc"), split_rows(100, 100)
    run_chunks(Doubler(), store, [chunk], "in-process", lambda *_: None)
    store.path(chunk).write_bytes(damage(store.path(chunk).read_bytes()))
    job = Doubler()
    run_chunks(job, store, [chunk], "in-process", lambda *_: None)
    assert job.asked == [0]
    assert store.read(chunk)["value"][-1] == 198


def test_a_chunk_with_a_flipped_bit_is_removed(tmp_path):
    store, (chunk,) = ChunkStore(tmp_path, "s", "abc"), split_rows(1000, 1000)
    run_chunks(Doubler(), store, [chunk], "in-process", lambda *_: None)
    data = bytearray(store.path(chunk).read_bytes())
    data[len(data) // 3] ^= 1
    store.path(chunk).write_bytes(data)
    assert store.read_if_done(chunk) is None
    assert not store.path(chunk).exists()


def test_sweep_removes_stale_recipes_of_this_stage_only(tmp_path):
    names = [("a", fingerprint(x=1)), ("a", fingerprint(x=2)), ("a-large", fingerprint(x=1))]
    mine, stale, other = (ChunkStore(tmp_path, *name) for name in names)
    for store in (mine, stale, other):
        store.write(Chunk(0, 0, 1), {"x": np.zeros(1)})
    mine.sweep()
    assert not mine.folder.exists()
    assert not stale.folder.exists()
    assert other.read_if_done(Chunk(0, 0, 1)) is not None


def test_fingerprint_depends_on_values_not_on_key_order():
    assert fingerprint(a=1, b=[2, 3]) == fingerprint(b=[2, 3], a=1)
    assert len({fingerprint(a=1), fingerprint(a=2), fingerprint(b=1), fingerprint(a="1")}) == 4


def test_a_second_run_is_refused_with_the_process_that_holds_the_lock(tmp_path):
    refused = pytest.raises(BusyError, match=rf"already running.*{os.getpid()}")
    with lock("encode-demo", tmp_path), refused, lock("encode-demo", tmp_path):
        pass
    with lock("encode-demo", tmp_path):
        pass  # free again


def test_a_killed_run_holds_no_lock(tmp_path):
    script = (
        "import sys, time; from pathlib import Path; from semdict.pipeline.execute.locks import lock\n"
        f"with lock('x', Path({str(tmp_path)!r})):\n    print('up', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "up\n"
        with pytest.raises(BusyError), lock("x", tmp_path):
            pass
        child.kill()
        child.wait()
    with lock("x", tmp_path):
        pass


def interrupted(number: signal.Signals, before: str = "") -> tuple[int, str]:
    """Exit status and stderr of a process that gets a signal inside the block."""
    script = (
        f"import signal, time\nfrom semdict.pipeline.execute.locks import interrupt_on_signals\n{before}\n"
        "with interrupt_on_signals():\n    print('up', flush=True)\n    time.sleep(2 if SHORT else 60)\n"
    ).replace("SHORT", str(bool(before)))
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        child.stdout.readline()
        start = time.monotonic()
        child.send_signal(number)
        _, errors = child.communicate()
        assert time.monotonic() - start < 30
    return child.returncode, errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_end_a_block_like_ctrl_c(number):
    status, errors = interrupted(number)
    assert status != 0
    assert "KeyboardInterrupt" in errors


def test_nohup_is_respected():
    assert interrupted(signal.SIGHUP, "signal.signal(signal.SIGHUP, signal.SIG_IGN)") == (0, "")


def test_an_error_while_writing_leaves_the_old_file_and_no_rest(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path) as staged:
        staged.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_auto_starts_a_process_per_visible_gpu_unless_one_is_named(monkeypatch):
    monkeypatch.setattr(processes, "visible_gpus", lambda: ["2", "3", "5"])
    assert processes.resolve_scheduler("auto", "auto") == "local" == processes.resolve_scheduler("auto", "cuda")
    assert processes.resolve_scheduler("auto", "cuda:1") == "in-process" == processes.resolve_scheduler("auto", "cpu")
    assert processes.resolve_scheduler("local-2", "cuda:1") == "local-2"
    assert processes.local_processes("local") == 3 and processes.local_processes("local-7") == 7
    monkeypatch.setattr(processes, "visible_gpus", lambda: ["2"])
    assert processes.resolve_scheduler("auto", "auto") == "in-process"


def test_local_processes_share_the_cores(monkeypatch):
    monkeypatch.setattr(processes, "cores", lambda: 16)
    monkeypatch.setattr(processes, "visible_gpus", lambda: ["0", "1", "2"])
    assert processes.decode_threads(0, "local") == 5 and processes.decode_threads(0, "local-32") == 1
    assert processes.decode_threads(4, "local") == 4
    assert processes.decode_threads(0, "in-process") == 0 == processes.decode_threads(0, "tcp://10.0.0.1:8786")

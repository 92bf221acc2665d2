"""Chunks, locks and fingerprints: what is done stays done, what is stale never matches, the second run is told."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from semdict.pipeline.common.errors import BusyError
from semdict.pipeline.common.files import atomic_write
from semdict.pipeline.execute.chunks import Chunk, ChunkStore, fingerprint, lock, run_chunks, split_rows


@dataclass
class Doubler:
    """A job whose chunks hold 2 * row; remembers what it was asked for."""

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


def test_another_recipe_never_sees_the_chunks(tmp_path):
    chunks = split_rows(4, 2)
    run_chunks(Doubler(), ChunkStore(tmp_path, "s", "abc"), chunks, "in-process", lambda *_: None)
    assert not any(ChunkStore(tmp_path, "s", "abd").done(c) for c in chunks)


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[:-30] + b"\0" * 30])
def test_a_damaged_chunk_is_computed_again(tmp_path, damage):
    store, (chunk,) = ChunkStore(tmp_path, "s", "abc"), split_rows(100, 100)
    run_chunks(Doubler(), store, [chunk], "in-process", lambda *_: None)
    store.path(chunk).write_bytes(damage(store.path(chunk).read_bytes()))
    job = Doubler()
    run_chunks(job, store, [chunk], "in-process", lambda *_: None)
    assert job.asked == [0]
    assert store.read(chunk)["value"][-1] == 198


def test_a_flipped_byte_in_a_chunk_is_noticed(tmp_path):
    store, (chunk,) = ChunkStore(tmp_path, "s", "abc"), split_rows(1000, 1000)
    run_chunks(Doubler(), store, [chunk], "in-process", lambda *_: None)
    data = bytearray(store.path(chunk).read_bytes())
    data[len(data) // 3] ^= 1
    store.path(chunk).write_bytes(data)
    assert not store.done(chunk)
    assert not store.path(chunk).exists()


def test_sweep_removes_stale_recipes_of_this_stage_only(tmp_path):
    names = [("a", fingerprint(x=1)), ("a", fingerprint(x=2)), ("a-large", fingerprint(x=1))]
    mine, stale, other = (ChunkStore(tmp_path, *name) for name in names)
    for store in (mine, stale, other):
        store.write(Chunk(0, 0, 1), {"x": np.zeros(1)})
    mine.sweep()
    assert not mine.folder.exists()
    assert not stale.folder.exists()
    assert other.done(Chunk(0, 0, 1))


def test_fingerprint_depends_on_values_not_on_key_order():
    assert fingerprint(a=1, b=[2, 3]) == fingerprint(b=[2, 3], a=1)
    assert len({fingerprint(a=1), fingerprint(a=2), fingerprint(b=1), fingerprint(a="1")}) == 4


def test_the_second_run_is_told_who_holds_the_lock(tmp_path):
    told = pytest.raises(BusyError, match=rf"already running.*{os.getpid()}")
    with lock("encode-demo", tmp_path), told, lock("encode-demo", tmp_path):
        pass
    with lock("encode-demo", tmp_path):
        pass  # free again


def test_a_killed_run_holds_nothing(tmp_path):
    script = (
        "import sys, time; from pathlib import Path; from semdict.pipeline.execute.chunks import lock\n"
        f"with lock('x', Path({str(tmp_path)!r})):\n    print('held', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "held\n"
        with pytest.raises(BusyError), lock("x", tmp_path):
            pass
        child.kill()
        child.wait()
    with lock("x", tmp_path):
        pass


def test_sigterm_ends_a_block_like_ctrl_c(tmp_path):
    script = (
        "import time\nfrom semdict.pipeline.execute.chunks import sigterm_interrupts\n"
        "with sigterm_interrupts():\n    print('up', flush=True)\n    time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        child.stdout.readline()
        start = time.monotonic()
        child.send_signal(signal.SIGTERM)
        _, errors = child.communicate()
        assert time.monotonic() - start < 30
    assert child.returncode != 0
    assert "KeyboardInterrupt" in errors


def test_an_error_while_writing_leaves_the_old_file_and_no_rest(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path) as staged:
        staged.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]

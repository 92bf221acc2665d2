"""Long work in resumable chunks: one lock, one folder per fingerprint, one whole file per finished chunk.

The state is on disk and nowhere else: a chunk is done when its file stands under its final name, so a killed run, a
lost Dask worker and a second start are the same case. A folder's name is the fingerprint of everything that shapes the
result, so what another recipe left behind never matches. This is the only file that knows Dask.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from zipfile import BadZipFile

import numpy as np

from semdict.pipeline.common.errors import SemdictError
from semdict.pipeline.common.files import atomic_write, hold_lock, remove, sha256_json

WORK = Path("work")
FINGERPRINT_DIGITS = 16
Advance = Callable[[int, int], None]  # (images done, bad ones among them)
Finished = Callable[["Chunk"], None]


@dataclass(frozen=True)
class Chunk:
    """Rows [start, stop) of the manifest: the unit that is computed, written and resumed whole."""

    index: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def split_rows(rows: int, size: int) -> list[Chunk]:
    """Cut `rows` into chunks of `size`; the last may be shorter."""
    return [Chunk(i, start, min(start + size, rows)) for i, start in enumerate(range(0, rows, size))]


class Worker(Protocol):
    """Computes chunks one after the other; may look ahead, must yield them in the order given."""

    def process(self, chunks: Iterable[Chunk], advance: Advance) -> Iterator[tuple[Chunk, dict[str, np.ndarray]]]: ...


class Job(Protocol):
    """A picklable description of the work; `open` loads the models, once per process."""

    fingerprint: str

    def open(self) -> Worker: ...


def fingerprint(**parts: Any) -> str:
    """16 hex digits that name a recipe: every JSON-able part that shapes the result."""
    return sha256_json(parts)[:FINGERPRINT_DIGITS]


class ChunkStore:
    """Finished chunks of one recipe: `work/<stage>-<fingerprint>/chunk-000000.npz`, each whole or absent."""

    def __init__(self, root: Path, stage: str, recipe: str):
        self.folder = Path(root).resolve() / f"{stage}-{recipe}"
        self.siblings = f"{stage}-{'[0-9a-f]' * FINGERPRINT_DIGITS}"

    def path(self, chunk: Chunk) -> Path:
        """Where a finished chunk stands."""
        return self.folder / f"chunk-{chunk.index:06d}.npz"

    def done(self, chunk: Chunk) -> bool:
        """True when the chunk is there and readable; a damaged file is thrown away and computed again."""
        if not self.path(chunk).exists():
            return False
        try:
            self.read(chunk)
        except (OSError, ValueError, BadZipFile, EOFError, KeyError):
            remove(self.path(chunk))
            return False
        return True

    def write(self, chunk: Chunk, arrays: dict[str, np.ndarray]) -> None:
        """Write one chunk aside and rename it: from here on it is done."""
        with atomic_write(self.path(chunk)) as tmp_path, tmp_path.open("wb") as file:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())

    def read(self, chunk: Chunk, *names: str) -> dict[str, np.ndarray]:
        """The arrays of a finished chunk, or those named; the zip's checksums are verified while reading."""
        with np.load(self.path(chunk), allow_pickle=False) as archive:
            return {name: archive[name] for name in names or archive.files}

    def sweep(self) -> None:
        """Delete this stage's work folders, stale recipes included; called once the output is published."""
        for folder in self.folder.parent.glob(self.siblings):
            remove(folder)


def _pass(chunk: Chunk) -> None:
    """Nobody wants to know."""


def lock(name: str, root: Path = WORK) -> AbstractContextManager[None]:
    """Hold `work/locks/<name>.lock`; BusyError names the run that holds it. A killed run holds nothing."""
    return hold_lock(Path(root) / "locks" / f"{name}.lock", name)


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """SIGTERM ends the block like Ctrl-C does: pools close, nothing half-written, non-zero status."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_chunks(
    job: Job, store: ChunkStore, chunks: Sequence[Chunk], scheduler: str, advance: Advance, finished: Finished = _pass
) -> None:
    """Compute what is missing of `chunks` and write each to `store`; `finished` sees every chunk once it is there.

    scheduler: "in-process" | "local" | "local-N" (N processes; default one per GPU) | an address "tcp://host:port".
    """
    missing = []
    for chunk in chunks:
        if store.done(chunk):
            advance(len(chunk), 0)
            finished(chunk)
        else:
            missing.append(chunk)
    if not missing:
        return
    if scheduler == "in-process":
        for chunk, arrays in job.open().process(missing, advance):
            store.write(chunk, arrays)
            finished(chunk)
    else:
        _run_on_dask(job, store, missing, scheduler, advance, finished)


_opened: dict[str, Worker] = {}  # one loaded worker per process: Dask tasks are many, models are heavy


def _compute_one(job: Job, store: ChunkStore, chunk: Chunk) -> dict:
    """A Dask task: compute one chunk unless it is there, write it, report two numbers."""
    if not store.done(chunk):
        if job.fingerprint not in _opened:
            _opened.clear()
            _opened[job.fingerprint] = job.open()
        for part, arrays in _opened[job.fingerprint].process([chunk], lambda *_: None):
            store.write(part, arrays)
    status = store.read(chunk).get("status", ())
    return {"index": chunk.index, "bad": int(np.count_nonzero(status))}


def _run_on_dask(
    job: Job, store: ChunkStore, missing: list[Chunk], scheduler: str, advance: Advance, finished: Finished
) -> None:
    """Submit every missing chunk as one idempotent task; a lost worker's chunk is computed again elsewhere."""
    import dask
    from distributed import Client, as_completed

    # a chunk is blamed only after many deaths: workers are pre-empted more often than chunks are poisonous
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 20}),
        _cluster(scheduler) as address,
        Client(address, timeout="60s", set_as_default=False) as client,
    ):
        _say_who_works(client, scheduler)
        futures = {client.submit(_compute_one, job, store, c, pure=False, retries=3): c for c in missing}
        for future in as_completed(futures, loop=client.loop):
            chunk = futures[future]
            report = future.result()
            if not store.path(chunk).exists():
                raise SemdictError(
                    f"a worker finished chunk {chunk.index}, but {store.path(chunk)} is not here: "
                    "scheduler, workers and this machine must share the project's folder"
                )
            advance(len(chunk), report["bad"])
            finished(chunk)


def _say_who_works(client: Any, scheduler: str) -> None:
    """Dask waits silently for workers that never come; say so."""
    workers = client.scheduler_info(n_workers=-1)["workers"]
    if workers:
        print(f"{len(workers)} Dask workers at {scheduler}", file=sys.stderr)
    else:
        print(f"no Dask worker at {scheduler} yet: waiting (start one: dask worker {scheduler})", file=sys.stderr)


@contextmanager
def _cluster(scheduler: str) -> Iterator[str]:
    """The address of a running scheduler, or of a local one with one process per GPU (or N processes)."""
    if not scheduler.startswith("local"):
        yield scheduler
        return
    from distributed import Nanny, Scheduler, SpecCluster

    gpus = _gpu_count()
    count = int(scheduler.partition("-")[2] or 0) or gpus or 1
    workers = {i: {"cls": Nanny, "options": _worker_options(i, gpus, count)} for i in range(count)}
    spec = {"cls": Scheduler, "options": {"dashboard": False, "host": "127.0.0.1"}}
    with SpecCluster(workers=workers, scheduler=spec, silence_logs=40) as cluster:
        yield cluster.scheduler_address


def _worker_options(index: int, gpus: int, count: int) -> dict:
    """One thread per process; each process sees one GPU, set before it can import torch."""
    threads = str(max(1, (os.cpu_count() or 1) // count))
    env = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    if gpus:
        env["CUDA_VISIBLE_DEVICES"] = str(index % gpus)
    return {"nthreads": 1, "env": env, "host": "127.0.0.1"}


def _gpu_count() -> int:
    """GPUs that this process may use."""
    import torch

    return torch.cuda.device_count()

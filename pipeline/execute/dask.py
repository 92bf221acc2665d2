"""Chunks on Dask workers: processes of this machine, or a cluster that is running. The only file that knows Dask."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import dask
import numpy as np
from distributed import Client, Nanny, Scheduler, SpecCluster, as_completed

from semdict.pipeline.common.errors import SemdictError
from semdict.pipeline.execute.processes import cores, local_processes, visible_gpus
from semdict.pipeline.execute.store import Advance, Chunk, ChunkStore, Finished, Job, Worker

ALLOWED_FAILURES = 20  # worker deaths until a chunk is blamed: workers are pre-empted more often than chunks kill them
STARTS = 3  # attempts to start the local workers


@dataclass(frozen=True)
class DaskExecutor:
    """scheduler: "local" (one process per GPU), "local-N" (N processes), or the address of a running scheduler."""

    scheduler: str

    def __call__(self, job: Job, store: ChunkStore, missing: list[Chunk], advance: Advance, finished: Finished) -> None:
        """Submit every missing chunk as one idempotent task; a lost worker's chunk is computed again elsewhere."""
        with (
            dask.config.set({"distributed.scheduler.allowed-failures": ALLOWED_FAILURES}),
            _cluster(self.scheduler) as address,
            Client(address, timeout="60s", set_as_default=False) as client,
        ):
            _log_workers(client, self.scheduler)
            futures = {client.submit(compute_chunk, job, store, c, pure=False, retries=3): c for c in missing}
            for future in as_completed(futures, loop=client.loop):
                chunk = futures[future]
                future.result()
                arrays = store.read_if_done(chunk)
                if arrays is None:
                    raise SemdictError(
                        f"a worker finished chunk {chunk.index}, but {store.path(chunk)} is not here or damaged: "
                        "scheduler, workers and this machine must share the project's folder"
                    )
                advance(len(chunk), int(np.count_nonzero(arrays.get("status", ()))))
                finished(chunk, arrays)


_opened: list[tuple[Job, Worker]] = []  # at most one loaded worker per process: tasks are many, models are heavy


def compute_chunk(job: Job, store: ChunkStore, chunk: Chunk) -> None:
    """A Dask task: compute one chunk and write it, unless it is done."""
    if store.read_if_done(chunk) is not None:
        return
    if not _opened or _opened[0][0] != job:
        _opened[:] = [(job, job.open())]
    for part, arrays in _opened[0][1].process([chunk], lambda *_: None):
        store.write(part, arrays)


def _log_workers(client: Client, scheduler: str) -> None:
    """Log the Dask workers, or that there are none yet: Dask itself waits silently."""
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
    with _start_local(local_processes(scheduler)) as cluster:
        yield cluster.scheduler_address


def _start_local(count: int) -> SpecCluster:
    """A scheduler and `count` worker processes; started anew where a worker dies while it starts."""
    gpus = visible_gpus()
    spec = {"cls": Scheduler, "options": {"dashboard": False, "dashboard_address": "127.0.0.1:0", "host": "127.0.0.1"}}
    for attempt in range(1, STARTS + 1):
        workers = {i: {"cls": Nanny, "options": worker_options(i, gpus, count)} for i in range(count)}
        try:
            return SpecCluster(workers=workers, scheduler=spec, silence_logs=40)
        except RuntimeError as error:
            if attempt == STARTS:
                raise SemdictError(f"{count} local Dask workers did not start: {error}") from None
            print(f"a local Dask worker died while it started ({error}); starting anew", file=sys.stderr)
    raise AssertionError("unreachable")


def worker_options(index: int, gpus: list[str], count: int) -> dict[str, Any]:
    """Options of one Nanny: one thread per process; each process sees one of `gpus`, set before it imports torch."""
    threads = str(max(1, cores() // count))
    env = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    if gpus:
        env["CUDA_VISIBLE_DEVICES"] = gpus[index % len(gpus)]
    return {"nthreads": 1, "env": env, "host": "127.0.0.1"}
